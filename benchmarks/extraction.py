"""Images a second of feature extraction, ours and a plain timm loop's, taking turns in one run.

    .venv/bin/python benchmarks/extraction.py
    .venv/bin/python benchmarks/extraction.py --model tf_efficientnet_lite0 --input_size 128 --device cuda

Images are decoded beforehand, so this is the network alone; `--decoding` reads JPEG files of 256 × 256 instead.

    .venv/bin/python benchmarks/extraction.py --model tf_efficientnet_lite0 --input_size 128 --photos DIR --count 2000

With `--photos`, the stages of an extraction are measured on images below DIR, and other forms of the network.
"""

import argparse
import copy
import functools
import math
import os
import sys
import tempfile
import time
import warnings
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
from models.eval import inference  # noqa: E402
from models.eval.batch_norm import fold_batch_norms  # noqa: E402
from models.eval.features import extract  # noqa: E402
from models.eval.inference import Inference, embed  # noqa: E402
from models.export import _feature_module, feature_session  # noqa: E402
from models.networks import normalise  # noqa: E402
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
    add("--photos", type=lambda path: Path(path).resolve(), metavar="DIR")
    add("--count", type=int, default=2000, help="of the images below --photos, evenly spaced")
    add("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="with --photos")
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
    """Print CPU milliseconds an image of each stage on one thread, and images a second of a whole extraction."""
    paths = sorted(path for path in options.photos.rglob("*") if path.suffix in (".jpg", ".png"))
    paths = [paths[index] for index in evenly_spaced(len(paths), options.count)]
    torch.manual_seed(0)
    student, _ = create_pair(options.model, 100, "none")
    student.eval().to(memory_format=torch.channels_last)
    some, threads = paths[:: max(1, len(paths) // 256)][:256], torch.get_num_threads()
    torch.set_num_threads(1)
    with keep_freed_memory():
        images, decode = cpu_ms(read_rgb, some)
        resized, scale = cpu_ms(lambda image: resize(image, options.input_size), images)
        batch = torch.from_numpy(stack(resized))
        parts = batch.split(options.batch_size)
        ms = min(cpu_ms(lambda images: normalise(images, *student.statistics), parts)[1] for _ in range(4))
        rows = [("decode", decode), ("resize", scale), ("normalise", ms * len(parts) / len(some))]
        for name, ms in rows:
            print(f"{name:56} {ms:5.2f} ms {1000 / ms:6.0f} images/s", flush=True)
        network_forms(student, batch, options.batch_size)
        torch.set_num_threads(threads)
        whole_extractions(student, paths, options)


def network_forms(student, images, batch_size):
    """Print CPU milliseconds an image of the network in several forms, in batches of `batch_size` and less."""
    folded = fold_batch_norms(student, lambda network: embed(network, images[:4], "cpu"))
    session = feature_session(student, images[:2])

    def of_module(optimize):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = optimize(torch.jit.trace(_feature_module(folded), (images[:16],)))

        def compute(images):
            with torch.no_grad():
                return module(images).numpy()

        return compute

    compiled = copy.deepcopy(folded)
    torch._inductor.config.freezing = True  # packs weights for oneDNN
    compiled.compile_features()
    forms = {
        "PyTorch": functools.partial(embed, student, device="cpu"),
        "PyTorch, BatchNorms folded": functools.partial(embed, folded, device="cpu"),
        "the same, bf16": functools.partial(embed, folded, device="cpu", precision="bf16"),
        "the same, torch.jit.freeze": of_module(torch.jit.freeze),
        "the same, torch.jit.optimize_for_inference": of_module(torch.jit.optimize_for_inference),
        "the same, torch.compile with packed weights": functools.partial(embed, compiled, device="cpu"),
        "ONNX Runtime": lambda images: session.run(None, {"images": np.ascontiguousarray(images.numpy())})[0],
    }
    expected = embed(student, images, "cpu")
    for name, compute in forms.items():
        for size in sorted({2, 4, 16, batch_size}, reverse=True):
            if name != "ONNX Runtime" and size < 16:
                continue  # PyTorch does not use oneDNN for so few
            parts, best = images.split(size), math.inf
            for _ in range(4):
                rows, ms = cpu_ms(compute, parts)
                best = min(best, ms * len(parts) / len(images))
            difference = np.linalg.norm(np.concatenate(rows) - expected, axis=1).max()
            print(
                f"{name + f', {size} at a time':56} {best:5.2f} ms {1000 / best:6.0f} images/s, {difference:.0e}",
                flush=True,
            )


def whole_extractions(student, paths, options):
    """Print images a second of whole extractions, and for which share of the time the network waits for images."""
    files = FileList(options.photos, options.photos, paths, np.zeros(len(paths), np.int64), range(len(paths)))

    def extraction(workers, whole_batches, min_images):
        loader = evaluation_loader(files, LoaderOptions(options.input_size, options.batch_size, workers))
        computing = Inference(student, "cpu")
        if whole_batches:
            images = torch.zeros(4, 3, options.input_size, options.input_size, dtype=torch.uint8)
            folded = fold_batch_norms(student, lambda network: embed(network, images, "cpu"))
            computing.compute = functools.partial(embed, folded, device="cpu")
        before, inference.MIN_IMAGES = inference.MIN_IMAGES, min_images
        start, cpu = time.perf_counter(), sum(os.times()[:4])
        list(extract(student, loader, "cpu", inference=computing))
        inference.MIN_IMAGES, seconds = before, time.perf_counter() - start
        return len(paths) / seconds, 1000 * (sum(os.times()[:4]) - cpu) / len(paths), computing.waiting / seconds

    ways = {"whole batches": (True, 0), "PyTorch on threads": (False, math.inf), "ONNX Runtime on threads": (False, 0)}
    best = {}
    for _ in range(options.rounds):
        for workers in options.workers:
            for name, way in ways.items():
                found = extraction(workers, *way)
                best[name, workers] = max(best.get((name, workers), found), found)
    for (name, workers), (rate, ms, waiting) in best.items():
        row = f"{name}, {workers} workers"
        print(f"{row:56} {ms:5.2f} ms {rate:6.0f} images/s, {waiting:.0%} waiting for images", flush=True)


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
