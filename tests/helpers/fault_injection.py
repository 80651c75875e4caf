"""Kills, full disks and second processes: rows of the table of bad_inputs.py that take real processes, and minutes.

Each row runs commands as a user does, each in a process of its own. None may end otherwise than the row says, print a
traceback of ours, hang, or leave a process or something half-written behind; and what a fault interrupts goes on to its
end once the fault is mended. Needs Linux, whose /proc tells which processes are left.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 5
LIMIT = 300  # seconds until a command is said to hang
SMALL = "--data_root {data} -s {out} --model convnextv2_atto --input_size 32 --device cpu --workers 1"
TRAIN = (
    f"train_sketchy_ext.py {SMALL} --finetune none --batch_size 3 --epochs {EPOCHS} --warmup_epochs 1 --save_every 1s"
)
TEST = f"test_sketchy_ext_zeroshot.py {SMALL} --batch_size 1 --subspaces 2 --clusters 2"
PREPARE = "-m datasets.prepare"
TOGETHER = "-m torch.distributed.run --standalone --nproc_per_node 2"
OURS = re.compile(r"error: |note: |features: |saved |terminated|interrupted")
TRACEBACK = re.compile(rf'File "{ROOT}/(models|datasets|tests|[^/]*\.py)')
LAST = "checkpoint.pth.tar"


class Place:
    """A folder with a benchmark in `data`, and the processes that are started in it. `said`: what these printed."""

    def __init__(self, folder, benchmark):
        self.folder, self.said, self.mark = folder, [], ("FAULTS_PLACE", str(uuid.uuid4()))
        self.data, self.out, self.new = (folder / name for name in ("data", "out", "new"))
        shutil.copytree(benchmark, self.data)

    def start(self, command, largest=None, stdout=os.devnull):
        """Start a Python command; largest: bytes of the largest file that it may write, as if the disk were full."""
        limit = largest and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)))
        arguments = command.format(data=self.data, out=self.out, new=self.new).split()
        environment = os.environ | dict([self.mark], OMP_NUM_THREADS="1")
        errors = self.folder / f"{uuid.uuid4()}.stderr"
        with open(errors, "w") as stderr, open(stdout, "w") as printed:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=environment, preexec_fn=limit, stdout=printed, stderr=stderr
            )
        process.errors, process.is_launcher = errors, "torch.distributed.run" in arguments
        return process

    def end(self, process, status):
        """Wait for a process to end with `status`, without a traceback; several processes end with any but 0."""
        try:
            found = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs: {process.args}") from None
        text = process.errors.read_text(errors="replace")
        lines = text.splitlines()
        assert found == status or (process.is_launcher and status and found), (found, lines)
        assert not TRACEBACK.search(text), lines
        said = [line for line in lines if OURS.match(line)]
        assert process.is_launcher or said == lines, lines
        self.said += said
        return said

    def run(self, command, status=0, **options):
        """Start a command, and wait for its end."""
        return self.end(self.start(command, **options), status)

    def when(self, process, condition):
        """Wait until condition() holds, while a process runs."""
        while not condition():
            assert process.poll() is None, ("ended too early", process.errors.read_text())
            time.sleep(0.002)

    def processes(self):
        """Ids of the processes that live, of those started here and all that they started."""
        wanted, found = "=".join(self.mark).encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # it has just ended
                pass
        return found

    def left(self):
        """What is left that should not be: processes, after a while, and hidden files."""
        until = time.monotonic() + 20
        while (living := self.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        for each in living:
            os.kill(each, signal.SIGKILL)
        return [f"process {each}" for each in living] + [str(path) for path in self.folder.rglob(".*")]


# --- what rows share


def start_training(place, launcher=""):
    """A training process that has saved a checkpoint."""
    process = place.start(f"{launcher} {TRAIN}")
    place.when(process, (place.out / LAST).exists)
    return process


def go_on_training(place, launcher=""):
    said = place.run(f"{launcher} {TRAIN} --resume")
    assert any("resuming after" in line for line in said), said
    assert_trained(place)


def assert_trained(place):
    from models.checkpoints import read_checkpoint

    assert read_checkpoint(place.out / LAST)["epoch"] == EPOCHS


def add_photos(place, count=1500):
    """More photos of unseen classes, so that what reads them takes a while."""
    photos, names = place.data / "photo of zero", [f"more{number}.png" for number in range(count)]
    for name in names:
        os.link(photos / "0.png", photos / name)
    with open(place.data / "zeroshot1/all_photo_filelist_zero.txt", "a") as file:
        file.writelines(f"photo of zero/{name} 0\n" for name in names)


def start_test(place):
    """A test process that has extracted a part of the features, of a network that was trained before."""
    place.run(TRAIN)
    add_photos(place)
    process, part = place.start(TEST), place.out / ".photos.unfinished"
    place.when(process, lambda: part.exists() and part.stat().st_size > 20_000)
    return process


def kill(place, process, number=signal.SIGKILL):
    os.kill(process.pid, number)
    return place.end(process, -number if number == signal.SIGKILL else 128 + number)


def others(place, process):
    return [each for each in place.processes() if each != process.pid]


# --- kills


def training_killed(place):
    kill(place, start_training(place))
    go_on_training(place)


def training_terminated(place):
    assert "continue with --resume" in kill(place, start_training(place), signal.SIGTERM)[-1]
    go_on_training(place)


def training_interrupted(place):
    kill(place, start_training(place), signal.SIGINT)
    go_on_training(place)


def decoder_killed(place):
    process = start_training(place)
    os.kill(others(place, process)[0], signal.SIGKILL)
    assert "a process that decodes images was killed" in place.end(process, 2)[-1]
    go_on_training(place)


def extraction_killed(place):
    kill(place, start_test(place))
    assert "are already extracted" in "".join(place.run(TEST))


def extraction_terminated(place):
    process = start_test(place)
    os.kill(process.pid, signal.SIGTERM)
    place.end(process, -signal.SIGTERM)
    assert "are already extracted" in "".join(place.run(TEST))


def check_killed(place, number=signal.SIGKILL):
    add_photos(place, 4000)
    process = place.start(f"{PREPARE} check {{data}} --custom --images")
    place.when(process, lambda: len(others(place, process)) > 1)
    kill(place, process, number)
    place.run(f"{PREPARE} check {{data}} --custom --images")


def check_terminated(place):
    check_killed(place, signal.SIGTERM)


def miniature_killed(place):
    process = place.start(f"{PREPARE} miniature {{new}}")
    place.when(process, lambda: any(place.new.glob(".unfinished/256x256/*/*/*/*")))
    kill(place, process)
    place.run(f"{PREPARE} miniature {{new}}")
    assert (place.new / "zeroshot1/title.txt").exists()


# --- full disks


def full_disk_in_training(place):
    kill(place, start_training(place), signal.SIGTERM)
    before = (place.out / LAST).read_bytes()
    place.run(f"{TRAIN} --resume", 2, largest=1_000_000)
    assert (place.out / LAST).read_bytes() == before
    go_on_training(place)


def full_disk_before_the_first_checkpoint(place):
    place.run(TRAIN, 2, largest=1_000_000)
    assert not (place.out / LAST).exists()
    place.run(TRAIN)
    assert_trained(place)


def full_disk_in_a_test(place):
    place.run(TRAIN)
    place.run(TEST, 2, largest=4000)
    assert not (place.out / "results.json").exists()
    place.run(TEST)


def full_disk_in(command):
    def row(place):
        place.run(f"{PREPARE} {command}", 2, largest=500)  # what it says of that fits in

    return row


def full_disk_in_drawing(place):
    full_disk_in("miniature {new}")(place)
    place.run(f"{PREPARE} miniature {{new}}")


def nowhere_to_print(place):
    place.run(f"{PREPARE} check {{data}} --custom", 2, stdout="/dev/full")


# --- two processes


def second_training(place):
    process = start_training(place)
    assert "is training there" in place.run(f"{TRAIN} --overwrite", 2)[-1]
    place.end(process, 0)
    assert_trained(place)


def second_test(place):
    process = start_test(place)
    assert "is testing there" in place.run(TEST, 2)[-1]
    place.end(process, 0)


def one_of_two_finds_a_torn_image(place):
    photo = place.data / "photo of train/1.png"
    whole = photo.read_bytes()
    photo.write_bytes(whole[:40])
    said = place.run(f"{TOGETHER} {TRAIN}", 2)
    assert any("not a readable image" in line for line in said), said
    photo.write_bytes(whole)
    place.run(f"{TOGETHER} {TRAIN} --overwrite")
    assert_trained(place)


def two_find_no_data(place):
    said = place.run(f"{TOGETHER} {TRAIN} --data_root {{data}}/none", 2)
    assert len(said) == 1, said


def one_of_two_killed(place):
    process = start_training(place, TOGETHER)
    holder = int((place.out / ".training").read_text().split()[1])  # the first of the two
    os.kill(holder, signal.SIGKILL)
    place.end(process, 1)
    go_on_training(place, TOGETHER)


def two_terminated(place):
    process = start_training(place, TOGETHER)
    os.kill(process.pid, signal.SIGTERM)
    place.end(process, 1)
    go_on_training(place, TOGETHER)


ROWS = {  # what happens: (the script, a function that makes it happen in a Place)
    "SIGKILL, then --resume": ("train_sketchy_ext", training_killed),
    "SIGTERM, then --resume": ("train_sketchy_ext", training_terminated),
    "Ctrl-C, then --resume": ("train_sketchy_ext", training_interrupted),
    "SIGKILL of a process that decodes images, then --resume": ("train_sketchy_ext", decoder_killed),
    "SIGKILL, then again": ("test_sketchy_ext_zeroshot", extraction_killed),
    "SIGTERM, then again": ("test_sketchy_ext_zeroshot", extraction_terminated),
    "SIGKILL while images are decoded, then again": ("prepare check", check_killed),
    "SIGTERM while images are decoded, then again": ("prepare check", check_terminated),
    "SIGKILL while images are drawn, then again": ("prepare miniature", miniature_killed),
    "disk full at a later checkpoint, then --resume": ("train_sketchy_ext", full_disk_in_training),
    "disk full at the first checkpoint, then again": ("train_sketchy_ext", full_disk_before_the_first_checkpoint),
    "disk full at the features, then again": ("test_sketchy_ext_zeroshot", full_disk_in_a_test),
    "disk full at --json": ("prepare check", full_disk_in("check {data} --custom --json {new}.json")),
    "disk full at an image, then again": ("prepare miniature", full_disk_in_drawing),
    "disk full at the page": ("prepare summary", full_disk_in("summary {data} --out {new}")),
    "printing to /dev/full": ("prepare check", nowhere_to_print),
    "a second training in the folder": ("train_sketchy_ext", second_training),
    "a second test in the folder": ("test_sketchy_ext_zeroshot", second_test),
    "torchrun, a torn image, then mended": ("train_sketchy_ext", one_of_two_finds_a_torn_image),
    "torchrun, no data": ("train_sketchy_ext", two_find_no_data),
    "torchrun, SIGKILL of one process, then --resume": ("train_sketchy_ext", one_of_two_killed),
    "torchrun, SIGTERM, then --resume": ("train_sketchy_ext", two_terminated),
}


def run(act, folder, benchmark):
    """(what went otherwise than it should, or None; what the commands printed) of a row of ROWS in `folder`."""
    place = Place(folder, benchmark)
    try:
        act(place)
        wrong = None
    except AssertionError as error:
        wrong = str(error) or traceback.format_exc()
    left = place.left()
    return wrong or (left and f"left: {left}") or None, place.said
