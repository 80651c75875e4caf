"""Evaluates the features of any method under every published definition of mAP and Prec@k.

    python -m models.eval features.npz
    python -m models.eval photos.npy photos.csv sketches.npy sketches.csv --clusters 21 --subspaces 2 4

See models.eval.feature_files for the files. Writes results.json, per_query.npz and figures.
"""

import os
from pathlib import Path

import numpy as np
import torch

from models.eval.evaluate import evaluate_grid
from models.eval.feature_files import read_any
from models.eval.image_order import UNKNOWN, in_order_of
from models.eval.metrics import STANDARD
from models.eval.report import check_report_files, print_results, summarise, write_report
from models.options import add_grid, add_report, check_device, grid_of
from models.run_record import run_record
from models.testing import check_features
from utils import distributed
from utils.cli import InputError, OneLineParser, one_line_errors, path_type, sigterm_as_exception
from utils.distributed import log_rank0
from utils.files import folder_lock, sha256_of


@one_line_errors()
def main(argv=None):
    """Command line. Returns the content of results.json."""
    options = create_parser().parse_args(argv)
    if distributed.get_world_size() > 1:
        raise InputError("python -m models.eval runs in one process; start it without torchrun")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device("--device", options.device)
    if options.mixture_device is not None:
        check_device("--mixture_device", options.mixture_device)
    given = read_any(options.features, normalise=options.distance == "cosine")
    sources = options.features[1::2] or options.features * 2  # of four files those of labels, which have file names
    features, images = given.features, given.images(options.data_root, sources)
    if options.order:
        features, images = in_order_of(features, options.order)
    rows = _rows(options, len(np.unique(features.gallery_labels)))
    check_features(features, rows)
    if options.out is None:
        options.out = Path(f"{os.path.splitext(options.features[0])[0]}_results")
    check_report_files(options.out)
    grid = grid_of(options, rows)
    metrics, dtype = tuple(dict.fromkeys((*STANDARD, *options.metrics))), getattr(torch, options.distances)
    with sigterm_as_exception(), folder_lock(options.out, "testing"):
        result = evaluate_grid(features, grid, metrics, device=options.device, dtype=dtype)
        results = {"benchmark": "features", "protocol": None, "metrics": list(options.metrics)}
        results |= summarise(features, result.averages, run_record(options))
        results["features"] = {"files": {path: sha256_of(path) for path in options.features}, "source": None}
        print_results(results, definitions=True, per_class=options.per_class)
        write_report(options.out, results, features, result, images)
        if images is None:
            log_rank0(UNKNOWN)
    return results


def _rows(options, classes):
    """(M, K) of one-to-many matching, which --clusters or --subspaces asks for."""
    if not options.clusters and not options.subspaces:
        return []
    options.clusters, options.subspaces = options.clusters or [classes], options.subspaces or [2, 4]
    return [(m, k) for m in options.subspaces for k in options.clusters]


def create_parser():
    """The options of the command."""
    parser = OneLineParser(prog="python -m models.eval", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("features", nargs="+", metavar="FILE", help="one file (.npz, .pt, .safetensors, .pickle), or four: gallery "
        "features, gallery labels, query features, query labels (.npy, .pt, .csv)")  # fmt: skip
    add("--distance", choices=("cosine", "euclidean"), default="cosine", help="cosine: features are scaled to length "
        "1, and their Euclidean distances rank as cosine similarity does; euclidean: features as they are")  # fmt: skip
    add_grid(parser, metrics=STANDARD, dtype="float64")
    add_report(parser)
    add("--order", type=path_type, metavar="LISTS", help="folder of lists, such as datasets/Sketchy/zeroshot1, whose "
        "order the features have, in the folder of the data set: for file names, class names and pictures")  # fmt: skip
    add("--data_root", type=path_type, default=Path("."), metavar="DIR", help="what file names inside the features are "
        "relative to")  # fmt: skip
    add("--out", type=path_type, metavar="DIR", help="where the results go (default: FILE_results)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    return parser
