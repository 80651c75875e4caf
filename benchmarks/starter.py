"""What a trained network finds: of a few classes among photos of many, and among the photos of other data sets.

    .venv/bin/python benchmarks/starter.py FILE DATA DIR [--lists held_out] [--input_size 160]

FILE is a checkpoint, or a student.safetensors; DIR is what starter_data.py made of DATA. Three tables:

    mixed         Sketchy25: sketches of the unseen classes of DIR/LISTS, photos of all 125 classes
    PACS          its sketches, but those that TUBerlin187 has, too; its photos of 7 classes
    TUBerlin187   its unseen classes: sketches of classes that DIR/LISTS trains on under some name, and of new ones

A row is one-to-one matching, or one-to-many with a weight of the cluster distance, M 2 and a 25th of the photos as K.
Means over classes: P@1, P@10, "in 10": at least one right photo among the first ten, and mAP@all.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.starter_data import class_names, own_name
from datasets.images import read_rgb, resize, stack
from models.checkpoints import load_student
from models.eval.codebooks import fit_codebook
from models.eval.inference import embed
from models.eval.matching import cluster_distances, euclidean_distances, fused_scores, nearest_codes
from models.eval.metrics import SameClass, average_precision, class_means, precision_at, rank

WEIGHTS = (0, 0.1, 0.2, 0.3, 0.5, 0.8)


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path)
    add("data", type=Path, help="the folder that holds Sketchy25, PACS and TUBerlin187")
    add("merged", type=Path, help="what starter_data.py made")
    add("--lists", default="held_out", help="its folder of lists whose training classes the network knows")
    add("--input_size", type=int, help="side of an image (default: as in FILE)")
    add("--only", choices=("mixed", "PACS", "TUBerlin187"), nargs="+", default=["mixed", "PACS", "TUBerlin187"])
    options = parser.parse_args(argv)
    student, metadata, _ = load_student(options.file, input_size=options.input_size)
    student.to(memory_format=torch.channels_last)
    known = set(class_names(options.merged / options.lists / "cname_cid.txt"))
    collections = {"mixed": mixed, "PACS": pacs, "TUBerlin187": tuberlin}
    for name in options.only:
        sketches, photos = collections[name](options)
        gallery, labels = features(student, photos, metadata["input_size"])
        rankings = matched(student, metadata["input_size"], sketches, gallery, labels)
        for title, wanted in groups(name, sketches, known):
            table(f"{name}{title}", rankings, wanted, len(gallery))


def mixed(options):
    """({class: sketch files}, {class: photo files}): the unseen classes among all of Sketchy25's photos."""
    unseen = set(map(own_name, class_names(options.merged / options.lists / "cname_cid_zero.txt")))
    root, found = options.data / "Sketchy25", []
    for start in ("sketch_tx_000000000000_ready_filelist", "all_photo_filelist"):
        parts = (
            listed(root, "zeroshot2", f"{start}{split}.txt", suffix)
            for split, suffix in (("_train", ""), ("_zero", "_zero"))
        )
        found.append({name: paths for part in parts for name, paths in part.items()})
    sketches, photos = found
    return {name: paths for name, paths in sketches.items() if name in unseen}, photos


def pacs(options):
    """As `mixed`, of PACS; sketches that are in TUBerlin187 may have been trained on."""
    trained = {path.name for path in (options.data / "TUBerlin187/png_ready").glob("*/*.png")}
    sketches = {own_name(path.name): sorted(each for each in path.iterdir() if each.name not in trained)
                for path in sorted((options.data / "PACS/sketch").iterdir())}  # fmt: skip
    photos = {own_name(path.name): sorted(path.iterdir()) for path in sorted((options.data / "PACS/photo").iterdir())}
    return sketches, photos


def tuberlin(options):
    """As `mixed`, of TUBerlin187's unseen classes."""
    root = options.data / "TUBerlin187"
    sketches = listed(root, "zeroshot", "png_ready_filelist_zero.txt", "_zero")
    return sketches, listed(root, "zeroshot", "ImageResized_ready_filelist_zero.txt", "_zero")


def listed(root, lists, name, suffix):
    """{class: files} of a list."""
    names, files = class_names(root / lists / f"cname_cid{suffix}.txt"), defaultdict(list)
    for line in (root / lists / name).read_text().splitlines():
        path, _, label = line.rpartition(" ")
        files[own_name(names[int(label)])].append(root / path)
    return files


def groups(name, sketches, known):
    """(what it is, classes) of each table of a collection."""
    if name == "mixed":
        return [(f", {len(sketches)} classes", set(sketches))]
    parts = {"trained on": set(sketches) & known, "new": set(sketches) - known}
    return [(f", {len(part)} classes {what}: {', '.join(sorted(part))}", part) for what, part in parts.items() if part]


def features(student, files, size):
    """(features (n, D) float32, class names (n,)) of {class: files}."""
    names = np.array([name for name, paths in files.items() for _ in paths])
    paths = [path for found in files.values() for path in found]
    batches = [paths[start : start + 50] for start in range(0, len(paths), 50)]
    rows = [embed(student, torch.from_numpy(stack([resize(read_rgb(path), size) for path in batch])), "cpu")
            for batch in batches]  # fmt: skip
    return np.concatenate(rows), names


def matched(student, size, sketches, gallery, gallery_names):
    """{name of a row: (Ranking of all sketches, their class names)}."""
    query, query_names = features(student, sketches, size)
    names = sorted({*gallery_names, *query_names})
    labels = [torch.tensor([names.index(name) for name in each]) for each in (query_names, gallery_names)]
    clusters = min(100, len(gallery) // 25)
    codebook, _ = fit_codebook(gallery, 2, clusters)
    query, gallery, codebook = map(torch.from_numpy, (query, gallery, codebook))
    near = euclidean_distances(query, gallery)
    apart = cluster_distances(query, codebook, nearest_codes(gallery, codebook))
    scores = {"one-to-one": near} | {f"{weight:g}": fused_scores(apart, near, weight) for weight in WEIGHTS if weight}
    return {name: (rank(each, SameClass(*labels)), query_names) for name, each in scores.items()}


def table(title, rankings, wanted, photos):
    """Print the means over the classes `wanted`, of {row: (Ranking, class names)}."""
    print(f"\n{title}; {photos:,} photos\n{'matching':12} {'P@1':>6} {'P@10':>6} {'in 10':>6} {'mAP':>6}")
    for row, (ranking, names) in rankings.items():
        kept = torch.from_numpy(np.isin(names, list(wanted)))
        labels = torch.from_numpy(np.unique(names, return_inverse=True)[1])[kept]
        right = (ranking.hits[:, 0] <= 10).double()
        values = precision_at(ranking, 1), precision_at(ranking, 10), right, average_precision(ranking)
        means = [class_means(value[kept], labels)[1].mean().item() for value in values]
        print(f"{row:12} " + " ".join(f"{mean:6.3f}" for mean in means))


if __name__ == "__main__":
    main()
