"""Derived lists: seen classes held out as unseen ones, and photos of seen classes held back."""

import numpy as np
import pytest

from datasets.lists import open_benchmark, read_mask, write_list, write_mask
from datasets.prepare import __main__ as prepare
from datasets.prepare.check import check_benchmark
from datasets.protocols import PROTOCOLS, protocol_of

SEEN, UNSEEN = ["pig (animal)", "alarm clock", "cat", "door", "owl"], ["bell", "cow"]


def write_benchmark(root, protocol, validation=True, mask=True, photos=4):
    """Lists of 5 seen and 2 unseen classes, with empty image files, in the layout of a protocol."""
    lists, numbers = root / protocol.zero_version, {"train": 6, "test": 2, "zero": 3}
    for kind in ("sketch", "photo"):
        for split in ("train", "zero", *(["test"] if validation and kind == "sketch" else [])):
            rows = []
            for label, name in enumerate(UNSEEN if split == "zero" else SEEN):
                for number in range(photos if kind == "photo" else numbers[split]):
                    path = root / kind / name / f"{split} {number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
                    rows.append((path.relative_to(root), label))
            write_list(lists / protocol.list_names(kind, split)[0], rows)
    for file, names in (("cname_cid.txt", SEEN), ("cname_cid_zero.txt", UNSEEN)):
        write_list(lists / file, zip(names, range(len(names)), strict=True))
    if mask:
        write_mask(lists / "cid_mask.pickle", np.arange(5)[:, None] / 3 * np.ones(1000))


def derive(root, *options):
    prepare.main(["lists", str(root), *map(str, options)])


def images(benchmark, kind, *splits):
    """{class name: paths} in the lists of `splits`."""
    found = {}
    for split in splits:
        if benchmark.path(kind, split).is_file():
            files, names = benchmark.read(kind, split), benchmark.names(split)
            for path, label in zip(files.paths, files.labels, strict=True):
                found.setdefault(names[label], set()).add(path)
    return found


@pytest.mark.parametrize("name", PROTOCOLS)
def test_held_out_classes_are_the_unseen_ones_of_a_whole_benchmark(tmp_path, name, capsys):
    protocol = PROTOCOLS[name]
    write_benchmark(tmp_path, protocol, protocol.has_validation, protocol.has_mask)
    derive(tmp_path, "--protocol", name, "--hold_out_classes", 2, "--seed", 3)
    folder = f"{protocol.zero_version}_held_out_3"
    assert f"--data_root {tmp_path} --zero_version {folder}" in capsys.readouterr().out
    old, new = open_benchmark(name, tmp_path), open_benchmark(name, tmp_path, folder)
    assert len(new.unseen_names) == 2 and new.seen_names == [each for each in SEEN if each not in new.unseen_names]
    assert new.title.endswith(", 2 seen classes held out as unseen ones (seed 3)")
    for kind in ("sketch", "photo"):
        before = images(old, kind, "train", "test")
        assert images(new, kind, "zero") == {each: before[each] for each in new.unseen_names}
        assert images(new, kind, "train", "test") == {each: before[each] for each in new.seen_names}
    if protocol.has_validation:
        assert images(new, "sketch", "test") == {
            each: of for each, of in images(old, "sketch", "test").items() if each in new.seen_names
        }
    if protocol.has_mask:
        expected = old.read_mask()[[SEEN.index(each) for each in new.seen_names]]
        assert np.array_equal(new.read_mask(), expected)
    assert not set(UNSEEN) & {*new.seen_names, *new.unseen_names}
    written = b"".join(path.read_bytes() for path in new.lists.iterdir())
    assert not any(each.encode() in written for each in UNSEEN)
    for protocol_name in (None, name):  # --custom, --protocol
        assert not check_benchmark(tmp_path, protocol_name, folder).findings.faults
    assert protocol_of(name, folder) == name


