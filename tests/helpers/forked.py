"""Runs scripts in processes that are forked from one that has imported PyTorch: each starts seconds earlier.

For tests of what several processes do, or of one that is killed. How an interpreter starts and ends is not tested by
these.
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import sys
import tempfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["search_photos", "test_sketchy_ext_zeroshot", "train_sketchy_ext", "models.testing",
                               "models.training", "timm", "photo_search.update", "sklearn.cluster"])  # fmt: skip


class Forked:
    """A script that runs in a process of its own session, with the part of subprocess.Popen's interface used here."""

    def __init__(self, *command, **variables):
        """command: "-m" and a module, or the path of a script, and arguments; variables: of the environment."""
        self._files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115, closed by communicate
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        arguments = [str(part) for part in command], environment, [file.name for file in self._files]
        self._process = _FORKS.Process(target=_run, args=arguments)
        search = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=search):
            multiprocessing.forkserver.ensure_running()  # the first time this imports what is preloaded
        self._process.start()
        self.pid, self.sentinel = self._process.pid, self._process.sentinel

    def poll(self):
        return self._process.exitcode

    returncode = property(poll)

    def communicate(self):
        """Wait for the end; returns stdout and stderr (bytes)."""
        self._process.join()
        texts = tuple(file.read() for file in self._files)
        for file in self._files:
            file.close()
        return texts


def _run(command, environment, files):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True)  # that of a process from a command line, not of this one
    sys.argv = command[command[0] == "-m" :]
    if command[0] == "-m":
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


def run_ranks(processes, *command):
    """Run a script as torchrun does, in several processes that can find each other: (exit status, stdout, stderr).

    The first process that fails ends the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    ranks = []
    for rank in range(processes):
        variables = common | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(Forked(*command, **{name: str(value) for name, value in variables.items()}))
    while running := [each for each in ranks if each.poll() is None]:
        if any(each.poll() for each in ranks):
            for each in running:
                os.kill(each.pid, signal.SIGTERM)
        multiprocessing.connection.wait([each.sentinel for each in running])
    printed, complaints = zip(*(each.communicate() for each in ranks), strict=True)
    return max((each.poll() for each in ranks), key=abs), b"".join(printed).decode(), b"".join(complaints).decode()
