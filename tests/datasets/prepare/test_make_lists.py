"""Lists made from image folders, and lists converted from other releases."""

import errno
import itertools
import os
import shutil
from dataclasses import replace

import pytest

from datasets.lists import normalise_class_name, open_benchmark, read_class_names, write_list
from datasets.prepare import __main__ as prepare
from datasets.prepare.check import check_benchmark, check_result_to_json, label_order, print_check_result
from datasets.prepare.make_lists import lists_from_images
from datasets.protocols import LABEL_ORDERS, PROTOCOLS
from utils.cli import InputError

SIZES = {"sketchy": (100, 25), "sketchy_split": (104, 21), "tuberlin": (220, 30), "quickdraw": (80, 30)}


def lay_out(root, protocol, count=3, layout=0):
    """Make `count` empty files of every class in each image folder of `protocol`; returns {kind: {class: paths}}."""
    files = {"sketch": {}, "photo": {}}
    for kind, sources in (("sketch", protocol.sketch_folders), ("photo", protocol.photo_folders)):
        for alternatives in sources:
            source = alternatives[min(layout, len(alternatives) - 1)]
            for name in protocol.seen_names + protocol.unseen_names:
                folder = root / source / name
                folder.mkdir(parents=True)
                for number in range(count):
                    (folder / f"n0{number} é.png").touch()
                    files[kind].setdefault(name, set()).add(f"{source}/{name}/n0{number} é.png")
    return files


