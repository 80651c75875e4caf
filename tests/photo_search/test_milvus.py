"""An index in Milvus finds what the index on disk finds, whatever happens to its server, its writers and its contents.

Skipped where pymilvus or milvus-lite is not installed.
"""

import base64
import io
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from albums import FakeEncoder, update, write_album, write_photo
from test_cells import clustered

from photo_search.index import RECORD, open_index
from photo_search.index_writer import write_index
from photo_search.search import Searcher, open_index_at
from utils.cli import InputError

pytest.importorskip("pymilvus", reason="pymilvus is not installed (requirements-milvus.txt)")
pytest.importorskip("milvus_lite", reason="milvus-lite is not installed (requirements-milvus.txt)")

from pymilvus import DataType

from photo_search import milvus, milvus_about, milvus_publish
from photo_search.milvus import Server, open_milvus

NPY = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (%s,), }".ljust(120) + b"\n"
ROOT = Path(__file__).resolve().parent.parent.parent
FACTS = FakeEncoder().metadata | {"folders": ["/photos"], "exclude": [], "thumbnails": "thumbnails-1.bin"}


class LiteServer:
    """milvus-lite server on a port of this machine, in a process of its own."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, 0, None
        self.start()

    def start(self):
        run = "import sys; from milvus_lite.cmdline import main; sys.exit(main(sys.argv[1:]))"
        for _ in range(5):
            self.port = self.port or free_port()
            arguments = ["server", "--data-dir", self.folder, "--host", "127.0.0.1", "--port", self.port]
            command = [sys.executable, "-u", "-c", run, *map(str, arguments)]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            if "listening" in self.process.stdout.readline():
                return
            self.port = 0
        raise RuntimeError("milvus-lite server does not start")

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    @property
    def uri(self):
        return f"http://127.0.0.1:{self.port}"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    server = LiteServer(tmp_path_factory.mktemp("lite") / "data")
    yield server
    server.kill()


def names(uri):
    """The collections there, but for those that are kept."""
    return [name for name in Server(uri).client.list_collections() if not name.startswith("kept_")]


@pytest.fixture
def uri(lite):
    """A server whose collections are all dropped afterwards."""
    yield lite.uri
    for name in names(lite.uri):
        Server(lite.uri).client.drop_collection(name)


@pytest.fixture(scope="module")
def kept(lite, tmp_path_factory):
    """(Index, Server) of 60 photos, to be left as they are."""
    own, server = write(tmp_path_factory.mktemp("kept"), *gallery(60)), Server(lite.uri, "kept")
    milvus_publish.publish(server, own)
    return own, server


def write(folder, features, codebook):
    """An index of drawn features on disk; photo 10 is /photos/a10.jpg, and odd ones are in /photos/b."""
    folder.mkdir(exist_ok=True)
    names = [f"/photos/{'ab'[n % 2]}/{n}.jpg".encode() for n in range(len(features))]
    names[3] = b"/photos/a/\\xff\\xe9\\xdb\\xaa.jpg"
    order = sorted(range(len(names)), key=names.__getitem__)
    records = np.zeros(len(names), RECORD)
    records["thumbnail"], records["thumbnail_size"] = np.arange(len(names)), 1
    (folder / "thumbnails-1.bin").write_bytes(bytes(n % 251 for n in range(len(names))))
    metadata = FACTS | {"width": features.shape[1]}
    write_index(
        folder, metadata, ([names[n] for n in order], records), lambda rows: features[np.array(order)[rows]], codebook
    )
    return open_index(folder)


def gallery(count=1500, width=32):
    features = clustered(np.random.default_rng(0), count, width, classes=20, noise=0.4)
    features[500:700] = features[500:600].repeat(2, axis=0)  # ties
    return features, np.ascontiguousarray(features[:30].reshape(30, 2, -1).swapaxes(0, 1))


def same(one, other):
    """Whether two searches found the same photos, in the same order, with the same scores but for the last digits."""
    assert [match.path for match in one] == [match.path for match in other]
    for name in ("score", "distance", "cluster_distance"):
        values = [[getattr(match, name) for match in matches] for matches in (one, other)]
        assert values[0] == (pytest.approx(values[1], abs=1e-13) if values[1][0] is not None else values[1])


def near(features, number, rng):
    query = features[number] + 0.05 * rng.normal(size=features.shape[1]).astype(np.float32)
    return query / np.linalg.norm(query)


@pytest.mark.parametrize("where", ["server", "file"])
def test_milvus_finds_what_the_index_on_disk_finds(where, uri, tmp_path):
    features, codebook = gallery()
    own = write(tmp_path / "index", features, codebook)
    uri = uri if where == "server" else str(tmp_path / "photos.db")
    assert milvus_publish.publish(Server(uri), own)
    there = open_milvus(uri)
    assert len(there) == 1500 and there.clusters == (2, 30) and there.metadata["folders"] == ["/photos"]
    rng = np.random.default_rng(1)
    for number in [3, 500, 501, *rng.integers(1500, size=7)]:
        query = near(features, number, rng)
        for matching in ("one-to-many", "one-to-one"):
            for k in (1, 20):
                same(*(Searcher(index, None).find_features(query, k, matching) for index in (own, there)))
    one, other = (Searcher(index, None).find_features(features[0], 2000) for index in (own, there))
    same(one, other)
    assert (
        len(other) == 1500
        and [match.row for match in other] == own.cells.path_order[[match.row for match in one]].tolist()
    )
    rows = [[match.row for match in matches] for matches in (one, other)]
    assert own.thumbnails_of(rows[0]) == there.thumbnails_of(rows[1])
    np.testing.assert_array_equal(there.features_of(rows[1]), own.cells.features[rows[0]])


def test_a_search_may_be_kept_to_a_range_of_rows(uri, tmp_path):
    features, codebook = gallery(400)
    own = write(tmp_path / "index", features, codebook)
    milvus_publish.publish(Server(uri), own)
    there = open_milvus(uri)
    allowed = range(100, 180)
    within = (own.cells.path_order >= 100) & (own.cells.path_order < 180)
    for matching in ("one-to-many", "one-to-one"):
        one = Searcher(own, None).find_features(features[9], 30, matching, within)
        same(one, Searcher(there, None).find_features(features[9], 30, matching, allowed))


def test_a_killed_server_is_one_line_and_a_restarted_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(milvus, "REQUEST_TIMEOUT_S", 2)
    features, codebook = gallery(300)
    own = write(tmp_path / "index", features, codebook)
    server = LiteServer(tmp_path / "data")
    try:
        milvus_publish.publish(Server(server.uri), own)
        there = Searcher(open_milvus(server.uri), None)
        before = there.find_features(features[7])
        server.kill()
        refused(
            lambda: there.find_features(features[7]), f"photo_index at {server.uri}: ", "see whether Milvus runs there"
        )
        refused(lambda: open_milvus(server.uri), "see whether Milvus runs there")
        server.start()
        same(there.find_features(features[7]), before)
        same(Searcher(open_milvus(server.uri), None).find_features(features[7]), before)
    finally:
        server.kill()


def refused(action, *told):
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert all(part in message for part in told) and "\n" not in message and len(message) < 500, message


def photos_of(uri):
    index = open_milvus(uri)
    rows = range(len(index))
    features = [row.tobytes() for row in index.features_of(rows)]
    return dict(zip(index.paths_of(rows), zip(features, index.thumbnails_of(rows), strict=True), strict=True))


def on_disk(folder):
    index = open_index(folder)
    rows = range(len(index))
    return {index.path(row): (index.features_of([row]).tobytes(), index.thumbnail(row)) for row in rows}


def test_milvus_follows_the_index_on_disk(uri, tmp_path):
    album, folder, network = write_album(tmp_path / "album"), tmp_path / "index", FakeEncoder()
    update(folder, network, album, clusters=3)
    assert milvus_publish.publish(Server(uri), open_index(folder))
    assert photos_of(uri) == on_disk(folder) and len(on_disk(folder)) == 12
    before = names(uri)
    update(folder, network, album)
    assert not milvus_publish.publish(Server(uri), open_index(folder))  # nothing has changed
    assert names(uri) == before and len(before) == 2
    (album / "3.png").unlink()
    write_photo(album / "new.png", 99)
    write_photo(album / os.fsdecode(b"\xff\n.png"), 98)
    update(folder, network, album, clusters=2, refit=True)
    old = open_milvus(uri)
    assert milvus_publish.publish(Server(uri), open_index(folder))
    assert photos_of(uri) == on_disk(folder) and open_milvus(uri).clusters == (2, 2)
    assert len(names(uri)) == 2 and network.seen == 14
    refused(lambda: old.path(0), f"photo_index at {uri}: the photos were indexed again, or removed; search again")


def changes_of(server, monkeypatch):
    """A list of what is called with a Server that writes."""
    calls = []

    def call(method, *arguments, told=server.call_with_retries, **more):
        rows = len(arguments[1]) if method == "upsert" else 0
        calls.append((method, arguments[0], rows))
        return told(method, *arguments, **more)

    monkeypatch.setattr(server, "call_with_retries", call)
    return calls


def test_milvus_grows_with_the_index_on_disk(uri, tmp_path, monkeypatch):
    monkeypatch.setattr("photo_search.update.MAX_TAIL_SHARE", 2)
    monkeypatch.setattr("photo_search.cells.BLOCK_FEATURES", 5)  # photos of a cell
    album, folder, network = write_album(tmp_path / "album", 40), tmp_path / "index", FakeEncoder()
    update(folder, network, album, clusters=2)
    milvus_publish.publish(Server(uri), open_index(folder))
    collection = open_milvus(uri).generation
    draw = np.random.default_rng(0)
    for number in range(3):
        removed = draw.choice(sorted(album.rglob("*.png")), 3, replace=False)
        for path in removed:
            path.unlink()
        for name in range(4):
            write_photo(album / draw.choice(["a", "b", "c"]) / f"{draw.integers(10**6)}.png", 100 + 10 * number + name)
        if number == 1:  # added, and removed before it is copied
            write_photo(album / "soon gone.png", 99)
            update(folder, network, album)
            (album / "soon gone.png").unlink()
        update(folder, network, album)
        own, server, before = open_index(folder), Server(uri), open_milvus(uri)
        calls = changes_of(server, monkeypatch)
        assert milvus_publish.publish(server, own)
        assert sum(rows for method, name, rows in calls if name == collection) == 4 + 3
        assert ("delete", collection, 0) in calls
        there = open_milvus(uri)
        assert there.generation == collection and photos_of(uri) == on_disk(folder)
        assert there.folders() == own.folders() and len(before) == 40 + number
        for query in own.features_of([0, len(own) - 1]):
            for weight in (0, 0.2):
                for k in (9, 50):
                    one, other = own.nearest(query, k, weight), there.nearest(query, k, weight)
                    assert own.paths_of(one.rows) == there.paths_of(other.rows)
                    np.testing.assert_allclose(one.scores, other.scores, atol=1e-13)
                for place in range(len(own.folders())):
                    one, other = (
                        index.nearest(query, 5, weight, index.folders()[place].rows(index)) for index in (own, there)
                    )
                    assert own.paths_of(one.rows) == there.paths_of(other.rows)
    assert len(names(uri)) == 2 and milvus_publish.publish(Server(uri), own) is False
    update(folder, network, album, refit=True)
    milvus_publish.publish(Server(uri), open_index(folder))
    assert open_milvus(uri).generation != collection and len(names(uri)) == 2 and photos_of(uri) == on_disk(folder)


def test_a_copy_of_the_earlier_format_is_read_and_then_converted(uri, tmp_path, monkeypatch):
    features, codebook = gallery(60)
    own, server = write(tmp_path / "index", features, codebook), Server(uri)
    milvus_publish.publish(server, own)
    content = json.loads(milvus.read_about(server, server.current()))
    for name in ("photos", "sorted", "tail_rows", "removed", "copied"):
        del content[name]
    content["facts"]["format"] = 1
    server.client.alter_alias(open_milvus(uri).generation, "photo_index")
    with monkeypatch.context() as earlier:
        earlier.setattr(milvus, "read_about", lambda *_: json.dumps(content))
        there = open_milvus(uri)
        same(*(Searcher(index, None).find_features(features[0], 60) for index in (own, there)))
    assert not milvus_publish.publish(server, own) and not server.current().endswith("_about")
    own = write(tmp_path / "index", features, codebook)
    assert milvus_publish.publish(server, own) and server.current().endswith("_about") and len(names(uri)) == 2
    same(*(Searcher(index, None).find_features(features[0], 60) for index in (own, open_milvus(uri))))


class Died(BaseException):
    pass


@pytest.mark.parametrize("share", [0, 2])
def test_a_writer_that_dies_leaves_the_old_photos(share, uri, tmp_path, monkeypatch):
    monkeypatch.setattr("photo_search.update.MAX_TAIL_SHARE", share)
    album, folder, network = write_album(tmp_path / "album", 4), tmp_path / "index", FakeEncoder()
    update(folder, network, album, clusters=2)
    milvus_publish.publish(Server(uri), open_index(folder))
    before = photos_of(uri)
    for name in ("new.png", "newer.png"):
        write_photo(album / name, len(name))
    (album / "0.png").unlink()
    update(folder, network, album)
    dies, calls = True, 0
    while dies:
        calls, dies = calls + 4, False
        server, left = Server(uri), calls

        def dying(function, *arguments, told=server._call, **more):
            nonlocal left, dies
            left -= 1
            if not left:
                dies = True
                raise Died
            return told(function, *arguments, **more)

        monkeypatch.setattr(server, "_call", dying)
        try:
            milvus_publish.publish(server, open_index(folder))
        except Died:
            assert photos_of(uri) in (before, on_disk(folder))
        if len(photos_of(uri)) == 5:  # all that is left is to drop the old one
            break
    assert calls > 8
    milvus_publish.publish(Server(uri), open_index(folder))
    assert photos_of(uri) == on_disk(folder) and len(names(uri)) == 2


def test_photos_of_others_are_left_alone(uri, tmp_path, monkeypatch):
    features, codebook = gallery(60)
    own, other = (write(tmp_path / name, features, codebook) for name in ("own", "other"))
    server = Server(uri)
    milvus_publish.publish(server, own)
    for action in (milvus_publish.check_own, milvus_publish.publish):
        refused(lambda action=action: action(server, other.folder if action is milvus_publish.check_own else other),
                "holds the photos of another index than", "name another --collection")  # fmt: skip
    assert len(open_milvus(uri)) == 60 and len(names(uri)) == 2
    monkeypatch.setattr(milvus_publish, "check_own", lambda *_: None)  # as if it had come while they were written
    monkeypatch.setattr(Server, "current", lambda self: None)
    refused(lambda: milvus_publish.publish(server, other), "alias")
    assert len(names(uri)) == 2
    monkeypatch.undo()
    assert open_milvus(uri).generation.startswith(f"photo_index_{milvus_publish._mark(own.folder)}")
    milvus_publish.publish(Server(uri, "others"), other)
    assert len(open_milvus(uri)) == len(open_milvus(uri, "others")) == 60


def test_one_process_publishes_an_index(uri, tmp_path):
    features, codebook = gallery(60)
    own = write(tmp_path / "index", features, codebook)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(own.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=ROOT,
    )  # fmt: skip
    assert holder.stdout.readline() == "holding\n"
    refused(lambda: milvus_publish.publish(Server(uri), own), "is publishing there; wait until it ends")
    holder.communicate()
    assert milvus_publish.publish(Server(uri), own)


HOLDS = """
import sys
from utils.files import folder_lock
with folder_lock(sys.argv[1], "publishing"):
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_a_collection_of_something_else_is_refused(uri, tmp_path):
    refused(lambda: open_milvus(uri), f"photo_index at {uri}: no index of photos; make one")
    client = Server(uri).client
    client.create_collection("photo_index", dimension=8)
    refused(lambda: open_milvus(uri), "was not created by search_photos.py; name another --collection")
    features, codebook = gallery(60)
    own = write(tmp_path / "index", features, codebook)
    refused(lambda: milvus_publish.publish(Server(uri), own), "was not created by search_photos.py")
    client.rename_collection("photo_index", "cats")
    client.create_alias("cats", "photo_index")
    refused(lambda: open_milvus(uri), "was not created by search_photos.py; name another --collection")
    refused(lambda: milvus_publish.publish(Server(uri), own), "was not created by search_photos.py")
    assert names(uri) == ["cats"]


