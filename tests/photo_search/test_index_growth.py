"""An index grows: photos are appended and marked as removed, and each search equals comparing every photo."""

import io
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from albums import FakeEncoder, update, write_album, write_photo
from PIL import Image
from test_cells import WEIGHTS, brute_force
from test_update import contents, count, kills_until_new, photos_of

from datasets.images import resize, stack
from photo_search import index_writer
from photo_search import update as updates
from photo_search.index import TAIL_ARRAYS, open_index
from photo_search.photos import read_photo, thumbnail
from utils.cli import InputError
from utils.files import open_regular

FORMAT_1 = Path(__file__).with_name(
    "index_of_format_1"
)  # 12 photos of write_old_album; written before there was a tail
CHANGES = (2, 1, 1, 2, 0)  # of `grow`: new, changed, moved, removed and unreadable photos


class SteadyEncoder(FakeEncoder):
    """Features do not depend on the other photos of a batch, not even by rounding."""

    def embed(self, images):
        return np.concatenate([super(SteadyEncoder, self).embed(image[None]) for image in images])


@pytest.fixture
def network():
    return SteadyEncoder()


@pytest.fixture
def album(tmp_path):
    return write_album(tmp_path / "album", 40)


@pytest.fixture
def index(tmp_path):
    return tmp_path / "index"


@pytest.fixture
def grown(album, index, network, monkeypatch):
    """An index of 40 photos after `grow`, with a tail."""
    monkeypatch.setattr(updates, "MAX_TAIL_SHARE", 0.5)
    update(index, network, album, clusters=3)
    grow(album)
    assert count(update(index, network, album)) == CHANGES and has_tail(index)
    return index


@pytest.fixture(scope="module")
def grown_once(tmp_path_factory):
    """As `grown`, to be copied."""
    folder = tmp_path_factory.mktemp("grown")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "MAX_TAIL_SHARE", 0.5)
        update(folder / "index", SteadyEncoder(), write_album(folder / "album", 40), clusters=3)
        grow(folder / "album")
        update(folder / "index", SteadyEncoder(), folder / "album")
    return folder / "index"


@pytest.fixture
def copied(grown_once, index):
    """A copy of `grown_once`."""
    return shutil.copytree(grown_once, index)


def grow(album):
    (album / "a/1.png").rename(album / "a/moved.png")
    for name, seed in (("a/0new.png", 100), ("b/new.png", 101), ("3.png", 102)):
        write_photo(album / name, seed)
    (album / "b/c/5.png").unlink()
    (album / "6.png").unlink()


def has_tail(index):
    return any(name.startswith("tail_") for name in json.loads((index / "index.json").read_text())["files"])


def features_of_files(paths):
    """{path: features}, computed without an index."""
    return {str(path): SteadyEncoder().embed(stack([resize(read_photo(path, 32), 32)]))[0] for path in paths}


def assert_finds_what_comparing_all_finds(index, truth):
    """truth: {path: features} of all photos that the index should have."""
    opened, paths = open_index(index), sorted(truth, key=os.fsencode)
    assert sorted(opened.paths_of(range(len(opened))), key=os.fsencode) == paths
    features, codebook = np.stack([truth[path] for path in paths]), opened.cells.codebook
    rng = np.random.default_rng(len(paths))
    for query in (features[0], features[-1] + 0.3 * rng.normal(size=features.shape[1]).astype(np.float32)):
        query = query / np.linalg.norm(query)
        for weight in WEIGHTS if opened.clusters else (0,):
            for k in (1, 7, len(paths)):
                found = opened.nearest(query, k, weight)
                photos, scores = brute_force(features, codebook, query, k, weight)
                assert opened.paths_of(found.rows) == [paths[photo] for photo in photos]
                np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-14)
            for folder in opened.folders():
                found = opened.nearest(query, 5, weight, folder.rows(opened))
                photos, _ = brute_force(features, codebook, query, 5, weight, np.arange(folder.first, folder.last))
                assert opened.paths_of(found.rows) == [paths[photo] for photo in photos]


