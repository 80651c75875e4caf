"""Exact search at scale: time, the share of photos looked at, opening and memory, beside faiss where it is installed.

    .venv/bin/python benchmarks/search.py --folder DIR
    .venv/bin/python benchmarks/search.py --sizes 10000 --kinds clustered

Synthetic features of 768 values, an index on disk of each size and kind (3.5 GB for a million photos, deleted at the
end), and queries of the same kind. Each figure is the median of --queries searches after as many to warm up, in a
process of its own. Memory is resident memory after the searches, less what was resident of mapped files.

"clustered" features are those of a network trained to separate classes: 1000 classes in 64 directions, in which
photos of a class vary, too, and less in all others. "structureless" ones are uniform on the sphere: no bound helps.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import numpy_sort  # noqa: E402

numpy_sort.choose_sort_kernel()  # before NumPy, as in the scripts
import numpy as np  # noqa: E402

from photo_search.index import RECORD, open_index  # noqa: E402
from photo_search.index_writer import write_index  # noqa: E402

WIDTH, CLASSES, DIRECTIONS = 768, 1000, 64
INSIDE, OUTSIDE = 0.5, 0.4  # how far a photo is from its class, in those directions and in others; a class is at 1
BLOCK = 20_000


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--queries", type=int, default=30)
    add("--clusters", type=int, default=100, metavar="K")
    add("--folder", type=Path, default=Path("search_benchmark"), help="where indexes go")
    add("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    add("--records", type=Path, metavar="FILE", help="append what benchmarks/growth.py draws")
    add("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(JOBS[options.job](options.folder, options.queries)))
        return
    sys.stdout.reconfigure(line_buffering=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, K {options.clusters}, M 2, k 20")
    print("features          photos  what          median ms   looked at   outlines   opened s   memory GB")
    for kind in options.kinds:
        for size in options.sizes:
            folder = options.folder / f"{kind}-{size}"
            try:
                make(folder, KINDS[kind], size, options.clusters)
                for job in options.jobs:
                    result = _in_a_process(job, folder, options.queries)
                    _tell(kind, size, job, result)
                    if options.records and result:
                        _record(options.records, f"search, {job}, {kind}", size, result)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def _in_a_process(job, folder, queries):
    command = [sys.executable, __file__, "--job", job, "--folder", str(folder), "--queries", str(queries)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _tell(kind, size, job, result):
    if result is None:
        print(f"{kind:14} {size:9,}  {job:12}  not installed")
        return
    shares = [f"{100 * result[name]:9.1f} %" if name in result else " " * 11 for name in ("scanned", "projected")]
    opened = f"{result['opened']:10.2f}" if "opened" in result else " " * 10
    print(f"{kind:14} {size:9,}  {job:12} {result['ms']:10.1f} {' '.join(shares)} {opened} {result['memory']:11.2f}")


def _record(path, series, size, result):
    records = [{"series": series, "photos": size, "seconds": result["ms"] / 1e3, "memory_gb": result["memory"]}]
    if "opened" in result:
        records.append({"series": "open", "photos": size, "seconds": result["opened"]})
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def clustered(rng, count):
    """Photos of classes, (count, WIDTH) float32 of length 1."""
    own = np.random.default_rng(1)
    directions = np.linalg.qr(own.normal(size=(WIDTH, DIRECTIONS)))[0].T.astype(np.float32)
    classes = _unit(own.normal(size=(CLASSES, DIRECTIONS)))
    inside = classes[rng.integers(CLASSES, size=count)] + _noise(rng, count, DIRECTIONS, INSIDE)
    return _unit(inside @ directions + _noise(rng, count, WIDTH, OUTSIDE))


def structureless(rng, count):
    """Photos that have nothing in common."""
    return _unit(rng.standard_normal((count, WIDTH), np.float32))


def _noise(rng, count, width, length):
    return rng.standard_normal((count, width), np.float32) * np.float32(length / width**0.5)


KINDS = {"clustered": clustered, "structureless": structureless}


def _unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def make(folder, kind, size, clusters):
    """Write an index of `size` photos."""
    from sklearn.cluster import MiniBatchKMeans

    folder.mkdir(parents=True)
    raw = folder / "raw"
    with open(raw, "wb") as file:
        for number in range(0, size, BLOCK):
            file.write(kind(np.random.default_rng((2, number)), min(BLOCK, size - number)).tobytes())
    features = np.memmap(raw, np.float32, "r", shape=(size, WIDTH))
    sample = np.split(features[:: max(1, size // 20_000)], 2, axis=1)
    fits = [MiniBatchKMeans(clusters, n_init=1, random_state=0).fit(part).cluster_centers_ for part in sample]
    records = np.zeros(size, RECORD)
    records["thumbnail_size"], records["fitted"] = 1, 1
    (folder / "thumbnails-1.bin").write_bytes(b"-")
    paths = [f"/home/somebody/Pictures/{number // 1000:04d}/{number:07d}.jpg".encode() for number in range(size)]
    metadata = {
        "checkpoint": "", "sha256": "", "model": "", "imagenet_classes": 0, "input_size": 0, "width": WIDTH,
        "folders": ["/home/somebody/Pictures"], "exclude": [], "thumbnails": "thumbnails-1.bin",
    }  # fmt: skip
    codebook = np.stack(fits).astype(np.float32)
    write_index(folder, metadata, (paths, records), lambda chosen: features[chosen], codebook)
    raw.unlink()


def queries_of(folder, count):
    """Features of the same kind as those in a folder of `make`, which are not among them."""
    return KINDS[folder.name.split("-")[0]](np.random.default_rng(3), count)


def _measure(search, queries):
    """Median milliseconds, and what the searches returned."""
    half, times, results = len(queries) // 2, [], []
    for number, query in enumerate(queries):
        began = time.perf_counter()
        results.append(search(query))
        if number >= half:
            times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times)), results[half:]


def _memory():
    """Resident memory that is not of mapped files, GB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e6


def _ours(weight):
    def run(folder, count):
        from photo_search.cells import find_nearest

        began = time.perf_counter()
        index = open_index(folder)
        opened = time.perf_counter() - began
        index.cells.features.sum(axis=1)  # reads the file
        queries = queries_of(folder, 2 * count)
        ms, found = _measure(lambda query: find_nearest(index.cells, query, 20, weight), queries)
        shares = {
            name: float(np.mean([getattr(each, name) for each in found])) / len(index)
            for name in ("scanned", "projected")
        }
        return {"ms": ms, "opened": opened, "memory": _memory(), **shares}

    return run


def _brute_force(folder, count):
    index = open_index(folder)
    features = index.cells.features
    queries = queries_of(folder, 2 * count)

    def search(query):
        products = features @ query
        return np.argpartition(-products, min(20, len(products) - 1))[:20]

    return {"ms": _measure(search, queries)[0], "memory": _memory()}


def _faiss(folder, count):
    try:
        import faiss
    except ImportError:
        return None
    features = open_index(folder).cells.features
    index = faiss.IndexFlatL2(WIDTH)
    for start in range(0, len(features), BLOCK):
        index.add(np.ascontiguousarray(features[start : start + BLOCK]))
    queries = queries_of(folder, 2 * count)
    return {"ms": _measure(lambda query: index.search(query[None], 20), queries)[0], "memory": _memory()}


JOBS = {"one-to-many": _ours(0.8), "one-to-one": _ours(0), "numpy": _brute_force, "faiss": _faiss}

if __name__ == "__main__":
    main()