DAMAGED = "kept_00000000_0123456789abcdef"


def said(change):
    """A damage: what an index tells of itself is what `change` makes of it."""
    return lambda server, text: change(text)


def with_folders(*folders):
    return said(lambda text: json.dumps(json.loads(text) | {"folders": folders}))


def with_keys(**changes):
    """A damage: added or removed photos are others."""
    values = {
        name: milvus_about.array_to_text(value) if isinstance(value, np.ndarray) else value
        for name, value in changes.items()
    }
    return said(lambda text: json.dumps(json.loads(text) | values))


def metadata(**changes):
    return said(lambda text: json.dumps(json.loads(text) | {"facts": json.loads(text)["facts"] | changes}))


def table(part, content):
    """A damage: a part of the table of cells is this array, or file."""
    file = io.BytesIO(content if isinstance(content, bytes) else b"")
    if isinstance(content, np.ndarray):
        np.save(file, content)
    encoded = base64.b64encode(file.getvalue()).decode()
    return said(lambda text: json.dumps(json.loads(text) | {"table": json.loads(text)["table"] | {part: encoded}}))


def photos(kind="FLAT", metric="L2", width=32, without=None, value=32**-0.5, count=60):
    """A damage: the photos are others."""

    def damage(server, text):
        server.client.drop_collection(DAMAGED)
        schema = server.client.create_schema(auto_id=False)
        types = {"row": "INT64", "cell": "INT64", "gone": "INT64", "path": "VARCHAR", "thumbnail": "VARCHAR"}
        for field, type_ in types.items():
            if field != without:
                schema.add_field(field, DataType[type_], is_primary=field == "row", max_length=99)
        schema.add_field("feature", DataType.FLOAT_VECTOR, dim=width)
        params = server.client.prepare_index_params()
        params.add_index("feature", index_type=kind, metric_type=metric)
        server.client.create_collection(DAMAGED, schema=schema, index_params=params)
        row = {"path": '"/a"', "thumbnail": "", "cell": 0, "gone": 9, "feature": np.full(width, value, np.float32)}
        row.pop(without, None)
        server.client.insert(DAMAGED, [{**row, "row": number} for number in range(count)])
        return json.dumps(json.loads(text) | {"photos": DAMAGED})

    return damage


