"""Errors of users end in one line, bugs keep their traceback, and output that cannot be written is no bug."""

import argparse
import errno
import os
import platform
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from utils.cli import InputError, OneLineParser, one_line_errors, path_type, printable
from utils.distributed import log_rank0

ROOT = Path(__file__).resolve().parents[2]
OUT_OF_MEMORY = "out of memory; lower --batch_size or --input_size"
DEAD_WORKER = "a process that decodes images was killed, perhaps for memory; lower --workers"


def raise_in(module, error):
    """Raise `error` in a function of `module`, as its code would."""
    scope = {"__name__": module, "error": error}
    exec("def function():\n    raise error", scope)
    scope["function"]()


def outcome(capsys, function, *arguments):
    """What a command that calls `function` prints to standard error, after it has exited with status 2."""
    with pytest.raises(SystemExit) as end:
        one_line_errors()(function)(*arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def throw(error):
    raise error


@pytest.mark.parametrize(
    "message",
    [
        "a.txt:3: no label",
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
        "utils.cli.InputError: a.txt:3: no label\n",
    ],
)
def test_input_errors_end_in_one_line(capsys, message):
    assert outcome(capsys, throw, InputError(message)) == "error: a.txt:3: no label\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EMFILE, "Too many open files", "a.txt"), "[Errno 24] Too many open files: 'a.txt'"),
        (OSError(errno.EMFILE, "Too many open files"), "[Errno 24] Too many open files"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "the output cannot be written (No space left on device); make room, or redirect it elsewhere",
        ),
        (
            Exception("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"),
            OUT_OF_MEMORY,
        ),
        (FileNotFoundError(2, "No such file", "a.txt"), "[Errno 2] No such file: 'a.txt'"),
        (PermissionError(13, "Denied", "a.txt"), "a.txt: Denied; change its permissions, or choose another"),
        (MemoryError(), OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), OUT_OF_MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OUT_OF_MEMORY),
        (distributed.DistBackendError("NCCL error in: a.cpp:7\nmore"), "process 0: NCCL error in: a.cpp:7"),
        (distributed.DistNetworkError("The client socket has timed out"), "process 0: The client socket has timed out"),
    ],
)
def test_limits_of_the_machine_end_in_one_line(capsys, error, line):
    assert outcome(capsys, throw, error) == f"error: {line}\n"


@pytest.mark.parametrize(("arguments", "status"), [("--help", 0), ("check /none", 2)])
def test_a_command_without_standard_streams_does_its_work(arguments, status):
    command = f"{sys.executable} -m datasets.prepare {arguments} >&- 2>&-"
    assert subprocess.run(command, shell=True, cwd=ROOT).returncode == status


@pytest.mark.parametrize("module", ["torch.distributed.distributed_c10d", "torch.autograd.graph"])
def test_a_lost_peer_is_named_if_torch_noticed_it(capsys, module):
    message = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:27562"
    assert "a peer process died" in outcome(capsys, raise_in, module, RuntimeError(message))
    with pytest.raises(RuntimeError):
        one_line_errors()(raise_in)("models.training", RuntimeError(message))


class Deadly(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        os.kill(os.getpid(), 9)


def test_a_killed_worker_of_a_loader_ends_in_one_line(capsys):
    assert DEAD_WORKER in outcome(capsys, lambda: list(DataLoader(Deadly(), num_workers=1)))
    ours, other = Pipe()
    other.close()
    assert DEAD_WORKER in outcome(capsys, ours.recv)


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        OSError("a library says so"),
        OSError(errno.EBADF, "Bad file descriptor"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        EOFError(),
        RuntimeError("no igloo of this name; connection closed by peer"),
        RuntimeError("the gloo backend is out of memory of NCCL"),
        RuntimeError("DataLoader worker: not of torch"),
        ValueError("CUDA out of memory"),
    ],
    ids=str,
)
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        one_line_errors()(throw)(error)


# Output that cannot be written, in processes of their own.

COMMAND = """
import sys
from utils.cli import one_line_errors

@one_line_errors()
def main(stream):
    for number in range(20_000):
        print("\\xd7", "\\udc80", number, file=getattr(sys, stream))

main(sys.argv[1])
"""


def run(*arguments, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= options.pop("env", {})
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, timeout=100, **options
    )


@pytest.mark.parametrize(
    "arguments", [("-c", COMMAND, "stdout"), ("-c", COMMAND, "stderr"), ("-m", "datasets.prepare", "--help")], ids=str
)
def test_a_closed_pipe_ends_a_command_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams["stderr" if "stderr" in arguments else "stdout"] = writing
    ended = run(*arguments, **streams)
    os.close(writing)
    assert ended.returncode == 141 and not ended.stdout and not ended.stderr, ended


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("arguments", [("-c", COMMAND, "stdout"), ("-m", "datasets.prepare", "--help")], ids=str)
def test_a_full_disk_ends_in_one_line(arguments):
    with open("/dev/full", "w") as full:
        ended = run(*arguments, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and ended.stderr == (
        "error: the output cannot be written (No space left on device); make room, or redirect it elsewhere\n"
    )


@pytest.mark.parametrize("utf8", ["0", "1"])
def test_output_fits_into_any_encoding(utf8):
    environment = {"LC_ALL": "C", "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"}
    ended = run("-c", COMMAND, "stdout", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert ended.stdout.endswith("× ".encode() + b"\x80 19999\n" if utf8 == "1" else b"\\xd7 \\udc80 19999\n")


@pytest.mark.parametrize("command", [["train_sketchy_ext.py"], ["search_photos.py"], ["-m", "datasets.prepare"]])
def test_a_missing_requirement_ends_in_one_line(command):
    ended = run("-S", *command, "--help", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # no site-packages
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.count("\n") == 1 and " is not installed; " in ended.stderr


def test_names_of_files_cannot_forge_lines_or_act_on_the_terminal(capsys):
    line = outcome(capsys, throw, InputError("/nowhere/a\nb\x1b[2J\r\u202egpj.jpg\udcff: cannot be searched"))
    assert line == "error: /nowhere/a\\nb\\x1b[2J\\r\\u202egpj.jpg\\udcff: cannot be searched\n"
    log_rank0("note: \x1b[31m\n")
    assert capsys.readouterr().err == "note: \\x1b[31m\\n\n"
    assert printable("žluťoučký 雪 👨‍👩‍👧 صورة.jpg") == "žluťoučký 雪 👨‍👩‍👧 صورة.jpg"


def test_paths_are_texts_and_no_addresses():
    assert path_type("a b") == Path("a b")
    for text, message in (("", "an empty string"), (" ", "an empty string"), ("a\0b", "an empty string"),
                          ("https://host/m.onnx", "is an address; download the file")):  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            path_type(text)


def test_the_version_names_what_a_report_needs(capsys):
    with pytest.raises(SystemExit) as end:
        OneLineParser(prog="p").parse_args(["--version"])
    assert not end.value.code
    printed = capsys.readouterr().out
    assert printed.startswith("SBKA ") and f"Python {platform.python_version()}, numpy " in printed
