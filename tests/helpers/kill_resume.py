"""Kill a real training process at random moments, resume it each time, and compare the end with an undisturbed run.

    make torture

SIGKILL comes while the process starts, between steps, and in the middle of writing a checkpoint; SIGTERM goes to the
whole process group. The last weights must be the same bit for bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from datasets.prepare.miniature import write_miniature  # noqa: E402
from models.checkpoints import LAST, PREVIOUS  # noqa: E402

TRAIN = """--model test_convnext --finetune none --input_size 32 --batch_size 12 --drop_path 0.2 --device cpu
    --warmup_epochs 1 --save_every 1s --print_freq 1""".split()
MOMENTS = ("write", "step", "start")


def start_script(*command):
    """A process of a group of its own that runs a script of the project."""
    return subprocess.Popen(
        [sys.executable, *command], start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # sums in the same order on every machine
    )  # fmt: skip


def start(root, savedir, epochs, *more):
    """A training process, resumed if `savedir` has a checkpoint."""
    resume = any((savedir / name).exists() for name in (LAST, PREVIOUS))
    command = ["train_sketchy_ext.py", *TRAIN, "--epochs", epochs, "--data_root", root, "--savedir", savedir, *more]
    return start_script(*(str(part) for part in (*command, *(["--resume"] if resume else []))))


def finish(process):
    """Wait for the end of a process: (exit status, what it wrote to stderr)."""
    errors = process.communicate()[1].decode()
    return process.returncode, errors


def wait_for(process, moment, savedir, rng):
    """Wait for a `moment` of MOMENTS; False if the process ends first."""
    log = savedir / "log.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    until = time.monotonic() + rng.uniform(0, 6)

    def is_there():
        if moment == "start":
            return time.monotonic() > until
        if moment == "write":
            return any(path.stat().st_size for path in savedir.glob(f".{LAST}.*"))
        return log.exists() and log.stat().st_mtime_ns > before

    while process.poll() is None:
        try:
            if is_there():
                time.sleep(rng.uniform(0, 0.5) if moment == "step" else 0)
                return process.poll() is None
        except FileNotFoundError:  # it was renamed while we looked
            pass
        time.sleep(0.0005)
    return False


def torture(root, folder, kills, epochs, seed=0, workers=(1, 0, 2)):
    """Kill `kills` processes and return {moment: kills}. Raises AssertionError unless the weights come out the same."""
    rng, counts = random.Random(seed), dict.fromkeys(MOMENTS, 0)
    whole, broken = folder / "whole", folder / "broken"
    status, errors = finish(start(root, whole, epochs, "--workers", 1))
    assert status == 0, errors
    for number in range(kills):
        moment = MOMENTS[number % len(MOMENTS)]
        process = start(root, broken, epochs, "--workers", workers[number % len(workers)])
        reached = wait_for(process, moment, broken, rng)
        os.killpg(process.pid, signal.SIGKILL)
        status, errors = finish(process)
        assert reached and status == -signal.SIGKILL, f"the run ended before it was killed: {status} {errors}"
        counts[moment] += 1
    process = start(root, broken, epochs, "--workers", 1)
    if wait_for(process, "step", broken, rng):
        os.killpg(process.pid, signal.SIGTERM)
        status, errors = finish(process)
        assert status == 128 + signal.SIGTERM and "continue with --resume" in errors, (status, errors)
    status, errors = finish(start(root, broken, epochs, "--workers", 2))
    assert status == 0, errors
    one, two = (torch.load(path / LAST, weights_only=True) for path in (whole, broken))
    assert one["history"] == two["history"] and len(one["history"]) == epochs
    for part in ("state_dict", "teacher"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items()), part
    assert not list(broken.glob(".*")), "something half-written was left"
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments (default: the time)")
    options = parser.parse_args()
    print(f"{options.kills} kills, --seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_miniature(Path(folder) / "data", seed=3, sketches=4, photos=6, held_back=1, workers=2)
        counts = torture(Path(folder) / "data", Path(folder), options.kills, options.epochs, options.seed)
    print("the same weights, bit for bit, after", ", ".join(f"{n} kills at a {what}" for what, n in counts.items()))


if __name__ == "__main__":
    main()