DAMAGES = {
    "no JSON": (said(lambda _: "\x80\x04."), "("), "deep JSON": (said(lambda _: "[" * 10**5), "("),
    "nothing": (said(lambda _: ""), "("), "a list": (said(lambda _: "[]"), "("),
    "torn": (said(lambda text: text[:-99]), "("),
    "another version": (metadata(format=3), "made by another version"),
    "folders that are numbers": (metadata(folders=[1]), "made by another version"),
    "a pickle": (table("codes", pickle.dumps({"a": 1})), "("), "no array": (table("ends", b""), "("),
    "an endless array": (table("ends", NPY % b"1000000000000"), "("),
    "other numbers": (table("ends", np.float32([60])), "ends holds other values"),
    "cells without end": (table("ends", np.array([10**12])), "do not fit together"),
    "spheres of no size": (table("radii", np.float32([np.nan])), "do not fit together"),
    "folders that are none": (with_folders(["a", 0, 0, 61]), "malformed folder list"),
    "folders too deep": (with_folders(["a", 41, 0, 5]), "malformed folder list"),
    "folders of nothing": (with_folders(["a", 0, 5, 5]), "a folder without photos"),
    "another codebook": (table("codebook", gallery(60)[1][:, ::-1].copy()), "not in the cells of their codes"),
    "another width in words": (metadata(width=33), "do not fit together"),
    "photos that are elsewhere": (said(lambda text: json.dumps(json.loads(text) | {"photos": "x"})), "name"),
    "an added photo that is none": (with_keys(sorted=59), "malformed lists of added"),
    "a photo removed twice": (with_keys(removed=np.array([3, 3])), "malformed lists of added"),
    "a removed photo that is none": (with_keys(removed=np.array([60])), "malformed lists of added"),
    "all photos removed": (with_keys(removed=np.arange(60)), "malformed lists of added"),
    "removed photos that are not there": (with_keys(removed=np.array([3])), "malformed folder list"),
    "an added photo of no row": (with_keys(sorted=59, tail_rows=np.array([-1])), "malformed list of added"),
    "an added photo beyond the end": (with_keys(sorted=59, tail_rows=np.array([60])), "malformed list of added"),
    "a photo is gone": (photos(count=59), "59 photos, not 60"),
    "vectors of another width": (photos(width=16), "features of 16 values, not 32"),
    "other fields": (photos(without="thumbnail"), "not those of photos"),
    "a search that is not exact": (photos("HNSW"), "its search is not exact"),
    "another metric": (photos(metric="IP"), "its search is not exact"),
    "features of no length": (photos(value=0), "not of length 1"),
    "photos of another index": (photos(), "not in the cells of their codes"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_collection_is_refused_in_one_line(damage, kept, uri, monkeypatch):
    server, (change, told) = kept[1], DAMAGES[damage]
    text = milvus.read_about(server, server.current())
    assert len(open_milvus(uri, "kept")) == 60
    text = change(server, text)
    monkeypatch.setattr(milvus, "read_about", lambda *_: text)
    refused(
        lambda: open_milvus(uri, "kept"), f"kept at {uri}: damaged index (", told, "index into another --collection"
    )


def test_the_page_shows_what_is_in_milvus(uri, tmp_path, monkeypatch):
    pytest.importorskip("starlette", reason="starlette is not installed (requirements-search.txt)")
    from pages import PageEncoder, drawing, visitor

    from photo_search import server

    monkeypatch.setattr(server, "open_searcher", lambda place, *_: Searcher(open_index_at(place), PageEncoder()))
    album, folder, network = write_album(tmp_path / "album", 12), tmp_path / "index", PageEncoder()
    update(folder, network, album, clusters=2)
    milvus_publish.publish(Server(uri), open_index(folder))
    one, other = (visitor(server.ReloadingIndex(place)) for place in (folder, Server(uri)))
    about = [each.get("/about").json() for each in (one, other)]
    stamp = about[1].pop("index")
    about[0].pop("index")
    assert about[0] == about[1] and len(about[0]["folders"]) == 4
    for query in ("k=5", "k=12&folder=1", "k=4&folder=2&matching=one-to-one"):
        found = [each.post(f"/find?{query}", content=drawing()).json()["found"] for each in (one, other)]
        shown = [[(photo["path"], pytest.approx(photo["score"], abs=1e-12)) for photo in photos] for photos in found]
        assert shown[0] == shown[1] and found[1]
    photo = found[1][0]["photo"]
    like = [each.post(f"/find?photo={photo}").json()["found"] for each in (one, other)]
    assert len(like[1]) == 11 and photo not in [each["photo"] for each in like[1]]
    assert other.get(f"/thumbnail/{stamp}/{photo}").content == open_milvus(uri).thumbnail(photo)
    assert other.get(f"/photo/{stamp}/{photo}").content == Path(found[1][0]["path"]).read_bytes()
    write_photo(album / "new.png", 99)
    update(folder, network, album)
    milvus_publish.publish(Server(uri), open_index(folder))
    assert other.get("/about").json()["photos"] == 13 and other.get(f"/thumbnail/{stamp}/{photo}").status_code == 410
    Server(uri).client.drop_alias("photo_index")
    assert other.get("/about").status_code == 503


ANSWERS = {
    "a row that is none": ("search", lambda hits: hits[0].update(row=60)),
    "a row below all": ("search", lambda hits: hits[0].update(row=-1)),
    "a text for a row": ("search", lambda hits: hits[0].update(row="1")),
    "a row twice": ("search", lambda hits: hits[0].update(row=hits[1]["row"])),
    "a cell that is none": ("search", lambda hits: hits[0]["entity"].update(cell=10**6)),
    "a distance that is none": ("search", lambda hits: hits[0].update(distance=float("nan"))),
    "distances in disorder": ("search", lambda hits: hits[0].update(distance=9.0)),
    "too many": ("search", lambda hits: hits.extend([{**hits[-1], "row": 59}] * 2000)),
    "too few": ("search", lambda hits: hits.clear()),
    "features that are not finite": ("query", lambda rows: rows[0].update(feature=[float("nan")] * 32)),
    "features of another width": ("query", lambda rows: rows[0].update(feature=[1.0])),
    "photos missing": ("query", lambda rows: rows.pop()),
    "a path that is none": ("query", lambda rows: rows[0].update(path="a.jpg")),
    "no row": ("search", lambda hits: hits[0].pop("row")),
    "no cell": ("search", lambda hits: hits[0]["entity"].clear()),
    "a path in disguise": ("query", lambda rows: rows[0].update(path='"a.jpg"')),
}


def test_thumbnails_that_are_none(kept, monkeypatch):
    there = open_milvus(kept[1].uri, "kept")
    for text in ("a", None, 5, "雪"):
        monkeypatch.setattr(there.server, "call", lambda *_, text=text, **__: [{"row": 3, "thumbnail": text}])
        refused(lambda: there.thumbnail(3), "damaged index (")


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_are_checked(answer, kept, monkeypatch):
    there, features = open_milvus(kept[1].uri, "kept"), kept[0].cells.features
    asked, spoil = ANSWERS[answer]

    def call(method, *arguments, told=there.server.call, **more):
        result = told(method, *arguments, **more)
        if method != asked:
            return result
        rows = [dict(each) for each in (result[0] if method == "search" else result)]
        spoil(rows)
        return [rows] if method == "search" else rows

    monkeypatch.setattr(there.server, "call", call)
    refused(
        lambda: Searcher(there, None).find_features(features[7]), "damaged index (", "index into another --collection"
    )


@pytest.mark.parametrize(("uri", "told"), [
    ("", "is not an address"), ("milvus", "is not an address"), ("ftp://127.0.0.1", "is not an address"),
    ("http://", "is not an address"), ("http://127.0.0.1:99999", "is not an address"),
    ("http://a b", "is not an address"),
    ("none/photos.db", "no such file"), ("photos.db", "no such file; make it with search_photos.py index"),
    ("file.db", "another process may have it open, or correct"), ("http://root:secret@127.0.0.1", "MILVUS_TOKEN"),
])  # fmt: skip
def test_addresses_that_are_none(uri, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.db").write_text("not a folder of milvus-lite")
    refused(lambda: open_milvus(uri), told, "--uri")
    with pytest.raises(InputError) as error:
        open_milvus(uri)
    assert "secret" not in str(error.value)
    refused(lambda: Server("none/photos.db"), "its folder does not exist; make it, or correct --uri")


def test_names_that_are_none():
    for name in ("", "a-b", "1a", "a b", "a" * 300, "photo.index"):
        refused(lambda name=name: open_milvus("http://127.0.0.1:1", name), f"--collection {name}: ")


def test_servers_that_are_none(monkeypatch):
    monkeypatch.setattr(milvus, "REQUEST_TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        for port in (free_port(), silent.getsockname()[1]):
            refused(
                lambda port=port: open_milvus(f"http://127.0.0.1:{port}"),
                "see whether Milvus runs there, or correct --uri",
            )
