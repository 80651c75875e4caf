"""The report of a test: printed tables, results.json, per_query.npz, and figures."""

import numpy as np

from models.eval.figures import (
    draw_precision_recall,
    draw_retrievals,
    draw_tsne,
    main_rows,
    retrieval_groups,
    row_name,
)
from models.eval.matching import CLUSTER_WEIGHT
from models.eval.metrics import STANDARD
from utils.cli import InputError
from utils.distributed import log_rank0
from utils.files import atomic_write, check_output, write_json
from utils.pictures import OWN_PNG, draw_or_note

QUERIES = "per_query.npz"


def summarise(features, averages, run_record):
    """The results of named Features as results.json has them.

    averages: that of a models.eval.evaluate.EvalResult; run_record: options and versions.
    """
    names = [features.names[label] for label in np.unique(features.query_labels)]
    return {
        "queries": len(features.query),
        "gallery": len(features.gallery),
        "classes": len(np.unique(features.gallery_labels)),
        **run_record,
        "rows": [_summarise_row(row, seeds, names) for row, seeds in averages.items()],
    }


def _summarise_row(row, seeds, names):
    """A row of results.json. seeds: {seed: Averages, or why there are none}; names: of the queries' classes."""
    entry = row_entry(row)
    failures = {seed: reason for seed, reason in seeds.items() if isinstance(reason, str)}
    if failures:
        entry["failed"] = failures
    fitted = {seed: averages for seed, averages in seeds.items() if seed not in failures}
    if not fitted:
        return entry
    metrics = next(iter(fitted.values())).metrics
    entry |= {name: float(np.mean([each.metrics[name] for each in fitted.values()], axis=0).mean()) for name in metrics}
    if len(seeds) > 1:
        entry["seeds"] = {
            seed: {name: float(each.metrics[name].mean()) for name in metrics} for seed, each in fitted.items()
        }
        entry["spread"] = {name: _spread([each[name] for each in entry["seeds"].values()]) for name in metrics}
    per_class = {name: np.mean([each.per_class[name] for each in fitted.values()], axis=0) for name in metrics}
    entry["per_class"] = {
        label: {name: float(per_class[name][index]) for name in metrics} for index, label in enumerate(names)
    }
    entry["definitions"] = _mean([each.definitions for each in fitted.values()])
    entry["precision_at_recall"] = np.mean([each.curve for each in fitted.values()], axis=0).mean(axis=0).tolist()
    return entry


def row_entry(row):
    """How results.json names a row (M, K, cluster weight), or None for one-to-one matching."""
    if row is None:
        return {"matching": "one-to-one"}
    return {"matching": "one-to-many", **dict(zip(("M", "K", "cluster_weight"), row, strict=True))}


def _mean(tables):
    """The mean of nested dicts of numbers."""
    if not isinstance(tables[0], dict):
        return float(np.mean(tables))
    return {name: _mean([table[name] for table in tables]) for name in tables[0]}


def _spread(values):
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"deviation": deviation, "range": [min(values), max(values)]}


def check_report_files(folder):
    """Raise InputError if a file that `write_report` writes would replace one that it did not write."""
    for name in ("precision_recall.png", "tsne.png", "retrievals.png"):
        check_output(folder / name, "", OWN_PNG)
    check_output(folder / "results.json", "", rb'\A\{\s*"benchmark":')
    check_output(folder / QUERIES, "", rb"\APK\x03\x04")


def write_report(folder, results, features, result, images, count=4):
    """Write results.json, per_query.npz and figures into `folder`, and print their paths, or why one is missing.

    features: named Features; result: the EvalResult; images: the QueryGallery in the order of the features, None where
    it is not known; count: sketches in each group of retrievals.png.
    """
    write_json(folder / "results.json", results)
    print(f"results: {folder / 'results.json'}")
    write_queries(folder / QUERIES, features, result.per_query, images and images.query.paths)
    print(f"each sketch: {folder / QUERIES}")
    path = folder / "precision_recall.png"
    if draw_or_note(draw_precision_recall, path, results):
        print(f"figure: {path}")
    path = folder / "tsne.png"
    if results["options"].get("tsne") and draw_or_note(draw_tsne, path, features, results["benchmark"]):
        print(f"figure: {path}")
    if images is None:
        return
    path, title = folder / "retrievals.png", f"{results['benchmark']}, {matching_name(result.shown)}"
    try:
        images.check()
        groups = retrieval_groups(features, result, results["metrics"][0], images, count)
        if draw_or_note(draw_retrievals, path, groups, title):
            print(f"picture: {path}")
    except InputError as error:
        log_rank0(f"note: no retrievals.png, {error}")


def matching_name(row):
    """The name of a row (M, K, cluster weight), or None, in a title."""
    if row is None:
        return "one-to-one matching"
    subspaces, clusters, weight = row
    return f"one-to-many matching, M {subspaces}, K {clusters}" + (
        "" if weight == CLUSTER_WEIGHT else f", weight {weight:g}"
    )


def write_queries(path, features, per_query, files=None):
    """Write per_query.npz: the metrics of each sketch in each row, for models.compare.

    features: named Features; per_query: {row: {metric: (Q,)}}; files: of the sketches, None if they are not known.
    Arrays: "rows" (R, 3) float64, M, K and cluster weight, 0 for one-to-one matching; "metrics" (n,) and "values"
    (R, n, Q) float64; "class" and "sketch" (Q,) text, the sketch's number where its file is not known.
    """
    files = [str(number) for number in range(len(features.query_labels))] if files is None else files
    with atomic_write(path) as file:
        np.savez_compressed(
            file,
            rows=np.array([(0, 0, 0) if row is None else row for row in per_query], np.float64),
            metrics=np.array(list(next(iter(per_query.values())))),
            values=np.stack([np.stack([np.asarray(value) for value in each.values()]) for each in per_query.values()]),
            sketch=np.array([str(each) for each in files]),
            **{"class": np.array(features.names)[features.query_labels]},
        )


def print_results(results, definitions=False, per_class=False):
    """Print the table of `results`, and those of other definitions and of classes where they are wanted."""
    print_table(results)
    if definitions:
        print_definitions(results)
    if per_class:
        print_classes(results)


def print_table(results):
    """Print one line per row of `results` (the content of results.json); a star marks K = number of unseen classes.

    Of several mixture seeds: the mean, and the standard deviation and range of the first metric.
    """
    metrics = results["metrics"]
    counts = f"{results['queries']:,} sketches, {results['gallery']:,} photos, {results['classes']} classes"
    print(f"{results['benchmark']}: {counts}")
    spread = any("spread" in row for row in results["rows"])
    weighted = len({row["cluster_weight"] for row in results["rows"] if "cluster_weight" in row}) > 1
    widths = {name: max(9, len(name)) for name in metrics}
    heads = "".join(f" {name:>{width}}" for name, width in widths.items())
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
            line += "".join(f" {row[name]:{width}.4f}" for name, width in widths.items())
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
    """Print each row by the DEFINITIONS of models.eval.metrics."""
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