@pytest.mark.parametrize("clusters", [None, 4])
@pytest.mark.parametrize("share", [0.4, 2])
def test_after_any_changes_a_search_finds_what_comparing_all_photos_finds(
    clusters, share, album, index, network, monkeypatch
):
    monkeypatch.setattr(updates, "MAX_TAIL_SHARE", share)
    update(index, network, album, clusters=clusters)
    known, draw, seen = {}, random.Random(clusters), set()
    for _ in range(7):
        photos = sorted(album.rglob("*.png"))
        for path in draw.sample(photos, draw.randrange(4)):
            path.unlink()
        for path in draw.sample([path for path in photos if path.exists()], 3):
            draw.choice([
                lambda path=path: write_photo(path, draw.randrange(200, 300)),
                lambda path=path: path.rename(path.with_name(f"{draw.randrange(10**6)}.png")),
                lambda path=path: os.utime(path),
                lambda path=path: shutil.copy(path, path.with_name(f"copy {draw.randrange(10**6)}.png")),
            ])()  # fmt: skip
        for _ in range(draw.randrange(4)):
            write_photo(album / draw.choice("abz") / f"{draw.randrange(10**6)}.png", draw.randrange(100, 200))
        update(index, network, album)
        photos = list(album.rglob("*.png"))
        new = {path: path.read_bytes() for path in photos}
        for path, content in new.items():
            if content not in known:
                known |= {content: features_of_files([path])[str(path)]}
        assert_finds_what_comparing_all_finds(index, {str(path): known[content] for path, content in new.items()})
        seen.add(has_tail(index))
    assert seen == ({True, False} if share < 1 else {True})


def test_few_photos_are_appended(album, index, network, grown):
    opened = open_index(grown)
    assert len(opened) == 40 and len(opened.cells.features) == 40 and len(opened.cells.tail_features) == 4
    assert opened.share_new == pytest.approx(3 / 40)  # the photo that was moved is not new to the clusters
    held = photos_of(grown)
    truth = features_of_files(album.rglob("*.png"))
    assert {path: features.tobytes() for path, features in truth.items()} == {path: held[path][0] for path in held}
    assert all(held[str(path)][1] == thumbnail(read_photo(path, 32)) for path in album.rglob("*.png"))
    before = contents(grown)
    assert count(update(index, network, album)) == (0, 0, 0, 0, 0) and contents(grown) == before
    write_photo(album / "one more.png", 103)
    network.seen = 0
    update(index, network, album)
    after = contents(grown)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {f"{name}-1.bin" for name in TAIL_ARRAYS if name != "removed"} | {
        "thumbnails-1.bin",
        "index.json",
    }
    assert all(after[name].startswith(before[name]) for name in changed - {"index.json"}) and network.seen == 1
    assert sum(len(after[name]) - len(before[name]) for name in changed) < 3000
    assert not list(grown.glob("unfinished*"))


def test_a_large_tail_is_merged(album, index, network, grown, monkeypatch):
    monkeypatch.setattr(updates, "MAX_TAIL_SHARE", 0.05)
    codebook, share = open_index(grown).cells.codebook, open_index(grown).share_new
    write_photo(album / "one more.png", 103)
    update(index, network, album)
    opened = open_index(grown)
    assert not has_tail(grown) and not list(grown.glob("tail_*")) and len(opened.cells.features) == len(opened) == 41
    np.testing.assert_array_equal(opened.cells.codebook, codebook)
    assert opened.share_new == pytest.approx((40 * share + 1) / 41)
    assert_finds_what_comparing_all_finds(index, features_of_files(album.rglob("*.png")))


def test_a_refit_merges_the_tail(album, index, network, grown):
    update(index, network, album, refit=True)
    assert not has_tail(grown) and open_index(grown).share_new == 0
    assert_finds_what_comparing_all_finds(index, features_of_files(album.rglob("*.png")))


def test_other_folders_or_patterns_alone_rewrite_no_photos(album, index, network):
    update(index, network, album)
    before = contents(index)
    update(index, network, album, exclude=["none"])
    after = contents(index)
    assert {name for name in after if after[name] != before[name]} == {"index.json"}
    assert open_index(index).metadata["exclude"] == ["none"]


def write_old_album(folder):
    """The photos of FORMAT_1, in another folder."""
    for number in range(12):
        path = folder / f"{('', 'a/', 'b/c/')[number % 3]}{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def old_features():
    """{path: features} of FORMAT_1, read by NumPy alone."""
    features, records = (np.load(FORMAT_1 / f"{name}-1.npy") for name in ("features", "records"))
    paths, ends = np.load(FORMAT_1 / "paths-1.npy").tobytes(), [0, *records["path_end"]]
    return {paths[ends[row] : ends[row + 1]].decode(): features[row] for row in range(12)}


def test_an_index_of_the_earlier_format_is_read_as_it_is(index):
    shutil.copytree(FORMAT_1, index)
    before = contents(index)
    opened = open_index(index)
    assert opened.clusters == (2, 3) and opened.metadata["format"] == 1
    assert_finds_what_comparing_all_finds(index, old_features())
    assert Image.open(io.BytesIO(opened.thumbnail(3))).size == (4, 4)
    assert contents(index) == before