def rows(path):
    """{path: label} of a list."""
    pairs = [line.rsplit(" ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(dict(pairs)) == len(pairs)
    return {name: int(label) for name, label in pairs}


def make(root, *options):
    prepare.main(["lists", str(root), *map(str, options)])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_class_tables(name):
    protocol = PROTOCOLS[name]
    classes = protocol.seen_names + protocol.unseen_names
    assert (protocol.seen_classes, protocol.unseen_classes) == SIZES[name]
    assert len(set(map(normalise_class_name, classes))) == len(classes)  # no two classes have a spelling in common
    assert all(each and "," not in each and "\n" not in each for each in classes)


def test_both_splits_of_sketchy_are_of_the_same_classes():
    one, other = (PROTOCOLS[name].seen_names + PROTOCOLS[name].unseen_names for name in ("sketchy", "sketchy_split"))
    assert sorted(one) == sorted(other)


@pytest.mark.parametrize(("name", "layout"), [*itertools.product(PROTOCOLS, [0]), ("sketchy", 2), ("tuberlin", 1)])
def test_every_image_is_in_one_list_with_the_label_of_its_class(tmp_path, name, layout):
    protocol = PROTOCOLS[name]
    files = lay_out(tmp_path, protocol, layout=layout)
    make(tmp_path, "--protocol", name, "--held_back", 1)
    folder = tmp_path / protocol.zero_version
    assert read_class_names(folder / "cname_cid.txt") == list(protocol.seen_names)
    assert read_class_names(folder / "cname_cid_zero.txt") == list(protocol.unseen_names)

    def expected(kind, classes):
        return {path: label for label, each in enumerate(classes) for path in files[kind][each]}

    def written(kind, split):
        return rows(folder / protocol.list_names(kind, split)[0])

    for kind in files:
        assert written(kind, "zero") == expected(kind, protocol.unseen_names)
    assert written("photo", "train") == expected("photo", protocol.seen_names)
    train, test = written("sketch", "train"), written("sketch", "test")
    assert sorted(test.values()) == list(range(protocol.seen_classes)) and not train.keys() & test.keys()
    assert train | test == expected("sketch", protocol.seen_names)


def test_the_seed_chooses_what_is_held_back(tmp_path):
    protocol = PROTOCOLS["tuberlin"]
    lay_out(tmp_path, protocol, count=6)
    name = protocol.list_names("sketch", "test")[0]
    chosen = [lists_from_images(protocol, tmp_path, 2, seed)[0][name] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    places = {path.rsplit("/", 1)[1] for path, _ in chosen[0]}
    assert len(places) == 6  # each class holds back others
    lists, notes = lists_from_images(protocol, tmp_path, 0)
    assert name not in lists and not notes


@pytest.fixture
def quickdraw(tmp_path):
    """Image folders in the layout of QuickDraw, with one sketch and one photo of each class."""
    lay_out(tmp_path, PROTOCOLS["quickdraw"], count=1)
    return tmp_path


def test_other_spellings_are_taken_and_told(quickdraw, capsys):
    (quickdraw / "images/hot-air_balloon").rename(quickdraw / "images/Hot Air Balloon")
    make(quickdraw, "--protocol", "quickdraw")
    assert "images/Hot Air Balloon: taken for the class 'hot-air_balloon'" in capsys.readouterr().err
    label = PROTOCOLS["quickdraw"].seen_names.index("hot-air_balloon")
    photos = rows(quickdraw / "zeroshot/all_photo_filelist_train.txt")
    assert photos["images/Hot Air Balloon/n00 é.png"] == label


def test_what_is_no_image_is_left_out_and_told(quickdraw, capsys):
    (quickdraw / "images/._bat").mkdir()
    (quickdraw / "images/bat/._1.jpg").touch()
    (quickdraw / "images/bat/Thumbs.db").touch()
    (quickdraw / "images/bat/folder.png").mkdir()
    (quickdraw / "images/bat/upper.JPG").touch()
    (quickdraw / "images/zeppelin").mkdir()
    (quickdraw / "images/bat/loop.png").symlink_to("loop.png")
    (quickdraw / "images/loop").symlink_to("loop")
    make(quickdraw, "--protocol", "quickdraw")
    printed = capsys.readouterr().err
    assert "images/bat: 3 files are no images, first 'Thumbs.db': left out" in printed
    assert "images: 1 folders are no class of this protocol, first 'zeppelin': left out" in printed
    bats = [path for path in rows(quickdraw / "zeroshot/all_photo_filelist_zero.txt") if "/bat/" in path]
    assert bats == ["images/bat/n00 é.png", "images/bat/upper.JPG"]


def test_links_are_told(quickdraw, tmp_path_factory, capsys):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(quickdraw / "images/bat", elsewhere / "bat")
    (quickdraw / "images/bat").symlink_to(elsewhere / "bat")
    (quickdraw / "images/cow/2.jpg").symlink_to(elsewhere / "bat/n00 é.png")
    make(quickdraw, "--protocol", "quickdraw")
    printed = capsys.readouterr().err
    assert f"images/bat: a link to {elsewhere / 'bat'}" in printed and "images/cow/2.jpg: a link to" in printed


def _missing(root):
    shutil.move(root / "images/bat", root / "images/batt")


def _two(root):
    (root / "images/Fire Hydrant").mkdir()


def _empty(root):
    (root / "images/bat/n00 é.png").unlink()


def _name(root):
    (root / "images/bat/one\rtwo.png").touch()


def _half(root):
    shutil.rmtree(root / "images")


def _loop(path):
    shutil.rmtree(path)
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda root: _loop(root / "images"), r"/images: cannot be read \(Too many levels of symbolic links\)"),
        (lambda root: _loop(root / "images/bat"), r"images/bat: cannot be read \(Too many levels of symbolic links\)"),
        (_missing, r"images: 1 of 110 classes are missing, first 'bat'; rename 'batt' if that is it"),
        (_two, r"'Fire Hydrant' and 'fire_hydrant' are both the class 'fire_hydrant'; merge them"),
        (_empty, r"images/bat: holds no image; unpack the data again"),
        (_name, r"images/bat: no list can hold the name 'one\\rtwo\.png'; rename it"),
        (lambda root: (root / "images/bat").rename(root / "images/b\nat"), r"can hold the name 'b\\nat'; rename it"),
        (_half, r"no folder images; unpack the data there"),
    ],
)
def test_bad_folders_are_named_and_nothing_is_written(quickdraw, plant, words):
    plant(quickdraw)
    with pytest.raises(InputError, match=words):
        lists_from_images(PROTOCOLS["quickdraw"], quickdraw, 0)
    with pytest.raises(SystemExit):
        make(quickdraw, "--protocol", "quickdraw")
    assert not (quickdraw / "zeroshot").exists()


