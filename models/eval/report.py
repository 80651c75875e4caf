"""What a test leaves: tables, results.json, per_query.npz, and the figures."""

import numpy as np

from models.eval.figures import (
    draw_plane,
    draw_precision_recall,
    draw_retrievals,
    main_rows,
    retrieval_groups,
    row_name,
)
from models.eval.matching import CLUSTER_WEIGHT
from models.eval.metrics import STANDARD
from utils.cli import InputError
from utils.distributed import log_rank0
from utils.files import atomic_write, write_json

QUERIES = "per_query.npz"


def summarise(features, metrics, measured, run_record):
    """What results.json says of named Features.

    metrics: names; measured: {row: {seed: class means by name, or why there are none}}, see models.testing.measure;
    run_record: options and versions.
    """
    present = [features.names[label] for label in np.unique(features.query_labels)]
    return {
        "queries": len(features.query),
        "gallery": len(features.gallery),
        "classes": len(np.unique(features.gallery_labels)),
        **run_record,
        "rows": [_summary(row, seeds, metrics, present) for row, seeds in measured.items()],
    }


def _summary(row, seeds, metrics, names):
    """A row of results.json from {seed: class means by name, or why there are none}."""
    entry = {"matching": "one-to-one" if row is None else "one-to-many"}
    if row is not None:
        entry |= dict(zip(("M", "K", "cluster_weight"), row, strict=True))
    failures = {seed: reason for seed, reason in seeds.items() if isinstance(reason, str)}
    if failures:
        entry["failed"] = failures
    fitted = {seed: means for seed, means in seeds.items() if seed not in failures}
    if not fitted:
        return entry
    means = {name: np.mean([each[name] for each in fitted.values()], axis=0) for name in (*metrics, "curve")}
    entry |= {name: float(means[name].mean()) for name in metrics}
    if len(seeds) > 1:
        entry["seeds"] = {seed: {name: float(each[name].mean()) for name in metrics} for seed, each in fitted.items()}
        entry["spread"] = {name: _spread([each[name] for each in entry["seeds"].values()]) for name in metrics}
    entry["per_class"] = {
        label: {name: float(means[name][index]) for name in metrics} for index, label in enumerate(names)
    }
    entry["definitions"] = _mean([each["definitions"] for each in fitted.values()])
    entry["precision_at_recall"] = means["curve"].mean(axis=0).tolist()
    return entry


def _mean(tables):
    """The mean of nested dicts of numbers."""
    if not isinstance(tables[0], dict):
        return float(np.mean(tables))
    return {name: _mean([table[name] for table in tables]) for name in tables[0]}


def _spread(values):
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"deviation": deviation, "range": [min(values), max(values)]}


def write_report(folder, results, features, measured, images, count=4):
    """Write results.json, per_query.npz and figures into `folder`, and print where they are, or why one is missing.

    features: named Features; measured: an EvalResult; images: QueryGallery, or None where they are not at hand;
    count: sketches in each group of the picture of retrievals.
    """
    write_json(folder / "results.json", results)
    print(f"results: {folder / 'results.json'}")
    at_hand = _drawable(features, images)
    write_queries(folder / QUERIES, features, measured.queries, images.query.paths if at_hand else None)
    print(f"each sketch: {folder / QUERIES}")
    try:
        draw_precision_recall(folder / "precision_recall.png", results)
        print(f"figure: {folder / 'precision_recall.png'}")
        if results["options"].get("tsne"):
            draw_plane(folder / "tsne.png", features, results["benchmark"])
            print(f"figure: {folder / 'tsne.png'}")
        if not at_hand:
            log_rank0("note: no picture of retrievals, the images of these features are not at hand (see --data_root)")
            return
        values = measured.queries[measured.shown] | {"nearest": measured.nearest}
        groups = retrieval_groups(features, values, results["metrics"][0], images, count)
        title = f"{results['benchmark']}, {matching_name(measured.shown)}"
        draw_retrievals(folder / "retrievals.png", groups, title)
        print(f"picture: {folder / 'retrievals.png'}")
    except ImportError:
        log_rank0("note: no figures, matplotlib is not installed")
    except InputError as error:
        log_rank0(f"note: no picture of retrievals, {error}")


def matching_name(row):
    """How a row (M, K, cluster weight), or None, matches, in words."""
    if row is None:
        return "one-to-one matching"
    subspaces, clusters, weight = row
    return f"one-to-many matching, M {subspaces}, K {clusters}" + (
        "" if weight == CLUSTER_WEIGHT else f", weight {weight:g}"
    )


