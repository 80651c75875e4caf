"""The page answers with what a Searcher finds, and follows an index that changes."""

import base64
import errno
import hashlib
import io
import os
import re
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from albums import FakeEncoder, update, write_album, write_photo
from pages import drawing, reloading_index_of, say, served, visitor
from PIL import Image

import search_photos
from photo_search import http_server
from photo_search import server as pages
from photo_search.clean_sketch import clean_up
from photo_search.folders import folders_of
from photo_search.index import open_index
from photo_search.photos import MAX_UPLOAD_BYTES, open_photo, read_drawing
from photo_search.search import DEFAULT_CLUSTER_WEIGHT
from utils.cli import InputError


@pytest.fixture
def album(tmp_path):
    return write_album(tmp_path / "album", 24)


@pytest.fixture
def index(album, tmp_path):
    update(tmp_path / "index", FakeEncoder(), album, clusters=3)
    return tmp_path / "index"


def find(client, body=b"", **options):
    answer = client.post("/find", params=options, content=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def as_found(matches):
    return [(each.row, each.score, each.distance, each.cluster_distance) for each in matches]


def told(answer):
    return [(each["photo"], each["score"], each["distance"], each["cluster_distance"]) for each in answer["found"]]


def test_the_page_is_one_file_that_may_run_its_own_script_alone(client):
    answer = client.get("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for name in ("script", "style"):
        (content,) = re.findall(rf"<{name}>(.*?)</{name}>", answer.text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    for name in ("default-src", "frame-ancestors", "base-uri", "form-action"):
        assert policy[name] == "'none'"
    assert (policy["img-src"], policy["connect-src"]) == ("'self' blob: data:", "'self'")
    assert not re.search(r"(src|href|url\()\s*=?\s*[\"']?(https?:)?//", answer.text)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)
    for path in ("/", "/about", "/thumbnail/x/1", "/nowhere"):
        headers = client.get(path).headers
        assert headers["content-security-policy"] == answer.headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("matching", [None, "one-to-one", "one-to-many"])
def test_a_drawing_finds_what_the_finder_finds(client, reloading, matching):
    searcher, options = reloading.latest().searcher, {"matching": matching} if matching else {}
    answer = find(client, drawing(), k=7, **options)
    assert told(answer) == as_found(searcher.find(read_drawing(drawing()), 7, matching))
    assert answer["matching"] == (matching or "one-to-many")
    as_drawn = find(client, drawing(), k=7, as_drawn=1, **options)
    assert (
        told(as_drawn) == as_found(searcher.find(read_drawing(drawing()), 7, matching, as_drawn=True)) != told(answer)
    )
    for each in answer["found"]:
        path = searcher.index.path(each["photo"])
        assert (each["path"], each["name"]) == (path, os.path.basename(path))


@pytest.mark.parametrize(
    ("form", "mode"), [("JPEG", "L"), ("WEBP", "RGB"), ("GIF", "P"), ("PNG", "RGBA"), ("PNG", "1")]
)
def test_pictures_of_other_forms_are_drawings_too(client, form, mode):
    assert len(find(client, drawing(form, mode=mode), k=3)["found"]) == 3


def test_a_photo_finds_photos_like_it(client, reloading):
    searcher = reloading.latest().searcher
    for row in (0, 11, 23):
        answer = find(client, photo=row, k=5)
        matches = searcher.find_features(searcher.index.cells.features[row], 6)
        assert matches[0].row == row  # which is left out
        assert told(answer) == as_found(matches[1:])
    assert len(find(client, photo=3, k=200)["found"]) == len(searcher.index) - 1


def test_a_photo_and_a_drawing_find_what_is_between_them(client, reloading):
    searcher = reloading.latest().searcher
    one, other = searcher.index.features_of([5])[0], searcher.encoder.features([clean_up(read_drawing(drawing()))])[0]
    middle = (one + other) / np.linalg.norm(one + other)
    expected = [match for match in searcher.find_features(middle, 8) if match.row != 5][:7]
    answer = find(client, drawing(), photo=5, k=7)
    assert [each["photo"] for each in answer["found"]] == [match.row for match in expected]
    assert [each["score"] for each in answer["found"]] == pytest.approx([match.score for match in expected], abs=1e-6)


def test_the_weight_of_the_cluster_distance_is_chosen(client, reloading):
    searcher = reloading.latest().searcher
    assert client.get("/about").json()["cluster_weight"] == DEFAULT_CLUSTER_WEIGHT
    for weight in ("0", "0.2", ".45", "0.8", "1"):
        answer = find(client, drawing(), k=9, weight=weight)
        assert told(answer) == as_found(searcher.find(read_drawing(drawing()), 9, weight=float(weight)))
        assert answer["cluster_weight"] == float(weight)
        for each in answer["found"]:
            score = float(weight) * each["cluster_distance"] + (1 - float(weight)) * each["distance"]
            assert each["score"] == pytest.approx(score, abs=1e-6)


def test_copies_of_a_photo_have_one_digest(client, reloading, album, index):
    shutil.copy(reloading.latest().searcher.index.path(0), album / "b" / "a copy.png")
    update(index, FakeEncoder(), album)
    digests = [each["digest"] for each in find(client, drawing(), k=200)["found"]]
    assert len(digests) == 25 and len(set(digests)) == 24


def test_a_search_can_be_kept_to_a_folder(client, reloading, album):
    searcher, about = reloading.latest().searcher, client.get("/about").json()
    assert about["photos"] == 24 and about["matchings"] == ["one-to-one", "one-to-many"]
    folders = [(each["name"], each["depth"], each["photos"]) for each in about["folders"]]
    assert folders == [("album", 0, 24), ("a", 1, 8), ("b", 1, 8), ("c", 2, 8)]
    every = searcher.find(read_drawing(drawing()), 24)
    for place, folder in enumerate((album, album / "a", album / "b", album / "b/c")):
        inside = [match for match in every if match.path.startswith(f"{folder}{os.sep}")]
        assert inside and told(find(client, drawing(), k=24, folder=place)) == as_found(inside)
        among = {each["path"] for each in find(client, photo=every[0].row, k=24, folder=place)["found"]}
        assert among == {match.path for match in inside} - {every[0].path}


def test_folders_hold_the_photos_whose_paths_begin_with_them(tmp_path):
    names = ["x/1.png", "x-y/2.png", "x/z/3.png", "x.d/4.png", "é/5.png", "6.png", "xx/7.png", "x/8.png", "0.png"]
    for seed, name in enumerate(names):
        write_photo(tmp_path / "some" / name, seed)
    write_photo(tmp_path / "something" / "else" / "9.png", 50)
    update(tmp_path / "index", FakeEncoder(), tmp_path / "some", tmp_path / "something")
    index = open_index(tmp_path / "index")
    found = folders_of(index)
    expected = ["some", "x-y", "x.d", "x", "z", "xx", "é", "something", "else"]
    assert [folder.name for folder in found] == expected
    assert [folder.depth for folder in found] == [0, 1, 1, 1, 2, 1, 1, 0, 1]
    for folder in found:
        root = {"something": tmp_path / "something", "else": tmp_path / "something/else", "some": tmp_path / "some",
                "z": tmp_path / "some/x/z"}  # fmt: skip
        prefix = f"{root.get(folder.name, tmp_path / 'some' / folder.name)}{os.sep}"
        inside = [index.path(row).startswith(prefix) for row in range(len(index))]
        assert folder.rows(index).tolist() == inside and any(inside)


def test_photos_and_thumbnails_come_by_number(client, reloading):
    index, stamp = reloading.latest().searcher.index, reloading.latest().version
    for row in range(24):
        small = client.get(f"/thumbnail/{stamp}/{row}")
        assert small.content == index.thumbnail(row) and small.headers["content-type"] == "image/jpeg"
        large = client.get(f"/photo/{stamp}/{row}")
        with open(index.path(row), "rb") as file:
            assert large.content == file.read()
        assert large.headers["content-type"] == "image/png"
        assert large.headers["content-length"] == str(len(large.content))


def test_what_browsers_do_not_show_is_converted(tmp_path, monkeypatch):
    pixels = np.linspace(0, 255, 3000 * 60 * 3).reshape(60, 3000, 3).astype(np.uint8)
    (tmp_path / "album").mkdir()
    Image.fromarray(pixels).save(tmp_path / "album/photo.tif")
    Image.fromarray(pixels).save(tmp_path / "album/named so.png", "BMP")
    update(tmp_path / "index", FakeEncoder(), tmp_path / "album")
    reloading = reloading_index_of(tmp_path / "index", monkeypatch)
    for row in range(2):
        answer = visitor(reloading).get(f"/photo/{reloading.latest().version}/{row}")
        assert answer.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(answer.content), formats=["JPEG"]) as image:
            assert image.size == (2048, 41)
            wanted = Image.fromarray(pixels).resize(image.size)
            assert np.abs(np.asarray(image, int) - np.asarray(wanted, int)).mean() < 3


def test_a_photo_that_is_gone_is_told(client, reloading):
    index, stamp = reloading.latest().searcher.index, reloading.latest().version
    os.remove(index.path(5))
    answer = client.get(f"/photo/{stamp}/5")
    assert answer.status_code == 404
    assert answer.json() == {"error": "this photo does not exist any more; index again to remove it"}
    assert client.get(f"/thumbnail/{stamp}/5").status_code == 200
    with open(index.path(6), "wb") as file:
        file.write(b"no image")
    assert "this photo cannot be shown: " in client.get(f"/photo/{stamp}/6").json()["error"]


def test_no_address_is_redirected(client):
    for path in ("/about/", "/find/", "/health/"):
        assert client.get(path).status_code == 404


def test_photos_that_are_gone_make_room_for_the_next(client):
    every = find(client, drawing(), k=24)["found"]
    for each in (every[0], every[2], every[23]):
        os.remove(each["path"])
    answer = find(client, drawing(), k=5)
    assert [each["path"] for each in answer["found"]] == [every[place]["path"] for place in (1, 3, 4, 5, 6)]
    assert not answer["all"]
    answer = find(client, drawing(), k=21)
    assert (len(answer["found"]), answer["missing"], answer["all"]) == (21, 3, True)
    like = find(client, photo=every[1]["photo"], k=200)
    assert len(like["found"]) == 20 and like["all"]


def test_copies_do_not_take_the_room_of_other_photos(client, reloading, album, index):
    first = find(client, drawing(), k=1)["found"][0]
    for number in range(30):
        shutil.copy(first["path"], album / f"copy {number}.png")
    update(index, FakeEncoder(), album, clusters=3)
    answer = find(client, drawing(), k=3)
    assert len(answer["found"]) == 33 and len({each["digest"] for each in answer["found"]}) == 3
    assert not answer["all"] and find(client, drawing(), k=24)["all"]


def test_a_new_index_is_taken_while_the_page_is_open(client, reloading, album, index):
    before = client.get("/about").json()
    assert find(client, drawing(), index=before["index"])["index"] == before["index"]
    write_photo(album / "new" / "one.png", 99)
    update(index, FakeEncoder(), album, clusters=3)
    for path in (f"/thumbnail/{before['index']}/0", f"/photo/{before['index']}/0"):
        assert client.get(path).status_code == 410
    assert client.post("/find", params={"index": before["index"]}, content=drawing()).status_code == 410
    after = client.get("/about").json()
    assert after["photos"] == 25 and {"name": "new", "depth": 1, "photos": 1} in after["folders"]
    assert len(find(client, drawing(), k=99, index=after["index"])["found"]) == 25
    os.remove(index / "index.json")
    answer = client.get("/about")
    assert answer.status_code == 503 and "no index of photos" in answer.json()["error"]


def test_an_index_of_another_checkpoint_brings_its_network(index, reloading, album, monkeypatch):
    first = reloading.latest().searcher.encoder
    write_photo(album / "new.png", 99)
    update(index, FakeEncoder(), album, clusters=3)
    assert reloading.latest().searcher.encoder is first and len(reloading.latest().searcher.index) == 25
    for path in index.iterdir():
        path.unlink()
    update(index, FakeEncoder(sha256="cd" * 32), album)
    assert reloading.latest().searcher.encoder is not first


def test_several_threads_find_what_one_finds(reloading):
    searcher = reloading.latest().searcher
    images = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)) for seed in range(40)
    ]
    jobs = [(image, matching) for image in images for matching in ("one-to-one", "one-to-many")]

    def found(job):
        return searcher.find(job[0], 9, job[1], as_drawn=True)

    alone = list(map(found, jobs))
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(found, jobs)) == alone


