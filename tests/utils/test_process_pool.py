"""Worker processes never outlive the process that started them, and signals end in one word."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_info

from datasets.prepare import __main__ as prepare
from datasets.prepare import commands
from utils import process_pool
from utils.process_pool import _in_order, available_cores, parallel_map, thread_pool

SCRIPT = """
import signal
from utils import cli
from utils.process_pool import parallel_map

def wait(_):
    print("at work\\n", end="", flush=True)
    while True:
        signal.pause()

@cli.one_line_errors()
def main():
    with cli.sigterm_as_exception():
        list(parallel_map(wait, range(4), "waiting", workers=2, chunk=1))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("number", "send", "status", "told"),
    [
        (signal.SIGTERM, os.kill, 143, "terminated\n"),
        (signal.SIGKILL, os.kill, -9, None),  # Python itself may print something then
        (signal.SIGINT, os.killpg, 130, "interrupted\n"),  # a terminal sends Ctrl-C to all processes
    ],
)
def test_workers_in_the_middle_of_an_image_end_with_their_parent(tmp_path, number, send, status, told):
    (tmp_path / "script.py").write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        env={**os.environ, "PYTHONPATH": str(Path(prepare.__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert [parent.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
        send(parent.pid, number)
        _, error = parent.communicate(timeout=60)  # returns once no worker has the output open
        assert parent.returncode == status and told in (None, error)
    finally:
        parent.kill()
        with contextlib.suppress(ProcessLookupError):  # no process is left
            os.killpg(parent.pid, signal.SIGKILL)


def test_results_come_in_order_and_can_be_left_early():
    assert list(parallel_map(abs, range(-9, 0), "counting", workers=2, chunk=2)) == list(range(9, 0, -1))
    results = parallel_map(abs, range(-9, 0), "counting", workers=2, chunk=2)
    assert next(results) == 9
    results.close()


def test_no_process_is_started_for_no_workers():
    assert list(parallel_map(lambda _: os.getpid(), range(3), "counting", workers=0)) == [os.getpid()] * 3


def test_work_is_only_a_few_chunks_ahead_of_what_is_taken():
    class Now:
        submitted = 0

        def submit(self, _, function, part):
            self.submitted += 1
            future = Future()
            future.set_result([function(each) for each in part])
            return future

    now = Now()
    results = _in_order(now, abs, [[-1, -2], [-3, -4], [-5, -6], [-7]], 2)
    seen = [(next(results), now.submitted) for _ in range(7)]
    assert seen == [(1, 2), (2, 2), (3, 3), (4, 3), (5, 4), (6, 4), (7, 4)]


def test_sigterm_ends_a_command_in_one_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "write_miniature", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        prepare.main(["miniature", str(tmp_path)])
    assert end.value.code == 143 and capsys.readouterr().err == "terminated\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_waits_until_all_is_imported(tmp_path, monkeypatch, capsys):
    plain = importlib.import_module

    def interrupted(name):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("what NumPy makes of Ctrl-C") from error
        return plain(name)

    monkeypatch.setattr(importlib, "import_module", interrupted)
    with pytest.raises(SystemExit) as end:
        prepare.main(["miniature", str(tmp_path)])
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_each_thread_uses_one_blas_thread_and_limits_are_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with thread_pool(2) as pool:
        inside = pool.submit(
            lambda: (torch.get_num_threads(), [pool["num_threads"] for pool in threadpool_info()])
        ).result()
        assert inside[0] == 1 and set(inside[1]) == {1}
    assert torch.get_num_threads() == 3
    assert max(pool["num_threads"] for pool in threadpool_info()) > 1 or available_cores() == 1
    torch.set_num_threads(before)


def test_a_failure_cancels_threads_that_have_not_begun_and_waits_for_none():
    started, release, ran = threading.Event(), threading.Event(), []

    def job(number):
        ran.append(number)
        started.set()
        release.wait(30)

    with pytest.raises(KeyboardInterrupt), thread_pool(1) as pool:
        jobs = [pool.submit(job, number) for number in range(5)]
        started.wait(30)
        raise KeyboardInterrupt
    assert not jobs[0].done()  # it was not waited for
    release.set()
    jobs[0].result(30)
    assert ran == [0] and all(one.cancelled() for one in jobs[1:])


def test_a_call_that_takes_too_long_is_given_up(monkeypatch):
    ended, exits, stuck = [], [], threading.Event()
    monkeypatch.setattr(process_pool, "GRACE_S", 0.01)
    monkeypatch.setattr(process_pool.atexit, "register", exits.append)
    monkeypatch.setattr(process_pool.os, "_exit", ended.append)
    assert process_pool.call_with_timeout(lambda: 7, 60) == 7
    together = threading.Barrier(3, timeout=60)
    assert process_pool.map_with_timeout(lambda item: (together.wait(), -item)[1], [1, 2, 3], 60) == [-1, -2, -3]
    with pytest.raises(KeyError, match="own error"):
        process_pool.call_with_timeout(lambda: {}["own error"], 60)
    with pytest.raises(TimeoutError, match=r"longer than 0\.01 seconds"):
        process_pool.call_with_timeout(stuck.wait, 0.01)
    assert len(exits) == 1
    exits[0]()
    assert ended == [2]
    asked = threading.Event()
    monkeypatch.setattr(process_pool, "GRACE_S", 60)
    with pytest.raises(TimeoutError):
        process_pool.call_with_timeout(asked.wait, 0.01, asked.set)
    assert len(exits) == 1
    stuck.set()
