"""How many clusters photos of unknown classes need: simple rules for K beside the number of classes.

    .venv/bin/python benchmarks/clusters.py --data_root DIR [DIR ...] --checkpoint FILE --cache DIR
    .venv/bin/python benchmarks/clusters.py ... --figure clusters.png

Each DIR is a benchmark folder with Sketchy's lists. Its galleries: the photos of its unseen classes, of some of these,
of all its classes, and a few photos; the queries are sketches of the same classes. Each gallery is drawn, and its
mixtures are fitted, once a seed. Tables show what one-to-many matching adds to the mAP@all of one-to-one matching, the
mean and the deviation over seeds. Features are kept in --cache, and are not computed again.

In hundreds of dimensions a mixture leaves the clusters of k-means, which it starts from, as they are. So the means of
these are taken, which is many times as fast; --mixtures fits mixtures all the same.
"""

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import numpy_sort  # noqa: E402

numpy_sort.choose_sort_kernel()  # before NumPy, as in the scripts
import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.cluster import KMeans  # noqa: E402
from sklearn.decomposition import PCA  # noqa: E402
from sklearn.mixture import GaussianMixture  # noqa: E402

from datasets.lists import open_benchmark  # noqa: E402
from datasets.loaders import LoaderOptions, evaluation_loader  # noqa: E402
from models.checkpoints import load_student  # noqa: E402
from models.eval.codebooks import fit_codebook  # noqa: E402
from models.eval.evaluate import evaluate_rows  # noqa: E402
from models.eval.features import Features, extract  # noqa: E402
from models.eval.metrics import class_means  # noqa: E402
from utils.files import atomic_write, sha256_of  # noqa: E402

GRID = (2, 5, 10, 20, 40, 80)  # of K, for the rules that fit mixtures
RULES = {  # of photos (N, D) and classes: K
    "10": lambda photos, classes: 10,
    "25": lambda photos, classes: 25,
    "50": lambda photos, classes: 50,
    "100": lambda photos, classes: 100,
    "√(N/2)": lambda photos, classes: math.sqrt(len(photos) / 2),
    "√N": lambda photos, classes: math.sqrt(len(photos)),
    "N/10": lambda photos, classes: len(photos) / 10,
    "N/25": lambda photos, classes: len(photos) / 25,
    "N/50": lambda photos, classes: len(photos) / 50,
    "held out": lambda photos, classes: by_mixtures(photos, held_out=True),
    "BIC": lambda photos, classes: by_mixtures(photos, held_out=False),
    "classes": lambda photos, classes: classes,
}


class OpenIndex(NamedTuple):
    """Features and labels of photos, and of sketches of the same classes."""

    photos: np.ndarray  # (N, D) float32
    labels: np.ndarray  # (N,) int64
    sketches: np.ndarray
    sketch_labels: np.ndarray


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_root", nargs="+", required=True, metavar="DIR", help="benchmark folders with Sketchy's lists")
    add("--checkpoint", required=True, metavar="FILE")
    add("--cache", type=Path, default=Path("clusters_benchmark"), metavar="DIR", help="where features go")
    add("--sketches", type=int, default=1500, help="of each gallery at most")
    add("--seeds", type=int, default=3)
    add("--subspaces", type=int, nargs="+", default=[1, 2, 4], metavar="M")
    add("--largest", type=int, default=100, metavar="K", help="larger K are cut")
    add("--mixtures", action="store_true")
    add("--figure", type=Path, metavar="FILE")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    changes = defaultdict(list)  # (M, rule, gallery): of each seed (K, mAP@all less that of one-to-one)
    for root in options.data_root:
        unseen, everything = albums(root, options)
        for name, draw in galleries(Path(root).name, unseen, everything).items():
            for seed in range(options.seeds):
                measure(changes, name, draw(np.random.default_rng(seed), options.sketches), seed, options)
    for subspaces in options.subspaces:
        table({key[1:]: found for key, found in changes.items() if key[0] == subspaces}, subspaces)
    if options.figure:
        draw_figure(options.figure, changes)


