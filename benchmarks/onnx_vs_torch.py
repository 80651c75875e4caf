"""The photo search with PyTorch and with ONNX Runtime, taking turns in one run: start, memory, images a second.

    .venv/bin/python benchmarks/onnx_vs_torch.py
    .venv/bin/python benchmarks/onnx_vs_torch.py --model convnextv2_tiny --input_size 224 --photos 32 --batch_size 8

Networks are untrained. "find" is the whole command, from its start to the answer to one sketch in an index of
--photos photos; "index" is that of these photos, decoded in the same process. Memory is the most that a command held
(Linux only). Images a second are the network's alone. All are the best of --rounds; CPU seconds are what a busy
machine changes least.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from models import export  # noqa: E402
from models.checkpoints import save_checkpoint  # noqa: E402
from models.weights import student_of  # noqa: E402
from photo_search.encoder import load_encoder  # noqa: E402
from utils.process_pool import available_cores  # noqa: E402

# A process begins with the most memory that its parent held, in getrusage; its own is in /proc.
COMMAND = """
import sys, time, search_photos
search_photos.main(sys.argv[1:])
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(time.process_time(), int(peak) / 1024)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="convnextv2_atto")
    add("--input_size", type=int, default=48)
    add("--photos", type=int, default=200)
    add("--batch_size", type=int, default=32)
    add("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = write_networks(folder, options.model, options.input_size)
        write_photos(folder, options.photos)
        found = {name: [] for name in files}
        for _ in range(options.rounds):
            for name, file in files.items():
                found[name].append(commands(folder, name, file, options.batch_size))
        rates = images_a_second(files, options)
    print(f"{options.model} at {options.input_size}, {options.photos} photos, cores: {available_cores()}")
    print("          find: s  CPU s    MB   index: s  CPU s    MB   images/s")
    for name, rounds in found.items():
        best = [min(values) for values in zip(*rounds, strict=True)]
        print("{:8}{:9.2f}{:7.2f}{:6.0f}{:11.2f}{:7.2f}{:6.0f}{:11.1f}".format(name, *best, rates[name]))


def write_networks(folder, model, size):
    """{backend: file} of an untrained student."""
    files = {"torch": folder / "student.pth.tar", "onnx": folder / "student.onnx"}
    settings = {"model": model, "input_size": size, "imagenet_classes": 1000}
    save_checkpoint(files["torch"], student_of(model, 100), options=settings)
    export.main([str(files["torch"]), "--to", str(files["onnx"])])
    return files


def write_photos(folder, count):
    """Photos of coloured noise, and a sketch of a line."""
    random = np.random.default_rng(0)
    (folder / "album").mkdir()
    for number in range(count):
        noise = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
        noise.resize((320, 240), Image.Resampling.BICUBIC).save(folder / f"album/{number}.jpg")
    sketch = Image.new("RGB", (240, 240), "white")
    ImageDraw.Draw(sketch).line([(20, 20), (200, 90), (60, 220)], fill="black", width=5)
    sketch.save(folder / "sketch.png")


def commands(folder, name, file, batch_size):
    """(seconds, CPU seconds, MB) of `find`, then of `index` in a new index."""
    index = tempfile.mkdtemp(dir=folder)
    own = ["--index", index, "--checkpoint", file, "--backend", name, "--device", "cpu"]
    indexed = measured("index", folder / "album", *own, "--workers", 0, "--batch_size", batch_size)
    return *measured("find", folder / "sketch.png", *own), *indexed


def measured(*arguments):
    """(seconds, CPU seconds, MB at most) of search_photos.py."""
    began = time.perf_counter()
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - began, *map(float, done.stdout.splitlines()[-1].split())


def images_a_second(files, options):
    """{backend: images a second}."""
    size = options.input_size
    images = np.random.default_rng(0).integers(0, 256, (options.batch_size, size, size, 3), np.uint8)
    networks = {name: load_encoder(file, device="cpu") for name, file in files.items()}
    best = dict.fromkeys(files, 0.0)
    for turn in range(options.rounds + 1):  # the first warms up
        for name, network in networks.items():
            began = time.perf_counter()
            network.embed(images.transpose(0, 3, 1, 2))
            if turn:
                best[name] = max(best[name], len(images) / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()
