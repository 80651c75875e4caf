"""Kills, full disks and second processes: rows of cli_error_table.py that need real processes and take minutes.

Each row runs commands as a user does, each in a process of its own. None may end otherwise than the row says, print a
traceback of ours, hang, or leave a process or something half-written behind; and a run that a fault interrupts is
resumed to its end once the fault is removed. Needs Linux: /proc lists the processes that are left.
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
TIMEOUT_S = 300  # until a command counts as hung
SMALL = "--data_root {data} -s {out} --model convnextv2_atto --input_size 32 --device cpu --workers 1"
TRAIN = (
    f"train_sketchy_ext.py {SMALL} --finetune none --batch_size 3 --epochs {EPOCHS} --warmup_epochs 1 --save_every 1s"
)
TEST = f"test_sketchy_ext_zeroshot.py {SMALL} --batch_size 1 --subspaces 2 --clusters 2"
PREPARE = "-m datasets.prepare"
TOGETHER = "-m torch.distributed.run --standalone --nproc_per_node 2"
OURS = re.compile(r"error: |note: |features: |saved |terminated|interrupted")
TRACEBACK = re.compile(rf'File "{ROOT}/(utils|datasets|models|photo_search|tests|[^/]*\.py)')
LAST = "checkpoint.pth.tar"


class Sandbox:
    """A folder with a benchmark in `data`, and the processes started in it. `printed`: their lines on stderr."""

    def __init__(self, folder, benchmark):
        self.folder, self.printed, self.mark = folder, [], ("FAULTS_PLACE", str(uuid.uuid4()))
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
            status_found = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs: {process.args}") from None
        text = process.errors.read_text(errors="replace")
        lines = text.splitlines()
        assert status_found == status or (process.is_launcher and status and status_found), (status_found, lines)
        assert not TRACEBACK.search(text), lines
        printed = [line for line in lines if OURS.match(line)]
        assert process.is_launcher or printed == lines, lines
        self.printed += printed
        return printed

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
        wanted, status_found = "=".join(self.mark).encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted in path.read_bytes().split(b"\0"):
                    status_found.append(int(path.parent.name))
            except OSError:  # it has just ended
                pass
        return status_found

    def left(self):
        """Processes that are left after a while, and hidden files."""
        until = time.monotonic() + 20
        while (living := self.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        for each in living:
            os.kill(each, signal.SIGKILL)
        return [f"process {each}" for each in living] + [str(path) for path in self.folder.rglob(".*")]


# --- what rows share


def start_training(sandbox, launcher=""):
    """A training process that has saved a checkpoint."""
    process = sandbox.start(f"{launcher} {TRAIN}")
    sandbox.when(process, (sandbox.out / LAST).exists)
    return process


def resume_training(sandbox, launcher=""):
    printed = sandbox.run(f"{launcher} {TRAIN} --resume")
    assert any("resuming after" in line for line in printed), printed
    assert_trained(sandbox)


def assert_trained(sandbox):
    from models.checkpoints import read_checkpoint

    assert read_checkpoint(sandbox.out / LAST)["epoch"] == EPOCHS


def add_photos(sandbox, count=1500):
    """More photos of unseen classes, so that what reads them takes a while."""
    photos, names = sandbox.data / "photo of zero", [f"more{number}.png" for number in range(count)]
    for name in names:
        os.link(photos / "0.png", photos / name)
    with open(sandbox.data / "zeroshot1/all_photo_filelist_zero.txt", "a") as file:
        file.writelines(f"photo of zero/{name} 0\n" for name in names)


def start_test(sandbox):
    """A test process that has extracted a part of the features, of a network that was trained before."""
    sandbox.run(TRAIN)
    add_photos(sandbox)
    process, part = sandbox.start(TEST), sandbox.out / ".photos.unfinished"
    sandbox.when(process, lambda: part.exists() and part.stat().st_size > 20_000)
    return process


def kill(sandbox, process, number=signal.SIGKILL):
    os.kill(process.pid, number)
    return sandbox.end(process, -number if number == signal.SIGKILL else 128 + number)


def others(sandbox, process):
    return [each for each in sandbox.processes() if each != process.pid]


# --- kills


def training_killed(sandbox):
    kill(sandbox, start_training(sandbox))
    resume_training(sandbox)


def training_terminated(sandbox):
    assert "continue with --resume" in kill(sandbox, start_training(sandbox), signal.SIGTERM)[-1]
    resume_training(sandbox)


def training_interrupted(sandbox):
    kill(sandbox, start_training(sandbox), signal.SIGINT)
    resume_training(sandbox)


def decoder_killed(sandbox):
    process = start_training(sandbox)
    os.kill(others(sandbox, process)[0], signal.SIGKILL)
    assert "a process that decodes images was killed" in sandbox.end(process, 2)[-1]
    resume_training(sandbox)


def extraction_killed(sandbox):
    kill(sandbox, start_test(sandbox))
    assert "are already extracted" in "".join(sandbox.run(TEST))


def extraction_terminated(sandbox):
    process = start_test(sandbox)
    os.kill(process.pid, signal.SIGTERM)
    sandbox.end(process, -signal.SIGTERM)
    assert "are already extracted" in "".join(sandbox.run(TEST))


def check_killed(sandbox, number=signal.SIGKILL):
    add_photos(sandbox, 4000)
    process = sandbox.start(f"{PREPARE} check {{data}} --custom --images")
    sandbox.when(process, lambda: len(others(sandbox, process)) > 1)
    kill(sandbox, process, number)
    sandbox.run(f"{PREPARE} check {{data}} --custom --images")


def check_terminated(sandbox):
    check_killed(sandbox, signal.SIGTERM)


def miniature_killed(sandbox):
    process = sandbox.start(f"{PREPARE} miniature {{new}}")
    sandbox.when(process, lambda: any(sandbox.new.glob(".unfinished/256x256/*/*/*/*")))
    kill(sandbox, process)
    sandbox.run(f"{PREPARE} miniature {{new}}")
    assert (sandbox.new / "zeroshot1/title.txt").exists()


# --- full disks


def full_disk_in_training(sandbox):
    kill(sandbox, start_training(sandbox), signal.SIGTERM)
    before = (sandbox.out / LAST).read_bytes()
    sandbox.run(f"{TRAIN} --resume", 2, largest=1_000_000)
    assert (sandbox.out / LAST).read_bytes() == before
    resume_training(sandbox)


def full_disk_before_the_first_checkpoint(sandbox):
    sandbox.run(TRAIN, 2, largest=1_000_000)
    assert not (sandbox.out / LAST).exists()
    sandbox.run(TRAIN)
    assert_trained(sandbox)


def full_disk_in_a_test(sandbox):
    sandbox.run(TRAIN)
    sandbox.run(TEST, 2, largest=4000)
    assert not (sandbox.out / "results.json").exists()
    sandbox.run(TEST)


def full_disk_in(command):
    def row(sandbox):
        sandbox.run(f"{PREPARE} {command}", 2, largest=500)  # what it says of that fits in

    return row


def full_disk_in_drawing(sandbox):
    full_disk_in("miniature {new}")(sandbox)
    sandbox.run(f"{PREPARE} miniature {{new}}")


def nowhere_to_print(sandbox):
    sandbox.run(f"{PREPARE} check {{data}} --custom", 2, stdout="/dev/full")


# --- two processes


def second_training(sandbox):
    process = start_training(sandbox)
    assert "is training there" in sandbox.run(f"{TRAIN} --overwrite", 2)[-1]
    sandbox.end(process, 0)
    assert_trained(sandbox)


def second_test(sandbox):
    process = start_test(sandbox)
    assert "is testing there" in sandbox.run(TEST, 2)[-1]
    sandbox.end(process, 0)


def one_of_two_finds_a_torn_image(sandbox):
    photo = sandbox.data / "photo of train/1.png"
    whole = photo.read_bytes()
    photo.write_bytes(whole[:40])
    printed = sandbox.run(f"{TOGETHER} {TRAIN}", 2)
    assert any("not a readable image" in line for line in printed), printed
    photo.write_bytes(whole)
    sandbox.run(f"{TOGETHER} {TRAIN} --overwrite")
    assert_trained(sandbox)


def two_find_no_data(sandbox):
    printed = sandbox.run(f"{TOGETHER} {TRAIN} --data_root {{data}}/none", 2)
    assert len(printed) == 1, printed


def one_of_two_killed(sandbox):
    process = start_training(sandbox, TOGETHER)
    holder = int((sandbox.out / ".training").read_text().split()[1])  # the first of the two
    os.kill(holder, signal.SIGKILL)
    sandbox.end(process, 1)
    resume_training(sandbox, TOGETHER)


def two_terminated(sandbox):
    process = start_training(sandbox, TOGETHER)
    os.kill(process.pid, signal.SIGTERM)
    sandbox.end(process, 1)
    resume_training(sandbox, TOGETHER)


ROWS = {  # what happens: (the script, a function that makes it happen in a Sandbox)
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
    """(what failed, or None; what the commands printed) of a row of ROWS in `folder`."""
    sandbox = Sandbox(folder, benchmark)
    try:
        act(sandbox)
        wrong = None
    except AssertionError as error:
        wrong = str(error) or traceback.format_exc()
    left = sandbox.left()
    return wrong or (left and f"left: {left}") or None, sandbox.printed