def test_the_seed_chooses_classes_and_the_same_seed_the_same(tmp_path):
    write_benchmark(tmp_path, PROTOCOLS["tuberlin"])
    chosen = {}
    for seed in range(6):
        derive(tmp_path, "--custom", "--hold_out_classes", 3, "--seed", seed)
        chosen[seed] = (tmp_path / f"zeroshot_held_out_{seed}/cname_cid_zero.txt").read_text()
    assert len(set(chosen.values())) > 2
    before = {path.name: path.read_bytes() for path in (tmp_path / "zeroshot_held_out_0").iterdir()}
    derive(tmp_path, "--custom", "--zero_version", "zeroshot", "--hold_out_classes", 3, "--out", "again")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


@pytest.mark.parametrize(("amount", "count"), [("0.25", 1), ("0.5", 2), ("3", 3), ("0.01", 1)])
def test_photos_are_held_back_out_of_the_training_list(tmp_path, amount, count):
    write_benchmark(tmp_path, PROTOCOLS["tuberlin"])
    derive(tmp_path, "--protocol", "tuberlin", "--hold_out_photos", amount)
    old, new = open_benchmark("tuberlin", tmp_path), open_benchmark("tuberlin", tmp_path, "zeroshot_held_back_0")
    assert new.path("photo", "test").name == "ImageResized_ready_filelist_test.txt"
    held_back, train = images(new, "photo", "test"), images(new, "photo", "train")
    assert {name: len(paths) for name, paths in held_back.items()} == dict.fromkeys(SEEN, count)
    assert not any(held_back[name] & train[name] for name in SEEN)
    assert images(new, "photo", "train", "test") == images(old, "photo", "train")
    for kind, split in (("sketch", "train"), ("sketch", "test"), ("sketch", "zero"), ("photo", "zero")):
        assert images(new, kind, split) == images(old, kind, split)
    assert (new.seen_names, new.unseen_names) == (SEEN, UNSEEN) and "photos of each seen class held back" in new.title
    checked = check_benchmark(tmp_path, None, "zeroshot_held_back_0")
    assert not checked.findings.faults and checked.rows[4]["list"].endswith("_test.txt")


def test_sketches_are_held_back_where_a_benchmark_has_no_validation_list(tmp_path, fails):
    write_benchmark(tmp_path, PROTOCOLS["quickdraw"], validation=False, mask=False)
    options = "--custom", "--hold_out_classes", 2, "--hold_out_photos", 1, "--held_back", 2
    derive(tmp_path, *options)
    new = open_benchmark("quickdraw", tmp_path, "zeroshot_held_out_0")
    for kind, count in (("sketch", 2), ("photo", 1)):
        assert {name: len(paths) for name, paths in images(new, kind, "test").items()} == dict.fromkeys(
            new.seen_names, count
        )
    again = fails(prepare.main, "lists", tmp_path, *options, "--zero_version", "zeroshot_held_out_0", "--out", "b")
    assert "3 seen classes, and 2 or more must remain seen; hold out 1 or fewer" in again
    again = fails(prepare.main, "lists", tmp_path, *options[:1], *options[3:], "--zero_version", "zeroshot_held_out_0")
    assert "all_photo_filelist_test.txt: holds back photos already; leave out --hold_out_photos" in again


def test_lists_in_another_folder_get_links_to_the_images(tmp_path, fails, capsys):
    data, own = tmp_path / "data", tmp_path / "own"
    write_benchmark(data, PROTOCOLS["sketchy_split"])
    options = "--protocol", "sketchy_split", "--hold_out_classes", 2
    before = sorted(data.rglob("*"))
    derive(data, *options, "--out", own / "zeroshot2_mine")
    assert (own / "sketch").readlink() == data / "sketch" and (own / "photo").readlink() == data / "photo"
    assert not check_benchmark(own, None, "zeroshot2_mine").findings.faults
    assert sorted(data.rglob("*")) == before
    assert protocol_of("sketchy", "zeroshot2_mine") == "sketchy_split"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo").mkdir()
    message = fails(prepare.main, "lists", data, *options, "--out", tmp_path / "other/new")
    assert f"{tmp_path / 'other/photo'}: is not {data / 'photo'}" in message
    assert not (tmp_path / "other/new").exists()


