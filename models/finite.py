"""Ends a run whose losses are not finite, naming step, terms and images."""

import itertools
from collections import deque

import torch

from datasets.errors import InputError
from models import parallel
from models.alignment import TERMS
from models.run import MEASURES


class FiniteCheck:
    """Looks at what the steps of an epoch measured; on a GPU one step later, so that no step is waited for."""

    def __init__(self, loader, epoch, device):
        self.loader, self.epoch = loader, epoch
        self.unread, self.lag = deque(), int(torch.device(device).type != "cpu")

    def add(self, step, values, sound):
        """Take the `values` (MEASURES) of a step, and which of this process's images have finite outputs (B,).

        Raises InputError if the values of this step, or of the one before it, are not finite.
        """
        self.unread.append((step, values, sound))
        if len(self.unread) > self.lag:
            self._check(*self.unread.popleft())

    def finish(self):
        """Look at what is left. Raises InputError as `add` does."""
        while self.unread:
            self._check(*self.unread.popleft())

    def _check(self, step, values, sound):
        if values.isfinite().all():
            return
        finite = dict(zip(MEASURES, values.isfinite().tolist(), strict=True))
        terms = ", ".join(name for name in TERMS if not finite[name])
        bad = (~sound).nonzero()[:, 0].tolist()
        if not bad and parallel.processes() > 1:
            raise SystemExit(2)  # the process that has the images tells of them
        images = "not of single images" if len(bad) in (0, len(sound)) else self._names(step, bad)
        raise InputError(
            f"epoch {self.epoch + 1}, step {step + 1}: {terms} not finite, {images}; the last checkpoint is as it was: "
            "--resume without these images, or start anew with a lower --lr"
        )

    def _names(self, step, bad):
        """The first images of `bad`, numbers in this process's share of the batch of a step."""
        whole = next(itertools.islice(self.loader.batch_sampler.batches(), step, None))
        own = whole[parallel.share(len(whole))]
        files = [self.loader.dataset.file(own[number]) for number in bad[:3]]
        return f"in {len(bad)} images: " + ", ".join(str(files.root / files.paths[at]) for files, at in files)
