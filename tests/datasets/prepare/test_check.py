"""Every planted fault is found, with file and line, and a correct benchmark has none."""

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.images import read_rgb
from datasets.lists import find_layout, read_mask, write_list, write_mask
from datasets.prepare import __main__ as prepare
from datasets.prepare import commands
from datasets.prepare.check import check_benchmark
from datasets.protocols import PROTOCOLS
from utils.cli import InputError

SEEN, UNSEEN = ["alarm clock", "cat"], ["bell", "cow"]
SKETCHES = "sketch_tx_000000000000_ready_filelist_{}.txt"


@pytest.fixture
def benchmark(tmp_path):
    """A correct benchmark of 2 seen and 2 unseen classes in the layout of Sketchy Ext, class by class."""
    root = tmp_path / "data"
    for kind, pattern, splits in (
        ("sketch", SKETCHES, ("train", "test", "zero")),
        ("photo", "all_photo_filelist_{}.txt", ("train", "zero")),
    ):
        for split in splits:
            rows = []
            for label, name in enumerate(UNSEEN if split == "zero" else SEEN):
                for number in range(2):
                    path = root / kind / name / f"{split}{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (40, 40), (60, 90 * number, 120)).save(path)
                    rows.append((path.relative_to(root), label))
            write_list(root / "zeroshot1" / pattern.format(split), rows)
    write_list(root / "zeroshot1/cname_cid.txt", zip(SEEN, (0, 1), strict=True))
    write_list(root / "zeroshot1/cname_cid_zero.txt", zip(UNSEEN, (0, 1), strict=True))
    write_mask(root / "zeroshot1/cid_mask.pickle", np.full((2, 1000), 0.25))
    return root


def findings(root, decode=True, **kwargs):
    """(faults, notes) of a check, each a list of lines."""
    checked = check_benchmark(root, decode=decode, **kwargs)
    kinds = checked.findings.faults, checked.findings.notes
    return ([line for lines in each.values() for line in lines] for each in kinds)


def edit(name, change):
    """A function that plants a fault: it changes the lines of a list."""

    def plant(root):
        path = root / "zeroshot1" / name
        lines = path.read_text().splitlines()
        path.write_text("".join(f"{line}\n" for line in change(lines)))

    return plant


def replaced(index, line):
    return lambda lines: [*lines[:index], line, *lines[index + 1 :]]


