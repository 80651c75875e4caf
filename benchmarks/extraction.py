"""Images a second of feature extraction, ours and a plain timm loop's, taking turns in one run.

    .venv/bin/python benchmarks/extraction.py
    .venv/bin/python benchmarks/extraction.py --model tf_efficientnet_lite0 --input_size 128 --device cuda

Images are decoded beforehand, so this is the network alone; `--decoding` reads JPEG files of 256 × 256 instead.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets.lists import FileList  # noqa: E402
from datasets.loaders import LoaderOptions, evaluation_loader  # noqa: E402
from models.eval.features import extract  # noqa: E402
from models.weights import create_pair  # noqa: E402
from utils.memory import keep_freed_memory  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="convnextv2_tiny")
    add("--input_size", type=int, default=224)
    add("--batch_size", type=int, default=32)
    add("--batches", type=int, default=3)
    add("--rounds", type=int, default=3)
    add("--device", default="cpu")
    add("--decoding", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loader = images_of(options, Path(folder))
        cases = {"plain timm loop": lambda: plain(network, loader, options.device)}
        network = timm.create_model(options.model, num_classes=0).eval().to(options.device)
        for name, precision, compiled in (("fp32", "fp32", False), ("fp32, --compile", "fp32", True),
                ("bf16", "bf16", False), ("bf16, --compile", "bf16", True)):  # fmt: skip
            cases[f"ours, {name}"] = ours(options, loader, precision, compiled)
        best = take_turns(cases, options)
    count = options.batches * options.batch_size
    machine = f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, {options.device}"
    print(f"{options.model} at {options.input_size}, {machine}")
    for name, seconds in best.items():
        print(f"{name:22} {count / seconds:8.1f} images/s  {best['plain timm loop'] / seconds:5.2f} x")


def images_of(options, folder):
    """A loader of (images uint8, labels)."""
    random, size = np.random.default_rng(0), options.input_size
    count = options.batches * options.batch_size
    if not options.decoding:
        images = torch.from_numpy(random.integers(0, 256, (count, size, size, 3), np.uint8)).permute(0, 3, 1, 2)
        return DataLoader(TensorDataset(images, torch.zeros(count, dtype=torch.long)), options.batch_size)
    names = [f"{number}.jpg" for number in range(count)]
    for name in names:
        noise = Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8))
        noise.resize((256, 256), Image.Resampling.BICUBIC).save(folder / name, quality=85)
    files = FileList(folder / "list", folder, names, np.zeros(count, np.int64), list(range(count)))
    return evaluation_loader(files, LoaderOptions(size, options.batch_size, 1, options.device))


@torch.inference_mode()
def plain(network, loader, device):
    """Features as one writes it in a notebook."""
    mean, std = (torch.tensor(network.pretrained_cfg[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
    return torch.cat([F.normalize(network((images.to(device) / 255 - mean) / std)).cpu() for images, _ in loader])


def ours(options, loader, precision, compiled):
    student, _ = create_pair(options.model, 100, "none")
    student.to(options.device)
    if compiled:
        student.compile_features()

    def run():
        with keep_freed_memory():  # as the test scripts do
            list(extract(student, loader, options.device, precision=precision))

    return run


def take_turns(cases, options):
    """{name: best seconds}."""
    best = dict.fromkeys(cases, math.inf)
    for turn in range(-1, options.rounds):  # the first warms up
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if options.device != "cpu":
                torch.cuda.synchronize(options.device)
            if turn >= 0:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
