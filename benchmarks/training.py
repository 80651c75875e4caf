"""Speed and memory of training: the loader, the whole step beside a plain one and timm's own, end to end.

    .venv/bin/python benchmarks/training.py --data_root <images in the layout of Sketchy Ext>
    .venv/bin/python benchmarks/training.py --tasks step --device cuda --batch_size 210 --precisions fp32 tf32 bf16

What is compared takes turns in one process; the best of --rounds turns counts. Without --data_root the loader reads
drawings of the miniature benchmark at 227 pixels, as JPEG and PNG. scikit-image (benchmarks/requirements.txt) is needed
for the loader of the release.
"""

import argparse
import copy
import math
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets.images import draw_augmentation  # noqa: E402
from datasets.lists import FileList, open_benchmark  # noqa: E402
from datasets.loaders import LoaderOptions, TrainingDataset, training_loader  # noqa: E402
from models.losses import Batch, alignment_losses  # noqa: E402
from models.networks import (  # noqa: E402
    IMAGENET_MEAN,
    IMAGENET_STD,
    Student,
    Teacher,
    arithmetic,
    create_backbone,
    matmul_rules,
    normalise,
    prepare_models,
)
from models.train_step import TrainState, create_optimizers  # noqa: E402
from models.training import train_step  # noqa: E402
from utils.memory import keep_freed_memory  # noqa: E402

