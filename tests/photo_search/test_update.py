"""An index does only what changed, whatever happens to its photos, its process and its files."""

import json
import os
import random
import shutil
import signal
import sys

import numpy as np
import pytest
from albums import FakeEncoder, update, write_album, write_photo

from photo_search import update as updates
from photo_search.cells import assign_codes, find_nearest
from photo_search.index import open_index
from photo_search.photos import read_photo, thumbnail
from utils.cli import InputError
from utils.files import folder_lock, open_regular


@pytest.fixture
def network():
    return FakeEncoder()


@pytest.fixture
def album(tmp_path):
    return write_album(tmp_path / "album")


@pytest.fixture
def index(tmp_path):
    return tmp_path / "index"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def photos_of(folder):
    """{path: (features, thumbnail)} of an index."""
    opened = open_index(folder)
    rows = range(len(opened))
    return {opened.path(row): (opened.features_of([row]).tobytes(), opened.thumbnail(row)) for row in rows}


def count(totals):
    return totals.new, totals.changed, totals.moved, totals.removed, len(totals.unreadable)


def test_an_index_holds_every_photo(album, index, network):
    totals = update(index, network, album)
    assert (totals.photos, count(totals), totals.extracted) == (12, (12, 0, 0, 0, 0), 12)
    held = photos_of(index)
    files = [album / f"{('', 'a/', 'b/c/')[n % 3]}{n}.png" for n in range(12)]
    assert sorted(held) == sorted(map(str, files))
    opened = open_index(index)
    paths = [opened.path(row) for row in range(12)]
    assert [paths[row] for row in np.argsort(opened.cells.path_order)] == sorted(held)
    for path in files:
        assert held[str(path)][1] == thumbnail(read_photo(path, 32))
        features = np.frombuffer(held[str(path)][0], np.float32)
        assert opened.path(find_nearest(opened.cells, features, 1, 0).rows[0]) == str(path)
    assert not list(index.glob(".*")) and not list(index.glob("unfinished*"))


def test_only_what_changed_is_done_again(album, index, network):
    update(index, network, album)
    before, network.seen = contents(index), 0
    assert count(update(index, network, album)) == (0, 0, 0, 0, 0)
    assert contents(index) == before and network.seen == 0
    os.utime(album / "0.png")  # touched: read, and found to be the same
    assert count(update(index, network, album)) == (0, 0, 0, 0, 0) and network.seen == 0
    (album / "a/1.png").rename(album / "moved.png")
    (album / "b/c").rename(album / "d")
    assert count(update(index, network, album)) == (0, 0, 5, 0, 0) and network.seen == 0
    write_photo(album / "0.png", 50)  # changed
    write_photo(album / "new.png", 51)
    shutil.copy(album / "3.png", album / "copy.png")
    (album / "6.png").unlink()
    (album / "9.png").write_text("torn")
    totals = update(index, network, album)
    assert count(totals) == (2, 1, 0, 2, 1) and network.seen == totals.extracted == 2  # the copy is known
    assert totals.unreadable == [f"{album}/9.png: not a readable image (a text)"]
    # It is tried each time, and costs no loading of the network.
    assert count(update(index, lambda: pytest.fail("the network was loaded"), album)) == (0, 0, 0, 0, 1)
    fresh = index.with_name("fresh")
    update(fresh, FakeEncoder(), album)
    assert photos_of(index) == photos_of(fresh)
    assert find_nearest(open_index(index).cells, network_feature(fresh, "0.png"), 12, 0).scores.tolist() == (
        find_nearest(open_index(fresh).cells, network_feature(fresh, "0.png"), 12, 0).scores.tolist()
    )


def network_feature(index, name):
    opened = open_index(index)
    return next(opened.cells.features[row] for row in range(len(opened)) if opened.path(row).endswith(name))


def test_names_of_any_bytes_come_back(tmp_path, index, network):
    names = [b"\xff\xfe.png", "雪.png".encode(), b"new\nline.png"]
    for number, name in enumerate(names):
        write_photo(tmp_path / "odd" / os.fsdecode(name), number)
    update(index, network, tmp_path / "odd", batch_size=1)
    opened = open_index(index)
    assert sorted(os.fsencode(os.path.basename(opened.path(row))) for row in range(3)) == sorted(names)
    assert count(update(index, network, tmp_path / "odd")) == (0, 0, 0, 0, 0) and network.seen == 3


