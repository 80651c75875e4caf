"""What other pages, other machines, torn pictures and tampered indexes can do to the page: nothing."""

import hashlib
import io
import json
import os
import re
import shutil
import socket
import struct
import zlib
from unittest.mock import Mock

import pytest
from albums import FakeEncoder, update, write_album, write_photo
from pages import PORT, drawing, reloading_index_of, say, served, visitor
from PIL import Image
from starlette.testclient import TestClient
from uvicorn.server import ServerState

from photo_search import http_server
from photo_search.access import MAX_WRONG_TOKENS, WRONG_TOKENS_PERIOD_S
from photo_search.photos import MAX_UPLOAD_BYTES
from photo_search.server import create_app

TOKEN = "abcdefgh-123"
PATIENCE = 0.3  # seconds, where a test waits for it to run out
CHUNK = 1 << 16


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An index of a few photos, to be left as it is."""
    folder = tmp_path_factory.mktemp("attacked")
    write_album(folder / "album", 6)
    update(folder / "index", FakeEncoder(), folder / "album", clusters=2)
    return folder / "index"


def refused(answer, status):
    """The one line of a refusal."""
    assert answer.status_code == status, answer.text
    (line,) = answer.json().values()
    assert list(answer.json()) == ["error"] and "\n" not in line and len(line) < 400
    assert "Traceback" not in line and answer.headers["content-security-policy"].startswith("default-src 'none'")
    return line


def head(port, *lines):
    """The head of a request, with the right Host after its first line."""
    return "\r\n".join([*lines[:1], f"Host: 127.0.0.1:{port}", *lines[1:], "", ""]).encode()


NUMBERS = ["-1", "6", "1e0", "0x1", "٣", "1.0", "+1", "%201", "1%00", "9" * 5000,
           "%2e%2e%2fphoto", "..%2f..%2fetc%2fpasswd", "index.json"]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:12])
@pytest.mark.parametrize("kind", ["photo", "thumbnail"])
def test_only_numbers_of_photos_lead_to_photos(client, reloading, kind, number):
    assert refused(client.get(f"/{kind}/{reloading.latest().version}/{number}"), 404)


PATHS = ["/../../etc/passwd", "/photo/../../../etc/passwd", "/photo//etc/passwd", "//etc/passwd", "/page.html",
         "/photo/%2e%2e/%2e%2e/etc/passwd", "http://other/", "*"]  # fmt: skip


def test_paths_lead_nowhere(reloading):
    with served(reloading) as port:
        for path in PATHS:
            answer = say(port, [head(port, f"GET {path} HTTP/1.1", "Connection: close")])
            assert re.match(rb"HTTP/1.1 4\d\d ", answer) and b"root:" not in answer, (path, answer)


OTHER_HOSTS = ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:80", f"127.0.0.1.evil.example:{PORT}",
               f"127.0.0.2:{PORT}", f"localhost:{PORT}.evil.example", f"a@localhost:{PORT}", ""]  # fmt: skip


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_other_hosts_are_refused(client, host):
    for path in ("/", "/about", "/nowhere"):
        assert "this page is at http://127.0.0.1:8000 alone" in refused(client.get(path, headers={"Host": host}), 421)
    refused(client.post("/find", content=drawing(), headers={"Host": host}), 421)


@pytest.mark.parametrize("host", [f"127.0.0.1:{PORT}", f"localhost:{PORT}", f"[::1]:{PORT}", f"LocalHost:{PORT}"])
def test_the_names_of_this_machine_are_its_hosts(client, host):
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert client.get("/", headers=headers).status_code == 200
    assert client.post("/find", content=drawing(), headers=headers).status_code == 200


@pytest.mark.parametrize("port", [80, 443])
def test_browsers_leave_out_the_port_of_the_scheme(reloading, port):
    client = TestClient(create_app(reloading, port))
    for host in ("127.0.0.1", "localhost", "[::1]", f"127.0.0.1:{port}"):
        for origin in ("http://", "https://"):
            name = host.removesuffix(f":{port}") if (origin, port) in (("http://", 80), ("https://", 443)) else host
            headers = {"Host": host, "Origin": origin + name, "Sec-Fetch-Site": "same-origin"}
            assert client.post("/find", content=drawing(), headers=headers).status_code == 200, headers
        for origin in ("http://evil.example", f"http://{host}:8000", "null", "http://", f"http://127.0.0.1:{port}1"):
            refused(client.post("/find", content=drawing(), headers={"Host": host, "Origin": origin}), 403)
    for host in ("evil.example", "127.0.0.1:8000", f"evil.example:{port}"):
        refused(client.get("/", headers={"Host": host}), 421)


def test_two_hosts_or_none_are_refused(reloading):
    with served(reloading) as port:
        own = f"Host: 127.0.0.1:{port}\r\n"
        for hosts in (own + own, "Host: evil.example\r\n" + own, ""):
            answer = say(port, [f"GET /about HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n".encode()])
            assert re.match(rb"HTTP/1.1 4\d\d ", answer) and b"photos" not in answer
        answer = say(port, [b"GET /about HTTP/1.0\r\n\r\n"])
        assert answer.startswith(b"HTTP/1.1 421 ")


FOREIGN = [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": f"http://127.0.0.1:{PORT + 1}"},
    {"Origin": f"http://localhost:{PORT}"}, {"Origin": "file://"}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"}, {"Origin": f"http://127.0.0.1:{PORT}", "Sec-Fetch-Site": "cross-site"},
]  # fmt: skip


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_other_pages_may_not_search(client, headers):
    assert "another page asked" in refused(client.post("/find", content=drawing(), headers=headers), 403)
    refused(client.get("/about", headers=headers), 403)


def test_a_proxy_may_change_the_host(reloading):
    client = visitor(reloading, token=TOKEN)
    assert client.get(f"/?token={TOKEN}").status_code == 303
    headers = {"Origin": "https://hub.example", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/find", content=drawing(), headers=headers).status_code == 200
    for site in ("cross-site", "same-site", "none"):
        refused(client.post("/find", content=drawing(), headers=headers | {"Sec-Fetch-Site": site}), 403)


def test_a_link_from_another_page_opens_the_page(client):
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200
    refused(client.post("/", headers={"Sec-Fetch-Site": "cross-site"}), 403)


def test_other_methods_are_refused(client):
    for method, path in (("GET", "/find"), ("POST", "/about"), ("DELETE", "/photo/x/1"), ("OPTIONS", "/find")):
        assert refused(client.request(method, path), 405)


def test_with_a_token_whoever_shows_it_comes_in(reloading):
    client = visitor(reloading, host="album.example:9000", token=TOKEN)
    for path in (
        "/",
        "/about",
        "/?token=",
        "/?token=abcdefgh-12",
        f"/about?token={TOKEN}",
        f"/?token={TOKEN}4",
        "/?token=%ff",
    ):
        assert "/?token=... once" in refused(client.get(path), 401)
    refused(client.post("/find", content=drawing()), 401)
    answer = client.get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and TOKEN not in cookie
    assert "path=" not in cookie.lower()  # the folder of the page, where a proxy serves it under a path
    assert hashlib.sha256(TOKEN.encode()).hexdigest() not in cookie
    assert client.get("/about").json()["photos"] == 6
    own = {"Origin": "http://album.example:9000", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/find", content=drawing(), headers=own).status_code == 200
    refused(client.post("/find", content=drawing(), headers={"Origin": "http://evil.example"}), 403)
    for value in ("", TOKEN, "é", "0" * 64):
        refused(visitor(reloading, token=TOKEN).get("/about", headers={"Cookie": f"page{PORT}={value}".encode()}), 401)


def test_wrong_tokens_are_slowed_down(reloading):
    app, now = create_app(reloading, PORT, TOKEN), [1000.0]
    app.clock = lambda: now[0]
    own, guessing = (TestClient(app, base_url="http://x", follow_redirects=False) for _ in range(2))
    assert own.get(f"/?token={TOKEN}").status_code == 303
    guessed = 0
    for second in range(600):
        now[0] += 1
        for guess in range(3):
            answer = guessing.get(f"/?token=guess-{second}-{guess}")
            guessed += answer.status_code == 401
            assert answer.status_code in (401, 429)
    assert guessed == 600 / WRONG_TOKENS_PERIOD_S * MAX_WRONG_TOKENS
    assert "try again in a minute" in refused(guessing.get(f"/?token={TOKEN}"), 429)  # else it would be found
    assert own.get("/about").status_code == 200
    now[0] += WRONG_TOKENS_PERIOD_S
    assert guessing.get(f"/?token={TOKEN}").status_code == 303


def test_a_cookie_ends_with_the_process_that_gave_it(reloading):
    before, after = (TestClient(create_app(reloading, PORT, TOKEN), base_url="http://x") for _ in range(2))
    assert before.get(f"/?token={TOKEN}").status_code == 200
    after.cookies = before.cookies
    refused(after.get("/about"), 401)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *more):
    """A PNG that says it is so large, and holds almost nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(9)))