def write_queries(path, features, queries, files=None):
    """Write per_query.npz: what each row gave each sketch, for models.compare.

    features: named Features; queries: {row: {metric: (Q,)}}; files: of the sketches, None where they are not known.
    Arrays: "rows" (R, 3) float64, M, K and cluster weight, 0 for one-to-one matching; "metrics" (n,) and "values"
    (R, n, Q) float64; "class" and "sketch" (Q,) text, the sketch by its number where its file is not known.
    """
    files = [str(number) for number in range(len(features.query_labels))] if files is None else files
    with atomic_write(path) as file:
        np.savez_compressed(
            file,
            rows=np.array([(0, 0, 0) if row is None else row for row in queries], np.float64),
            metrics=np.array(list(next(iter(queries.values())))),
            values=np.stack([np.stack([np.asarray(value) for value in each.values()]) for each in queries.values()]),
            sketch=np.array([str(each) for each in files]),
            **{"class": np.array(features.names)[features.query_labels]},
        )


def _drawable(features, images):
    """Whether QueryGallery are at hand and are those that the Features were computed from."""
    if images is None:
        return False
    try:
        images.check()
    except InputError:
        return False
    pairs = ((images.gallery, features.gallery_labels), (images.query, features.query_labels))
    return all(np.array_equal(files.labels, labels) for files, labels in pairs)


def print_table(results):
    """Print one line per row of `results` (the content of results.json); a star marks K = number of unseen classes.

    Of several mixture seeds: the mean, ± the deviation and the range of its first metric.
    """
    metrics = results["metrics"]
    counts = f"{results['queries']:,} sketches, {results['gallery']:,} photos, {results['classes']} classes"
    print(f"{results['benchmark']}: {counts}")
    spread = any("spread" in row for row in results["rows"])
    weighted = len({row["cluster_weight"] for row in results["rows"] if "cluster_weight" in row}) > 1
    heads = "".join(f" {name:>9}" for name in metrics)
    print(
        f"{'matching':12} {'M':>2} {'K':>4} "
        + (" weight " if weighted else "")
        + heads
        + (f"  {metrics[0]} over seeds" if spread else "")
    )
    for row in results["rows"]:
        subspaces, clusters = row.get("M", "-"), row.get("K", "-")
        star = "*" if clusters == results["classes"] else " "
        line = f"{row['matching']:12} {subspaces:>2} {clusters:>3}{star} "
        if weighted:
            line += f" {row.get('cluster_weight', '-'):>6} "
        if metrics[0] in row:
            line += "".join(f" {row[name]:9.4f}" for name in metrics)
        else:
            line += "  left out, a mixture collapsed"
        if "spread" in row:
            of_first = row["spread"][metrics[0]]
            deviation = "" if of_first["deviation"] is None else f"± {of_first['deviation']:.4f}, "
            line += "  {}{:.4f} to {:.4f}".format(deviation, *of_first["range"])
        print(line)
    if any(row.get("K") == results["classes"] for row in results["rows"]):
        print("* K = number of unseen classes")


def print_definitions(results):
    """Print each row under the DEFINITIONS of models.eval.metrics."""
    print(f"\n{'what the same rankings are called elsewhere':31}" + "".join(f" {name:>9}" for name in STANDARD))
    for row in results["rows"]:
        for definition, values in row.get("definitions", {}).items():
            cells = (f"{values[name]:9.4f}" if name in values else f"{'-':>9}" for name in STANDARD)
            print(f"{row_name(row):16} {definition:26} " + " ".join(cells))


def print_classes(results):
    """Print the metrics of each class for one-to-one matching and for the row of `main_rows` after it, best first."""
    rows, metrics = main_rows(results)[:2], results["metrics"]
    width = max(len("class"), *(len(name) for name in rows[0]["per_class"]))
    heads = [f"{row_name(row)} {metric}" for row in rows for metric in metrics]
    print("".join([f"{'class':{width}}", *(f"  {head}" for head in heads)]))
    for name in sorted(rows[-1]["per_class"], key=lambda name: -rows[-1]["per_class"][name][metrics[0]]):
        values = [row["per_class"][name][metric] for row in rows for metric in metrics]
        cells = (f"  {value:{len(head)}.4f}" for value, head in zip(values, heads, strict=True))
        print("".join([f"{name:{width}}", *cells]))