def test_folders_that_are_no_longer_named_leave_the_index(album, index, network):
    update(index, network, album)
    totals = update(index, network, album / "a", album / "b", exclude=["11.png"])
    assert totals.photos == 7 and totals.removed == 5 and network.seen == 12


def test_photos_of_a_disk_that_is_away_stay(album, tmp_path, index, network, capsys):
    other = write_album(tmp_path / "other", 3)
    update(index, network, album, other)
    before = photos_of(index)
    album.rename(tmp_path / "away")
    assert count(update(index, network, album, other)) == (0, 0, 0, 0, 0)
    said = f"note: {album}: cannot be listed (No such file or directory); the index keeps its 12 photos, "
    assert capsys.readouterr().err == f"{said}and --remove {album} removes them\n"
    album.mkdir()
    write_photo(other / "new.png", 60)
    assert count(update(index, network, album, other)) == (1, 0, 0, 0, 0)
    assert f"{album}: contains no photos any more; the index keeps its 12 photos" in capsys.readouterr().err
    assert before.items() < photos_of(index).items()
    album.rmdir()
    with pytest.raises(InputError, match="album: cannot be searched"):
        update(index, network, album, other, only=True)
    update(index, network, other)  # --remove
    assert len(photos_of(index)) == 4


@pytest.mark.parametrize("change", ["replaced", "written"])
def test_a_photo_that_changes_while_it_is_read_has_the_features_of_its_content(
    change, album, tmp_path, index, monkeypatch
):
    content = write_photo(tmp_path / "other.png", 99).read_bytes()
    update(tmp_path / "expected", FakeEncoder(), album)
    before = photos_of(tmp_path / "expected")[str(album / "0.png")]

    def changing(path, *options, **named):
        image = read_photo(path, *options, **named)
        if path == str(album / "0.png") and (tmp_path / "other.png").exists():
            if change == "written":
                (album / "0.png").write_bytes(content)
                os.utime(album / "0.png", ns=(5, 5))
                (tmp_path / "other.png").unlink()
            else:
                (tmp_path / "other.png").replace(album / "0.png")
        return image

    monkeypatch.setattr("photo_search.encoder.read_photo", changing)
    update(index, FakeEncoder(), album)
    after = photos_of(index)[str(album / "0.png")]
    assert (after == before) == (change == "replaced")
    update(index, FakeEncoder(), album)
    update(tmp_path / "new", FakeEncoder(), album)
    assert photos_of(index) == photos_of(tmp_path / "new") and photos_of(index)[str(album / "0.png")] != before


def test_an_endless_file_is_not_read(album, index, network, monkeypatch):
    with open(album / "0.png", "ab") as file:
        file.truncate(1 << 40)
    assert update(index, network, album).unreadable == [f"{album}/0.png: larger than 4 GiB"]


@pytest.mark.parametrize("is_mount", [False, True])
def test_a_disk_that_goes_while_photos_are_read_takes_none_of_them(is_mount, album, tmp_path, index, capsys):
    class Unmounting(FakeEncoder):
        def embed(self, images):
            if self.seen == 12:
                album.rename(tmp_path / "away")
                if is_mount:
                    album.mkdir()
            return super().embed(images)

    network = Unmounting()
    update(index, network, album)
    before = photos_of(index)
    for path in album.glob("**/*.png"):
        write_photo(path, 50 + int(path.stem))
    assert count(update(index, network, album)) == (0, 0, 0, 0, 0) and photos_of(index) == before
    assert (
        "note: files have gone while they were read (7); their folders are searched again\n" in capsys.readouterr().err
    )
    shutil.rmtree(album, ignore_errors=True)
    (tmp_path / "away").rename(album)
    assert count(update(index, network, album)) == (0, 12, 0, 0, 0)


