"""Full disks, a second process and disks that go, for an index that grows: no photo is lost."""

import contextlib
import errno
import itertools
import os
import shutil
import signal

import pytest
from albums import FakeEncoder, update, write_album, write_photo
from test_update import count, photos_of

from photo_search import index_writer, partial_index
from photo_search import update as updates
from photo_search.index import TAIL_ARRAYS, open_index
from utils.cli import InputError
from utils.files import open_own


@pytest.fixture
def album(tmp_path):
    return write_album(tmp_path / "album", 24)


@pytest.fixture
def index(album, tmp_path, monkeypatch):
    """An index with a tail."""
    monkeypatch.setattr(updates, "MAX_TAIL_SHARE", 0.5)
    update(tmp_path / "index", FakeEncoder(), album, clusters=3)
    write_photo(album / "tail.png", 90)
    update(tmp_path / "index", FakeEncoder(), album)
    assert has_tail(tmp_path / "index")
    return tmp_path / "index"


def has_tail(folder):
    return all((folder / f"{name}-1.bin").exists() for name in TAIL_ARRAYS)


class FullDisk:
    """Fails at the n-th of all writes, truncations, fsyncs and renames of an index."""

    def __init__(self, moment, patch):
        self.left, self.fsync, self.replace = moment, os.fsync, os.replace
        patch.setattr(index_writer, "open_own", self.open)
        patch.setattr(partial_index, "open_own", self.open)
        patch.setattr(os, "fsync", lambda descriptor: self.call(self.fsync, descriptor))
        patch.setattr("pathlib.Path.replace", lambda path, to: self.call(self.replace, path, to))

    def call(self, function, *arguments):
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*arguments)

    @contextlib.contextmanager
    def open(self, path, mode="rb"):
        with open_own(path, mode) as file:
            yield _File(file, self)


class _File:
    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def write(self, content):
        """Half of it is written before the disk is full."""
        if self.disk.left == 1:
            self.file.write(content[: len(content) // 2])
        return self.disk.call(self.file.write, content)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_at_any_write_of_an_append_leaves_the_old_index(album, index, tmp_path):
    before = photos_of(index)
    write_photo(album / "new.png", 91)
    (album / "a/1.png").unlink()
    shutil.copytree(index, tmp_path / "whole")
    assert count(update(tmp_path / "whole", FakeEncoder(), album)) == (1, 0, 0, 1, 0)
    after = photos_of(tmp_path / "whole")
    assert has_tail(tmp_path / "whole") and len(after) == len(before)
    for moment in itertools.count(1):
        folder = tmp_path / f"full {moment}"
        shutil.copytree(index, folder)
        try:
            with pytest.MonkeyPatch.context() as patch:
                FullDisk(moment, patch)
                update(folder, FakeEncoder(), album)
        except InputError as error:
            assert "No space left on device" in str(error) and "\n" not in str(error)
        else:
            break
        assert photos_of(folder) == before
        update(folder, FakeEncoder(), album)
        assert photos_of(folder) == after and has_tail(folder)
        shutil.rmtree(folder)
    assert moment > 12 and photos_of(folder) == after


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
def test_of_two_processes_that_append_one_is_refused_and_no_photo_is_lost(album, index, tmp_path):
    class Stopping(FakeEncoder):
        def embed(self, images):
            os.kill(os.getpid(), signal.SIGSTOP)
            return super().embed(images)

    write_photo(tmp_path / "other/one.png", 92)
    write_photo(tmp_path / "third/two.png", 93)
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            update(index, Stopping(), album, tmp_path / "other")
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    try:
        before = photos_of(index)
        with pytest.raises(InputError, match=f"process {child} on .* is indexing there"):
            update(index, FakeEncoder(), album, tmp_path / "third")
        assert photos_of(index) == before
    finally:
        os.kill(child, signal.SIGCONT)
        os.waitpid(child, 0)
    assert photos_of(index).keys() == {*before, str(tmp_path / "other/one.png")}
    update(index, FakeEncoder(), album, tmp_path / "other", tmp_path / "third")
    assert photos_of(index).keys() == {*before, str(tmp_path / "other/one.png"), str(tmp_path / "third/two.png")}


def test_photos_of_a_disk_that_is_away_stay_in_an_index_that_grew(album, index, tmp_path, capsys):
    before, network = photos_of(index), FakeEncoder()
    write_photo(tmp_path / "home/one.png", 92)
    album.rename(tmp_path / "away")
    for mount in (False, True):
        if mount:
            album.mkdir()
        assert update(index, network, album, tmp_path / "home").removed == 0
        assert before.items() < photos_of(index).items() and has_tail(index)
        (line,) = capsys.readouterr().err.splitlines()  # not that more than half of the index is missing
        assert line.endswith(f"; the index keeps its 25 photos, and --remove {album} removes them")
    album.rmdir()
    (tmp_path / "away").rename(album)
    network.seen = 0
    assert count(update(index, network, album, tmp_path / "home")) == (0, 0, 0, 0, 0)
    assert network.seen == 0 and len(open_index(index)) == 26
