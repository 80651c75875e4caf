"""What a training run learns from and is measured on, shared by several processes."""

from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from datasets.benchmark import FileList, check_images
from datasets.errors import InputError
from datasets.zeroshot import evaluation_loader, training_loader
from models import parallel


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from, and the held-back sketches that it is measured on."""

    loader: DataLoader  # of this process's share of each batch
    mask: torch.Tensor  # (C, J) the semantic mask, or (C, 1) zeros for none; on the device of the run
    files: list[FileList]  # sketches, photos and, if there are any, held-back sketches
    validation: DataLoader | None = None  # of this process's share of the held-back sketches
    held_back: int = 0  # how many there are in all


def open_training_data(benchmark, loading, seed=0, imagenet_classes=1000, validate=True, max_steps=None):
    """TrainingData of a benchmark folder.

    loading: a Loading, its batch_size that of a whole batch; seed: of order and augmentation; imagenet_classes: width
    of the semantic mask, None for no mask; validate: whether held-back sketches are read; max_steps: of an epoch.
    Raises InputError for bad lists, missing images or mask, and a batch size that does not fit.
    """
    split = _split_batch(benchmark.protocol, loading.batch_size)
    sketches, photos = benchmark.read("sketch", "train"), benchmark.read("photo", "train")
    held_back = _held_back(benchmark) if validate else None
    files = [sketches, photos, *filter(None, [held_back])]
    for each in files:
        check_images(each)
    loader = training_loader(sketches, photos, loading, split, seed, parallel.share)
    batches = loader.batch_sampler
    batches.stop = min(batches.stop, max_steps or batches.stop)
    if (least := min(batches.size(step) for step in range(batches.stop))) < parallel.processes():
        raise InputError(
            f"--batch_size {loading.batch_size}: the last batch of an epoch holds {least} images, fewer than the "
            f"{parallel.processes()} processes; use another size, or fewer processes"
        )
    mask = torch.zeros(len(benchmark.seen_names), 1)
    if imagenet_classes is not None:
        mask = torch.from_numpy(benchmark.read_mask(imagenet_classes))
    data = TrainingData(loader, mask.to(loading.device), files)
    if not held_back:
        return data
    part = parallel.share(len(held_back))
    validation = evaluation_loader(held_back, loading, part.start, part.stop)
    return TrainingData(data.loader, data.mask, files, validation, len(held_back))


def _split_batch(protocol, batch_size):
    """(sketches, photos) of a batch. Raises InputError if it is too small for the protocol or for the processes."""
    split = protocol.split_batch(batch_size)
    if not all(split):
        least = protocol.sketch_share + protocol.photo_share
        raise InputError(
            f"--batch_size {batch_size}: too small for {protocol.sketch_share} sketch and "
            f"{protocol.photo_share} photos; use {least} or more"
        )
    if split[1] < parallel.processes():
        raise InputError(
            f"--batch_size {batch_size}: its {split[1]} photos cannot be shared by "
            f"{parallel.processes()} processes; use a larger batch, or fewer processes"
        )
    return split


def _held_back(benchmark):
    try:
        return benchmark.read("sketch", "test")
    except InputError as error:
        raise InputError(f"{error}; --no_validation trains without held-back sketches") from None