SEEN = 100
FORWARD = 4.47e9 * 2  # FLOPs of one image through ConvNeXt V2-Tiny at 224; backward takes twice as many


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=JOBS, default=list(TASKS))
    add("--data_root", type=Path)
    add("--device", default="cpu")
    add("--batch_size", type=int, default=8)
    add("--precisions", nargs="+", default=["fp32", "bf16"])
    add("--rounds", type=int, default=5)
    add("--images", type=int, default=400, help="a turn of the loader")
    add("--workers", type=int, default=2)
    add("--peak", type=float, help="TFLOP/s of the device, for the share of it that is used")
    add("--no_compile", action="store_true")
    add("--case", choices=MEMORY, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    print(f"{torch.get_num_threads()} threads, device {options.device}, torch {torch.__version__}")
    for task in options.tasks:
        JOBS[task](options)


# --- the loader


def loader(options):
    """Images a second that one core decodes, augments and resizes: ours, and as the release does it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sketches, photos = images_of(options, Path(folder))
        ours = TrainingDataset(sketches, photos, 224, 0)
        keys = np.random.default_rng(0).permutation(len(sketches) + len(photos))[: options.images]
        readers = {"ours": lambda key: ours[0, int(key)]}
        try:
            import skimage.transform as transform

            readers["as the release does it"] = lambda key: as_released(ours, int(key), transform)
        except ImportError:
            print("scikit-image is not installed: the loader of the release is left out")
        best = dict.fromkeys(readers, 0.0)
        for _ in range(options.rounds):
            for name, read in readers.items():
                start = time.perf_counter()
                for key in keys:
                    read(key)
                best[name] = max(best[name], len(keys) / (time.perf_counter() - start))
    print("\n| images a second and core | |\n|---|---|")
    for name, rate in best.items():
        print(f"| {name} | {rate:.0f} |")
    if len(best) == 2:
        print(f"| ratio | {best['ours'] / best['as the release does it']:.2f} |")


def images_of(options, folder):
    """(sketches, photos) FileLists: those of --data_root, or drawings."""
    if options.data_root:
        benchmark = open_benchmark("sketchy", options.data_root)
        return benchmark.read("sketch", "train"), benchmark.read("photo", "train")
    from datasets.prepare.miniature import write_miniature

    write_miniature(folder / "small", seed=0, sketches=4, photos=4, held_back=1, workers=2)
    benchmark = open_benchmark("sketchy", folder / "small")
    lists = []
    for kind, ending in (("sketch", "png"), ("photo", "jpg")):
        files = benchmark.read(kind, "train")
        for number, name in enumerate(files.paths):
            Image.open(files.root / name).convert("RGB").resize((227, 227)).save(folder / f"{kind}{number}.{ending}")
        names = [f"{kind}{number}.{ending}" for number in range(len(files))]
        lists.append(FileList(files.source, folder, names, files.labels, files.lines))
    return lists


def as_released(images, index, transform):
    """One image by scikit-image's warp, Pillow's resize, float tensors and normalisation on the CPU."""
    files, prepare_models = images.file(index)
    with Image.open(files.root / files.paths[prepare_models]) as file:
        image = file.convert("RGB")
    augmentation = draw_augmentation(np.random.default_rng((0, 0, index)))
    if augmentation is not None:
        flip, sx, sy, rotation, tx, ty = augmentation
        pixels = np.asarray(image)[:, :: -1 if flip else 1]
        mapping = transform.AffineTransform(scale=(sx, sy), rotation=rotation, translation=(tx, ty))
        image = Image.fromarray((255 * transform.warp(pixels, mapping.inverse)).astype(np.uint8))
    image = image.resize((224, 224), Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (values - mean) / std, int(files.labels[prepare_models])


# --- the step


def step(options):
    """The whole bidirectional step, and that of warm-up: ours in each precision, a plain one in fp32, timm's own."""
    torch.manual_seed(0)
    network = create_backbone("convnextv2_tiny")
    batch = example_batch(options)
    cases = {"plain fp32, eager": plain_case(network, batch, options)}
    for precision in options.precisions:
        for compiled in (False, True)[: 1 if options.no_compile else 2]:
            name = f"ours, {precision}" + (", --compile" if compiled else "")
            cases[name] = our_case(network, batch, precision, compiled)
    cases[f"ours, {options.precisions[0]}, warm-up"] = our_case(
        network, batch, options.precisions[0], bidirectional=False
    )
    cases["timm's step, student alone, fp32"] = timm_case(network, batch, options, "fp32")
    cases[f"timm's step, student alone, {options.precisions[-1]}"] = timm_case(
        network, batch, options, options.precisions[-1]
    )
    seconds = take_turns(cases, options)
    print(f"\n| step of {options.batch_size} images at 224 | seconds | images/s | ratio to plain | TFLOP/s"
          + (" | share of peak |" if options.peak else " |"))  # fmt: skip
    print("|---|---|---|---|---|" + ("---|" if options.peak else ""))
    for name, each in seconds.items():
        work = options.batch_size * FORWARD * (3 if "timm" in name else 4)
        rate = work / each / 1e12
        used = f" | {rate / options.peak:.2f}" if options.peak else ""
        print(f"| {name} | {each:.3f} | {options.batch_size / each:.1f} | {seconds['plain fp32, eager'] / each:.2f} "
              f"| {rate:.2f}{used} |")  # fmt: skip


def example_batch(options):
    count, generator = options.batch_size, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 224, 224), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, SEEN, (count,), generator=generator)
    is_photo = (torch.arange(count) % 3 > 0).float()
    mask, noise = torch.rand(count, 1000, generator=generator), torch.randn(count, 768, generator=generator)
    return Batch(*(values.to(options.device) for values in (images, labels, is_photo, mask, noise)))


def plain_case(network, batch, options):
    """The step as it is written down: float32, eager, Adam as it comes."""
    student, teacher = (each.to(options.device) for each in pair(network))
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-4, weight_decay=5e-4) for part in (student, teacher.head)]

    def run():
        values = normalise(batch.images)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with matmul_rules("fp32"):
            losses = alignment_losses(student(values), teacher(values), batch, bidirectional=True)
            losses["total"].backward()
        for optimizer in optimizers:
            optimizer.step()

    return run


def our_case(network, batch, precision, compiled=False, bidirectional=True, accum_steps=1, checkpointing=False):
    networks = pair(network)
    prepare_models(*networks, batch.images.device, checkpointing, compiled)
    run = TrainState(*networks, create_optimizers(*networks, 1e-4, 1e-4, 5e-4))
    return lambda: train_step(
        run, batch._replace(images=normalise(batch.images)), bidirectional, accum_steps, precision
    )


