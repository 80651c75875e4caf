import threading

import pytest
import torch
from threadpoolctl import threadpool_info

from models.eval.workers import workers
from utils.process_pool import available_cores


def test_each_thread_computes_alone_and_nothing_stays_that_way():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with workers(2) as pool:
        inside = pool.submit(
            lambda: (torch.get_num_threads(), [pool["num_threads"] for pool in threadpool_info()])
        ).result()
        assert inside[0] == 1 and set(inside[1]) == {1}
    assert torch.get_num_threads() == 3
    assert max(pool["num_threads"] for pool in threadpool_info()) > 1 or available_cores() == 1
    torch.set_num_threads(before)


def test_a_failure_is_told_at_once_and_cancels_what_has_not_begun():
    started, release, ran = threading.Event(), threading.Event(), []

    def job(number):
        ran.append(number)
        started.set()
        release.wait(30)

    with pytest.raises(KeyboardInterrupt), workers(1) as pool:
        jobs = [pool.submit(job, number) for number in range(5)]
        started.wait(30)
        raise KeyboardInterrupt
    assert not jobs[0].done()  # it was not waited for
    release.set()
    jobs[0].result(30)
    assert ran == [0] and all(one.cancelled() for one in jobs[1:])