def test_an_existing_folder_is_replaced_only_with_force_and_never_mixed(tmp_path, fails):
    write_benchmark(tmp_path, PROTOCOLS["sketchy"])
    options = "--protocol", "sketchy", "--hold_out_classes", 2
    derive(tmp_path, *options, "--hold_out_photos", 1)
    folder = tmp_path / "zeroshot1_held_out_0"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert f"{folder}: is there already" in fails(prepare.main, "lists", tmp_path, *options)
    message = fails(prepare.main, "lists", tmp_path, *options, "--force")
    assert "all_photo_filelist_test.txt: would remain beside lists that it does not fit" in message
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    derive(tmp_path, *options, "--hold_out_photos", 2, "--force")
    assert (folder / "all_photo_filelist_test.txt").read_bytes() != before["all_photo_filelist_test.txt"]
    for out in ("zeroshot1", tmp_path / "zeroshot1"):
        message = fails(prepare.main, "lists", tmp_path, *options, "--force", "--out", out)
        assert "is the folder that the new lists are made from" in message
    (tmp_path / "file").touch()
    assert "file: is no folder" in fails(prepare.main, "lists", tmp_path, *options, "--force", "--out", "file")
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/photo.jpg").touch()
    message = fails(prepare.main, "lists", tmp_path, *options, "--force", "--out", "holiday")
    assert "holiday: holds something else than lists" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hold_out_classes", "4"], "has 5 seen classes, and 2 or more must remain seen; hold out 3 or fewer"),
        (["--hold_out_classes", "1"], "'1' is not a whole number, 2 or more"),
        (["--hold_out_photos", "4"], "'pig (animal)' has 4 photos, too few to hold back 4; see --hold_out_photos"),
        (["--hold_out_photos", "0.999"], "'pig (animal)' has 4 photos, too few to hold back 4"),
        (["--hold_out_photos", "2.5"], "'2.5' is not a whole number from 1"),
        (["--hold_out_photos", "0"], "'0' is not a share below 1, or a whole number of photos"),
        (["--hold_out_photos", "nan"], "'nan' is not a share below 1, or a whole number of photos"),
        (["--hold_out_photos", "1", "--held_back", "1"], "holds back sketches already; leave out --held_back"),
        (["--hold_out_classes", "2", "--convert", "zeroshot0"], "--convert: is for the lists of a release"),
        (["--hold_out_classes", "2", "--unseen_classes", "2"], "--unseen_classes: is for lists of a benchmark of your"),
        (["--out", "new"], "--out: is for --hold_out_classes and --hold_out_photos"),
        (["--hold_out_classes", "2", "--zero_version", "zeroshot7"], "zeroshot7: no such folder of lists"),
        *(
            (
                ["--hold_out_classes", "2", "--force", "--out", out],
                f"--out {out}: does not end in the name of a new folder",
            )
            for out in ("..", ".", "/", "a/..")
        ),
    ],
)
def test_wrong_options_end_in_one_line_and_write_nothing(tmp_path, fails, options, words):
    write_benchmark(tmp_path, PROTOCOLS["sketchy"])
    before = sorted(tmp_path.rglob("*"))
    assert words in fails(prepare.main, "lists", tmp_path, "--protocol", "sketchy", *options)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_lists_and_a_class_without_photos(tmp_path, fails):
    options = "--custom", "--hold_out_classes", 3
    assert "no lists of unseen sketches and photos" in fails(prepare.main, "lists", tmp_path, *options)
    write_benchmark(tmp_path, PROTOCOLS["sketchy"])
    photos = tmp_path / "zeroshot1/all_photo_filelist_train.txt"
    photos.write_text("photo/alarm clock/train 0.png 1\n")
    assert "is to be held out and has no photos" in fails(prepare.main, "lists", tmp_path, *options)
    photos.unlink()
    assert "all_photo_filelist_train.txt: no such list" in fails(prepare.main, "lists", tmp_path, *options)


def test_a_mask_keeps_its_values_to_the_last_digit(tmp_path):
    write_benchmark(tmp_path, PROTOCOLS["sketchy"])
    derive(tmp_path, "--protocol", "sketchy", "--hold_out_photos", 1)
    names = ("zeroshot1/cid_mask.pickle", "zeroshot1_held_back_0/cid_mask.pickle")
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1
    assert read_mask(tmp_path / names[1], 5)[1, 0] == np.float32(1 / 3)