def loop(path):
    """Put a link to itself in the place of `path`."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(path)


def plant_outside_link(root):
    shutil.move(root / "photo/bell", root.parent / "bell")
    (root / "photo/bell").symlink_to(root.parent / "bell")


def test_a_sound_benchmark_has_no_fault(benchmark):
    faults, notes = findings(benchmark)
    assert faults == notes == []


PHOTOS, TRAIN, ZERO = "all_photo_filelist_zero.txt", SKETCHES.format("train"), SKETCHES.format("zero")

FAULTS = {
    "no list": (lambda root: (root / "zeroshot1" / PHOTOS).rename(root / "lost"), r"no lists of unseen sketches"),
    "no training list": (lambda root: (root / "zeroshot1" / TRAIN).unlink(), r"_train\.txt: no such list"),
    "empty list": (edit(TRAIN, lambda lines: []), r"_train\.txt: the list is empty"),
    "no label": (edit(PHOTOS, replaced(1, "photo/bell/zero1.png")), r"_zero\.txt:2: expected 'path label'"),
    "torn line": (edit(PHOTOS, replaced(1, "photo/b\0ell/zero1.png 0")), r"_zero\.txt:2: expected 'path label'"),
    "label too high": (edit(PHOTOS, replaced(3, "photo/cow/zero1.png 2")), r"_zero\.txt:4: label 2 is outside 0\.\.1"),
    "absolute path": (edit(PHOTOS, replaced(0, "/photo/bell/zero0.png 0")), r"_zero\.txt:1: .* leaves the data folder"),
    "Windows paths": (
        edit(PHOTOS, replaced(0, r"photo\bell\zero0.png 0")),
        r"_zero\.txt:1: no image .*, Windows paths:",
    ),
    "path out of root": (edit(PHOTOS, replaced(0, "../bell/zero0.png 0")), r"_zero\.txt:1: .* leaves the data folder"),
    "line twice": (
        edit(PHOTOS, lambda lines: [*lines, lines[0]]),
        r"_zero\.txt:5: 'photo/bell/zero0\.png' is in all_photo_filelist_zero\.txt:1 already; take one out",
    ),
    "line twice, spelled otherwise": (
        edit(PHOTOS, lambda lines: [*lines, f"./{lines[0]}"]),
        r"_zero\.txt:5: 'photo/bell/zero0\.png' is in all_photo_filelist_zero\.txt:1 already; take one out",
    ),
    "image in two lists": (
        edit(SKETCHES.format("test"), replaced(1, "sketch/alarm clock/train0.png 0")),
        r"_test\.txt:2: 'sketch/alarm clock/train0\.png' is in sketch_tx_\w+_train\.txt:1 already",
    ),
    "photo among sketches": (
        edit(ZERO, replaced(1, "photo/bell/zero1.png 0")),
        r"all_photo_filelist_zero\.txt:2: 'photo/bell/zero1\.png' is in sketch_\w+_zero\.txt:2 already",
    ),
    "label of another class": (
        edit(ZERO, replaced(2, "sketch/cow/zero0.png 0")),
        r"_zero\.txt:3: 'sketch/cow/zero0\.png' has the label 0, which is 'bell'",
    ),
    "seen class among the unseen": (
        edit(ZERO, replaced(1, "sketch/cat/zero1.png 0")),
        r"_zero\.txt:2: 'sketch/cat/zero1\.png' has the label 0, which is 'bell'",
    ),
    "class without images": (edit(PHOTOS, lambda lines: lines[:2]), r"all_photo_filelist_zero\.txt: no image of 'cow'"),
    "class name twice": (
        edit("cname_cid.txt", lambda lines: [*lines, "cat 2"]),
        r"cname_cid\.txt:3: the class 'cat' already has a label",
    ),
    "label twice": (edit("cname_cid.txt", replaced(1, "cat 0")), r"cname_cid\.txt:2: label 0 is already that of"),
    "label left out": (edit("cname_cid_zero.txt", replaced(1, "cow 2")), r"labels must be 0\.\.1, but 1 is missing"),
    "class in both halves": (edit("cname_cid_zero.txt", replaced(1, "cat 1")), r"'cat' is in cname_cid\.txt and in"),
    "class in both halves, spelled otherwise": (
        edit("cname_cid_zero.txt", replaced(1, "Alarm_Clock 1")),
        r"zeroshot1: 'alarm clock' is seen and 'Alarm_Clock' unseen: one class",
    ),
    "no class names": (lambda root: (root / "zeroshot1/cname_cid.txt").unlink(), r"cname_cid\.txt: no such list"),
    "image missing": (
        lambda root: (root / "photo/cow/zero1.png").unlink(),
        r"_zero\.txt:4: no image .*photo/cow/zero1\.png, others of its folder are there",
    ),
    "image spelled otherwise": (
        lambda root: (root / "photo/cow/zero1.png").rename(root / "photo/cow/Zero1.PNG"),
        r"_zero\.txt:4: no image .*photo/cow/zero1\.png, but 'Zero1\.PNG'; rename it",
    ),
    "folder missing": (
        lambda root: shutil.rmtree(root / "photo/cow"),
        r"_zero\.txt:3: no image .*photo/cow/zero0\.png, nor any other in that folder; unpack",
    ),
    "looping link to an image": (
        lambda root: loop(root / "photo/cow/zero1.png"),
        r"_zero\.txt:4: no image .*photo/cow/zero1\.png, only a link that leads to no file; correct the link",
    ),
    "folder that cannot be read": (
        lambda root: loop(root / "photo/cow"),
        r"_zero\.txt:3: no image .*photo/cow/zero0\.png, its folder cannot be read \(Too many levels of symbolic links",
    ),
    "torn image": (
        lambda root: (root / "photo/cow/zero1.png").write_bytes((root / "photo/cow/zero1.png").read_bytes()[:60]),
        r"_zero\.txt:4: .*photo/cow/zero1\.png: not a readable image",
    ),
    "empty image": (
        lambda root: (root / "sketch/cow/zero1.png").write_bytes(b""),
        r"_zero\.txt:4: .*sketch/cow/zero1\.png: not a readable image",
    ),
    "torn mask": (
        lambda root: (root / "zeroshot1/cid_mask.pickle").write_bytes(b"\x80\x02}"),
        r"cid_mask\.pickle: not a readable pickle .*fetch it again",
    ),
    "mask of other classes": (
        lambda root: write_mask(root / "zeroshot1/cid_mask.pickle", np.zeros((3, 1000))),
        r"cid_mask\.pickle: not a mask of the 2 classes",
    ),
    "mask of other length": (
        lambda root: write_mask(root / "zeroshot1/cid_mask.pickle", np.zeros((2, 999))),
        r"every class needs a vector of 1000 finite numbers",
    ),
    "not text": (
        lambda root: (root / "zeroshot1" / PHOTOS).write_bytes(b"\xff\xfe\x00"),
        r"_zero\.txt: cannot be read as text",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(benchmark, name):
    plant, words = FAULTS[name]
    plant(benchmark)
    faults, _ = findings(benchmark)
    assert any(re.search(words, line) for line in faults), faults


NOTES = {
    "Windows line ends": (
        lambda root: (root / "zeroshot1" / PHOTOS).write_text(
            (root / "zeroshot1" / PHOTOS).read_text(), newline="\r\n"
        ),
        r"_zero\.txt: has Windows line ends",
    ),
    "byte-order mark": (
        lambda root: (root / "zeroshot1" / PHOTOS).write_text(
            (root / "zeroshot1" / PHOTOS).read_text(), encoding="utf-8-sig"
        ),
        r"_zero\.txt: has a byte-order mark",
    ),
    "link out of the root": (plant_outside_link, r"photo/bell: leads out of the data folder, to .*/bell"),
    "no validation": (lambda root: (root / "zeroshot1" / SKETCHES.format("test")).unlink(), r"--no_validation"),
    "class not validated": (
        edit(SKETCHES.format("test"), lambda lines: lines[:2]),
        r"_test\.txt: no image of 'cat'",
    ),
    "no mask": (lambda root: (root / "zeroshot1/cid_mask.pickle").unlink(), r"no semantic mask; .* --no_mask"),
    "odd mask": (
        lambda root: write_mask(root / "zeroshot1/cid_mask.pickle", np.full((2, 1000), 0.7)),
        r"holds values such as 0\.7",
    ),
    "empty row of a mask": (
        lambda root: write_mask(root / "zeroshot1/cid_mask.pickle", np.eye(2, 1000)[[0, 0]] * [[0], [1]]),
        r"1 classes are like no ImageNet class, first 'alarm clock'",
    ),
    "small image": (
        lambda root: Image.new("L", (40, 9)).save(root / "photo/cow/zero1.png"),
        r"_zero\.txt:4: .*photo/cow/zero1\.png: only 40 x 9 pixels",
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_is_odd_is_noted_and_no_fault(benchmark, name):
    plant, words = NOTES[name]
    plant(benchmark)
    faults, notes = findings(benchmark)
    assert not faults and any(re.search(words, line) for line in notes), (faults, notes)


def test_a_looping_link_is_no_fault_of_the_images_beside_it(benchmark):
    loop(benchmark / "photo/cow/loop.png")
    assert [*findings(benchmark)] == [[], []]


@pytest.mark.parametrize(("at", "options", "words"), [
    ("zeroshot1", ["--custom"], r"\(.*/zeroshot1 cannot be read: Too many levels of symbolic links\)"),
    ("zeroshot1", ["--protocol", "sketchy"], r"/zeroshot1: cannot be read \(Too many levels"),
    (".", ["--protocol", "sketchy"], r"/data: cannot be read \(Too many levels"),
    ("zeroshot1/all_photo_filelist_zero.txt", ["--custom"], r"\(.*_zero\.txt cannot be read: Too many levels"),
    ("zeroshot1/" + SKETCHES.format("test"), ["--custom"], r"_test\.txt: cannot be read \(Too many levels"),
    ("zeroshot1/cid_mask.pickle", ["--custom"], r"cid_mask\.pickle: cannot be read \(Too many levels"),
])  # fmt: skip
def test_a_looping_link_is_not_taken_for_something_missing(benchmark, fails, capsys, at, options, words):
    loop(benchmark / at)
    with pytest.raises(SystemExit):
        prepare.main(["check", str(benchmark), *options])
    printed = "".join(capsys.readouterr())
    assert re.search(words, printed) and "no such" not in printed, printed


@pytest.fixture
def shut(benchmark):
    """shut(name, mode, ...) is (faults, notes) of a check with a folder of that mode, by someone who is not root."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "data"
        shutil.copytree(benchmark, root)
        (root / "a folder beside the data").mkdir()
        os.chmod(place, 0o755)
        findings(root)  # loads what only root may read, perhaps

        def check(name, mode, **options):
            with as_nobody(root):
                os.chmod(root / name, mode)
                try:
                    return findings(root, **options)
                finally:
                    os.chmod(root / name, 0o755)

        yield check


