"""Several processes, as torchrun starts them, compute the features of photos; the first does all else.

Batches are dealt out in turn, and the first process keeps them in their order: the index is the one that a process
alone makes. Only the first needs the folder of the index; all need the checkpoint and the photos.
"""

import functools
from contextlib import contextmanager

from photo_search import encoder as networks
from utils import distributed
from utils.cli import InputError, RankError
from utils.distributed import get_rank, get_world_size


def add_photos(network, metadata, found, unfinished, batch_size=64, workers=0):
    """As photo_search.encoder.add_photos, for the first process; the others are in `follow`."""
    distributed.init_process_group("cpu")
    distributed.broadcast_object((metadata, found, batch_size))
    _compute(network, metadata, found, unfinished, batch_size, workers)


@contextmanager
def leading():
    """Within this block the first process makes the index; at its end the others end, too."""
    try:
        yield
        if not distributed.is_initialized():  # nothing was to be computed
            distributed.init_process_group("cpu")
            distributed.broadcast_object(None)
    finally:
        distributed.destroy_process_group()


def follow(checkpoint=None, device=None, workers=0):
    """Compute what the first process shares, in another one.

    checkpoint: where it is on this machine, if not where the first process has it. Raises OwnError.
    """
    distributed.init_process_group("cpu")
    try:
        if task := distributed.broadcast_object(None):
            metadata, found, batch_size = task
            network = functools.cache(lambda: networks.encoder_of(metadata, checkpoint, device))
            _compute(network, metadata, found, None, batch_size, workers)
    except InputError as error:
        raise RankError(str(error)) from error
    finally:
        distributed.destroy_process_group()


def _compute(network, metadata, found, unfinished, batch_size, workers):
    batches = [found[start : start + batch_size] for start in range(0, len(found), batch_size)]
    own = batches[get_rank() :: get_world_size()]
    together = _Together(unfinished)
    networks.add_photos(network, metadata, [each for batch in own for each in batch], together, batch_size, workers)
    if len(own) < -(-len(batches) // get_world_size()):
        together.add()  # the others have one more


class _Together:
    """An PartialIndex to which all processes add a batch at a time."""

    def __init__(self, unfinished):
        self.unfinished = unfinished

    def add(self, *batch):
        for each in distributed.gather_objects(batch) or ():
            if each:
                self.unfinished.add(*each)
