"""Two runs in one folder: the second one is refused, whatever happens to the first."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import test_sketchy_ext_zeroshot
import train_sketchy_ext
from utils.cli import InputError
from utils.files import folder_lock

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from utils.files import folder_lock
with folder_lock(sys.argv[2], sys.argv[3]):
    if os.fork() == 0:  # a process that it starts, such as one that decodes images
        signal.pause()
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """holder(work) is a process that holds tmp_path; its standard input ends it."""
    started = []

    def start(work):
        command = [sys.executable, "-c", HOLD, str(ROOT), str(tmp_path), work]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        start_new_session=True))  # fmt: skip
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdin.close()
        process.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="folders are held where there are POSIX locks")
@pytest.mark.parametrize("end", ["killed", "in order"])
def test_a_folder_is_held_until_its_process_ends(tmp_path, holder, end):
    process = holder("training")
    refused = pytest.raises(InputError, match=rf"process {process.pid} on .* is training there; wait until it ends")
    with refused, folder_lock(tmp_path, "training"):
        pytest.fail("two writers")
    with folder_lock(tmp_path, "testing"):  # another kind of work
        pass
    if end == "killed":
        process.send_signal(signal.SIGKILL)
    else:
        process.stdin.write("\n")
        process.stdin.flush()
    process.wait()  # while what it started lives on
    with folder_lock(tmp_path, "training"):
        assert (tmp_path / ".training").read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_holds_nothing(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="folders are held where there are POSIX locks")

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with folder_lock(tmp_path, "training"):
        pass


def test_a_second_training_and_a_second_test_are_refused(tiny, tmp_path, holder, fails):
    holder("training")
    holder("testing")
    small = "--model convnextv2_atto --input_size 32 --workers 0 --device cpu".split()
    arguments = [*small, "--data_root", tiny]
    message = fails(
        train_sketchy_ext.main, *arguments, *"--finetune none --batch_size 3 --overwrite".split(), "-s", tmp_path
    )
    assert f"{tmp_path}: process " in message and "is training there" in message
    (tmp_path / "checkpoint.pth.tar").write_bytes(b"")
    assert "is testing there" in fails(test_sketchy_ext_zeroshot.main, *arguments, "-s", tmp_path)
    assert not (tmp_path / "train.json").exists() and not (tmp_path / "results.json").exists()