@contextlib.contextmanager
def as_nobody(root):
    """Within this block root is someone whom permissions stop, and owns `root` and all in it."""
    was_root = os.geteuid() == 0
    if was_root:
        for path in (root, *root.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)


NOBODY = 65534
of_posix = pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions are those of POSIX")


@of_posix
@pytest.mark.parametrize(("name", "mode", "options", "words"), [
    ("photo/cow", 0, {}, r"_zero\.txt:3: no image .*/cow/zero0\.png, its folder cannot be read \(Permission denied\)"),
    ("zeroshot1", 0, {}, r"\(.*/zeroshot1 cannot be read: Permission denied\)"),
    ("zeroshot1", 0, {"protocol_name": "sketchy"}, r"cname_cid\.txt: cannot be read \(Permission denied\)"),
    (".", 0o444, {}, r" cannot be read: Permission denied\)"),
    (".", 0, {"protocol_name": "sketchy"}, r"/zeroshot1: cannot be read \(Permission denied\)"),
])  # fmt: skip
def test_a_folder_that_is_shut_is_not_taken_for_a_missing_one(shut, name, mode, options, words):
    faults, _ = shut(name, mode, **options)
    assert re.search(words, "\n".join(faults)) and not any("no such" in line or "unpack" in line for line in faults)


