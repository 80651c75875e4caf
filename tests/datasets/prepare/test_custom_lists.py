"""Lists of a benchmark of one's own, made from any pair of folders of class folders."""

import pytest

from datasets.lists import open_benchmark
from datasets.prepare import __main__ as prepare
from datasets.prepare.check import check_benchmark

CLASSES = ["alarm clock", "Cat", "pickup_truck", "car (sedan)", "zebra"]


def lay_out(root, *folders, classes=CLASSES, count=3):
    for folder in folders:
        for name in classes:
            (root / folder / name).mkdir(parents=True)
            for number in range(count):
                (root / folder / name / f"{number} é.png").touch()


def make(root, *options):
    prepare.main(["lists", str(root), "--custom", *map(str, options)])
    assert not check_benchmark(root).findings.faults
    return open_benchmark("sketchy", root)


def paths(benchmark, kind, split):
    files, names = benchmark.read(kind, split), benchmark.names(split)
    return {path: names[label] for path, label in zip(files.paths, files.labels, strict=True)}


@pytest.mark.parametrize("named", [(), ("--sketches", "sketch/", "--photos", "./photo")])
def test_plain_folders_with_unseen_classes_by_name(tmp_path, named, capsys):
    lay_out(tmp_path, "sketch", "photo")
    lay_out(tmp_path, "sketch", classes=["only drawn"])
    (tmp_path / "unseen.txt").write_text("CAR-SEDAN\nzebra\n")
    benchmark = make(tmp_path, "--unseen", tmp_path / "unseen.txt", *named)
    assert "note: 1 classes have no sketches or no photos, first 'only drawn': left out" in capsys.readouterr().err
    assert benchmark.unseen_names == ["car (sedan)", "zebra"]
    assert benchmark.seen_names == ["Cat", "alarm clock", "pickup_truck"]
    for kind in ("sketch", "photo"):
        for split in ("train", "zero"):
            assert paths(benchmark, kind, split) == {
                f"{kind}/{name}/{number} é.png": name for name in benchmark.names(split) for number in range(3)
            }
    assert not benchmark.path("sketch", "test").exists() and benchmark.title == tmp_path.name


def test_class_names_with_labels_are_read(tmp_path):
    lay_out(tmp_path, "sketch", "photo")
    (tmp_path / "cname_cid_zero.txt").write_text("zebra 1\nCat 0\n")
    assert make(tmp_path, "--unseen", tmp_path / "cname_cid_zero.txt").unseen_names == ["Cat", "zebra"]


def test_a_seed_chooses_the_unseen_classes_and_the_sketches_that_are_held_back(tmp_path):
    lay_out(tmp_path, "drawings/all", "pictures", "more")
    folders = "--sketches", "drawings/all", "--photos", "pictures", "more"
    chosen = set()
    for seed in range(6):
        benchmark = make(tmp_path, *folders, "--unseen_classes", 2, "--seed", seed, "--held_back", 1, "--force")
        chosen.add(tuple(benchmark.unseen_names))
        assert len(benchmark.unseen_names) == 2 and len(benchmark.seen_names) == 3
    assert len(chosen) > 2
    assert len(benchmark.read("sketch", "test")) == 3 and len(benchmark.read("sketch", "train")) == 6
    photos = paths(benchmark, "photo", "zero")
    assert len(photos) == 12 and {path.split("/")[0] for path in photos} == {"pictures", "more"}


def test_train_and_val_folders_part_the_classes(tmp_path, fails):
    for part, classes in (("train", CLASSES[:3]), ("val", CLASSES[3:])):
        lay_out(tmp_path, f"{part}/sketch", f"{part}/photo", classes=classes)
    benchmark = make(tmp_path)
    assert benchmark.unseen_names == ["car (sedan)", "zebra"] and len(benchmark.seen_names) == 3
    assert set(paths(benchmark, "photo", "zero")) == {
        f"val/photo/{name}/{number} é.png" for name in CLASSES[3:] for number in range(3)
    }
    assert make(tmp_path, "--unseen_classes", 3, "--force").unseen_names != benchmark.unseen_names
    lay_out(tmp_path, "val/sketch", "val/photo", classes=["CAT"])
    message = fails(prepare.main, "lists", tmp_path, "--custom", "--force")
    assert "'Cat' is in train and in val, so these folders do not part the classes" in message
    benchmark = make(tmp_path, "--unseen_classes", 1, "--force")
    images = [path for split in ("train", "zero") for path in paths(benchmark, "photo", split)]
    assert sum("/Cat/" in path or "/CAT/" in path for path in images) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "choose the unseen classes by --unseen FILE or --unseen_classes N"),
        (("--unseen_classes", 5), "--unseen_classes 5: {root} has 5 classes; some must remain seen"),
        (("--unseen", "{root}/names"), "names: no file; name one of class names"),
        (("--unseen", "{root}/unknown"), "'zebras' is no class of {root} with sketches and photos; rename it"),
        (("--unseen", "{root}/all"), "5 of 5 classes are unseen; some must be, and not all"),
        (("--unseen", "{root}/all", "--unseen_classes", 2), "--unseen and --unseen_classes: use one of them"),
        (("--unseen_classes", 2, "--photos", "images"), "{root}/images: no such folder"),
        (("--unseen_classes", 2, "--photos", "{root}/photo"), "{root}/photo: is not inside {root}; lists name"),
        (("--unseen_classes", 2, "--photos", "photo/../../photo"), "../photo: is not inside {root}"),
        (("--unseen_classes", 2, "--held_back", 3), "has 3 sketches, too few to hold back 3"),
        (("--unseen_classes", 2, "--convert", "zeroshot0"), "--convert: is for the lists of a release"),
    ],
)  # fmt: skip
def test_wrong_options_end_in_one_line_and_write_nothing(tmp_path, fails, options, words):
    lay_out(tmp_path, "sketch", "photo")
    (tmp_path / "unknown").write_text("zebras\n")
    (tmp_path / "all").write_text("\n".join(CLASSES))
    options = [str(option).format(root=tmp_path) for option in options]
    assert words.format(root=tmp_path) in fails(prepare.main, "lists", tmp_path, "--custom", *options)
    assert not (tmp_path / "zeroshot1").exists()


def test_folders_that_cannot_be_used(tmp_path, fails):
    command = prepare.main, "lists", tmp_path, "--custom", "--unseen_classes", 2
    assert "no folder sketch or train/sketch; name the folders of class folders with --sketches" in fails(*command)
    lay_out(tmp_path, "sketch")
    assert "no folder photo or train/photo; name the folders of class folders with --photos" in fails(*command)
    lay_out(tmp_path, "photo")
    (tmp_path / "photo/CAT").mkdir()
    assert "'CAT' and 'Cat' are one class; merge them" in fails(*command)
    (tmp_path / "photo/CAT").rename(tmp_path / "photo/dog")
    assert "photo/dog: holds no image" in fails(*command)
