"""mAP@all of unseen classes on the miniature benchmark after `make demo`, beside chance and the untrained network.

    .venv/bin/python benchmarks/miniature.py --seeds 0 1 2
    .venv/bin/python benchmarks/miniature.py --train "--precision bf16"

The seed decides the start, the order, the augmentation and the noise; the images are the same. Takes minutes a seed.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import test_sketchy_ext_zeroshot  # noqa: E402
import train_sketchy_ext  # noqa: E402
from datasets.lists import open_benchmark  # noqa: E402
from models.eval.metrics import SameClass, average_precision, class_means, rank  # noqa: E402

SMALL = "--model tf_efficientnet_lite0 --input_size 96".split()
UNTRAINED = "--finetune lite0 --epochs 1 --max_steps 1 --lr 0 --teacher_lr 0 --no_validation".split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", default="", metavar="OPTIONS", help="more options of the train script")
    options = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            start = time.perf_counter()
            subprocess.run(
                ["make", "demo", f"SEED={seed}", f"DEMO={folder}", f"TRAIN={options.train}"], cwd=ROOT, check=True
            )
            seconds = time.perf_counter() - start
            rows = json.loads((Path(folder) / "checkpoint/results.json").read_text())["rows"]
            marked = [row["mAP@all"] for row in rows if row.get("K") == 8]
            table.append((seed, chance(folder, seed), untrained(folder, seed), rows[0]["mAP@all"], *marked, seconds))
    print(f"\nmAP@all of unseen classes, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print("seed  chance  untrained  one-to-one  M 2, K 8  M 4, K 8  seconds")
    for seed, *values, seconds in table:
        columns = (f"{value:{width}.3f}" for value, width in zip(values, (6, 9, 10, 8, 8), strict=True))
        print(f"{seed:4}  {'  '.join(columns)}  {seconds:7.0f}")


def chance(folder, seed):
    """mAP@all of a random ranking."""
    benchmark = open_benchmark("sketchy", Path(folder) / "data")
    query, gallery = (torch.from_numpy(benchmark.read(kind, "zero").labels) for kind in ("sketch", "photo"))
    scores = torch.from_numpy(np.random.default_rng(seed).random((len(query), len(gallery))))
    return class_means(average_precision(rank(scores, SameClass(query, gallery))), query)[1].mean().item()


def untrained(folder, seed):
    """One-to-one mAP@all of the network that training starts from."""
    data, start = ["--data_root", f"{folder}/data"], f"{folder}/start"
    with contextlib.redirect_stdout(io.StringIO()):
        train_sketchy_ext.main([*data, *SMALL, *UNTRAINED, "--seed", str(seed), "--savedir", start, "--overwrite"])
        results = test_sketchy_ext_zeroshot.main([*data, *SMALL, "--mode", "1", "--resume_dir", start])
    return results["rows"][0]["mAP@all"]


if __name__ == "__main__":
    main()