def gif_bomb():
    return (
        b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"
    )


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
NO_DRAWINGS = {
    "empty": (b"", "not a readable PNG"), "text": (b"hello", "not a readable"), "SVG": (SVG, "not a readable"),
    "a bomb": (png(65000, 65000), "pixels are too many); at most 4096 pixels a side"),
    "wide": (png(4097, 1), "at most 4096"),
    "a GIF bomb": (gif_bomb(), "at most 4096"), "no pixels": (png(0, 0), "not a readable"),
    "half": (drawing()[:100], "not a readable"), "half a JPEG": (drawing("JPEG")[:300], "not a readable"),
    "a bomb of text": (
        png(9, 9, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))] * 2), "not a readable"
    ),
    "another format": (drawing("TIFF"), "not a readable"), "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0", "not a readable"),
    "blank": (None, "the sketch is blank"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_DRAWINGS)
def test_what_is_no_drawing_is_told_in_one_line(client, name):
    content, said = NO_DRAWINGS[name]
    if content is None:
        file = io.BytesIO()
        Image.new("RGB", (9, 9), "white").save(file, "PNG")
        content = file.getvalue()
    assert said in refused(client.post("/find", content=content), 400)


def too_much(port, sent):
    """A body in chunks, much more than is allowed and without an end; `sent` gets what was taken of it."""
    yield head(port, "POST /find HTTP/1.1", "Transfer-Encoding: chunked")
    for number in range(16 * MAX_UPLOAD_BYTES // CHUNK):
        sent.append(number)
        yield b"%x\r\n" % CHUNK + bytes(CHUNK) + b"\r\n"


def test_what_is_too_large_is_cut_off(reloading):
    with served(reloading) as port:
        answer = say(port, [head(port, "POST /find HTTP/1.1", f"Content-Length: {MAX_UPLOAD_BYTES + 1}")])
        assert answer.startswith(b"HTTP/1.1 413 ") and b"at most 4 MB" in answer  # before any of it came
        sent = []
        answer = say(port, too_much(port, sent))
        assert not answer or answer.startswith(b"HTTP/1.1 413 ")
        assert len(sent) * CHUNK < 8 * MAX_UPLOAD_BYTES  # what was on its way counts, too
        assert say(port, [head(port, "GET /about HTTP/1.1", "Connection: close")]).startswith(b"HTTP/1.1 200 ")


def test_a_connection_without_a_whole_head_is_closed(reloading, monkeypatch):
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_S", 0.05)
    with served(reloading) as port:
        for start in (b"", b"GET", head(port, "GET / HTTP/1.1", "X: y").removesuffix(b"\r\n")):
            assert say(port, [start]) == b""


def test_the_time_of_a_head_ends_with_it(reloading):
    loop, transport = Mock(), Mock()
    config = http_server.page_config(create_app(reloading, PORT))
    config.load()
    connection = http_server.TimedProtocol(config, ServerState(), {}, loop)
    loop.create_task.side_effect = lambda coroutine, **_: [coroutine.close(), Mock()][1]
    connection.connection_made(transport)
    whole = head(PORT, "POST /find HTTP/1.1", "Content-Length: 2")
    for part in (whole[:9], whole[9:-2]):
        connection.data_received(part)
    loop.call_later.assert_called_once_with(http_server.HEAD_TIMEOUT_S, transport.close)
    timer = loop.call_later.return_value
    timer.cancel.assert_not_called()
    connection.data_received(whole[-2:])
    timer.cancel.assert_called_once()
    connection.data_received(b"12")
    loop.call_later.assert_called_once()


def test_what_comes_too_slowly_is_given_up(reloading):
    with served(reloading, timeout=PATIENCE) as port:
        for length in ("Content-Length: 1000", "Transfer-Encoding: chunked"):
            answer = say(port, [head(port, "POST /find HTTP/1.1", length), b"5\r\nhello"])
            assert answer.startswith(b"HTTP/1.1 408 ") and b"did not come within 0.3 seconds" in answer


def test_refused_bodies_are_not_read(reloading):
    with served(reloading) as port:
        for lines in (
            ("POST /find HTTP/1.1", "Origin: http://evil.example"),
            ("PUT /about HTTP/1.1",),
            ("POST /none HTTP/1.1",),
        ):
            answer = say(port, [head(port, *lines, "Content-Length: 1000000000")])
            assert re.match(rb"HTTP/1.1 40[345] ", answer) and b"connection: close" in answer.lower()


def test_whoever_goes_away_leaves_nothing(reloading, capfd):
    with served(reloading) as port:
        for body in (drawing(), drawing()[:50]):
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    length = f"Content-Length: {len(drawing())}"
                    connection.sendall(head(port, "POST /find HTTP/1.1", length) + body)
        assert say(port, [head(port, "GET /about HTTP/1.1", "Connection: close")]).startswith(b"HTTP/1.1 200 ")
    assert "Traceback" not in capfd.readouterr().err


def bad_requests(port):
    yield from (b"\x16\x03\x01\x02\x00\x01", b"GET", b"GET / HTTP/9\r\n\r\n", b"\0" * 2000, b"A" * 40000)
    yield head(port, "GET / HTTP/1.1", "X: " + "y" * 40000)
    for length in ("-1", "x", "1, 2", "9" * 99):
        yield head(port, "POST /find HTTP/1.1", f"Content-Length: {length}")
    yield head(port, "POST /find?k=%ff%00 HTTP/1.1", "Content-Length: 0", "Connection: close")
    yield head(port, "GET /about HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade")


def test_no_request_leaves_a_traceback(reloading, capfd):
    with served(reloading) as port:
        for request in bad_requests(port):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
    assert "Traceback" not in capfd.readouterr().err


def tampered(index, folder, **metadata):
    """A copy of an index whose index.json says other things."""
    shutil.copytree(index, folder)
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(content | metadata))
    return folder


