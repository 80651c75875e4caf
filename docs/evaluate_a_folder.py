"""Computes features, codebooks, matching and metrics of a folder of images, from Python.

    python -m docs.evaluate_a_folder demo/data

The folder is a benchmark's; `python -m datasets.prepare miniature demo/data` draws one. Nothing is written.
The network is untrained, so the result is close to that of a random ranking.
"""

import sys

import torch

from datasets.lists import open_benchmark
from datasets.loaders import LoaderOptions
from models.eval.codebooks import fit_codebooks
from models.eval.evaluate import evaluate_rows
from models.eval.features import extract_all
from models.eval.metrics import class_means
from models.weights import create_pair

benchmark = open_benchmark("sketchy", sys.argv[1] if len(sys.argv) > 1 else "demo/data")
torch.manual_seed(0)
student, _ = create_pair("convnextv2_atto", len(benchmark.seen_names), finetune="none")
# A trained one: student = models.checkpoints.load_student(file).student
features = extract_all(student, benchmark.read_query_gallery(), LoaderOptions(size=48))
print(f"{len(features.query)} sketches, {len(features.gallery)} photos, features of {student.width} values")
codebooks, _ = fit_codebooks(features.gallery, [(2, len(benchmark.unseen_names))])
for row, values in evaluate_rows(features, {None: None, **codebooks}).items():
    classes, means = class_means(values["mAP@all"], torch.from_numpy(features.query_labels))
    best = benchmark.unseen_names[classes[means.argmax()]]
    name = "M {}, K {}".format(*row) if row else "one-to-one"
    print(f"{name}: mAP@all {means.mean():.4f}, best class {best} {means.max():.4f}")