def test_too_few_sketches_to_hold_back(quickdraw, fails):
    assert "'teapot' has 1 sketches, too few to hold back 1" in fails(
        prepare.main, "lists", quickdraw, "--protocol", "quickdraw", "--held_back", 1
    )


def test_lists_are_replaced_only_by_force(quickdraw, fails):
    command = prepare.main, "lists", quickdraw, "--protocol", "quickdraw"
    make(*command[2:])
    photos = quickdraw / "zeroshot/all_photo_filelist_zero.txt"
    before = photos.read_bytes()
    make(*command[2:])  # writing the same lists again needs no --force
    photos.write_text("mine/1.png 0\n")
    others = {path: path.read_bytes() for path in photos.parent.iterdir()}
    assert f"{photos}: exists with other content; replace it with --force" in fails(*command)
    assert others == {path: path.read_bytes() for path in photos.parent.iterdir()}
    make(*command[2:], "--force")
    assert photos.read_bytes() == before


def test_a_full_disk_changes_no_list(quickdraw, fails, monkeypatch):
    make(quickdraw, "--protocol", "quickdraw")
    folder = quickdraw / "zeroshot"
    for path in folder.glob("*filelist*"):
        path.write_text("mine/1.png 0\n")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    plain, calls = os.fsync, []

    def full_at_the_third_file(file):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(file)

    monkeypatch.setattr(os, "fsync", full_at_the_third_file)
    message = fails(prepare.main, "lists", quickdraw, "--protocol", "quickdraw", "--force")
    assert "cannot be written (No space left on device)" in message
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_in_the_place_of_a_list_is_told_before_any_list_changes(quickdraw, fails):
    (quickdraw / "zeroshot/cname_cid_zero.txt").mkdir(parents=True)
    message = fails(prepare.main, "lists", quickdraw, "--protocol", "quickdraw", "--force")
    assert "cname_cid_zero.txt: is a folder where a list belongs" in message
    assert len(list((quickdraw / "zeroshot").iterdir())) == 1


@pytest.mark.parametrize("option", ["--seed", "--held_back"])
def test_options_that_convert_would_ignore_are_refused(quickdraw, fails, option):
    command = "lists", quickdraw, "--protocol", "quickdraw", "--convert", "zeroshot", option, 0
    assert "leave out --held_back and --seed" in fails(prepare.main, *command)


def test_an_old_validation_list_is_not_left_beside_lists_that_hold_nothing_back(tmp_path, fails):
    lay_out(tmp_path, PROTOCOLS["tuberlin"], count=2)
    make(tmp_path, "--protocol", "tuberlin", "--held_back", 1)
    train = tmp_path / "zeroshot/png_ready_filelist_train.txt"
    before = train.read_bytes()
    message = fails(prepare.main, "lists", tmp_path, "--protocol", "tuberlin", "--held_back", 0, "--force")
    assert "png_ready_filelist_test.txt: exists, but nothing is held back; move it away" in message
    assert train.read_bytes() == before


def test_published_lists_under_another_name_are_not_put_aside(quickdraw, fails):
    (quickdraw / "zeroshot").mkdir()
    (quickdraw / "zeroshot/sketch_zero.txt").write_text("sketches/bat/1.png 0\n")
    message = fails(prepare.main, "lists", quickdraw, "--protocol", "quickdraw")
    assert "sketch_zero.txt: exists and would no longer be read" in message
    assert len(list((quickdraw / "zeroshot").iterdir())) == 1


def test_root_is_a_file(tmp_path, fails):
    (tmp_path / "data.zip").touch()
    assert "data.zip: is a file" in fails(prepare.main, "lists", tmp_path / "data.zip", "--protocol", "tuberlin")