def test_an_index_that_names_other_folders_gives_none_of_its_photos(index, tmp_path, monkeypatch):
    reloading = reloading_index_of(tampered(index, tmp_path / "index", folders=["/etc", "/proc"]), monkeypatch)
    for row in range(6):
        assert "does not exist any more" in refused(
            visitor(reloading).get(f"/photo/{reloading.latest().version}/{row}"), 404
        )


def test_a_damaged_index_is_told(index, tmp_path, monkeypatch):
    folder = tampered(index, tmp_path / "index")
    reloading = reloading_index_of(folder, monkeypatch)
    (folder / "index.json").write_text("{")
    assert "damaged index" in refused(visitor(reloading).get("/about"), 503)


def test_files_that_became_others_are_harmless(tmp_path, monkeypatch):
    write_album(tmp_path / "album", 6)
    update(tmp_path / "index", FakeEncoder(), tmp_path / "album")
    reloading = reloading_index_of(tmp_path / "index", monkeypatch)
    index, client = reloading.latest().searcher.index, visitor(reloading)
    others = [SVG, b"<html><script>alert(1)</script>", b"", b"\x89PNG\r\n\x1a\n<script>alert(1)</script>"]
    for row, content in enumerate(others):
        with open(index.path(row), "wb") as file:
            file.write(content)
    for row in range(3):
        assert "this photo cannot be shown" in refused(client.get(f"/photo/{reloading.latest().version}/{row}"), 404)
    answer = client.get(f"/photo/{reloading.latest().version}/3")
    assert answer.headers["content-type"] == "image/png" and answer.headers["x-content-type-options"] == "nosniff"
    os.remove(index.path(4))
    os.mkfifo(index.path(4))
    os.remove(index.path(5))
    os.mkdir(index.path(5))
    for row in (4, 5):
        assert "does not exist any more" in refused(client.get(f"/photo/{reloading.latest().version}/{row}"), 404)


def test_names_of_any_bytes_are_data(tmp_path, monkeypatch):
    names = [
        b"<script>alert(1)<",
        b"\xff\xfe.png",
        b'"><img src=x onerror=alert(1)>.png',
        b"new\nline.png",
        b"\xe2\x80\xae.png",
    ]
    for seed, name in enumerate(names):
        name = name if name.endswith(b".png") else name + b".png"
        write_photo(tmp_path / "album" / os.fsdecode(name), seed)
    update(tmp_path / "index", FakeEncoder(), tmp_path / "album")
    reloading = reloading_index_of(tmp_path / "index", monkeypatch)
    answer = visitor(reloading).post("/find", content=drawing())
    assert answer.headers["content-type"] == "application/json"
    expected = {os.fsencode(name).decode("utf-8", "replace") for name in os.listdir(tmp_path / "album")}
    assert {each["name"] for each in answer.json()["found"]} == expected and len(expected) == 5