def test_too_many_searches_at_once_are_put_off(reloading, monkeypatch):
    monkeypatch.setattr(pages, "MAX_WAITING_REQUESTS", 0)
    answer = visitor(reloading).post("/find", content=drawing())
    assert answer.status_code == 503 and "too many searches" in answer.json()["error"]


def test_every_search_makes_room_for_the_next(reloading, monkeypatch):
    monkeypatch.setattr(pages, "MAX_WAITING_REQUESTS", 2)
    client = visitor(reloading)
    for body in [drawing(), b"no picture", bytes(MAX_UPLOAD_BYTES + 1)] * 3:
        client.post("/find", content=body)
    assert client.post("/find", content=drawing()).status_code == 200


def test_a_picture_of_a_phone_is_looked_at_upright():
    image = Image.new("L", (60, 20), "white")
    image.paste(0, (0, 0, 20, 20))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(file, "JPEG", exif=exif)
    upright = np.asarray(read_drawing(file.getvalue()).convert("L"))
    assert upright.shape == (60, 20) and upright[:18].mean() < 20 and upright[22:].mean() > 235


@pytest.mark.parametrize(("options", "said"), [
    ({"k": "0"}, "k: it is a whole number from 1 to 200"), ({"k": "201"}, "k: it is"), ({"k": "x"}, "k: it is"),
    ({"matching": "both"}, "matching: it is one of one-to-one, one-to-many"),
    ({"as_drawn": "yes"}, "as_drawn: it is a whole number from 0 to 1"),
    ({"folder": "4"}, "folder: it is a whole number from 0 to 3"), ({"folder": "-1"}, "folder: it is"),
    ({"weight": "1.01"}, "weight: it is a number from 0 to 1"), ({"weight": "nan"}, "weight: it is a number"),
    ({"photo": "24"}, "photo: it is a whole number from 0 to 23"), ({"photo": ""}, "photo: it is"),
])  # fmt: skip
def test_wrong_options_are_told(client, options, said):
    answer = client.post("/find", params=options, content=drawing())
    assert answer.status_code == 400 and answer.json()["error"].startswith(said)


