"""Time, memory and agreement of the zero-shot evaluation, at the true sizes of the benchmarks on synthetic features.

    .venv/bin/python benchmarks/evaluation.py --benchmark sketchy
    .venv/bin/python benchmarks/evaluation.py --benchmark quickdraw --tasks protocol
    .venv/bin/python benchmarks/evaluation.py --tasks peers em
    .venv/bin/python benchmarks/evaluation.py --tasks scaling --records growth.jsonl

Each figure is taken in a process of its own, whose peak memory (everything in it, libraries too) stands beside it.
[x] marks what was measured on a part and extrapolated. Peers that are not installed (benchmarks/requirements.txt) are
left out, and named.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import numpy_sort  # noqa: E402

numpy_sort.choose_sort_kernel()  # before NumPy, as in the scripts
import numpy as np  # noqa: E402

from benchmarks.other_libraries import PEERS  # noqa: E402

SIZES = {  # unseen sketches, photos
    "sketchy": (15229, 17101),
    "sketchy_split": (12694, 12553),
    "tuberlin": (2400, 27989),
    "quickdraw": (92291, 54151),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--benchmark", choices=SIZES, default="sketchy")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--device", default="cpu", help="of ours; everything else runs on the CPU")
    add("--queries", type=int, help="of the comparison with peers (default: all)")
    add("--plain_queries", type=int, default=40, help="on which the plain definition is measured")
    add("--records", type=Path, help="file to which scaling adds records of benchmarks/growth.py, as lines of JSON")
    add("--only_ours", action="store_true", help="leave out what the protocol is compared with")
    add("--job", help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        name, *arguments = options.job.split(":")
        print(json.dumps(JOBS[name](options, *arguments) | device_memory(options.device)))
        return
    import torch

    sys.stdout.reconfigure(line_buffering=True)
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, device {options.device}")
    queries, photos = SIZES[options.benchmark]
    print(f"{options.benchmark}: {queries:,} sketches, {photos:,} photos, synthetic features of 768 values")
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        for kind in ("easy", "hard") if "em" in options.tasks else ("easy",):
            run("make", options, kind)
        for task in options.tasks:
            TASKS[task](options)


def device_memory(device):
    """{"device_peak": GB that torch held on a GPU}."""
    if device == "cpu":
        return {}
    import torch

    return {"device_peak": torch.cuda.max_memory_allocated(device) / 1e9}


def run(job, options, *arguments):
    """Run a job in a process of its own: its result, "wall" seconds and "peak" memory in GB; None if it fails."""
    command = [
        sys.executable,
        __file__,
        "--job",
        ":".join([job, *map(str, arguments)]),
        "--folder",
        str(options.folder),
    ]
    for name in ("benchmark", "device", "queries", "plain_queries"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output, errors = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        print(
            f"{job} {arguments}: left out ({(errors.strip().splitlines() or [f'ended by signal {status}'])[-1][:150]})"
        )
        return None
    wall = {"wall": time.perf_counter() - start, "peak": usage.ru_maxrss / 1e6}
    return json.loads(output.splitlines()[-1]) | wall


# --- features


def make(options, kind):
    """Features with one-to-one mAP of about a half. Easy: a few strong directions, as networks give; hard: none."""
    queries, photos = SIZES[options.benchmark]
    classes = {"sketchy": 25, "sketchy_split": 21}.get(options.benchmark, 30)
    rng = np.random.default_rng(0)
    spectrum = (1 + np.arange(768)) ** -0.6 if kind == "easy" else np.ones(768)
    spectrum /= np.linalg.norm(spectrum)
    noise = 1.1 if kind == "easy" else 3.5
    turn = np.linalg.qr(rng.normal(size=(768, 768)))[0]
    centres, shift = rng.normal(size=(classes, 768)) * spectrum, 0.5 * rng.normal(size=768) * spectrum
    content = []
    for count, of_sketches in ((photos, 0), (queries, 1)):
        labels = rng.choice(classes, count, p=rng.dirichlet(np.full(classes, 20.0)))
        labels[:classes] = np.arange(classes)
        rows = []
        for part in np.array_split(labels, max(1, count // 10_000)):
            values = centres[part] + noise * rng.normal(size=(len(part), 768)) * spectrum + of_sketches * shift
            values = values @ turn
            rows.append((values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32))
        content += [np.concatenate(rows), labels]
    (options.folder / kind).mkdir()
    with open(options.folder / kind / "features_zero.pickle", "wb") as file:
        pickle.dump([*content, None], file, protocol=4)
    return {}


def load(options, kind="easy"):
    with open(options.folder / kind / "features_zero.pickle", "rb") as file:
        return pickle.load(file)[:4]


# --- the protocol: ours and the plain definition


def protocol(options):
    """The whole protocol, matching and metrics alone, and the same by the plain definition."""
    from datasets.protocols import PROTOCOLS

    row = PROTOCOLS[options.benchmark]
    grid, queries = [(m, k) for m in row.subspaces for k in row.clusters], SIZES[options.benchmark][0]
    ours, matching = run("ours_protocol", options), run("ours_matching", options, "float32")
    if options.only_ours:
        print("\n| ours | seconds | peak memory, GB | of the device, GB |\n|---|---|---|---|")
        for name, result, seconds in (("whole protocol", ours, "wall"), ("matching and metrics", matching, "seconds")):
            print(f"| {name} | {result[seconds]:.1f} | {result['peak']:.2f} | {result.get('device_peak', 0):.2f} |")
        return
    plain = run("plain_matching", options)
    mixtures = sum(run("plain_mixture", options, m)["seconds"] for m in row.subspaces) * len(row.clusters)
    one = plain["distances"] + plain["ap"] + plain["prec"]
    many = sum(plain["ap"] + plain["prec"] + plain[f"cluster {m}"] for m, _ in grid)
    plain_matching = queries * (one + many)
    total = plain_matching + mixtures
    print(f"\n| one-to-one and {len(grid)} rows | seconds | peak memory, GB | ratio |\n|---|---|---|---|")
    for name, result, seconds, base in (
        ("ours, whole protocol", ours, ours["wall"], total),
        ("ours, matching and metrics", matching, matching["seconds"], plain_matching),
    ):
        print(f"| {name} | {seconds:.1f} | {result['peak']:.2f} | {base / seconds:.0f} |")
    print(f"| plain definition, matching and metrics [x] | {plain_matching:.0f} | | |")
    print(f"| scikit-learn's mixtures in float64 [x] | {mixtures:.0f} | | |")
    print(f"| both [x] | {total:.0f} | | |")
    parts = [f"{name} {1000 * plain[name]:.2f}" for name in plain if name not in ("wall", "peak", "worst")]
    print(f"\nplain definition, ms a sketch, on {options.plain_queries} sketches: {', '.join(parts)}")
    print(f"largest difference of a sketch's AP or Prec@100, ours in float64 - plain: {plain['worst']:.1e}")


def agreement(options):
    """Ours in float32 and float64: the largest difference of a row's metric at full size."""
    single, double = (run("ours_matching", options, dtype) for dtype in ("float32", "float64"))
    worst = max(abs(a - b) for a, b in zip(single["metrics"], double["metrics"], strict=True))
    print(
        f"\nfloat32 - float64, largest difference of a row's metric: {worst:.1e} ({double['seconds']:.0f} s in float64)"
    )


