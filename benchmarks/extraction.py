"""Images a second of feature extraction, ours and a plain timm loop's, taking turns in one run.

    .venv/bin/python benchmarks/extraction.py
    .venv/bin/python benchmarks/extraction.py --model tf_efficientnet_lite0 --input_size 128 --device cuda

Images are decoded beforehand, so this is the network alone; `--decoding` reads JPEG files of 256 × 256 instead.

    .venv/bin/python benchmarks/extraction.py --model tf_efficientnet_lite0 --input_size 128 --photos DIR --count 2000

With `--photos`, the stages of an extraction are measured on some of the images below DIR.
"""

import argparse
import functools
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

from datasets.images import read_rgb, resize, stack  # noqa: E402
from datasets.lists import FileList  # noqa: E402
from datasets.loaders import LoaderOptions, evaluation_loader  # noqa: E402
from models.eval.batch_norm import fold_batch_norms  # noqa: E402
from models.eval.features import embed, extract  # noqa: E402
from models.weights import create_pair  # noqa: E402
from utils.memory import keep_freed_memory  # noqa: E402
from utils.sampling import evenly_spaced  # noqa: E402


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
    add("--photos", type=Path, metavar="DIR")
    add("--count", type=int, default=2000, help="of the images below --photos, evenly spaced")
    options = parser.parse_args()
    if options.photos:
        stages(options)
        return
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


def stages(options):
    """Print milliseconds of CPU an image of each stage on one thread, and images a second of a whole extraction."""
    paths = sorted(path for path in options.photos.rglob("*") if path.suffix in (".jpg", ".png"))
    paths = [paths[index] for index in evenly_spaced(len(paths), options.count)]
    student, _ = create_pair(options.model, 100, "none")
    student.eval().to(memory_format=torch.channels_last)
    some, threads = paths[:: max(1, len(paths) // 256)][:256], torch.get_num_threads()
    torch.set_num_threads(1)
    with keep_freed_memory():
        images, decode = cpu_ms(read_rgb, some)
        resized, scale = cpu_ms(lambda image: resize(image, options.input_size), images)
        batches = torch.from_numpy(stack(resized)).split(options.batch_size)
        folded = fold_batch_norms(student, lambda network: embed(network, batches[0][:4], "cpu"))
        print(f"decode {decode:.2f} ms, resize {scale:.2f} ms")
        for name, network, precision in (
            ("fp32", student, "fp32"), ("fp32, folded", folded, "fp32"), ("bf16, folded", folded, "bf16")
        ):  # fmt: skip
            compute = functools.partial(embed, network, device="cpu", precision=precision)
            best = min(cpu_ms(compute, batches)[1] for _ in range(4))
            print(f"network, {name}: {best * len(batches) / len(some):.2f} ms")
        torch.set_num_threads(threads)
        files = FileList(options.photos, options.photos, paths, np.zeros(len(paths), np.int64), range(len(paths)))
        for workers in (0, 1, 2):
            loader = evaluation_loader(files, LoaderOptions(options.input_size, options.batch_size, workers))
            start = time.perf_counter()
            list(extract(student, loader, "cpu"))
            print(f"whole, {workers} workers: {len(paths) / (time.perf_counter() - start):.0f} images/s")


def cpu_ms(function, items):
    """(results, milliseconds of CPU an item)."""
    start = time.process_time()
    results = [function(item) for item in items]
    return results, 1000 * (time.process_time() - start) / len(items)


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