def test_an_index_without_clusters_has_one_matching(tmp_path, album, monkeypatch):
    update(tmp_path / "plain", FakeEncoder(), album)
    client = visitor(reloading_index_of(tmp_path / "plain", monkeypatch))
    assert client.get("/about").json()["matchings"] == ["one-to-one"]
    assert find(client, drawing())["found"][0]["cluster_distance"] is None
    answer = client.post("/find", params={"matching": "one-to-many"}, content=drawing())
    assert answer.status_code == 400 and "has no clusters" in answer.json()["error"]


def test_the_command_is_refused_in_one_line(index, fails, monkeypatch):
    own = ["page", "--index", index, "--device", "cpu"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"--port {port}: address already in use; choose another --port" in fails(
            search_photos.main, *own, "--port", port
        )
    assert "guard them with --token" in fails(search_photos.main, *own, "--host", "0.0.0.0")
    for token in ("short", ""):
        assert "--token: shorter ones" in fails(search_photos.main, *own, "--token", token)
    for token in ("with spaces in it", "späť-späť", "a/b/c/d/e"):
        assert "--token: only letters, digits, - and _" in fails(search_photos.main, *own, "--token", token)
    for token in ("short", ""):
        monkeypatch.setenv("PAGE_TOKEN", token)
        assert "PAGE_TOKEN: shorter ones" in fails(search_photos.main, *own)
    monkeypatch.delenv("PAGE_TOKEN")
    other = ["--host", "192.0.2.1", "--token", "longenough"]
    assert "--host 192.0.2.1: not an address of this machine" in fails(search_photos.main, *own, *other)
    for host in ("a..b", "x" * 70):
        assert f"--host {host}: not " in fails(search_photos.main, *own, "--host", host, "--token", "longenough")
    for seconds in ("0", "x"):
        assert "argument --watch" in fails(search_photos.main, *own, "--watch", seconds)
    assert "argument --port: '65536' is not a port" in fails(search_photos.main, *own, "--port", "65536")
    assert "no index of photos" in fails(search_photos.main, "page", "--index", index / "x", "--port", "0")
    assert "the checkpoint of the index does not exist" in fails(search_photos.main, *own, "--port", "0")
    monkeypatch.setitem(sys.modules, "photo_search.server", None)
    assert "pip install -r requirements-search.txt" in fails(search_photos.main, *own)


def test_photos_outside_the_folders_of_the_index_are_not_sent(reloading, album, tmp_path):
    index = reloading.latest().searcher.index
    outside = write_photo(tmp_path / "album-2" / "secret.png", 1)
    os.remove(index.path(3))
    os.symlink(outside, index.path(3))
    with pytest.raises(FileNotFoundError):
        open_photo(index, 3)
    os.remove(index.path(3))
    os.symlink(index.path(4), index.path(3))
    kind, file = open_photo(index, 3)
    with file:
        assert kind == "image/png"


def test_a_browser_is_opened_only_where_it_has_a_window(monkeypatch):
    opened = []
    monkeypatch.setattr(pages.webbrowser, "open", lambda address: not opened.append(address))
    monkeypatch.setattr(pages.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not pages._open_browser("http://127.0.0.1:8000/") and not opened
    monkeypatch.setenv("DISPLAY", ":0")
    assert pages._open_browser("http://127.0.0.1:8000/") and opened == ["http://127.0.0.1:8000/"]


def test_the_page_waits_for_the_first_run_of_an_index(album, tmp_path, monkeypatch):
    folder, progress = tmp_path / "index", []

    class WatchedEncoder(FakeEncoder):
        def embed(self, images):
            reloading = reloading_index_of(folder, monkeypatch)
            answer = visitor(reloading).get("/about")
            progress.append((answer.status_code, answer.headers["retry-after"], answer.json()["error"]))
            self.waiting = self.waiting if self.seen else visitor(reloading)
            return super().embed(images)

    network = WatchedEncoder()
    update(folder, network, album, batch_size=10)
    said = f"{folder}: the photos are being indexed, {{}} of 24"
    assert progress == [(503, "2", said.format(done)) for done in (0, 10, 20)]
    assert network.waiting.get("/about").json()["photos"] == 24
    assert find(network.waiting, drawing(), k=3)["found"]


def test_a_token_is_given_made_or_in_the_environment(monkeypatch):
    monkeypatch.delenv("PAGE_TOKEN", raising=False)
    assert pages.choose_token(None) == (None, None)
    assert pages.choose_token("abcdefgh") == ("abcdefgh", "abcdefgh")
    made = {pages.choose_token("auto") for _ in range(9)}
    assert len(made) == 9 and all(token == shown and len(token) >= 24 for token, shown in made)
    monkeypatch.setenv("PAGE_TOKEN", "secret-secret")
    assert pages.choose_token(None) == ("secret-secret", "<PAGE_TOKEN>")  # a log does not show it
    assert pages.choose_token("abcdefgh") == ("abcdefgh", "abcdefgh")


class FakeServer:
    """Stands for PageServer, which would serve until Ctrl-C."""

    def __init__(self, config):
        self.app = config.app

    def run(self, sockets):
        self.port = sockets[0].getsockname()[1]


@pytest.mark.parametrize(("given", "shown"), [("auto", r"\?token=[\w-]{24}"), (None, "\\?token=<PAGE_TOKEN>")])
def test_the_address_shows_a_token_that_is_made_and_no_other_secret(index, monkeypatch, capsys, given, shown):
    monkeypatch.setenv("PAGE_TOKEN", "secret-secret")
    monkeypatch.setattr(pages, "PageServer", FakeServer)
    reloading_index_of(index, monkeypatch)
    pages.serve(index, host="127.0.0.1", port=0, token=given)
    printed = capsys.readouterr().out
    assert re.fullmatch(rf".*: 24 photos; draw at http://127\.0\.0\.1:\d+/{shown}\n", printed)
    assert "secret-secret" not in printed


def test_a_database_that_others_can_read_is_not_served_with_a_token(monkeypatch):
    server = SimpleNamespace(uri="photos.db", is_file=True)
    monkeypatch.setattr(pages, "listen", lambda *_: 1 / 0)
    with pytest.raises(InputError, match=r"--uri photos\.db: other users of this machine can read such a file without"):
        pages.serve(server, token="longenough")
    monkeypatch.setenv("PAGE_TOKEN", "longenough")
    with pytest.raises(InputError, match=r"--uri photos\.db: other users"):
        pages.serve(server)
    monkeypatch.delenv("PAGE_TOKEN")
    with pytest.raises(ZeroDivisionError):
        pages.serve(server)
    with pytest.raises(InputError, match="--watch: only an index on disk"):
        pages.serve(server, watch=5)


def test_health_needs_no_token_and_says_nothing(reloading, index):
    client = visitor(reloading, host="album.example", token="longenough")
    assert (client.get("/health").status_code, client.get("/health").json()) == (200, {"status": "ok"})
    (index / "index.json").write_text("{")
    answer = client.get("/health")
    assert (answer.status_code, answer.json()) == (503, {"error": "the index cannot be opened"})
    assert visitor(reloading, host="album.example").get("/health").status_code == 421


def test_a_page_leaves_its_index_as_it_is(client, reloading, index):
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in index.iterdir()}
    version = reloading.latest().version
    find(client, drawing())
    for path in ("/", "/about", "/health", f"/thumbnail/{version}/1", f"/photo/{version}/1"):
        assert client.get(path).status_code == 200
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in index.iterdir()}