def test_photos_of_a_folder_that_cannot_be_listed_stay(album, index, network, capsys, monkeypatch):
    update(index, network, album)
    before, scandir = photos_of(index), os.scandir

    def refuse(path):
        if str(path) in (str(album / "a"), str(album / "b")):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    totals = update(index, network, album)
    assert totals.removed == 0 and photos_of(index) == before
    assert f"note: {album}/a: cannot be listed (Permission denied); the index keeps its 4" in capsys.readouterr().err
    assert update(index, network, album, exclude=["a"]).removed == 4 and len(photos_of(index)) == 8


def test_photos_stay_that_cannot_be_read_any_more(album, index, network, capsys, monkeypatch):
    for number in range(8):  # more than half of the index
        (album / f"{('', 'a/', 'b/c/')[number % 3]}{number}.png").rename(album / f"{number}.heic")
    monkeypatch.setattr("photo_search.photos.suffixes_of_formats", lambda: {".png": "PNG", ".heic": "HEIF"})
    update(index, network, album)
    before = photos_of(index)
    monkeypatch.setattr("photo_search.photos.suffixes_of_formats", lambda: {".png": "PNG"})
    (album / "new.heic").write_bytes(b"new")
    for options in ({}, {"only": True}):
        totals = update(index, network, album, **options)
        assert count(totals) == (0, 0, 0, 0, 0) and photos_of(index) == before
        assert totals.unread == [str(album / "new.heic")]
        note = "note: 8 .heic photos cannot be read any more (pip install pillow-heif); the index keeps them\n"
        assert capsys.readouterr().err == note
    (album / "0.heic").unlink()
    (album / "9.png").unlink()
    assert update(index, network, album).removed == 2 and len(photos_of(index)) == 10


