"""Photos are shown in a file manager by programs of the desktop, and only where the page is local."""

import os
import stat

import pytest
from albums import FakeEncoder, update, write_album
from pages import visitor

from photo_search import file_manager


@pytest.fixture
def index(tmp_path):
    update(tmp_path / "index", FakeEncoder(), write_album(tmp_path / "album", 3), clusters=1)
    return tmp_path / "index"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """program(name, status) puts a program into an empty PATH; it returns a function: what the program was run with."""
    monkeypatch.setattr(file_manager.sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def add(name, status=0):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {path}.said\nexit {status}\n")
        path.chmod(stat.S_IRWXU)
        return lambda: (tmp_path / "bin" / f"{name}.said").read_text().splitlines()

    return add


def test_the_file_is_selected_where_that_works(program):
    said = program("dbus-send")
    assert file_manager.show_in_folder("/photos, of 2024/a b.jpg")
    assert said()[-2:] == ["array:string:file:///photos%2C%20of%202024/a%20b.jpg", "string:"]


def test_else_its_folder_is_opened(program):
    assert not file_manager.show_in_folder("/photos/a.jpg")
    program("dbus-send", 1)
    assert not file_manager.show_in_folder("/photos/a.jpg")
    said = program("xdg-open")
    assert file_manager.show_in_folder("/photos/a.jpg") and said() == ["/photos"]


def test_the_page_shows_photos_by_their_numbers(reloading):
    shown, works = [], [True, False]
    client = visitor(reloading, show=lambda path: shown.append(path) or works.pop(0))
    about = client.get("/about").json()
    assert about["show"]
    address, path = f"/show/{about['index']}/1", reloading.latest().searcher.index.path(1)
    assert client.get(address).status_code == 405 and not shown
    assert client.post(address, headers={"Origin": "http://example.org"}).status_code == 403 and not shown
    assert client.post(address).status_code == 204 and shown == [path]
    assert client.post(address).status_code == 501
    assert client.post(f"/show/{about['index']}/3").status_code == 404
    os.remove(path)
    assert client.post(address).status_code == 404 and shown == [path, path]


def test_without_a_desktop_the_page_cannot_show_them(client):
    about = client.get("/about").json()
    assert not about["show"]
    assert client.post(f"/show/{about['index']}/1").status_code == 404