class ChangingFile(io.BytesIO):
    """A file that has `now` bytes once its size was asked for."""

    def __init__(self, before, now):
        super().__init__(bytes(before))
        self.now = now

    def seek(self, *arguments):
        size = super().seek(*arguments)
        if arguments == (0, os.SEEK_END):
            self.truncate(self.now)
            self.write(bytes(max(0, self.now - size)))
        return size


@pytest.mark.parametrize("now", [0, 100, 70_000, 200_000])
def test_a_photo_that_changes_while_it_is_sent_leaves_no_traceback(reloading, monkeypatch, capfd, now):
    monkeypatch.setattr(pages, "open_photo", lambda *_: ("image/png", ChangingFile(150_000, now)))
    with served(reloading) as port:
        request = (
            f"GET /photo/{reloading.latest().version}/3 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
        )
        head, body = say(port, [request.encode()]).split(b"\r\n\r\n", 1)
        assert b"content-length: 150000" in head.lower() and len(body) == min(now, 150_000)
        assert say(port, [request.encode().replace(b"/photo", b"/nowhere")]).startswith(b"HTTP/1.1 404 ")
    assert capfd.readouterr().err == ""


def test_too_many_open_files_are_one_line_a_minute_and_no_fault_of_the_index(client, reloading, monkeypatch, capsys):
    now, loop, passed = [0.0], SimpleNamespace(default_exception_handler=lambda context: passed.append(context)), []
    handler = http_server.OutOfFilesHandler(clock=lambda: now[0])
    for _ in range(1000):
        handler(loop, {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")})
        now[0] += 0.1
    assert capsys.readouterr().err.count("\n") == 2 and not passed
    handler(loop, {"message": "a bug", "exception": ValueError()})
    assert len(passed) == 1
    version = reloading.opened.version
    for name, found in (("open_photo", version), ("open_index_at", "another")):
        with monkeypatch.context() as broken:
            broken.setattr(pages, name, without_files)
            broken.setattr(pages, "_version_at", {reloading.location: found}.get)
            answer = client.get(f"/photo/{version}/3")
            assert answer.status_code == 503 and "too many files are open" in answer.json()["error"]


def without_files(*_):
    why = FileNotFoundError() if len(_) == 2 else InputError("damaged index; delete the folder")
    raise why from OSError(errno.EMFILE, "Too many open files")
