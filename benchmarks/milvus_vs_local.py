"""Search in Milvus beside the local engine: the same photos, what a query asks for, and how long it takes.

    .venv/bin/python benchmarks/milvus_vs_local.py --folder DIR
    .venv/bin/python benchmarks/milvus_vs_local.py --uri http://HOST:PORT --photos 1000000
    .venv/bin/python benchmarks/milvus_vs_local.py --counts --photos 1000000

Clustered features of 768 values, as in benchmarks/search.py, M 2. A milvus-lite server is started on a port of this
machine and killed at the end, unless --uri names another one, which needs an empty collection "engines". Each query
goes to both engines, one-to-many and one-to-one, and it is an error if they find other photos, or in another order.
--counts does without Milvus: the features in memory answer the questions, which are counted.
"""

import argparse
import functools
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import numpy_sort  # noqa: E402

numpy_sort.choose_sort_kernel()  # before NumPy, as in the scripts
import numpy as np  # noqa: E402
from search import clustered, make  # noqa: E402

from photo_search import remote_search  # noqa: E402
from photo_search.index import open_index  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--photos", type=int, default=20_000)
    add("--queries", type=int, default=100)
    add("--clusters", type=int, default=100, metavar="K")
    add("-k", type=int, default=20)
    add("--uri", help="a Milvus that runs (default: a milvus-lite server is started)")
    add("--counts", action="store_true", help="count what a query asks for, without Milvus")
    add("--folder", type=Path, default=Path("engines_benchmark"), help="where index and server go")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, K {options.clusters}, M 2, k {options.k}")
    server = None
    try:
        make(options.folder / "index", clustered, options.photos, options.clusters)
        index = open_index(options.folder / "index")
        sizes = np.diff(index.cells.cell_ends, prepend=0)
        print(f"{len(index):,} photos in {len(sizes):,} cells, {sizes.mean():.1f} a cell, {sizes.max():,} at most")
        if options.counts:
            search, asked = counting(index)
        else:
            server, uri = (None, options.uri) if options.uri else start(options.folder / "server")
            search, asked = published(index, uri)
        queries = clustered(np.random.default_rng(3), options.queries)
        for name, weight in (("one-to-many", 0.8), ("one-to-one", 0)):
            compare(name, index, search, asked, queries, options.k, weight)
    finally:
        if server:
            server.kill()
            server.wait()
        shutil.rmtree(options.folder, ignore_errors=True)


def start(folder):
    """(process, address) of a milvus-lite server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    run = "import sys; from milvus_lite.cmdline import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-u", "-c", run, "server", "--data-dir", folder, "--host", "127.0.0.1", "--port", port]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    if "listening" not in process.stdout.readline():
        raise SystemExit("milvus-lite server does not start")
    return process, f"http://127.0.0.1:{port}"


def published(index, uri):
    """(the search of a copy in Milvus, the list to which it adds every request)."""
    from photo_search.milvus import Server, open_milvus
    from photo_search.milvus_publish import publish

    began = time.perf_counter()
    publish(Server(uri, "engines"), index)
    written = time.perf_counter()
    there = open_milvus(uri, "engines")
    print(f"copied to Milvus in {written - began:.1f} s, opened in {time.perf_counter() - written:.2f} s")
    asked, ask = [], there.server.call

    def counted(method, *arguments, **more):
        asked.append(method)
        return ask(method, *arguments, **more)

    there.server.call = counted

    def search(query, k, weight):
        found = there.nearest(query, k, weight)
        return found, there.paths_of(found.rows)

    return search, asked


def counting(index):
    """As `published`, for features in memory; the list has each question, and one for what is then read."""
    asked, places = [], np.argsort(index.cells.path_order)
    numbers = index.cells.cell_ends.searchsorted(places, side="right")
    features = index.cells.features[places]

    def answer(squares, chosen, limit):
        rows = np.arange(len(squares)) if chosen is None else np.flatnonzero(np.isin(numbers, chosen))
        if limit < len(rows):
            rows = rows[np.argpartition(squares[rows], limit - 1)[:limit]]
        rows = rows[np.argsort(squares[rows], kind="stable")]
        return rows, numbers[rows], squares[rows]

    def ask(squares, questions):
        asked.extend(["search"] * len(questions))
        return [answer(squares, *question) for question in questions]

    def fetch(rows):
        asked.extend(["query"] * 2)  # for features, and for paths
        return features[rows], numbers[rows]

    def search(query, k, weight):
        squares = np.maximum(2 - 2 * (features @ query), 0)
        found = remote_search.find_nearest_remote(index.cells, query, k, functools.partial(ask, squares), fetch, weight)
        return found, index.paths_of(places[found.rows])

    return search, asked


def compare(name, index, search, asked, queries, k, weight):
    """Ask both engines every query, and print what that took."""
    times, came, requests = [[], []], [], []
    for query in queries:
        began = time.perf_counter()
        one = index.nearest(query, k, weight)
        paths = index.paths_of(one.rows)
        times[0].append(time.perf_counter() - began)
        asked.clear()
        began = time.perf_counter()
        other, others = search(query, k, weight)
        times[1].append(time.perf_counter() - began)
        if paths != others or np.abs(one.scores - other.scores).max() > 1e-12:
            raise SystemExit(f"{name}: the engines differ")
        came.append(other.projected)
        requests.append(len(asked))
    local, there = (1e3 * np.median(each) for each in times)
    share = 100 * np.mean(came) / len(index)
    print(f"{name}: {len(queries)} queries, the same photos in the same order")
    print(f"  requests a query: {np.mean(requests):.1f}, {max(requests)} at most")
    print(f"  photos that came: {np.mean(came):,.0f} a query, {share:.2f} %")
    print(f"  median ms: {local:.1f} local, {there:.1f} there")


if __name__ == "__main__":
    main()