@pytest.mark.parametrize("share", [0.05, 3])
def test_an_index_of_the_earlier_format_is_converted_by_the_first_write(share, index, tmp_path, monkeypatch):
    monkeypatch.setattr(updates, "MAX_TAIL_SHARE", share)
    shutil.copytree(FORMAT_1, index)
    album = write_old_album(tmp_path / "album")
    totals = update(index, lambda: pytest.fail("features are computed again"), album)
    assert count(totals) == (0, 0, 12, 0, 0) and has_tail(index) == (share > 1)
    assert open_index(index).metadata["format"] == 2
    moved = {path.replace("/photos", str(album), 1): features for path, features in old_features().items()}
    assert_finds_what_comparing_all_finds(index, moved)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
def test_a_killed_append_leaves_the_old_index_or_the_new_one(album, tmp_path, monkeypatch):
    monkeypatch.setattr(updates, "MAX_TAIL_SHARE", 0.5)
    update(tmp_path / "old", FakeEncoder(), album, batch_size=3)
    (album / "0.png").unlink()
    update(tmp_path / "old", FakeEncoder(), album, batch_size=3)
    assert has_tail(tmp_path / "old")
    grow(album)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    update(tmp_path / "new", FakeEncoder(), album, batch_size=3)
    assert kills_until_new(tmp_path, album, random.Random(0), rounds=2, most=60) >= 6


