"""Feature computation on several ranks that torchrun starts; rank 0 does everything else.

Batches are assigned round-robin, and rank 0 stores them in their order, so the index equals that of one process. Only
rank 0 needs the folder of the index; all ranks need the checkpoint and the photos.
"""

import functools
from contextlib import contextmanager

from photo_search import encoder as local
from utils import distributed
from utils.cli import InputError, RankError
from utils.distributed import get_rank, get_world_size


def add_photos(encoder, metadata, photos, partial_index, batch_size=64, workers=0, truncated=False):
    """As photo_search.encoder.add_photos, on rank 0, while the other ranks are in `follow`."""
    distributed.init_process_group("cpu")
    distributed.broadcast_object((metadata, photos, batch_size, truncated))
    _compute(encoder, metadata, photos, partial_index, batch_size, workers, truncated)


@contextmanager
def leading():
    """Within this block rank 0 makes the index; at its end `follow` returns on the other ranks."""
    try:
        yield
        if not distributed.is_initialized():  # there was nothing to compute
            distributed.init_process_group("cpu")
            distributed.broadcast_object(None)
    finally:
        distributed.destroy_process_group()


def follow(checkpoint=None, device=None, workers=0):
    """Compute features on a rank other than 0.

    checkpoint: its path on this machine, if it differs from that of rank 0. Raises RankError.
    """
    distributed.init_process_group("cpu")
    try:
        if task := distributed.broadcast_object(None):
            metadata, photos, batch_size, truncated = task
            encoder = functools.cache(lambda: local.encoder_of(metadata, checkpoint, device, threads=1))
            _compute(encoder, metadata, photos, None, batch_size, workers, truncated)
    except InputError as error:
        raise RankError(str(error)) from error
    finally:
        distributed.destroy_process_group()


def _compute(encoder, metadata, photos, partial_index, batch_size, workers, truncated):
    batches = [photos[start : start + batch_size] for start in range(0, len(photos), batch_size)]
    own = batches[get_rank() :: get_world_size()]
    gathering = _GatheringIndex(partial_index)
    photos = [each for batch in own for each in batch]
    local.add_photos(encoder, metadata, photos, gathering, batch_size, workers, truncated)
    if len(own) < -(-len(batches) // get_world_size()):
        gathering.add()  # other ranks have one more batch


class _GatheringIndex:
    """Gathers one batch of each rank at a time into the PartialIndex of rank 0."""

    def __init__(self, partial_index):
        self.partial_index = partial_index

    def add(self, *batch):
        for each in distributed.gather_objects(batch) or ():
            if each:
                self.partial_index.add(*each)
