"""What a test leaves to look at: the table, results.json, precision over recall and the picture of retrievals."""

import numpy as np

from datasets.errors import InputError
from datasets.files import write_json, write_whole
from datasets.images import read_rgb
from models.eval.metrics import RECALL_LEVELS
from models.parallel import note


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
    entry = {"matching": "one-to-one"} if row is None else {"matching": "one-to-many", "M": row[0], "K": row[1]}
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
    entry["precision_at_recall"] = means["curve"].mean(axis=0).tolist()
    return entry


def _spread(values):
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"deviation": deviation, "range": [min(values), max(values)]}


def write_report(folder, results, features, shown, images, count=4):
    """Write results.json and the figures into `folder`, and print where they are, or why there is no figure.

    features: named Features; shown: a Shown of models.testing; images: UnseenImages, or None where they are not at
    hand; count: sketches in each group of the picture of retrievals.
    """
    write_json(folder / "results.json", results)
    print(f"results: {folder / 'results.json'}")
    try:
        draw_precision_recall(folder / "precision_recall.png", results)
        print(f"figure: {folder / 'precision_recall.png'}")
        if not _drawable(features, images):
            note("note: no picture of retrievals, the images of these features are not at hand (see --data_root)")
            return
        groups = retrieval_groups(features, shown.values, results["metrics"][0], images, count)
        matching = "one-to-many matching, M {}, K {}".format(*shown.key) if shown.key else "one-to-one matching"
        draw_retrievals(folder / "retrievals.png", groups, f"{results['benchmark']}, {matching}")
        print(f"picture: {folder / 'retrievals.png'}")
    except ImportError:
        note("note: no figures, matplotlib is not installed")
    except InputError as error:
        note(f"note: no picture of retrievals, {error}")


def _drawable(features, images):
    """Whether UnseenImages are at hand and are those that the Features were computed from."""
    if images is None:
        return False
    try:
        images.check()
    except InputError:
        return False
    pairs = ((images.photos, features.gallery_labels), (images.sketches, features.query_labels))
    return all(np.array_equal(files.labels, labels) for files, labels in pairs)


def print_table(results):
    """Print one line per row of `results` (the content of results.json); a star marks K = number of unseen classes.

    Of several mixture seeds: the mean, ± the deviation and the range of its first metric.
    """
    metrics = results["metrics"]
    counts = f"{results['queries']:,} sketches, {results['gallery']:,} photos, {results['classes']} classes"
    print(f"{results['benchmark']}: {counts}")
    spread = any("spread" in row for row in results["rows"])
    heads = "".join(f" {name:>9}" for name in metrics)
    print(f"{'matching':12} {'M':>2} {'K':>4} {heads}" + (f"  {metrics[0]} over seeds" if spread else ""))
    for row in results["rows"]:
        subspaces, clusters = row.get("M", "-"), row.get("K", "-")
        star = "*" if clusters == results["classes"] else " "
        line = f"{row['matching']:12} {subspaces:>2} {clusters:>3}{star} "
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


def main_rows(results):
    """The rows to look at first: one-to-one and, for each M, K = number of unseen classes, else its last K."""
    best = {}
    for row in results["rows"]:
        if "per_class" in row and best.get(row.get("M"), {}).get("K") != results["classes"]:
            best[row.get("M")] = row
    return list(best.values())


def row_name(row):
    """ "one-to-one" or "M 2, K 25"."""
    return f"M {row['M']}, K {row['K']}" if "M" in row else row["matching"]


def draw_precision_recall(path, results):
    """Draw interpolated precision over recall, mean of classes, for the `main_rows` of `results`.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    for row in main_rows(results):
        label = f"{row_name(row)}, mAP@all {row['mAP@all']:.3f}"
        axis.plot(RECALL_LEVELS, row["precision_at_recall"], marker=".", label=label)
    axis.set(xlabel="recall", ylabel="precision (interpolated)", xlim=(0, 1), ylim=(0, 1))
    axis.set_title(f"{results['benchmark']}: {results['classes']} unseen classes", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with write_whole(path) as file:
        figure.savefig(file, format="png", dpi=130)


def retrieval_groups(features, values, metric, images, count):
    """Groups for `draw_retrievals`: sketches with the best, typical and worst values of a metric, `count` in each.

    features: named Features; values: {metric: (Q,), "nearest": (Q, k)}; images: UnseenImages.
    """
    value, groups = values[metric].numpy(), []
    kind = "AP" if metric.startswith("mAP") else metric
    for title, picked in pick_queries(value, features.query_labels, count).items():
        queries = []
        for index in picked:
            label = features.query_labels[index]
            found = [
                (images.photos.root / images.photos.paths[photo], features.gallery_labels[photo] == label)
                for photo in values["nearest"][index]
            ]
            sketch = images.sketches.root / images.sketches.paths[index]
            queries.append((f"{features.names[label]}\n{kind} {value[index]:.2f}", sketch, found))
        groups.append((title, queries))
    return groups


def draw_retrievals(path, groups, title):
    """Draw each query sketch beside its nearest photos, right ones framed green and wrong ones dashed red.

    groups: list of (title, list of (caption, sketch file, [(photo file, whether it is right), ...])).
    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    groups = [group for group in groups if group[1]]
    columns = 1 + max(len(photos) for _, queries in groups for _, _, photos in queries)
    heights = [len(queries) for _, queries in groups]
    figure = Figure(figsize=(1.25 * columns, 1.5 * sum(heights) + 0.35 * len(groups) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (heading, queries) in zip(parts, groups, strict=True):
        part.suptitle(heading, fontsize=10, weight="bold")
        axes = part.subplots(len(queries), columns, squeeze=False)
        for row, (caption, sketch, photos) in zip(axes, queries, strict=True):
            for axis in row:
                axis.set_axis_off()
            row[0].imshow(_thumbnail(sketch))
            row[0].set_title(caption, fontsize=8, parse_math=False)
            for axis, (photo, right) in zip(row[1:], photos, strict=False):
                axis.imshow(_thumbnail(photo))
                axis.set_axis_on()
                axis.set(xticks=[], yticks=[])
                frame = dict(color="tab:green", linestyle="-") if right else dict(color="tab:red", linestyle="--")
                axis.spines[:].set(linewidth=3, **frame)
    with write_whole(path) as file:
        figure.savefig(file, format="png", dpi=110)


def pick_queries(average_precision, labels, count):
    """Indices of `count` queries each by AP, from as many classes as there are: {"best", "typical", "worst"}.

    Typical are those nearest to the median. No query is in two groups.
    """
    order = np.argsort(-average_precision, kind="stable")
    typical = np.argsort(np.abs(average_precision - np.median(average_precision)), kind="stable")
    picked, taken = {}, set()
    for group, ranking in (("best", order), ("worst", order[::-1]), ("typical", typical)):
        picked[group] = _one_per_class([index for index in ranking if index not in taken], labels, count)
        taken.update(picked[group])
    return {group: sorted(picked[group], key=lambda index: -average_precision[index]) for group in _GROUPS}


_GROUPS = ("best", "typical", "worst")


def _one_per_class(ranking, labels, count):
    """The first `count` of ranking, each class once before any comes again."""
    first = list({labels[index]: index for index in reversed(ranking)}.values())
    place = {index: number for number, index in enumerate(ranking)}
    first.sort(key=place.get)
    rest = [index for index in ranking if index not in set(first)]
    return [*first, *rest][:count]


def _thumbnail(path):
    image = read_rgb(path)
    image.thumbnail((160, 160))
    return np.asarray(image)
