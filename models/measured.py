"""Reads what the steps of an epoch measured, and ends a run whose losses are not finite, naming the images."""

import itertools
from collections import deque
from typing import NamedTuple

import torch

from models.losses import LOSS_NAMES
from models.train_step import MEASURES
from utils import distributed
from utils.cli import InputError, exit_quietly


class _Step(NamedTuple):
    number: int
    values: torch.Tensor  # (MEASURES,) on the CPU, or on their way there
    arrival: torch.cuda.Event | None  # when they are there; None: they are
    sound: torch.Tensor  # (B,) bool: which of this process's images have finite outputs


class Measured:
    """Brings what the steps of an epoch measured to the CPU. A GPU is read one step later, so that it need not wait."""

    def __init__(self, loader, epoch):
        self.loader, self.epoch, self.unread = loader, epoch, deque()

    def add(self, number, values, sound):
        """Take the `values` (MEASURES) of a step, and which of this process's images have finite outputs (B,).

        Returns (number, values on the CPU) of the steps that can be read now without waiting for this one.
        Raises InputError if the values of one of these are not finite.
        """
        self.unread.append(_Step(number, *_to_cpu(values), sound))
        return [self._read() for _ in range(len(self.unread) - (values.device.type != "cpu"))]

    def rest(self):
        """Wait for the steps that `add` has not returned yet. Returns and raises as `add` does."""
        return [self._read() for _ in range(len(self.unread))]

    def _read(self):
        step = self.unread.popleft()
        if step.arrival is not None:
            step.arrival.synchronize()
        if not step.values.isfinite().all():
            self._refuse(step)
        return step.number, step.values

    def _refuse(self, step):
        finite = dict(zip(MEASURES, step.values.isfinite().tolist(), strict=True))
        terms = ", ".join(name for name in LOSS_NAMES if not finite[name]) or "total"
        bad = (~step.sound).nonzero()[:, 0].tolist()
        # All processes are here. The first that has such images tells of them; without any, the first of all.
        having = [
            rank for rank, count in distributed.all_gather_dict({distributed.get_rank(): len(bad)}).items() if count
        ]
        if distributed.get_rank() != min(having, default=0):
            exit_quietly()
        images = "not of single images" if len(bad) in (0, len(step.sound)) else self._names(step.number, bad)
        raise InputError(
            f"epoch {self.epoch + 1}, step {step.number + 1}: {terms} not finite, {images}; the last checkpoint is as "
            "it was: mend the images and --resume, or start anew without them or with a lower --lr"
        )

    def _names(self, number, bad):
        """The first images of `bad`, which counts in this process's share of the batch of a step."""
        whole = next(itertools.islice(self.loader.batch_sampler.batches(), number, None))
        own = whole[distributed.rank_slice(len(whole))]
        files = [self.loader.dataset.file(own[place]) for place in bad[:3]]
        return f"in {len(bad)} images: " + ", ".join(str(files.root / files.paths[at]) for files, at in files)


def _to_cpu(values):
    """(values on the CPU, None), or (values on their way there, the event of their arrival)."""
    if values.device.type == "cpu":
        return values, None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)  # to other memory, the host would wait
    copy.copy_(values, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(values.device))
    return copy, arrival