@of_posix
def test_a_shut_folder_beside_the_data_is_no_fault(shut):
    assert [*shut("a folder beside the data", 0)] == [[], []]


def test_an_image_that_may_not_be_read_is_told_without_a_number(benchmark, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("PIL.Image.open", refuse)
    with pytest.raises(InputError, match=r"zero1\.png: Permission denied; change its permissions"):
        read_rgb(benchmark / "photo/cow/zero1.png")


def test_a_folder_that_may_not_be_read_is_told_without_a_number(benchmark, fails, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    message = fails(prepare.main, "check", benchmark, "--custom")
    assert message == f"error: {benchmark}: Permission denied; change its permissions, or choose another"


def test_large_images_are_noted_in_our_own_words(benchmark, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)  # Pillow warns of more pixels than these
    monkeypatch.setattr("datasets.prepare.check.MAX_AREA_PX", 1599)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        faults, notes = findings(benchmark)
    assert not faults and len(notes) == 20 and all("40 x 40 pixels, slow to decode" in note for note in notes)


def test_links_within_the_root_are_not_odd(benchmark):
    shutil.move(benchmark / "photo/bell", benchmark / "elsewhere")
    (benchmark / "photo/bell").symlink_to(benchmark / "elsewhere")
    assert [*findings(benchmark)] == [[], []]


def test_an_archive_beside_missing_images_is_pointed_at(benchmark):
    (benchmark / "photos.zip").touch()
    _, notes = findings(benchmark)
    assert not notes
    (benchmark / "photo/cow/zero1.png").unlink()
    _, notes = findings(benchmark)
    assert "photos.zip: an archive; images are missing, so unpack it again" in notes[0]


def test_a_protocol_asks_for_its_classes_its_mask_and_its_validation_list(benchmark):
    (benchmark / "zeroshot1/cid_mask.pickle").unlink()
    (benchmark / "zeroshot1" / SKETCHES.format("test")).unlink()
    faults, notes = findings(benchmark, protocol_name="sketchy")
    for words in (
        r"cname_cid\.txt: not the 100 classes of Sketchy Ext",
        r"no validation list",
        r"no semantic mask",
    ):
        assert any(re.search(words, line) for line in faults), faults
    assert any("4 images, published are 17,101" in line for line in notes)


def test_lists_of_another_protocol_are_recognised(benchmark):
    (benchmark / "zeroshot1").rename(benchmark / "zeroshot")
    faults, _ = findings(benchmark, protocol_name="tuberlin")
    assert any("all_photo_filelist_zero.txt is there, a list of Sketchy Ext" in line for line in faults)


def test_the_published_classes_in_another_order_are_noted(benchmark):
    protocol = PROTOCOLS["sketchy"]
    for name, classes in (("cname_cid.txt", protocol.seen_names[::-1]), ("cname_cid_zero.txt", protocol.unseen_names)):
        write_list(benchmark / "zeroshot1" / name, zip(classes, range(len(classes)), strict=True))
    _, notes = findings(benchmark, decode=False, protocol_name="sketchy")
    assert sum("another order or spelling" in line for line in notes) == 1


@pytest.mark.parametrize("name", ["missing", "a file"])
def test_a_root_that_is_no_folder(tmp_path, name, fails, capsys):
    if name == "a file":
        (tmp_path / name).touch()
    assert "not ready" in fails(prepare.main, "check", tmp_path / name, "--custom")
    with pytest.raises(SystemExit):
        prepare.main(["check", str(tmp_path / name), "--protocol", "sketchy"])
    assert f"fault: {tmp_path / name}: " in capsys.readouterr().out


def test_the_command_ends_with_0_only_where_all_is_well(benchmark, fails, capsys, tmp_path):
    prepare.main(["check", str(benchmark), "--custom", "--images", "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert "\nready\n" in printed
    assert re.search(r"^all_photo_filelist_train\.txt +4 +- +2 +0 +0$", printed, re.MULTILINE)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["faults"] == {} and found["rows"][0]["images"] == 4
    for number in range(5):
        with open(benchmark / "zeroshot1" / PHOTOS, "a") as file:
            file.write(f"photo/cow/{number}.png 1\n")
    assert "not ready, 5 faults" in fails(prepare.main, "check", benchmark, "--custom")
    assert "one of the arguments --protocol --custom is required" in fails(prepare.main, "check", benchmark)
    assert "not allowed with" in fails(prepare.main, "check", benchmark, "--custom", "--protocol", "sketchy")


def test_findings_replace_only_findings_and_the_target_is_checked_first(benchmark, tmp_path, fails, monkeypatch):
    mine, link, circle = tmp_path / "mine.txt", tmp_path / "link.json", tmp_path / "circle.json"
    mine.write_text("mine")
    circle.symlink_to(circle)
    command = prepare.main, "check", benchmark, "--custom", "--json"
    with monkeypatch.context() as patch:
        patch.setattr(commands, "check_benchmark", lambda *_: pytest.fail("checked the benchmark first"))
        for target in (tmp_path, os.devnull, circle):
            assert f"--json {target}: is not a file" in fails(*command, target)
        assert "mine.txt: holds something that this command did not write" in fails(*command, mine)
        assert "cannot be written" in fails(*command, mine / "found.json")
    link.symlink_to("found.json")
    for _ in range(2):  # the second time it replaces the findings of the first
        prepare.main([*map(str, command[1:]), str(link)])
    assert link.is_symlink() and json.loads((tmp_path / "found.json").read_text())["faults"] == {}
    assert mine.read_text() == "mine"


def test_a_root_may_have_a_name_that_the_terminal_cannot_show(benchmark, tmp_path, capfd):
    root = benchmark.rename(tmp_path / os.fsdecode(b"no utf-8: \xff"))
    with open(os.dup(1), "w", encoding="utf-8") as strict, contextlib.redirect_stdout(strict):
        prepare.main(["check", str(root), "--custom"])
    assert "no utf-8: \\udcff/zeroshot1" in capfd.readouterr().out


def test_few_faults_of_a_kind_are_printed_and_the_rest_counted(benchmark, capsys):
    with open(benchmark / "zeroshot1" / PHOTOS, "a") as file:
        file.write("".join(f"photo/cow/{number}.png 1\n" for number in range(5)))
    with pytest.raises(SystemExit):
        prepare.main(["check", str(benchmark), "--custom"])
    printed = capsys.readouterr().out
    assert printed.count("fault: ") == 3 and "and 2 more: missing images" in printed


def test_a_mask_is_written_for_every_python_and_numpy(tmp_path):
    write_mask(tmp_path / "mask.pickle", np.eye(3, 1000))
    content = (tmp_path / "mask.pickle").read_bytes()
    assert b"numpy._core" not in content and b"cnumpy.core.multiarray\n" in content and content[:2] == b"\x80\x02"
    loaded = pickle.loads(content)
    assert loaded.keys() == {0, 1, 2} and (np.stack(list(loaded.values())) == np.eye(3, 1000)).all()
    assert (read_mask(tmp_path / "mask.pickle", 3) == np.eye(3, 1000)).all()


def test_of_several_folders_of_lists_the_usual_one_is_found(benchmark, tmp_path):
    shutil.copytree(benchmark / "zeroshot1", benchmark / "another")
    assert find_layout(benchmark) == ("sketchy", "zeroshot1")
    assert find_layout(benchmark, "another") == ("sketchy", "another")
    shutil.rmtree(benchmark / "zeroshot1")
    assert find_layout(benchmark) == ("sketchy", "another")


def test_a_killed_process_is_told_in_one_line(benchmark, fails, monkeypatch):
    monkeypatch.setattr("datasets.prepare.check._size", _end)
    assert "was killed, perhaps for memory" in fails(prepare.main, "check", benchmark, "--custom", "--images")


def _end(_):
    os._exit(1)


def test_a_folder_without_training_lists_is_ready_for_tests_only(benchmark, capsys, fails):
    for name in (TRAIN, SKETCHES.format("test"), "all_photo_filelist_train.txt", "cid_mask.pickle"):
        (benchmark / "zeroshot1" / name).unlink()
    prepare.main(["check", str(benchmark), "--custom", "--test_only", "--images"])
    assert capsys.readouterr().out.endswith("ready for tests\n")
    assert "not ready" in fails(prepare.main, "check", benchmark, "--custom")
    (benchmark / "photo/bell/zero0.png").unlink()
    assert "not ready" in fails(prepare.main, "check", benchmark, "--custom", "--test_only")