def albums(root, options):
    """(OpenIndex of the unseen classes, OpenIndex of all classes) of a benchmark folder."""
    path = options.cache / f"{Path(root).name}-{sha256_of(options.checkpoint)[:12]}.npz"
    if not path.is_file():
        options.cache.mkdir(parents=True, exist_ok=True)
        (student, metadata, _), benchmark = load_student(options.checkpoint), open_benchmark("sketchy", root)
        arrays = {}
        for kind in ("photo", "sketch"):
            for split in ("train", "zero"):
                files = benchmark.read(kind, split)
                loader = evaluation_loader(files, LoaderOptions(metadata["input_size"]))
                arrays[f"{kind} {split}"] = np.concatenate(list(extract(student, loader, "cpu")))
                arrays[f"{kind} {split} labels"] = files.labels
        with atomic_write(path) as file:
            np.savez(file, **arrays)
    with np.load(path) as arrays:
        zero, train = (
            OpenIndex(arrays[f"photo {split}"], arrays[f"photo {split} labels"],
                  arrays[f"sketch {split}"], arrays[f"sketch {split} labels"])
            for split in ("zero", "train")
        )  # fmt: skip
    shifted = train._replace(labels=train.labels + 1000, sketch_labels=train.sketch_labels + 1000)
    return zero, OpenIndex(*map(np.concatenate, zip(zero, shifted, strict=True)))


def galleries(name, unseen, everything):
    """{name of a gallery: a function of a NumPy generator and a number of sketches that gives its OpenIndex}."""
    classes, every = (len(np.unique(album.labels)) for album in (unseen, everything))
    found = {f"{count} classes": of_classes(unseen, count) for count in (5, 10, 15, classes) if count <= classes}
    found[f"{every} classes"] = of_classes(everything, every)
    found[f"{every} classes, uneven"] = of_classes(everything, every, uneven=True)
    for few in (5, classes):
        if few <= classes:
            found |= {
                f"{count} photos of {few} classes": of_classes(unseen, few, photos=count)
                for count in (20, 50, 100, 200) if count <= np.sort(np.bincount(unseen.labels))[:few].sum()
            }  # fmt: skip
    return {f"{name}, {each}": draw for each, draw in found.items()}


def of_classes(album, count, photos=None, uneven=False):
    """Draws `count` classes; of their photos all, or so many, or of each class a share from a tenth to all."""

    def draw(random, sketches):
        labels = album.labels
        chosen = np.isin(labels, random.permutation(np.unique(labels))[:count])
        if uneven:
            chosen &= random.random(len(labels)) < (0.1 ** random.random(labels.max() + 1))[labels]
        if photos:
            chosen[random.permutation(np.flatnonzero(chosen))[photos:]] = False
        return part(album, chosen, random, sketches)

    return draw


def part(album, photos, random, most):
    """An OpenIndex of some photos (N,) bool, and of at most `most` sketches of their classes."""
    classes = np.unique(album.labels[photos])
    sketches = np.flatnonzero(np.isin(album.sketch_labels, classes))
    sketches = np.sort(random.permutation(sketches)[:most])
    labels, sketch_labels = classes.searchsorted(album.labels[photos]), album.sketch_labels[sketches]
    return OpenIndex(album.photos[photos], labels, album.sketches[sketches], classes.searchsorted(sketch_labels))


