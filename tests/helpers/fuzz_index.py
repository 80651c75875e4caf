"""Open and search thousands of damaged indexes; each must be searched, or refused in one line.

    make fuzz

A small index with a tail, and the files of an unfinished run, are damaged: bits, headers of arrays, values of
index.json. In half of the damaged indexes the sizes in index.json are those of the damaged files, so that these are
read. One process reads all, within bounds of memory and time, and leaves the index that caused a crash in its folder.
"""

import argparse
import collections
import copy
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/photo_search")]

import numpy as np  # noqa: E402
from albums import FakeEncoder, update, write_album, write_photo  # noqa: E402
from tqdm import tqdm  # noqa: E402

from helpers.fuzz_bounds import crash_with_traceback, limit_memory, limit_time  # noqa: E402
from photo_search import update as updates  # noqa: E402
from photo_search.index import INDEX_FILE, open_index  # noqa: E402
from photo_search.partial_index import PHOTOS_FILE, PartialIndex, unfinished_options  # noqa: E402
from utils.cli import InputError  # noqa: E402

MAX_EXTRA_BYTES = 400 << 20  # that opening an index may take on top of what the process has
CPU_SECONDS = 30  # that an index may take
ODD_VALUES = (
    None, True, -1, 0, 1, 3, 2**31, 2**63 - 1, 2**63, 10**400, -(2**63), 0.5, 1e400, float("nan"), "", "x", "\ud800",
    "a\0b", "/", "/a/../..", "a\nb", "\x1b[2J", "/etc/passwd", "x" * 10**5, [], [[]], ["/a"], ["\ud800"], [""], {},
    {"a": 1},
)  # fmt: skip
ODD_BYTES = (b"\x00", b"\xff" * 8, b"(", b"'", b"9" * 30, b"-", b"|O", b"<f8", b"\n", b"{" * 2000, b"L")


def make(folder):
    """An index of 40 photos with a tail, and the source of its unfinished run."""
    encoder, album = FakeEncoder(), write_album(folder / "album", 40)
    before, updates.MAX_TAIL_SHARE, append = updates.MAX_TAIL_SHARE, 1, updates.append_to_index
    try:
        update(folder / "index", encoder, album, clusters=3)
        (album / "0.png").unlink()
        write_photo(album / "new.png", 100)
        update(folder / "index", encoder, album)
        write_photo(album / "newer.png", 101)
        updates.append_to_index = lambda *_: 1 / 0
        update(folder / "index", encoder, album)
    except ZeroDivisionError:
        pass
    finally:
        updates.MAX_TAIL_SHARE, updates.append_to_index = before, append
    assert (folder / "index" / PHOTOS_FILE).exists()
    return folder / "index"


def damage_bytes(rng, content):
    """Damaged bytes of a file."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(min(len(content), rng.choice((130, 10**9))) or 1)
        change = rng.choice(("flip", "flip", "byte", "put in", "leave out", "cut", "double", "nothing"))
        if change == "flip" and content:
            content[min(at, len(content) - 1)] ^= 1 << rng.randrange(8)
        elif change == "byte" and content:
            content[min(at, len(content) - 1)] = rng.randrange(256)
        elif change == "put in":
            content[at:at] = rng.choice(ODD_BYTES)
        elif change == "leave out":
            del content[at : at + rng.randrange(1, 40)]
        elif change == "cut" and rng.random() < 0.3:
            del content[at:]
        elif change == "double" and rng.random() < 0.3:
            content += bytes(content)
    return bytes(content)


def damage_metadata(rng, metadata):
    """Damaged content of index.json."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.choice((metadata, metadata, metadata["files"] if type(metadata.get("files")) is dict else metadata))
        name = rng.choice(list(place) or ["x"])
        change = rng.choice(("value", "value", "leave out", "other name", "number"))
        if change == "leave out":
            place.pop(name, None)
        elif change == "other name":
            place[rng.choice(("x", "/etc/passwd", "../a.npy", "features-2.npy", "", "\ud800"))] = place.get(name)
        elif change == "number" and type(place.get(name)) is int:
            place[name] += rng.choice((-1, 1, 8, -(2**40), 2**40))
        else:
            place[name] = copy.deepcopy(rng.choice(ODD_VALUES))
    return metadata


def write_damaged(rng, whole, folder, in_metadata):
    """Make `folder` the index `whole` ({name: bytes}) with a damage in index.json or in another of its files.

    Returns the name of that file.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    name = INDEX_FILE if in_metadata else rng.choice(sorted(whole.keys() - {INDEX_FILE}))
    files = dict(whole)
    if name == INDEX_FILE and rng.random() < 0.8:
        files[name] = json.dumps(damage_metadata(rng, json.loads(whole[name]))).encode()
    else:
        files[name] = damage_bytes(rng, whole[name])
        metadata = json.loads(whole[INDEX_FILE])
        if name in metadata["files"] and rng.random() < 0.5:
            metadata["files"][name] = len(files[name])
            files[INDEX_FILE] = json.dumps(metadata).encode()
    for each, content in files.items():
        (folder / each).write_bytes(content)
    return name


def read(folder):
    """Do with an index what the commands do; returns the message of an InputError, or None."""
    try:
        index = open_index(folder)
        rows = range(len(index))
        for weight in (0, 0.2) if index.clusters else (0,):
            found = index.nearest(np.full(16, 0.25, np.float32), 5, weight)
            index.paths_of(found.rows), index.thumbnails_of(found.rows), index.digests_of(found.rows)
        for each in index.folders():
            index.nearest(np.full(16, 0.25, np.float32), 5, 0, each.rows(index))
        index.stored_paths(), index.features_of(rows), index.share_new, index.name
        unfinished_options(folder)
        source = {name: index.metadata[name] for name in updates.FEATURE_KEYS}
        thumbnails = folder / index.metadata["thumbnails"]
        partial = PartialIndex(folder, source, index.metadata["width"], (thumbnails, 1))
        updates.KnownPhotos(index, partial)
    except InputError as error:
        message = str(error)
        assert message.startswith(str(folder)) and message.isprintable() and len(message) < 600, message
        return message
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000, help="number of indexes of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    crash_with_traceback()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="photo_search.cells")  # in threads
    folder = Path(tempfile.mkdtemp(prefix="fuzz-index-"))
    whole = {path.name: path.read_bytes() for path in make(folder).iterdir()}
    assert read(folder / "index") is None
    limit_memory(MAX_EXTRA_BYTES)
    print(f"--seed {options.seed}; a crash leaves its index in {folder}", flush=True)
    rng, counts = random.Random(options.seed), collections.Counter()
    for number in tqdm(range(2 * options.files), desc="fuzz", unit="index", disable=None):
        name = write_damaged(rng, whole, folder / "damaged", in_metadata=number % 2 == 0)
        limit_time(CPU_SECONDS)
        is_refused = read(folder / "damaged") is not None
        limit_time()
        counts[INDEX_FILE if name == INDEX_FILE else "index files", "refused" if is_refused else "read"] += 1
    for (kind, end), count in sorted(counts.items()):
        print(f"{kind}: {count:,} {end}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