def devices(options):
    """The whole protocol on the CPU and on --device: the largest difference of a row's mAP@all, at most 1e-5."""
    if options.device == "cpu":
        return
    other = run("ours_protocol", options)
    on_cpu = run("ours_protocol", argparse.Namespace(**vars(options) | {"device": "cpu"}))
    worst = max(abs(a - b) for a, b in zip(on_cpu["mAP"], other["mAP"], strict=True))
    print(f"\nwhole protocol: {on_cpu['wall']:.1f} s on the CPU, {other['wall']:.1f} s on {options.device}")
    print(f"largest difference of a row's mAP@all: {worst:.1e}")
    if not worst <= 1e-5:
        raise SystemExit("that is more than rounding")


def ours_protocol(options):
    import importlib

    names = {"sketchy": "sketchy_ext", "sketchy_split": "sketchy_ext_split", "tuberlin": "tuberlin_ext"}
    script = importlib.import_module(f"test_{names.get(options.benchmark, 'quickdraw_ext')}_zeroshot")
    script.main(["--resume_dir", str(options.folder / "easy"), "--device", options.device])
    rows = json.loads((options.folder / "easy/results.json").read_text())["rows"]
    return {"mAP": [row["mAP@all"] for row in rows]}


def codebooks_of(options, gallery):
    """Codebooks of photos drawn at random: they cost what fitted ones cost."""
    from datasets.protocols import PROTOCOLS

    rng, row = np.random.default_rng(1), PROTOCOLS[options.benchmark]
    return {
        (m, k): gallery[rng.choice(len(gallery), k, False)].reshape(k, m, -1).transpose(1, 0, 2).copy()
        for m in row.subspaces
        for k in row.clusters
    }


