"""New and changed photos are taken while the page runs."""

import shutil
import sys
import threading
from types import SimpleNamespace

import pytest
from albums import FakeEncoder, update, write_album, write_photo
from pages import visitor

from photo_search.watch import Watcher, possible_changes


@pytest.fixture
def index(tmp_path):
    update(tmp_path / "index", FakeEncoder(), write_album(tmp_path / "album", 6))
    return tmp_path / "index"


@pytest.fixture
def watcher(reloading, monkeypatch):
    """A Watcher whose updates happen in this process; `updates` has their exit statuses."""
    watcher = Watcher(reloading, 5)
    watcher.updates, watcher.status = [], 0

    def run():
        watcher.updates.append(watcher.status)
        if not watcher.status:
            metadata = reloading.latest().searcher.index.metadata
            update(reloading.location, FakeEncoder(), *metadata["folders"])
        return watcher.status

    monkeypatch.setattr(watcher, "update", run)
    return watcher


def test_what_changes_is_indexed_and_nothing_else(watcher, reloading, tmp_path):
    client = visitor(reloading)
    new = tmp_path / "album/new.png"
    changes = [
        lambda: None,
        lambda: write_photo(new, 50),
        lambda: write_photo(new, 51),
        new.unlink,
        lambda: shutil.copytree(tmp_path / "album/a", tmp_path / "album/x"),
    ]
    for number, change in enumerate(changes):
        change()
        for _ in range(3):
            watcher.scan_once()
        assert len(watcher.updates) == number + 1
    assert client.get("/about").json()["photos"] == 8
    (tmp_path / "album/notes.txt").write_text("no photo")
    write_photo(tmp_path / "album/.hidden.png", 60)
    (tmp_path / "index/found.png").write_bytes(b"")
    watcher.scan_once()
    assert len(watcher.updates) == 5


def test_after_failures_scans_become_rare_and_then_go_on(watcher, tmp_path, reloading, capsys):
    watcher.status = 2  # a read-only index, or another process that indexes
    tried = []
    for _ in range(32):
        watcher.scan_once()
        tried.append(len(watcher.updates))
    assert tried[:9] == [1, 1, 2, 2, 2, 2, 3, 3, 3] and tried[-1] == 5
    watcher.status, watcher.skipped = 0, 99
    watcher.scan_once()
    assert watcher.failures == 0 and watcher.updates[-1] == 0
    content = (tmp_path / "index/index.json").read_bytes()
    (tmp_path / "index/index.json").write_text("{")
    watcher.scan_once()
    assert "note: not watched: " in capsys.readouterr().err and watcher.failures == 1
    (tmp_path / "index/index.json").write_bytes(content)
    for _ in range(2):
        watcher.scan_once()
    assert watcher.failures == 0 and len(watcher.updates) == 6


def test_an_update_is_the_index_command_at_low_priority(reloading, tmp_path, monkeypatch):
    watcher, started = Watcher(reloading, 5, "some.onnx", "cpu"), {}

    class Process:
        pid = 123

        def __init__(self, command, **_):
            started["command"] = command

        def terminate(self):
            started["ended"] = True

        def wait(self):
            return 3

    monkeypatch.setattr("photo_search.watch.subprocess.Popen", Process)
    monkeypatch.setattr("photo_search.watch.os.setpriority", lambda *given: started.update(priority=given[1:]))
    assert watcher.update() == 3 and started["priority"] == (123, 10) and "ended" not in started
    python, script, *rest = started["command"]
    assert python == sys.executable and script.endswith("search_photos.py")
    assert rest == ["index", "--index", str(tmp_path / "index"), "--checkpoint", "some.onnx", "--device", "cpu"]
    watcher.stopped.set()
    watcher.update()
    assert started["ended"]


def test_the_thread_ends_with_the_page(watcher):
    looked = threading.Event()
    watcher.scan_once = looked.set
    with watcher:
        assert looked.wait(60)
    assert not watcher.is_alive()


def test_watchfiles_reports_changes_where_it_is_installed(tmp_path, monkeypatch):
    stopped, asked, waited = threading.Event(), [], []

    def watch(*folders, stop_event, **more):
        asked.append((folders, stop_event, more["debounce"]))
        yield {"a change"}
        if len(asked) == 1:
            raise OSError("no more folders can be watched")

    monkeypatch.setitem(sys.modules, "watchfiles", SimpleNamespace(watch=watch))
    monkeypatch.setattr(stopped, "wait", lambda seconds: waited.append(seconds) or len(waited) > 2)
    assert len(list(possible_changes([str(tmp_path), str(tmp_path / "none")], 7, stopped))) == 3
    assert asked == [((str(tmp_path),), stopped, 7000)] and waited == [7, 7, 7]  # one change, then two scans
    assert len(list(possible_changes([str(tmp_path)], 7, stopped))) == 1 and len(waited) == 3
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    assert not list(possible_changes([], 7, stopped)) and waited[3:] == [7]