def test_what_a_disk_or_a_permission_did_is_not_remembered(album, index, network, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    def refused(path, *_, **__):
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr("photo_search.encoder.read_photo", refused)
    monkeypatch.setattr(updates, "_rows_of_readable", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update(index, network, album)
    monkeypatch.undo()
    assert count(update(index, network, album)) == (12, 0, 0, 0, 0)


def test_changed_photos_that_cannot_be_opened_stay_as_they_were(album, index, network, monkeypatch, capsys):
    update(index, network, album)
    before = photos_of(index)
    for name in ("0.png", "3.png"):
        write_photo(album / name, 70)

    def opened(path, *more):
        if str(path).endswith("/0.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return open_regular(path, *more)

    for module in ("photo_search.encoder", "photo_search.retention", "utils.files"):
        monkeypatch.setattr(f"{module}.open_regular", opened)
    assert count(update(index, network, album)) == (0, 1, 0, 0, 0)
    note = "note: 1 changed photo cannot be opened (Permission denied); the index keeps what was there\n"
    assert capsys.readouterr().err == note and before[str(album / "0.png")] == photos_of(index)[str(album / "0.png")]
    monkeypatch.undo()
    assert count(update(index, network, album)) == (0, 1, 0, 0, 0)


def test_more_than_half_of_the_photos_are_removed_only_if_the_user_says_so(album, index, network, capsys):
    update(index, network, album)
    before = photos_of(index)
    for path in [*album.glob("a/*"), *album.glob("*.png")][:7]:
        path.unlink()
    assert update(index, network, album).removed == 0 and photos_of(index) == before
    note = "note: 7 of 12 photos are not found any more; they stay in the index, and index --only removes them\n"
    assert capsys.readouterr().err == note
    assert update(index, network, album, only=True).removed == 7 and len(photos_of(index)) == 5


def test_the_default_number_of_clusters_grows_with_the_photos_up_to_a_limit():
    assert [updates.default_clusters(photos) for photos in (1, 200, 625, 2_500, 10**6)] == [2, 8, 25, 100, 100]


def test_clusters_stay_until_they_are_fitted_anew(album, index, network, monkeypatch):
    monkeypatch.setattr(updates, "MIN_PHOTOS_FOR_CLUSTERS", 60)
    write_album(album, 59)
    update(index, network, album)
    assert not open_index(index).clusters
    write_album(album, 60)
    update(index, network, album)
    opened = open_index(index)
    assert opened.clusters == (2, updates.default_clusters(60)) == (2, 2) and opened.share_new == 0
    write_album(album, 100)
    update(index, network, album)
    again = open_index(index)
    np.testing.assert_array_equal(again.cells.codebook, opened.cells.codebook)
    assert again.share_new == pytest.approx(0.4)
    sizes = np.diff(again.cells.cell_ends, prepend=0)
    codes = assign_codes(again.cells.features, again.cells.codebook)
    np.testing.assert_array_equal(np.repeat(again.cells.codes, sizes, axis=0), codes)
    update(index, network, album, refit=True)
    third = open_index(index)
    assert third.clusters == (2, 4) and third.share_new == 0
    update(index, network, album, clusters=5, subspaces=4)
    assert open_index(index).clusters == (4, 5) and network.seen == 100


def test_thumbnails_that_are_no_longer_used_go_in_time(album, index, network, monkeypatch):
    monkeypatch.setattr("photo_search.thumbnails.MIN_UNUSED_BYTES", 100)
    update(index, network, album)
    for number in range(8):
        write_photo(album / f"{('', 'a/', 'b/c/')[number % 3]}{number}.png", 100 + number)
    update(index, network, album)
    assert (index / "thumbnails-1.bin").exists()  # less than half is out of use
    kept = photos_of(index)
    for path in [*album.glob("a/*"), *album.glob("b/c/*")]:
        path.unlink()
    update(index, network, album, only=True)
    assert [path.name for path in index.glob("thumbnails*")] == ["thumbnails-3.bin"]
    left = photos_of(index)
    assert len(left) == 4 and all(kept[path] == photo for path, photo in left.items())


def test_a_reader_goes_on_while_a_second_writer_is_refused(album, index, network):
    update(index, network, album)
    opened = open_index(index)

    def read():
        return [(opened.path(row), opened.thumbnail(row), opened.cells.features[row].tolist()) for row in range(12)]

    before = read()
    write_photo(album / "new.png", 70)
    update(index, network, album)
    assert len(open_index(index)) == 13
    assert before == [
        (opened.path(row), opened.thumbnail(row), opened.cells.features[row].tolist()) for row in range(12)
    ]
    child = os.fork()
    if not child:
        with folder_lock(index, "indexing"):
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    try:
        with pytest.raises(InputError, match=f"process {child} on .* is indexing there"):
            update(index, network, album)
        assert len(open_index(index)) == 13
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def killed_at(moment, index, album):
    """Update an index in a process that is killed at a moment, counted in files of the index it opens, moves, deletes.

    Returns whether it was.
    """
    child = os.fork()
    if not child:
        left = [moment]

        def watch(event, arguments):
            if event in ("open", "os.rename", "os.remove", "os.truncate", "mmap.__new__") and (
                event == "mmap.__new__" or str(index) in str(arguments)
            ):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        status = 1
        try:
            update(index, FakeEncoder(), album, batch_size=3)
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kills_until_new(folder, album, moments, rounds, most):
    """How often updates of a copy of the index `old` in a folder are killed until one ends.

    Each leaves the photos of `old` or those of `new`, and the last the contents of `new`. moments: random.Random; most:
    the latest moment of the first kill in each of the rounds.
    """
    states, whole, kills = [photos_of(folder / name) for name in ("old", "new")], contents(folder / "new"), 0
    for round_ in range(rounds):
        index, latest = folder / f"index {round_}", most
        shutil.copytree(folder / "old", index)
        while killed_at(moments.randint(10, latest), index, album):
            kills, latest = kills + 1, latest + 12
            assert photos_of(index) in states
        assert contents(index) == whole
    return kills


@pytest.fixture
def moments():
    return random.Random(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
def test_a_killed_indexing_goes_on_to_the_same_index(album, tmp_path, moments):
    (album / "torn.png").write_text("no image")
    update(tmp_path / "whole", FakeEncoder(), album, batch_size=3)
    whole = contents(tmp_path / "whole")
    kills = 0
    for round_ in range(3):  # each until it comes to its end
        index, most = tmp_path / f"index {round_}", 30
        while killed_at(moments.randint(1, most), index, album):
            kills, most = kills + 1, most + 12
        assert contents(index) == whole
    assert kills >= 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
def test_a_killed_update_leaves_the_old_index_or_the_new_one(album, tmp_path, moments):
    update(tmp_path / "old", FakeEncoder(), album, batch_size=3)
    for number in range(12, 20):
        write_photo(album / f"{number}.png", number)
    (album / "0.png").unlink()
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    update(tmp_path / "new", FakeEncoder(), album, batch_size=3)
    assert kills_until_new(tmp_path, album, moments, rounds=3, most=90) >= 5


@pytest.mark.parametrize("damage", ["a torn line", "a torn feature", "zeros", "no thumbnails", "not ours"])
def test_a_batch_that_was_torn_is_done_again(album, index, network, damage, monkeypatch):
    update(index.with_name("whole"), FakeEncoder(), album)
    monkeypatch.setattr(updates, "write_index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        update(index, network, album)
    monkeypatch.undo()
    lines, features = index / "unfinished.photos", index / "unfinished.features"
    if damage == "a torn line":
        os.truncate(lines, lines.stat().st_size - 9)
    elif damage == "a torn feature":
        os.truncate(features, features.stat().st_size - 9)
    elif damage == "zeros":
        with open(features, "r+b") as file:
            file.seek(-4 * network.metadata["width"], os.SEEK_END)
            file.write(bytes(4 * network.metadata["width"]))
    elif damage == "no thumbnails":
        os.truncate(index / "thumbnails-1.bin", (index / "thumbnails-1.bin").stat().st_size - 9)
    else:
        lines.write_bytes(b"".join(lines.read_bytes().splitlines(True)[:-1]) + b'[[["a", 1, 2, "zz", 0, 9]], []]\n')
    network.seen = 0
    update(index, network, album)
    assert network.seen == 2  # the last batch of 5, 5 and 2
    assert contents(index) == contents(index.with_name("whole"))


def test_unfinished_photos_of_another_network_are_not_taken(album, index, network, monkeypatch):
    monkeypatch.setattr(updates, "write_index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        update(index, network, album)
    monkeypatch.undo()
    before = contents(index)
    with pytest.raises(InputError, match="unfinished index of another checkpoint"):
        update(index, FakeEncoder(sha256="cd" * 32), album)
    assert contents(index) == before


def test_a_full_disk_leaves_the_old_index(album, index, network, monkeypatch):
    update(index, network, album)
    before = photos_of(index)
    write_photo(album / "new.png", 90)
    real = np.lib.format.write_array

    def full(file, array, **options):
        if array.dtype == np.int64:
            raise OSError(28, "No space left on device")
        real(file, array, **options)

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); free some space"):
        update(index, network, album)
    assert photos_of(index) == before
    monkeypatch.undo()
    network.seen = 0
    update(index, network, album)
    assert network.seen == 0 and len(open_index(index)) == 13


def test_folders_without_photos_are_refused(tmp_path, index, network):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none: contains no photos"):
        update(index, network, tmp_path / "none")
    (tmp_path / "none/torn.png").write_text("no image")
    with pytest.raises(InputError, match="none of 1 photos can be read"):
        update(index, network, tmp_path / "none")
    with pytest.raises(InputError, match="--subspaces 3: features of 16 values"):
        update(index, network, tmp_path / "none", subspaces=3)


def test_more_clusters_than_photos_are_refused_before_the_work(album, index, network):
    with pytest.raises(InputError, match="--clusters 13: there are only 12 photos"):
        update(index, network, album, clusters=13)
    assert network.seen == 0


def spoil_json(**changes):
    def spoil(index):
        metadata = json.loads((index / "index.json").read_text())
        metadata.update({name: value(metadata) for name, value in changes.items()})
        (index / "index.json").write_text(json.dumps(metadata))

    return spoil


def spoil_array(name, change):
    def spoil(index):
        path = index / f"{name}-1.npy"
        array = np.load(path).copy()
        np.save(path, change(array))
        metadata = json.loads((index / "index.json").read_text())
        metadata["files"][path.name] = path.stat().st_size
        (index / "index.json").write_text(json.dumps(metadata))

    return spoil


def put(place, value):
    def change(array):
        array[place] = value
        return array

    return change


DAMAGES = {
    "no JSON": lambda index: (index / "index.json").write_bytes(b"\x80\x04."),
    "deep JSON": lambda index: (index / "index.json").write_text("[" * 10**5),
    "a list": lambda index: (index / "index.json").write_text("[]"),
    "a file elsewhere": spoil_json(files=lambda metadata: metadata["files"] | {"../../etc/passwd": 9}),
    "thumbnails elsewhere": spoil_json(thumbnails=lambda _: "/etc/passwd"),
    "another width": spoil_json(width=lambda _: 17),
    "another generation": spoil_json(generation=lambda _: 2),
    "another version": spoil_json(format=lambda _: 3),
    "sizes that are texts": spoil_json(files=lambda metadata: dict.fromkeys(metadata["files"], "9")),
    "a file gone": lambda index: (index / "codes-1.npy").unlink(),
    "a file torn": lambda index: os.truncate(index / "features-1.npy", 500),
    "folders that are none": spoil_json(folders=lambda _: []),
    "a folder in half a character": spoil_json(folders=lambda _: ["/a\ud800"]),
    "a folder with a zero": spoil_json(folders=lambda _: ["/a\0b"]),
    "a folder that is not absolute": spoil_json(folders=lambda _: ["a"]),
    "no sizes": spoil_json(files=lambda metadata: dict.fromkeys(metadata["files"], -1)),
    "a FIFO": lambda index: ((index / "index.json").unlink(), os.mkfifo(index / "index.json")),
    "a FIFO as an array": lambda index: ((index / "codes-1.npy").unlink(), os.mkfifo(index / "codes-1.npy")),
    "a large file": lambda index: os.truncate(index / "index.json", 1 << 25),
    "a pickle": spoil_array("codebook", lambda array: np.array([{"a": 1}], dtype=object)),
    "other numbers": spoil_array("features", lambda array: array.astype(np.float64)),
    "fewer photos": spoil_array("records", lambda array: array[:-1]),
    "places twice": spoil_array("places", put(0, 1)),
    "cells that end nowhere": spoil_array("ends", put(-1, 10**12)),
    "cells backwards": spoil_array("ends", lambda array: -array),
    "codes of no word": spoil_array("codes", put(0, 9)),
    "spheres of no size": spoil_array("radii", put(0, np.nan)),
    "paths backwards": spoil_array("records", lambda array: put("path_end", array["path_end"][::-1].copy())(array)),
    "thumbnails nowhere": spoil_array("records", put("thumbnail", 2**62)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_refused_in_one_line(album, index, network, damage):
    update(index, network, album, clusters=3)
    DAMAGES[damage](index)
    with pytest.raises(InputError) as told:
        open_index(index)
    where = (f"{index}: ", f"{index}/index.json: ")
    assert str(told.value).startswith(where) and "\n" not in str(told.value) and len(str(told.value)) < 400


def test_a_damaged_header_runs_nothing(album, index, network, trap):
    import pickle

    update(index, network, album)
    size = (index / "codes-1.npy").stat().st_size
    (index / "codes-1.npy").write_bytes(pickle.dumps(trap).ljust(size, b"."))
    with pytest.raises(InputError, match="damaged index"):
        open_index(index)
    assert not trap.sprung()


@pytest.mark.parametrize("header", [b"{'descr': ('<i4'", b"{'descr': (" + b"-" * 9000], ids=["torn", "nested"])
def test_a_damaged_header_ends_in_one_line(album, index, network, header):
    update(index, network, album)
    path = index / "codes-1.npy"
    size = path.stat().st_size
    path.write_bytes(b"\x93NUMPY\x01\x00" + bytes([118, 0]) + header[:118].ljust(118) + bytes(size)[: size - 128])
    with pytest.raises(InputError, match="damaged index"):
        open_index(index)


def test_there_may_be_no_index(tmp_path):
    with pytest.raises(InputError, match=r"no index of photos; make one with search_photos\.py index"):
        open_index(tmp_path)


def test_a_refit_leaves_few_photos_as_many_clusters_as_were_asked_for(tmp_path):
    album, network = write_album(tmp_path / "album"), FakeEncoder()
    update(tmp_path / "index", network, album, clusters=3)
    write_photo(album / "new.png", 99)
    update(tmp_path / "index", network, album, refit=True)
    index = open_index(tmp_path / "index")
    assert index.clusters == (2, 3) and index.share_new == 0
