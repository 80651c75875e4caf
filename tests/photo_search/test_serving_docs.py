"""What docs/serving.md proposes: its commands are commands, the container has what it needs, a path is no obstacle."""

import re
import shlex
from pathlib import Path

import pytest
from albums import FakeEncoder, update, write_album
from pages import PORT, drawing
from starlette.testclient import TestClient

from photo_search.cli import create_parser
from photo_search.server import create_app

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
CONTAINER = (ROOT / "docs/Containerfile").read_text(encoding="utf-8")


@pytest.fixture
def index(tmp_path):
    update(tmp_path / "index", FakeEncoder(), write_album(tmp_path / "album", 6))
    return tmp_path / "index"


def test_commands_are_those_of_the_program():
    text = PAGE.replace("\\\n", " ")
    commands = re.findall(r"(?:search_photos\.py|(?<=-t )photo-search$| photo-search) ((?:index|page) [^\n&`]*)", text)
    commands += re.findall(r"`(page --index [^`]*)`", text)
    commands += [" ".join(re.findall(r'"([^"]*)"', CONTAINER.split("\nCMD ")[1]))]
    assert len(commands) >= 6
    for command in commands:
        options = create_parser().parse_args(shlex.split(command))
        assert options.run


def test_the_container_copies_what_its_command_imports():
    copied = [line.split()[1:] for line in CONTAINER.splitlines() if line.startswith("COPY ")]
    sources = {Path(source).parts[0] for *names, _ in copied for source in names}
    assert all((ROOT / source).exists() for *names, _ in copied for source in names)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "docs", "benchmarks"}
    assert packages | {"search_photos.py", "requirements-search.lock", "checkpoint"} == sources
    ignore = (ROOT / "docs/Containerfile.dockerignore").read_text().splitlines()
    kept = {path for line in ignore if line.startswith("!") for path in ROOT.glob(line[1:])}
    needed = {path for name in packages for path in (ROOT / name).rglob("*.py")}
    needed |= {ROOT / "checkpoint/starter/student.onnx", *ROOT.glob("photo_search/page*")}
    assert needed <= kept and not any(".venv" in str(path) for path in kept)
    assert "USER 1000:1000" in CONTAINER and "torch" not in (ROOT / "requirements-search.lock").read_text()


class Proxy:
    """An ASGI application that serves another one under a path, as nginx's `location` of the docs does."""

    def __init__(self, app, prefix):
        self.app, self.prefix = app, prefix

    async def __call__(self, scope, receive, send):
        assert scope["path"].startswith(self.prefix), f"{scope['path']} is outside of {self.prefix}"
        path = scope["path"].removeprefix(self.prefix.rstrip("/"))
        await self.app({**scope, "path": path, "raw_path": path.encode()}, receive, send)


def test_a_page_under_a_path_stays_there(reloading):
    app = Proxy(create_app(reloading, PORT, "longenough"), "/user/me/proxy/8000/")
    client = TestClient(app, base_url="https://hub.example")
    address = "https://hub.example/user/me/proxy/8000/"
    page = client.get(f"{address}?token=longenough")
    assert page.status_code == 200 and page.url == address
    about = client.get(f"{address}about").json()
    own = {"Origin": "https://hub.example", "Sec-Fetch-Site": "same-origin"}
    assert client.post(f"{address}find", content=drawing(), headers=own).status_code == 200
    assert client.get(f"{address}thumbnail/{about['index']}/0").status_code == 200
    assert {cookie.path for cookie in client.cookies.jar} == {"/user/me/proxy/8000"}
    assert not re.search(r"""["'`(=]\s*/(find|about|thumbnail|photo|show|health)\b""", page.text)
    assert not re.search(r"""(href|src|action)=["']?/""", page.text)