@pytest.mark.parametrize("moment", ["append", "merge"])
def test_a_writer_that_ends_before_the_switch_changes_nothing(moment, album, index, network, grown, monkeypatch):
    before, held = contents(grown), photos_of(grown)
    write_photo(album / "one more.png", 103)
    with monkeypatch.context() as killed:
        killed.setattr(updates, "MAX_TAIL_SHARE", 0.5 if moment == "append" else 0.05)
        killed.setattr(index_writer, "write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            update(index, network, album)
    assert photos_of(grown) == held and contents(grown)["index.json"] == before["index.json"]
    network.seen = 0
    update(index, network, album)
    assert network.seen == 0 and has_tail(grown) and not list(grown.glob("*-2.npy"))
    assert_finds_what_comparing_all_finds(index, features_of_files(album.rglob("*.png")))


def test_a_reader_keeps_its_photos_while_others_are_appended(album, index, network, grown):
    opened, before = open_index(grown), photos_of(grown)
    write_photo(album / "one more.png", 103)
    (album / "9.png").unlink()
    update(index, network, album)
    rows = range(len(opened))
    read = zip(opened.paths_of(rows), opened.features_of(rows), opened.thumbnails_of(rows), strict=True)
    assert {path: (features.tobytes(), small) for path, features, small in read} == before


def test_a_read_only_index_with_a_tail_is_searched(album, grown, monkeypatch):
    truth, open_file = features_of_files(album.rglob("*.png")), os.open

    def refuse(path, flags, *more, **options):
        if str(grown) in os.fspath(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", path)
        return open_file(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert_finds_what_comparing_all_finds(grown, truth)


def spoil_tail(name, change):
    def spoil(index):
        path, metadata = index / f"{name}-1.bin", json.loads((index / "index.json").read_text())
        content = np.fromfile(path, TAIL_ARRAYS[name])
        change(content)
        content.tofile(path)
        assert path.stat().st_size == metadata["files"][path.name]

    return spoil


def put(field, value):
    return lambda array: (array[field] if isinstance(field, str) else array).__setitem__(
        field if not isinstance(field, str) else 0, value
    )


DAMAGES = {
    **{f"{name} is missing": lambda index, name=name: (index / f"{name}-1.bin").unlink() for name in TAIL_ARRAYS},
    **{
        f"{name} is torn": lambda index, name=name: os.truncate(
            index / f"{name}-1.bin", (index / f"{name}-1.bin").stat().st_size - 1
        )
        for name in TAIL_ARRAYS
    },
    "a FIFO": lambda index: ((index / "removed-1.bin").unlink(), os.mkfifo(index / "removed-1.bin")),
    "codes of no word": spoil_tail("tail_codes", put(0, 3)),
    "negative codes": spoil_tail("tail_codes", put(0, -1)),
    "places beyond the end": spoil_tail("tail_places", put(0, 41)),
    "negative places": spoil_tail("tail_places", put(0, -1)),
    "photos that are none": spoil_tail("removed", put(0, 44)),
    "a photo removed twice": spoil_tail("removed", lambda array: put(0, array[1])(array)),
    "paths without end": spoil_tail("tail_records", put("path_end", 2**40)),
    "paths backwards": spoil_tail("tail_records", put("path_end", -5)),
    "thumbnails nowhere": spoil_tail("tail_records", put("thumbnail", 2**62)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tail_is_refused_in_one_line(copied, damage):
    DAMAGES[damage](copied)
    with pytest.raises(InputError, match="damaged index") as error:
        open_index(copied)
    assert str(error.value).startswith(f"{copied}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["features-1.npy", "outlines-1.npy", "tail_features-1.bin"])
def test_a_file_that_became_shorter_ends_in_one_line(copied, name):
    opened = open_index(copied)
    os.truncate(copied / name, 10)  # reading the mapped file would end the process by SIGBUS
    for read in (lambda: opened.nearest(np.ones(16, np.float32) / 4, 5, 0), lambda: opened.features_of([3])):
        with pytest.raises(InputError, match=f"damaged index \\({name} has become shorter\\)"):
            read()


def test_thumbnails_that_became_shorter_are_empty(copied):
    opened = open_index(copied)
    os.truncate(copied / "thumbnails-1.bin", 10)
    assert opened.thumbnails_of([3, 39])[1] == b""


@pytest.mark.parametrize("damage", ["lost", "torn", "a FIFO"])
def test_lost_thumbnails_are_made_again_and_no_features(damage, album, index, network, grown, capsys):
    held, path = photos_of(grown), grown / "thumbnails-1.bin"
    if damage == "torn":
        os.truncate(path, 500)
    else:
        path.unlink()
    if damage == "a FIFO":
        os.mkfifo(path)
    opened = open_index(grown)
    assert opened.thumbnails_of(range(3)) == [b""] * 3
    assert_finds_what_comparing_all_finds(grown, features_of_files(album.rglob("*.png")))
    write_photo(album / "one more.png", 103)
    network.seen = 0
    update(index, network, album)
    assert network.seen == 1 and "its thumbnails are lost, and are made again" in capsys.readouterr().err
    again = photos_of(grown)
    assert held.items() < again.items() and len(again) == 41
    assert [path.name for path in grown.glob("thumbnails*")] == ["thumbnails-2.bin"]


def test_files_that_may_not_be_read_are_no_damage(tmp_path, monkeypatch):
    update(tmp_path / "index", FakeEncoder(), write_album(tmp_path / "album"))
    name = str(tmp_path / "index/records-1.npy")

    def refuse(path, *more):
        if str(path) == name:
            raise PermissionError(13, "Permission denied", name)
        return open_regular(path, *more)

    monkeypatch.setattr("photo_search.index.open_regular", refuse)
    with pytest.raises(InputError, match=r"records-1\.npy: Permission denied; correct its permissions"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize("name", ["features-7.npy", "thumbnails-2.bin", "tail_paths-1.bin", "unfinished.features"])
def test_files_of_the_user_are_not_replaced(name, album, index, network):
    index.mkdir()
    (index / name).write_bytes(b"of the user")
    with pytest.raises(InputError, match=f"has {name}, but no index"):
        update(index, network, album)
    assert contents(index) == {name: b"of the user"}


@pytest.mark.parametrize("name", [
    "unfinished.photos", "unfinished.features", "thumbnails-1.bin", "features-2.npy", "outlines-2.npy", "codes-2.npy",
    "tail_features-1.bin", "removed-1.bin", "index.json", "unfinished.json",
])  # fmt: skip
def test_links_are_not_written_through(name, album, index, network, tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_bytes(b"of the user")
    update(index, network, album)
    (index / name).unlink(missing_ok=True)
    monkeypatch.setattr(index_writer, "remove_old_generations", lambda *_: None)
    monkeypatch.setattr(updates, "remove_old_generations", lambda *_: None)
    (index / name).symlink_to(precious)
    monkeypatch.setattr(updates, "MAX_TAIL_SHARE", 0.05 if name.endswith(".npy") else 0.5)
    write_photo(album / "one more.png", 103)
    try:
        update(index, network, album)
    except InputError as error:
        assert "\n" not in str(error)
    assert precious.read_bytes() == b"of the user"


@pytest.mark.parametrize("cores", [1, 64])
def test_any_number_of_cores_finds_the_same(cores, album, grown, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from photo_search import cells as search_cells

    with ThreadPoolExecutor(cores) as pool:
        monkeypatch.setattr(search_cells, "_threads", lambda: pool)
        monkeypatch.setattr(search_cells, "GROUP", 8)
        monkeypatch.setattr(search_cells, "SCAN_SHARE", 0)
        assert_finds_what_comparing_all_finds(grown, features_of_files(album.rglob("*.png")))


def test_damaged_indexes_are_searched_or_refused_in_one_line(tmp_path):
    """A few of those of `make fuzz`."""
    from helpers import fuzz_index

    whole = {path.name: path.read_bytes() for path in fuzz_index.make(tmp_path).iterdir()}
    draw = random.Random(1)
    for in_metadata in (True, False) * 30:
        fuzz_index.write_damaged(draw, whole, tmp_path / "damaged", in_metadata)
        fuzz_index.read(tmp_path / "damaged")
