"""Figures of a test: precision-recall curves, sketches with their retrieved photos, and a t-SNE of the unseen classes.

All raise ImportError without matplotlib; see utils.pictures.draw_or_note.
"""

import numpy as np

from datasets.images import read_rgb
from models.eval.matching import CLUSTER_WEIGHT
from models.eval.metrics import RECALL_LEVELS
from utils.pictures import save_png
from utils.sampling import evenly_spaced


def main_rows(results):
    """The rows that figures show: one-to-one and, for each M, K = number of unseen classes, else its last K."""
    best = {}
    for row in results["rows"]:
        if "per_class" in row and best.get(row.get("M"), {}).get("K") != results["classes"]:
            best[row.get("M")] = row
    return list(best.values())


def row_name(row):
    """ "one-to-one", "M 2, K 25" or, with another weight than the paper's, "M 2, K 25, w 0.5"."""
    if "M" not in row:
        return row["matching"]
    weight = row.get("cluster_weight", CLUSTER_WEIGHT)
    return f"M {row['M']}, K {row['K']}" + ("" if weight == CLUSTER_WEIGHT else f", w {weight:g}")


def draw_precision_recall(path, results):
    """Draw interpolated precision over recall, averaged over classes, for the `main_rows` of `results`."""
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
    save_png(figure, path, dpi=130)


def draw_tsne(path, features, title, max_per_class=60):
    """Draw a t-SNE of the sketches and photos of named Features, each class with its colour and name.

    Of each class at most max_per_class sketches and as many photos are drawn, evenly spaced in its list.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    query, gallery = (
        _evenly_per_class(labels, max_per_class) for labels in (features.query_labels, features.gallery_labels)
    )
    vectors = np.concatenate([features.query[query], features.gallery[gallery]])
    labels = np.concatenate([features.query_labels[query], features.gallery_labels[gallery]])
    perplexity = min(30, (len(vectors) - 1) / 3)
    points = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(vectors)
    figure = Figure(figsize=(9, 8), layout="constrained")
    axis = figure.subplots()
    classes = np.unique(labels)
    for number, label in enumerate(classes):
        colour = colormaps["hsv"](number / len(classes))
        own, is_sketch = labels == label, np.arange(len(labels)) < len(query)
        axis.scatter(*points[own & ~is_sketch].T, s=14, color=colour, marker="o", alpha=0.5, linewidths=0)
        axis.scatter(*points[own & is_sketch].T, s=18, color=colour, marker="x", linewidths=0.9)
        centre = np.median(points[own], axis=0)
        axis.text(*centre, features.names[label], fontsize=7, ha="center", parse_math=False,
            bbox=dict(facecolor="white", alpha=0.7, linewidth=0, pad=1))  # fmt: skip
    for marker, name in (("x", "sketches"), ("o", "photos")):
        axis.scatter([], [], color="grey", marker=marker, label=name)
    axis.legend(fontsize=8)
    axis.set(xticks=[], yticks=[])
    axis.set_title(f"{title}: t-SNE of unseen classes, {len(query):,} sketches, {len(gallery):,} photos", fontsize=10)
    save_png(figure, path, dpi=110)


def _evenly_per_class(labels, max_per_class):
    """Indices of at most max_per_class of each label, evenly spaced."""
    chosen = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        chosen.append(own[evenly_spaced(len(own), max_per_class)])
    return np.concatenate(chosen)


def retrieval_groups(features, result, metric, images, count):
    """Groups for `draw_retrievals`: sketches with the best, typical and worst values of a metric, `count` in each.

    features: named Features; result: an EvalResult, of which the shown row is drawn; images: a QueryGallery.
    """
    value, groups = result.per_query[result.shown][metric].numpy(), []
    kind = "AP" if metric.startswith("mAP") else metric
    for title, picked in pick_queries(value, features.query_labels, count).items():
        queries = []
        for index in picked:
            name = features.names[features.query_labels[index]]
            photos = [
                (images.gallery.root / images.gallery.paths[photo], bool(relevant))
                for photo, relevant in zip(result.nearest[index], result.nearest_relevant[index], strict=True)
            ]
            sketch = images.query.root / images.query.paths[index]
            queries.append((f"{name}\n{kind} {value[index]:.2f}", sketch, photos))
        groups.append((title, queries))
    return groups


def draw_retrievals(path, groups, title):
    """Draw each sketch beside its nearest photos, relevant ones framed green and others dashed red.

    groups: list of (title, list of (caption, sketch file, [(photo file, whether it is relevant), ...])).
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    groups = [group for group in groups if group[1]]
    columns = 1 + max(len(photos) for _, queries in groups for _, _, photos in queries)
    width = max(1.25 * columns, 0.09 * len(title))  # inches, in which all is placed: an Axes an image takes seconds
    height = 0.4 + sum(0.35 + 1.5 * len(queries) for _, queries in groups)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.text(width / 2, 0.2, title, fontsize=10, ha="center", va="center")

    def draw_image(path, column, top, **frame):
        image = _thumbnail(path)
        half = 0.56 * np.array(image.shape[:2]) / max(image.shape[:2])
        left, upper = 1.25 * (column + 0.5) - half[1], top + 0.9 - half[0]
        axes.imshow(image, extent=(left, left + 2 * half[1], upper + 2 * half[0], upper), aspect="auto")
        if frame:
            axes.add_patch(Rectangle((left, upper), *2 * half[::-1], fill=False, linewidth=3, **frame))

    top = 0.4
    for heading, queries in groups:
        axes.text(width / 2, top + 0.17, heading, fontsize=10, weight="bold", ha="center", va="center")
        top += 0.35
        for caption, sketch, photos in queries:
            axes.text(0.06, top + 0.31, caption, fontsize=8, va="bottom", parse_math=False)
            draw_image(sketch, 0, top)
            for column, (photo, is_relevant) in enumerate(photos, 1):
                frame = dict(color="tab:green", linestyle="-") if is_relevant else dict(color="tab:red", linestyle="--")
                draw_image(photo, column, top, **frame)
            top += 1.5
    axes.set(xlim=(0, width), ylim=(height, 0))  # imshow changes them
    save_png(figure, path, dpi=110)


def pick_queries(average_precision, labels, count):
    """Indices of `count` queries each by AP, from as many classes as possible: {"best", "typical", "worst"}.

    "typical" queries have the APs nearest to the median. No query is in two groups.
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
    """The first `count` of ranking, one of each class before a second of any class."""
    first = list({labels[index]: index for index in reversed(ranking)}.values())
    position = {index: number for number, index in enumerate(ranking)}
    first.sort(key=position.get)
    rest = [index for index in ranking if index not in set(first)]
    return [*first, *rest][:count]


def _thumbnail(path):
    image = read_rgb(path)
    image.thumbnail((160, 160))
    return np.asarray(image)
