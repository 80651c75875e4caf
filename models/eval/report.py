"""What a test run leaves to look at: the table, results.json and the picture of retrievals."""

import numpy as np

from datasets.files import write_whole
from datasets.images import read_rgb


def print_table(results, protocol):
    """Print one line per row of `results` (the content of results.json); a star marks K = number of unseen classes."""
    at = "all" if protocol.map_at is None else protocol.map_at
    counts = f"{results['queries']:,} sketches, {results['gallery']:,} photos, {results['classes']} classes"
    print(f"{protocol.title}: {counts}")
    print(f"{'matching':12} {'M':>2} {'K':>4}  {f'mAP@{at}':>9} {f'Prec@{protocol.prec_at}':>9}")
    for row in results["rows"]:
        subspaces, clusters = row.get("M", "-"), row.get("K", "-")
        star = "*" if clusters == results["classes"] else " "
        print(f"{row['matching']:12} {subspaces:>2} {clusters:>3}{star}  {row['mAP']:9.4f} {row['Prec']:9.4f}")
    if any(row.get("K") == results["classes"] for row in results["rows"]):
        print("* K = number of unseen classes")


def draw_retrievals(path, queries, title):
    """Draw each query sketch beside its nearest photos, right ones framed green and wrong ones dashed red.

    queries: list of (caption, sketch file, [(photo file, whether it is right), ...]).
    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    columns = 1 + max(len(photos) for _, _, photos in queries)
    figure = Figure(figsize=(1.25 * columns, 1.5 * len(queries) + 0.5), layout="constrained")
    axes = figure.subplots(len(queries), columns, squeeze=False)
    for row, (caption, sketch, photos) in zip(axes, queries, strict=True):
        for axis in row:
            axis.set_axis_off()
        row[0].imshow(_thumbnail(sketch))
        row[0].set_title(caption, fontsize=8, parse_math=False)
        for axis, (photo, right) in zip(row[1:], photos, strict=False):
            axis.imshow(_thumbnail(photo))
            axis.set_axis_on()
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="tab:green" if right else "tab:red", linewidth=3, linestyle="-" if right else "--")
    figure.suptitle(title, fontsize=10)
    with write_whole(path) as file:
        figure.savefig(file, format="png", dpi=110)


def pick_queries(average_precision, labels, count):
    """Indices of the `count` best and `count` worst queries by AP, from as many classes as there are."""
    order = np.argsort(-average_precision, kind="stable")
    return _one_per_class(order, labels, count), _one_per_class(order[::-1], labels, count)[::-1]


def _one_per_class(order, labels, count):
    first = [order[np.flatnonzero(labels[order] == label)[0]] for label in np.unique(labels)]
    rank = {index: place for place, index in enumerate(order)}
    picked = sorted(first, key=rank.get)[:count]
    taken = set(first)
    rest = (index for index in order if index not in taken)
    return [*picked, *(next(rest) for _ in range(min(count, len(order)) - len(picked)))]


def _thumbnail(path):
    image = read_rgb(path)
    image.thumbnail((160, 160))
    return np.asarray(image)