def timm_case(network, batch, options, precision):
    """What timm's train script does with this network in a step: cross entropy and AdamW, channels last."""
    from timm.optim import create_optimizer_v2

    model = copy.deepcopy(network).to(options.device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=5e-4)
    images = normalise(batch.images).contiguous(memory_format=torch.channels_last)

    def run():
        with matmul_rules(precision):
            with arithmetic(precision, options.device):
                loss = F.cross_entropy(model(images), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def pair(network):
    return Student(copy.deepcopy(network), SEEN), Teacher(copy.deepcopy(network))


def take_turns(cases, options):
    """{name: best seconds a step}."""
    best, steps = dict.fromkeys(cases, math.inf), 10 if options.device != "cpu" else 2
    for turn in range(-1, options.rounds):  # the first warms up
        for name, run in cases.items():
            with keep_freed_memory() if name.startswith("ours") else nullcontext():  # as the train scripts do
                run()  # fills the memory that is kept
                finish(options)
                start = time.perf_counter()
                for _ in range(steps):
                    run()
                finish(options)
            if turn >= 0:
                best[name] = min(best[name], (time.perf_counter() - start) / steps)
    return best


def finish(options):
    if options.device != "cpu":
        torch.cuda.synchronize(options.device)


MEMORY = {  # accum_steps, checkpointing, precision, whether freed memory is kept, as the train scripts do
    "fp32": (1, False, "fp32", True),
    "fp32, freed memory given back": (1, False, "fp32", False),
    "fp32, --accum_steps 4": (4, False, "fp32", True),
    "fp32, --grad_checkpointing": (1, True, "fp32", False),
    "fp32, --grad_checkpointing, freed memory kept": (1, True, "fp32", True),
    "both": (4, True, "fp32", False),
    "bf16": (1, False, "bf16", True),
    "bf16, freed memory given back": (1, False, "bf16", False),
}


def memory(options):
    """Peak memory of the step, of the device or of a process of its own, and its time."""
    print(f"\n| step of {options.batch_size} images at 224 | peak memory, GB | seconds |\n|---|---|---|")
    for name in MEMORY:
        command = [sys.executable, __file__, "--tasks", "one_memory", "--case", name]
        command += ["--device", options.device, "--batch_size", str(options.batch_size)]
        result = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        print(f"| {name} | {result} |")


def one_memory(options):
    accum_steps, checkpointing, precision, kept = MEMORY[options.case]
    network = create_backbone("convnextv2_tiny")
    run = our_case(network, example_batch(options), precision, False, True, accum_steps, checkpointing)
    with keep_freed_memory() if kept else nullcontext():
        run()
        finish(options)
        start = time.perf_counter()
        run()
        finish(options)
    seconds = time.perf_counter() - start
    resident = 1000 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated(options.device) if options.device != "cpu" else resident
    print(f"{peak / 1e9:.2f} | {seconds:.2f}")


# --- both


def whole(options):
    """Training end to end from files: images a second, and what the loader alone reaches with as many workers."""
    with tempfile.TemporaryDirectory() as folder:
        sketches, photos = images_of(options, Path(folder))
        third = max(1, options.batch_size // 3)
        network = create_backbone("convnextv2_tiny")
        batch = example_batch(options)
        print("\n| from files | images/s |\n|---|---|")
        for name in ("loader alone", f"training, {options.precisions[-1]}"):
            networks = pair(network)
            prepare_models(*networks, options.device)
            run = TrainState(*networks, create_optimizers(*networks, 1e-4, 1e-4, 5e-4))
            loading = LoaderOptions(224, options.batch_size, options.workers, options.device)
            feed = training_loader(sketches, photos, loading, (third, 2 * third))
            seen, start = 0, None
            for images, labels, is_photo in feed:
                if start is None:  # the first batch, while workers start, is not counted
                    start = time.perf_counter()
                    continue
                if name != "loader alone":
                    own = (values.to(options.device, non_blocking=True) for values in (images, labels, is_photo))
                    own = Batch(*own, batch.mask[: len(images)], batch.noise[: len(images)])
                    own = own._replace(images=normalise(own.images))
                    train_step(run, own, bidirectional=True, precision=options.precisions[-1])
                seen += len(images)
                if seen >= options.images:
                    break
            print(f"| {name}, {options.workers} workers | {seen / (time.perf_counter() - start):.1f} |")


TASKS = {"loader": loader, "step": step, "memory": memory, "whole": whole}
JOBS = TASKS | {"one_memory": one_memory}

if __name__ == "__main__":
    main()