def ours_matching(options, dtype, queries=None, photos=None, rows="all"):
    import torch

    from models.eval.evaluate import evaluate_rows
    from models.eval.features import Features
    from models.eval.metrics import STANDARD

    gallery, gallery_labels, query, query_labels = load(options)
    rng = np.random.default_rng(2)
    some = np.sort(rng.choice(len(query), int(queries or len(query)), False))
    near = np.sort(rng.choice(len(gallery), int(photos or len(gallery)), False))
    features = Features(gallery[near], gallery_labels[near], query[some], query_labels[some])
    codebooks = {None: None} | (codebooks_of(options, gallery) if rows == "all" else {})
    start = time.perf_counter()
    measured = evaluate_rows(features, codebooks, device=options.device, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - start
    np.save(options.folder / "ours.npy", measured[None]["mAP@all"].numpy())
    return {
        "seconds": seconds,
        "metrics": [float(row[name].mean()) for row in measured.values() for name in STANDARD],
    }


def plain_matching(options):
    """By the definition, in float64, one query at a time, in a loop over the ranking: seconds a query of each part."""
    import torch
    from scipy.spatial.distance import cdist

    from datasets.protocols import PROTOCOLS
    from models.eval.evaluate import evaluate_rows
    from models.eval.features import Features

    gallery, gallery_labels, query, query_labels = load(options)
    chosen = np.linspace(0, len(query) - 1, options.plain_queries).astype(int)
    query, query_labels = query[chosen], query_labels[chosen]
    middle = PROTOCOLS[options.benchmark].clusters[3]
    codebooks = {key: book for key, book in codebooks_of(options, gallery).items() if key[1] == middle}
    seconds, values = dict.fromkeys(["distances", "ap", "prec"], 0.0), {None: [], **{key: [] for key in codebooks}}
    codes = {}
    for (m, _), book in codebooks.items():
        parts = np.split(gallery.astype(np.float64), m, axis=1)
        codes[book.shape[:2]] = [nearest(part, means) for part, means in zip(parts, book.astype(float), strict=True)]
    wide = gallery.astype(np.float64)
    for vector, label in zip(query.astype(np.float64), query_labels, strict=True):
        start = time.perf_counter()
        distances = cdist(vector[None], wide)[0]
        seconds["distances"] += time.perf_counter() - start
        for key in values:
            scores = distances
            if key:
                start = time.perf_counter()
                tables = ((np.split(vector, key[0])[m] - codebooks[key][m]) ** 2 for m in range(key[0]))
                cluster = sum(((table.sum(axis=1))[code]) for table, code in zip(tables, codes[key], strict=True))
                scores = 0.8 * cluster + 0.2 * distances
                name = f"cluster {key[0]}"
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            values[key].append(plain_metrics(scores, gallery_labels == label, seconds, first=key is None))
    features = Features(gallery, gallery_labels, query, query_labels)
    ours = evaluate_rows(features, {None: None} | codebooks, dtype=torch.float64)
    worst = 0.0
    for key, pairs in values.items():
        for name, column in zip(("mAP@all", "Prec@100"), np.array(pairs).T, strict=True):
            worst = max(worst, np.abs(ours[key][name].numpy() - column).max())
    return {name: value / options.plain_queries for name, value in seconds.items()} | {"worst": float(worst)}


def nearest(part, book):
    return ((part**2).sum(axis=1)[:, None] - 2 * part @ book.T + (book**2).sum(axis=1)).argmin(axis=1)


def plain_metrics(scores, relevant, seconds, first):
    """(AP, Prec@100) of one query; the time of the first row counts for all."""
    start = time.perf_counter()
    ranked = relevant[np.argsort(scores, kind="stable")].tolist()
    hits, precisions = 0, []
    for position, hit in enumerate(ranked):
        hits += hit
        precisions.append(hits / (position + 1))
    best, total = 0.0, 0.0
    for hit, precision in zip(reversed(ranked), reversed(precisions), strict=True):
        best = max(best, precision)
        total += best if hit else 0.0
    ap = total / hits
    middle = time.perf_counter()
    prec = relevant[np.argsort(scores, kind="stable")[:100]].mean()
    if first:
        seconds["ap"] += middle - start
        seconds["prec"] += time.perf_counter() - middle
    return ap, prec


def plain_mixture(options, subspaces):
    """scikit-learn's mixtures of one row, in float64, with all cores: seconds."""
    from sklearn.mixture import GaussianMixture

    from datasets.protocols import PROTOCOLS

    clusters = PROTOCOLS[options.benchmark].clusters[3]
    gallery = load(options)[0].astype(np.float64)
    start, random = time.perf_counter(), np.random.RandomState(123)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        iterations = [
            GaussianMixture(clusters, random_state=random).fit(part).n_iter_
            for part in np.split(gallery, int(subspaces), axis=1)
        ]
    return {"seconds": time.perf_counter() - start, "iterations": iterations}


# --- an EM step


def em(options):
    """Ten iterations of EM from the same k-means start, K = 25, one half of the features."""
    heads = ["EM of 10 iterations", "scikit-learn, s", "ours, s", "ratio", "our first iteration, s", "means differ by"]
    print("\n| " + " | ".join(heads) + " |" + "\n" + "|---" * len(heads) + "|")
    photos = SIZES[options.benchmark][1]
    for kind in ("easy", "hard"):
        for width in (384, 192):
            step = run("em_step", options, kind, width)
            ratio = step["theirs"] / step["ours"]
            cells = (
                f"{step['theirs']:.2f} | {step['ours']:.2f} | {ratio:.1f} | {step['first']:.2f} | {step['differ']:.0e}"
            )
            print(f"| {photos:,} × {width}, {kind} | {cells} |")


def em_step(options, kind, width):
    import torch
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    from models.eval import gmm

    points = np.ascontiguousarray(load(options, kind)[0][:, : int(width)])
    labels = KMeans(25, n_init=1, random_state=np.random.RandomState(123)).fit(points).labels_
    gmm.TOLERANCE = 0.0
    single, start = torch.from_numpy(points).to(options.device), torch.from_numpy(labels)
    seconds = {}
    for iterations in (1, 10):
        gmm.ITERATIONS = iterations
        begin = time.perf_counter()
        ours = gmm.fit_mixture(single, start, 25)
        seconds[iterations] = time.perf_counter() - begin
    theirs = GaussianMixture(25, max_iter=10, tol=0.0)
    theirs._initialize_parameters = lambda X, *_, **__: theirs._initialize(X, np.eye(25)[labels])
    wide = points.astype(np.float64)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.fit(wide)
    elapsed = time.perf_counter() - begin  # of 10 iterations, the first M step and an E step that predicts labels
    return {
        "ours": seconds[10],
        "first": seconds[1],
        "theirs": elapsed,
        "differ": float(np.abs(theirs.means_ - ours.means.cpu().numpy()).max()),
    }


# --- peers, one-to-one


def peers(options):
    """AP of one-to-one matching by ours and by what users would pick instead."""
    queries = options.queries or SIZES[options.benchmark][0]
    ours = run("ours_matching", options, "float32", queries, SIZES[options.benchmark][1], "one")
    expected = np.load(options.folder / "ours.npy")
    print(
        f"\n| one-to-one, {queries:,} sketches | ms a sketch | ratio | peak memory, GB | mean AP (not interpolated) |"
    )
    print("|---|---|---|---|---|")
    each = 1000 * ours["seconds"] / queries
    print(f"| ours | {each:.2f} | 1 | {ours['peak']:.2f} | {expected.mean():.4f} interpolated |")
    for peer in PEERS:
        count = queries
        result = run("peer", options, peer, count)
        if result is None and count > 2000:
            count = 2000
            result = run("peer", options, peer, count)
        if result:
            theirs = 1000 * result["seconds"] / count
            print(f"| {peer}, {count:,} sketches | {theirs:.2f} | {theirs / each:.1f} | {result['peak']:.2f} "
                  f"| {result['mean']:.4f} |")  # fmt: skip


def peer(options, name, queries):
    import torch

    gallery, gallery_labels, query, query_labels = load(options)
    some = np.sort(np.random.default_rng(2).choice(len(query), int(queries), False))
    query, query_labels = query[some], query_labels[some]
    compute = PEERS[name]()
    arrays = [torch.from_numpy(values) for values in (gallery, gallery_labels, query, query_labels)]
    start = time.perf_counter()
    mean = compute(*arrays)
    return {"seconds": time.perf_counter() - start, "mean": float(mean)}


# --- growth


def scaling(options):
    """Time of a row for queries × photos, and peak memory; see --records."""
    queries, photos = SIZES[options.benchmark]
    records = []
    print("\n| sketches × photos | seconds | ns a pair and row | peak memory, GB |\n|---|---|---|---|")
    for q, n in (
        (queries // 4, photos),
        (queries // 2, photos),
        (queries, photos),
        (queries, photos // 2),
        (queries, photos // 4),
        (queries, 1000),
    ):
        result = run("ours_matching", options, "float32", q, n)
        rows = len(result["metrics"]) // 4
        each = 1e9 * result["seconds"] / (q * n * rows)
        print(f"| {q:,} × {n:,} | {result['seconds']:.1f} | {each:.2f} | {result['peak']:.2f} |")
        series = f"matching of {q:,} sketches, {rows} rows"
        measured = {"seconds": round(result["seconds"], 2), "memory_gb": round(result["peak"], 2)}
        records.append({"series": series, "photos": n, **measured})
    if options.records:
        with open(options.records, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


TASKS = {"protocol": protocol, "devices": devices, "agreement": agreement, "em": em, "peers": peers, "scaling": scaling}
JOBS = {
    "make": make,
    "ours_protocol": ours_protocol,
    "ours_matching": ours_matching,
    "plain_matching": plain_matching,
    "plain_mixture": plain_mixture,
    "em_step": em_step,
    "peer": peer,
}

if __name__ == "__main__":
    main()
