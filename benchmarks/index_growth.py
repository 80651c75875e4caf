"""Seconds and bytes of an update of an index against the share of photos that changed, and of opening and searching it.

    .venv/bin/python benchmarks/index_growth.py --folder DIR
    .venv/bin/python benchmarks/index_growth.py --folder DIR --photos 1000 10000 --figure growth.png

Synthetic features of 768 values; no network is needed. The files of the photos are small and never decoded, but for
the new ones. Half of the changes are new photos, half are removed ones. "scan" is the search for the files, which is
included in the seconds of the update. Each update begins with the same index without a tail; "all written" is an update
that sorts all photos anew, as every update did before photos were appended. Bytes are those that the process writes.
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
from PIL import Image  # noqa: E402

from photo_search import update  # noqa: E402
from photo_search.index import RECORD, open_index  # noqa: E402
from photo_search.index_writer import write_index  # noqa: E402
from photo_search.photos import find_photos  # noqa: E402

WIDTH, CLUSTERS, PHOTOS_PER_FOLDER, BLOCK = 768, 100, 1000, 10_000
METADATA = {
    "checkpoint": "none", "sha256": "", "model": "none", "imagenet_classes": 1, "input_size": 32, "width": WIDTH,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--photos", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    add("--shares", type=float, nargs="+", default=[0, 0.0001, 0.001, 0.01, 0.05], help="of the photos that change")
    add("--folder", type=Path, default=Path("growth_benchmark"), help="takes photos and indexes")
    add("--figure", type=Path, help="draw the results into this file")
    add("--records", type=Path, metavar="FILE", help="append what benchmarks/growth.py draws")
    add("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(options.folder, *options.job)))
        return
    sys.stdout.reconfigure(line_buffering=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print("   photos   changed  update s  of CPU  scan s  of CPU  written MB  open s  search ms  memory GB")
    results = []
    for count in options.photos:
        folder = options.folder / str(count)
        try:
            make(folder, count)
            changes = list(dict.fromkeys(round(share * count) for share in options.shares))
            for changed, is_appended in [*((each, True) for each in changes), (changes[-1], False)]:
                job = json.dumps([changed, is_appended])
                command = [sys.executable, __file__, "--folder", str(folder), "--job", job]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append({"photos": count, "changed": changed, **json.loads(done.stdout)})
                print_result(results[-1])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if options.figure:
        draw(results, options.figure)
    if options.records:
        with open(options.records, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record(each)) + "\n" for each in results)


def print_result(each):
    figures = f"{each['seconds']:9.2f} {each['cpu']:7.2f} {each['scan']:7.2f} {each['scan_cpu']:7.2f}"
    figures += f" {each['bytes'] / 1e6:11.2f} {each['open']:7.2f}"
    rest = f"{each['search'] * 1e3:10.1f} {each['memory']:10.2f}   {'' if each['appended'] else 'all written'}"
    print(f"{each['photos']:9,} {each['changed']:9,} {figures} {rest}")


def record(each):
    """A result as a record of benchmarks/growth.py."""
    changed = f"{100 * each['changed'] / each['photos']:g} % changed" if each["changed"] else "nothing changed"
    what = changed if each["appended"] else "all written anew"
    return {"series": f"update, {what}", "photos": each["photos"], "seconds": each["seconds"]}


def make(folder, count):
    """Photos that are small files, and their index, which is copied before each update."""
    rng = np.random.default_rng(0)
    paths = [folder / f"album/{number // PHOTOS_PER_FOLDER:04d}/{number:07d}.jpg" for number in range(count)]
    records = np.zeros(count, RECORD)
    for number, path in enumerate(paths):
        if number % PHOTOS_PER_FOLDER == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(b"%d" % number)
        about = path.stat()
        records["size"][number], records["mtime"][number] = about.st_size, about.st_mtime_ns
    records["thumbnail_size"], records["fitted"] = 1, 1
    records["digest"] = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    (folder / "index").mkdir()
    (folder / "index/thumbnails-1.bin").write_bytes(b"-")
    with open(folder / "raw", "wb") as file:
        for _ in range(0, count, BLOCK):
            file.write(classes(rng, BLOCK).tobytes())
    features = np.memmap(folder / "raw", np.float32, "r").reshape(-1, WIDTH)
    metadata = METADATA | {
        "folders": [str((folder / "album").resolve())],
        "exclude": [],
        "thumbnails": "thumbnails-1.bin",
    }
    codebook = np.ascontiguousarray(features[:CLUSTERS].reshape(CLUSTERS, 2, -1).swapaxes(0, 1))
    sorted_paths = [os.fsencode(path.resolve()) for path in paths]
    write_index(folder / "index", metadata, (sorted_paths, records), lambda chosen: features[chosen], codebook)
    (folder / "raw").unlink()


def classes(rng, count):
    """Features (count, WIDTH) float32 of length 1 of photos of 200 classes."""
    centres = np.random.default_rng(1).normal(size=(200, WIDTH)).astype(np.float32)
    values = centres[rng.integers(200, size=count)] + rng.standard_normal((count, WIDTH), np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


class Encoder:
    """Draws features."""

    metadata = METADATA

    def embed(self, images):
        return classes(np.random.default_rng(len(images)), len(images))


def measure(folder, changed, is_appended):
    """Update a copy of the index after changes, which are taken back: figures of print_result."""
    album, index = folder / "album", folder / "copy"
    index.mkdir()
    for path in (folder / "index").iterdir():  # links: an update replaces files or appends to new ones
        os.link(path, index / path.name)
    (index / "thumbnails-1.bin").unlink()
    shutil.copy(folder / "index/thumbnails-1.bin", index)
    added = [album / f"0000/new {number}.jpg" for number in range(changed - changed // 2)]
    for number, path in enumerate(added):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    removed = sorted(album.rglob("0*.jpg"))[:: max(1, len(open_index(index)) // max(1, changed // 2))][: changed // 2]
    for path in removed:
        path.rename(path.with_suffix(".away"))
    update.MAX_TAIL_SHARE = update.MAX_TAIL_SHARE if is_appended else -1
    try:
        options = update.IndexOptions([str(album.resolve())])
        _, scan, scan_cpu = timed(lambda: find_photos(options.folders))
        before = written()
        stats, seconds, cpu = timed(lambda: update.update_index(index, Encoder, None, options))
        figures = {"seconds": seconds, "cpu": cpu, "scan": scan, "scan_cpu": scan_cpu, "bytes": written() - before}
        assert (stats.new, stats.removed) == (len(added), len(removed))
        return {**figures, "appended": is_appended, **search(index)}
    finally:
        for path in removed:
            path.with_suffix(".away").rename(path)
        for path in added:
            path.unlink()
        shutil.rmtree(index)


def search(folder):
    """Seconds to open an index and of a search, and the memory that is not of mapped files, in GB."""
    started = time.perf_counter()
    index = open_index(folder)
    opened = time.perf_counter() - started
    queries, times = classes(np.random.default_rng(5), 20), []
    for query in queries:
        started = time.perf_counter()
        index.nearest(query, 20, 0.2)
        times.append(time.perf_counter() - started)
    status = Path("/proc/self/status").read_text()
    memory = int(status.split("RssAnon:")[1].split()[0]) / 1e6
    return {"open": opened, "search": float(np.median(times[10:])), "memory": memory}


def timed(function):
    """(result, seconds, seconds of the processor) of a function."""
    started, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - started, time.process_time() - cpu


def written():
    """Bytes that this process has written."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def draw(results, path):
    """Seconds and bytes of updates against the share that changed, a line for each number of photos."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, (key, name) in zip(figure.subplots(1, 2), (("seconds", "seconds"), ("bytes", "MB written")), strict=True):
        for count in dict.fromkeys(each["photos"] for each in results):
            own = [each for each in results if each["photos"] == count and each["appended"]]
            shares = [100 * each["changed"] / count for each in own]
            axis.plot(
                shares, [each[key] / (1e6 if key == "bytes" else 1) for each in own], "o-", label=f"{count:,} photos"
            )
        axis.set(xscale="symlog", yscale="log", xlabel="changed photos, %", ylabel=f"{name} of an update")
        axis.set_xscale("symlog", linthresh=0.01)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
