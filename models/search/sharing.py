"""Several processes, as torchrun starts them, compute the features of photos; the first does all else.

Batches are dealt out in turn, and the first process keeps them in their order: the index is the one that a process
alone makes. Only the first needs the folder of the index; all need the checkpoint and the photos.
"""

import functools
from contextlib import contextmanager

from datasets.errors import InputError, OwnError
from models import parallel
from models.search import network as networks
from models.speaker import processes, rank


def add_photos(network, facts, found, unfinished, batch_size=64, workers=0):
    """As models.search.network.add_photos, for the first process; the others are in `follow`."""
    parallel.connect("cpu")
    parallel.told((facts, found, batch_size))
    _compute(network, facts, found, unfinished, batch_size, workers)


@contextmanager
def leading():
    """Within this block the first process makes the index; at its end the others end, too."""
    try:
        yield
        if not parallel.met():  # nothing was to be computed
            parallel.connect("cpu")
            parallel.told(None)
    finally:
        parallel.disconnect()


def follow(checkpoint=None, device=None, workers=0):
    """Compute what the first process shares, in another one.

    checkpoint: where it is on this machine, if not where the first process has it. Raises OwnError.
    """
    parallel.connect("cpu")
    try:
        if task := parallel.told(None):
            facts, found, batch_size = task
            network = functools.cache(lambda: networks.network_of(facts, checkpoint, device))
            _compute(network, facts, found, None, batch_size, workers)
    except InputError as error:
        raise OwnError(str(error)) from error
    finally:
        parallel.disconnect()


def _compute(network, facts, found, unfinished, batch_size, workers):
    batches = [found[start : start + batch_size] for start in range(0, len(found), batch_size)]
    own = batches[rank() :: processes()]
    together = _Together(unfinished)
    networks.add_photos(network, facts, [each for batch in own for each in batch], together, batch_size, workers)
    if len(own) < -(-len(batches) // processes()):
        together.add()  # the others have one more


class _Together:
    """An Unfinished to which all processes add a batch at a time."""

    def __init__(self, unfinished):
        self.unfinished = unfinished

    def add(self, *batch):
        for each in parallel.gathered(batch) or ():
            if each:
                self.unfinished.add(*each)