def measure(changes, name, album, seed, options):
    """Add what each rule gives for an OpenIndex to `changes`."""
    photos, classes = len(album.labels), len(np.unique(album.labels))
    most = min(options.largest, photos // 2)
    chosen = {rule: max(2, min(round(function(album.photos, classes)), most)) for rule, function in RULES.items()}
    codebooks = {None: None}
    for subspaces in options.subspaces:
        for clusters in sorted(set(chosen.values())):
            fit = fit_codebook if options.mixtures else k_means
            codebooks[subspaces, clusters] = fit(album.photos, subspaces, clusters, seed)[0]
    features = Features(album.photos, album.labels, album.sketches, album.sketch_labels)
    labels = torch.from_numpy(album.sketch_labels)
    found = {
        key: float(class_means(values["mAP@all"], labels)[1].mean())
        for key, values in evaluate_rows(features, codebooks, ("mAP@all",)).items()
    }
    for subspaces in options.subspaces:
        for rule, clusters in chosen.items():
            changes[subspaces, rule, name].append((clusters, found[subspaces, clusters] - found[None], found[None]))
    print(f"{name}, seed {seed}: {photos} photos, one-to-one {found[None]:.4f}", file=sys.stderr)


def k_means(photos, subspaces, clusters, seed):
    """(codebook (M, K, D/M), ): the means that fit_codebook starts from."""
    random, parts = np.random.RandomState(seed), np.split(photos, subspaces, axis=1)
    fits = [KMeans(clusters, n_init=1, random_state=random).fit(np.ascontiguousarray(part)) for part in parts]
    return (np.stack([fit.cluster_centers_ for fit in fits]),)


def by_mixtures(photos, held_out):
    """K of GRID with the best likelihood of the fifth of photos (N, D) held out, or the best BIC of all of them.

    Mixtures have diagonal covariances in 32 directions: a full one has more numbers than there are photos.
    """
    count = len(photos)
    flat = PCA(min(32, count // 2), random_state=0).fit_transform(photos.astype(np.float64))
    flat = flat[np.random.default_rng(0).permutation(count)]
    fitted, rest = (flat[count // 5 :], flat[: count // 5]) if held_out else (flat, None)

    def badness(clusters):
        mixture = GaussianMixture(clusters, covariance_type="diag", reg_covar=1e-4, random_state=0).fit(fitted)
        return -mixture.score(rest) if held_out else mixture.bic(flat)

    return min((clusters for clusters in GRID if clusters <= count // 3), key=badness)


def table(changes, subspaces):
    """Print a line a gallery, a column a rule in Markdown."""
    names = list(dict.fromkeys(name for _, name in changes))
    print(f"\nM {subspaces}: mAP@all less that of one-to-one matching, and K\n")
    print("| gallery | one-to-one | " + " | ".join(RULES) + " |")
    print("|" + "---|" * (len(RULES) + 2))
    for name in names:
        cells = [f"{np.mean([each[2] for each in changes['classes', name]]):.3f}"]
        for rule in RULES:
            clusters, change, _ = zip(*changes[rule, name], strict=True)
            cells.append(f"{spread(change)} ({np.mean(clusters):.0f})")
        print(f"| {name} | " + " | ".join(cells) + " |")
    # (rules, galleries, seeds), then means over galleries
    every = np.array([[[each[1] for each in changes[rule, name]] for name in names] for rule in RULES]).mean(axis=1)
    print("| mean | | " + " | ".join(map(spread, every)) + " |")
    print("| less classes' | | " + " | ".join(map(spread, every - every[-1])) + " |")


def spread(values):
    """The mean, and the deviation of several."""
    return f"{np.mean(values):+.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def draw_figure(path, changes):
    """Draw the change of each rule in each gallery, a panel for each M. Needs matplotlib."""
    from matplotlib.figure import Figure

    every = list(dict.fromkeys(key[0] for key in changes))
    names = list(dict.fromkeys(key[2] for key in changes))
    figure = Figure(figsize=(9, 3.6 * len(every)), layout="constrained")
    for axis, subspaces in zip(figure.subplots(len(every), squeeze=False)[:, 0], every, strict=True):
        for name in names:
            axis.plot(list(RULES), [np.mean([each[1] for each in changes[subspaces, rule, name]]) for rule in RULES],
                      "o-", markersize=4, linewidth=0.8, label=name)  # fmt: skip
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_ylabel(f"mAP@all less one-to-one's, M {subspaces}")
        axis.legend(fontsize=6, ncols=2)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    main()
