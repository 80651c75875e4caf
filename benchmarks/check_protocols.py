"""Checks generalised.json and instances.json of a test against plain loops: all numbers must be equal to 1e-12.

    .venv/bin/python test_sketchy_ext_zeroshot.py --data_root DIR --zero_version LISTS --generalised --instances \\
        --distances float64 --resume_dir FOLDER
    .venv/bin/python benchmarks/check_protocols.py FOLDER DIR/LISTS

DIR is of Sketchy's layout and names, and LISTS has held-back photos (prepare lists --hold_out_photos). One-to-one
matching is checked: mAP@all, Prec@100 and their harmonic means, acc@1, acc@5, acc@10, mean reciprocal and median rank.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.eval.features import FEATURES, SEEN_FEATURES, read_features  # noqa: E402
from models.eval.image_order import open_order  # noqa: E402
from utils.cli import InputError, OneLineParser, one_line_errors  # noqa: E402


@one_line_errors()
def main(argv=None):
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the results and features of the test")
    parser.add_argument("lists", type=Path, help="folder of the lists that were tested")
    options = parser.parse_args(argv)
    (unseen, _), (seen, _) = (read_features(options.folder / name) for name in (FEATURES, SEEN_FEATURES))
    row = json.loads((options.folder / "generalised.json").read_text())["rows"][0]
    expected = {"unseen": generalised(unseen, seen), "seen": generalised(seen, unseen)}
    expected["harmonic_mean"] = {
        name: 2 * value * expected["seen"][name] / (value + expected["seen"][name])
        for name, value in expected["unseen"].items()
    }
    compare({group: {name: row[group][name] for name in values} for group, values in expected.items()}, expected)
    results = json.loads((options.folder / "instances.json").read_text())
    _, images = open_order(options.lists)
    expected = instances(unseen, images.query.paths, images.gallery.paths)
    compare({scope: results[scope] for scope in expected}, expected)


def generalised(own, other):
    """mAP@all (interpolated) and Prec@100, means over classes, of the queries of `own` among the photos of both."""
    gallery = np.concatenate([own.gallery, other.gallery]).astype(float)
    of_class = {}
    for query, label in zip(own.query.astype(float), own.query_labels, strict=True):
        order = np.argsort(((gallery - query) ** 2).sum(axis=1), kind="stable")
        relevant = np.append(own.gallery_labels == label, [False] * len(other.gallery))[order]
        precision = relevant.cumsum() / np.arange(1, len(order) + 1)
        ap = np.mean([precision[rank:].max() for rank in np.flatnonzero(relevant)])
        of_class.setdefault(label, []).append([ap, relevant[:100].mean()])
    return dict(
        zip(
            ["mAP@all", "Prec@100"], np.mean([np.mean(each, axis=0) for each in of_class.values()], axis=0), strict=True
        )
    )


def instances(features, sketches, photos):
    """The summaries of instances.json. A sketch a/n1_5-2.png was drawn from the photo b/n1_5.jpg of its class."""
    ranks, gallery = {"all photos": [], "within the class": []}, features.gallery.astype(float)
    names = [re.sub(r".*/|\.\w+$", "", path) for path in photos]
    for path, query, label in zip(sketches, features.query.astype(float), features.query_labels, strict=True):
        name = re.sub(r".*/|-\d+\.\w+$", "", path)
        order = np.argsort(((gallery - query) ** 2).sum(axis=1), kind="stable")
        in_class = [number for number in order if features.gallery_labels[number] == label]
        for scope, ordered in (("all photos", order), ("within the class", in_class)):
            right = [r for r, n in enumerate(ordered, 1) if names[n] == name and features.gallery_labels[n] == label]
            ranks[scope] += right[:1]
    return {
        scope: {f"acc@{k}": np.mean([rank <= k for rank in own]) for k in (1, 5, 10)}
        | {"mean reciprocal rank": np.mean([1 / rank for rank in own]), "median rank": np.median(own)}
        for scope, own in ranks.items()
    }


def compare(found, expected):
    """Print both and their difference. Raises InputError if that is above 1e-12."""
    for group, values in expected.items():
        for name, value in values.items():
            difference = abs(found[group][name] - value)
            print(
                f"{group:16} {name:20} {found[group][name]:.12f}  plain loop {value:.12f}  difference {difference:.1e}"
            )
            if not difference <= 1e-12:
                raise InputError(
                    f"{group} {name} differs from a plain loop; was the test run with --distances float64?"
                )


if __name__ == "__main__":
    main()