def test_a_split_of_another_release_is_converted_and_its_held_back_sketches_are_found(tmp_path, capsys, fails):
    protocol = PROTOCOLS["sketchy_split"]
    lay_out(tmp_path, protocol)
    make(tmp_path, "--protocol", "sketchy_split", "--held_back", 1)
    (tmp_path / "zeroshot2").rename(tmp_path / "zeroshot0")
    held_back = tmp_path / "zeroshot0" / protocol.list_names("sketch", "test")[0]
    expected = rows(held_back)
    held_back.unlink()
    capsys.readouterr()
    make(tmp_path, "--protocol", "sketchy_split", "--convert", "zeroshot0")
    assert "the validation list is the 104 sketches of seen classes" in capsys.readouterr().err
    converted = tmp_path / "zeroshot2"
    assert rows(converted / held_back.name) == expected
    for path in (tmp_path / "zeroshot0").iterdir():
        assert path.read_bytes() == (converted / path.name).read_bytes()
    wrong = "lists", tmp_path, "--protocol", "sketchy", "--convert", "zeroshot0"
    assert "cname_cid.txt: not the classes of Sketchy Ext; choose another" in fails(prepare.main, *wrong)


def test_lists_of_the_authors_next_release_are_converted_in_its_label_order(tmp_path, capsys):
    protocol = PROTOCOLS["sketchy_split"]
    lay_out(tmp_path, protocol, count=2)
    seen, unseen = LABEL_ORDERS["the authors' next release (CMCA)"]
    lists_in_its_order, _ = lists_from_images(replace(protocol, seen_names=seen, unseen_names=unseen), tmp_path, 1)
    for name, of in lists_in_its_order.items():
        write_list(tmp_path / "cmca" / name, of)
    make(tmp_path, "--protocol", "sketchy_split", "--convert", "cmca")
    for path in (tmp_path / "cmca").iterdir():
        assert path.read_bytes() == (tmp_path / "zeroshot2" / path.name).read_bytes()
    assert len(rows(tmp_path / "zeroshot2" / protocol.list_names("sketch", "test")[0])) == 104
    capsys.readouterr()
    checked = check_benchmark(tmp_path, "sketchy_split")
    print_check_result(checked)
    assert "label order: the authors' next release (CMCA)\n" in capsys.readouterr().out
    assert check_result_to_json(checked)["label order"] == "the authors' next release (CMCA)"
    assert [*checked.findings.faults] == ["mask"] and [*checked.findings.notes] == ["counts"]
    names = tmp_path / "zeroshot2/cname_cid_zero.txt"
    write_list(names, [(name, label) for label, name in enumerate(sorted(unseen, reverse=True))])
    assert label_order(open_benchmark("sketchy_split", tmp_path)) == "that of no known release"


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda root: None, "note: there is no validation list"),
        (lambda root: shutil.rmtree(root / "256x256/sketch"), "no folder 256x256/sketch/tx_000000000000_ready"),
        (
            lambda root: (
                (folder := next(root.glob("256x256/sketch/*/pig"))).joinpath("n00 é.png").rename(folder / "2.png")
            ),
            "1 images of sketch_tx_000000000000_ready_filelist_train.txt are not there",
        ),
    ],
)
def test_no_validation_list_is_made_up(tmp_path, capsys, plant, words):
    lay_out(tmp_path, PROTOCOLS["sketchy_split"], count=1)
    make(tmp_path, "--protocol", "sketchy_split", "--held_back", 0, "--zero_version", "zeroshot0")
    plant(tmp_path)
    make(tmp_path, "--protocol", "sketchy_split", "--convert", "zeroshot0")
    assert words in (printed := capsys.readouterr().err) and "--no_validation" in printed
    assert len(list((tmp_path / "zeroshot2").iterdir())) == 6


def test_other_names_of_lists_are_converted_in_place(quickdraw):
    make(quickdraw, "--protocol", "quickdraw")
    folder = quickdraw / "zeroshot"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in before:
        (folder / name).rename(folder / name.replace("_filelist", ""))
    make(quickdraw, "--protocol", "quickdraw", "--convert", "zeroshot")
    assert all((folder / name).read_bytes() == content for name, content in before.items())
