"""Whether search_photos.py ranks the photos of a benchmark as its test script does, to the last photo.

    .venv/bin/python benchmarks/check_search_equals_eval.py --data_root DIR --checkpoint FILE

Sketches and photos are those of the unseen classes of Sketchy's lists. The test script computes features, whose scores
are float64 here; search makes an index of the folders that those photos lie in, and finds all of them for each sketch.
Both use the index's clusters. Of photos with the same score the test script puts the first in the list first, search
the first by path; there are none where all photos differ. Ends with status 1 on a difference.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import numpy_sort  # noqa: E402

numpy_sort.choose_sort_kernel()  # before NumPy, as in the scripts
import torch  # noqa: E402

import search_photos  # noqa: E402
import test_sketchy_ext_zeroshot as test_script  # noqa: E402
from datasets.lists import open_benchmark  # noqa: E402
from models.checkpoints import read_checkpoint, trained_with  # noqa: E402
from models.eval.evaluate import evaluate_rows  # noqa: E402
from models.eval.features import FEATURES, read_features  # noqa: E402
from models.eval.matching import CLUSTER_WEIGHT  # noqa: E402
from photo_search.index import open_index  # noqa: E402
from photo_search.search import MATCHINGS  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_root", type=Path, required=True, metavar="DIR", help="a benchmark folder with Sketchy's lists")
    add("--zero_version", default="zeroshot1")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="checkpoint, which records model and input size")
    add("--clusters", type=int, default=25, metavar="K")
    options = parser.parse_args()
    images = open_benchmark("sketchy", options.data_root, options.zero_version).read_query_gallery()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        index = make_index(folder / "index", images, options.checkpoint, options.clusters)
        expected = of_the_test(folder / "test", images, index, options)
        same = [compare(matching, expected[matching], found(folder, images, matching)) for matching in MATCHINGS]
    sys.exit(not all(same))


def make_index(folder, images, checkpoint, clusters):
    photos = sorted({str((images.gallery.root / path).parent) for path in images.gallery.paths})
    search("index", *photos, "--index", folder, "--checkpoint", checkpoint, "--clusters", clusters, "--subspaces", 2)
    index = open_index(folder)
    if len(index) != len(images.gallery):
        sys.exit(f"{len(index)} photos lie in the folders of {len(images.gallery)} listed ones; they must be the same")
    return index


def of_the_test(folder, images, index, options):
    """{matching: [files of the photos, nearest first, of each sketch]}."""
    folder.mkdir()
    shutil.copy(options.checkpoint, folder / "model_best.pth.tar")
    trained = trained_with(read_checkpoint(options.checkpoint))
    network = ["--model", trained["model"], "--input_size", str(trained["input_size"])]
    own = ["--data_root", str(options.data_root), "--zero_version", options.zero_version, "--resume_dir", str(folder)]
    test_script.main([*own, *network, "--device", "cpu", "--distances", "float64", "--mode", "1"])
    features, _ = read_features(folder / FEATURES)
    codebooks = {"one-to-one": None, "one-to-many": index.cells.codebook}
    measured = evaluate_rows(features, codebooks, nearest=dict.fromkeys(codebooks, len(index)), dtype=torch.float64)
    files = [os.path.realpath(images.gallery.root / path) for path in images.gallery.paths]
    return {
        matching: [[files[photo] for photo in nearest] for nearest in measured[matching]["nearest"]]
        for matching in codebooks
    }


def found(folder, images, matching):
    """[files of the photos, nearest first] of each sketch, by search."""
    sketches = [images.query.root / path for path in images.query.paths]
    out = folder / "found.json"
    weight = ["--cluster_weight", CLUSTER_WEIGHT] if matching == "one-to-many" else []
    how = ["--as_drawn", "--matching", matching, *weight, "-k", len(images.gallery)]
    search("find", *sketches, *how, "--index", folder / "index", "--json", out)
    return [[photo["photo"] for photo in each["found"]] for each in json.loads(out.read_text())]


def search(*arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        search_photos.main([*map(str, arguments), "--device", "cpu"])


def compare(matching, expected, found):
    """Say how many rankings are the same, and where the first other one differs; returns whether all are."""
    differ = [sketch for sketch, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]]
    print(f"{matching}: {len(found) - len(differ)} of {len(found)} rankings of {len(found[0])} photos are equal")
    if differ:
        test, own = expected[differ[0]], found[differ[0]]
        place = next(place for place, pair in enumerate(zip(test, own, strict=True)) if pair[0] != pair[1])
        print(f"  first at sketch {differ[0]}, place {place + 1}: {test[place]} in the test, {own[place]} in search")
    return not differ


if __name__ == "__main__":
    main()
