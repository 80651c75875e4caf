"""An index brought up to date, beside a full run: nothing changed, and one photo in a hundred.

    .venv/bin/python benchmarks/indexing.py --photos 50000 --folder DIR

Photos are small JPEGs of coloured noise, all different, and the network is an untrained ConvNeXt V2-Atto at 32 px, so
that what is not the network's work counts. Of the photos that change half are written anew, a quarter get another name
and content, a quarter are removed. Each time is that of a whole command, start included; the folder is deleted at the
end.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from models.networks import Student, create_backbone  # noqa: E402
from models.weights import published_state  # noqa: E402

MODEL = ("convnextv2_atto", 32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3, help="of updates")
    parser.add_argument("--folder", type=Path, default=Path("indexing_benchmark"), help="takes photos and index")
    options = parser.parse_args()
    album, index, checkpoint = (options.folder / name for name in ("album", "index", "checkpoint.pth.tar"))
    options.folder.mkdir(parents=True)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        random = np.random.default_rng(0)
        for number in range(options.photos):
            write_photo(album / f"{number % 100}" / f"{number}.jpg", random)
        write_checkpoint(checkpoint)
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        print_times("full run", index, album, "--checkpoint", checkpoint, "--model", MODEL[0], "--input_size", MODEL[1])
        for _ in range(options.rounds):
            print_times("nothing changed", index)
        for number in range(options.rounds):
            change(album, options.photos, number, random)
            print_times("1 % changed", index)
    finally:
        shutil.rmtree(options.folder)


def write_photo(path, random):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(path)


def write_checkpoint(path):
    torch.manual_seed(0)
    student = Student(create_backbone(MODEL[0]), 2)
    torch.save({"state_dict": published_state(student)}, path)


def change(album, photos, number, random):
    """Change one photo in a hundred; number: of the round, which are others each time."""
    few = photos // 400
    photo = [album / f"{each % 100}" / f"{each}.jpg" for each in range(4 * few * number, 4 * few * (number + 1))]
    for path in photo[: 2 * few]:
        write_photo(path, random)
    for path in photo[2 * few : 3 * few]:
        path.unlink()
        write_photo(path.with_name(f"new {path.name}"), random)
    for path in photo[3 * few :]:
        path.unlink()


def print_times(what, index, *more):
    """Run `search_photos.py index`, and print its seconds and its line of totals."""
    command = [sys.executable, ROOT / "search_photos.py", "index", "--index", index, *map(str, more)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"{what:16} {time.perf_counter() - began:7.1f} s   {done.stdout.strip().split(': ', 1)[1]}")


if __name__ == "__main__":
    main()
