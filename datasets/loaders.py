"""Dataset, Sampler and DataLoader over lists of images, for training and evaluation.

All randomness depends only on the seed, the epoch and the index in the list, so that a run gives the same result with
any number of workers, and after a restart.
"""

import functools
import signal
import sys
from dataclasses import dataclass
from multiprocessing.queues import Queue

import numpy as np
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.images import AUGMENTATIONS, augment_as_release, read_rgb, resize, stack
from datasets.lists import FileList, check_images
from utils import distributed
from utils.cli import InputError, first_line
from utils.memory import free_shared_memory

PREFETCH = 2  # batches that each worker prepares in advance, torch's default


@dataclass(frozen=True)
class LoaderOptions:
    """Image size, batch size, workers and device of a DataLoader."""

    size: int = 224  # side of an input image, in pixels
    batch_size: int = 64
    workers: int = 0  # processes that decode images; with 0 the calling process decodes them
    device: str = "cpu"  # where batches go


class EvaluationDataset(Dataset):
    """The images start..stop-1 of a FileList, in order, without augmentation: ((3, size, size) uint8, label)."""

    def __init__(self, files, size, start=0, stop=None):
        self.files, self.size = files, size
        self.indices = range(len(files))[start:stop]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        index = self.indices[index]
        image = read_rgb(self.files.root / self.files.paths[index])
        return resize(image, self.size), int(self.files.labels[index])


class TrainingDataset(Dataset):
    """Augmented sketches and photos, indexed by (epoch, index). Indices count the sketches first, then the photos.

    An item is ((3, size, size) uint8, label, 1.0 for a photo or 0.0 for a sketch). augment: a function in
    datasets.images.AUGMENTATIONS.
    """

    def __init__(self, sketches, photos, size, seed, augment=augment_as_release):
        self.sketches, self.photos = sketches, photos
        self.size, self.seed, self.augment = size, seed, augment

    def file(self, index):
        """The FileList of image `index`, and the position of the image in it."""
        is_photo = index >= len(self.sketches)
        return (self.photos, index - len(self.sketches)) if is_photo else (self.sketches, index)

    def __getitem__(self, key):
        epoch, index = key
        files, position = self.file(index)
        is_photo = files is self.photos
        image = read_rgb(files.root / files.paths[position])
        image = self.augment(image, np.random.default_rng((self.seed, epoch, index)), is_photo)
        return resize(image, self.size), int(files.labels[position]), float(is_photo)


class PairedBatchSampler(Sampler):
    """Batches of sketches_per_batch sketches and photos_per_batch photos, joined and shuffled.

    Seed and epoch decide the order. The epoch ends when one list has no images left; the last batch of a list may have
    fewer. Yields batches start..stop-1 as lists of (epoch, index) for TrainingDataset, of each batch
    only the slice share(length).
    """

    def __init__(self, sketches, photos, sketches_per_batch, photos_per_batch, seed, share=slice):
        self.counts = sketches, photos
        self.per_batch = sketches_per_batch, photos_per_batch
        self.seed, self.epoch, self.share = seed, 0, share
        pairs = zip(self.counts, self.per_batch, strict=True)
        self.start, self.stop = 0, min(-(-count // size) for count, size in pairs)

    def __len__(self):
        return max(0, self.stop - self.start)

    def size(self, step):
        """Number of images in the whole batch of `step`."""
        pairs = zip(self.counts, self.per_batch, strict=True)
        return sum(len(range(count)[step * size : (step + 1) * size]) for count, size in pairs)

    def __iter__(self):
        for step, batch in enumerate(self.batches()):
            if self.start <= step < self.stop:
                yield [(self.epoch, int(index)) for index in batch[self.share(len(batch))]]

    def batches(self):
        """The indices of every whole batch of the epoch; `start`, `stop` and `share` do not matter here."""
        rng = np.random.default_rng((self.seed, self.epoch))
        sketches, photos = rng.permutation(self.counts[0]), self.counts[0] + rng.permutation(self.counts[1])
        for step in range(self.stop):
            pairs = zip((sketches, photos), self.per_batch, strict=True)
            yield rng.permutation(np.concatenate([order[step * size : (step + 1) * size] for order, size in pairs]))


def training_loader(sketches, photos, loading, split, seed=0, share=slice, augment=augment_as_release):
    """Loader of (images uint8, labels int64, is_photo float32) batches.

    sketches, photos: FileLists. loading: LoaderOptions. split: (sketches, photos) in a batch. share: a function of
    the length of a batch; returns the slice that this rank trains on. augment: a function in AUGMENTATIONS.
    Before each epoch set `loader.batch_sampler.epoch`; to run only a part of an epoch, set its `start` and `stop`, too.
    """
    whole = range(sum(split))
    arguments = _worker_arguments(loading, len(whole[share(len(whole))]))
    return DataLoader(
        TrainingDataset(sketches, photos, loading.size, seed, augment),
        batch_sampler=PairedBatchSampler(len(sketches), len(photos), *split, seed, share),
        collate_fn=_collate_training,
        persistent_workers=arguments["num_workers"] > 0,
        **arguments,
    )


def evaluation_loader(files, loading, start=0, stop=None):
    """Loader of (images uint8, labels int64) batches of a FileList: its images start..stop-1, in order."""
    return DataLoader(
        EvaluationDataset(files, loading.size, start, stop),
        batch_size=loading.batch_size,
        collate_fn=_collate_evaluation,
        **_worker_arguments(loading, loading.batch_size),
    )


def _collate_training(items):
    images, labels, is_photo = zip(*items, strict=True)
    return torch.from_numpy(stack(images)), torch.tensor(labels), torch.tensor(is_photo, dtype=torch.float32)


def _collate_evaluation(items):
    images, labels = zip(*items, strict=True)
    return torch.from_numpy(stack(images)), torch.tensor(labels)


def _worker_arguments(loading, images):
    """Arguments of a DataLoader whose batches hold `images` images."""
    pinned = torch.device(loading.device).type == "cuda"
    workers = fit_workers(loading.workers, images * 3 * loading.size**2)
    prefetch = PREFETCH if workers else None
    return dict(num_workers=workers, pin_memory=pinned, worker_init_fn=init_worker, prefetch_factor=prefetch)


def fit_workers(workers, batch_bytes):
    """The number of workers, at most `workers`, whose batches fit into the free shared memory; fewer with a note.

    Workers pass batches through shared memory: PREFETCH each, and those that this process holds at the time.
    """
    free = free_shared_memory()
    if not workers or free is None:
        return workers
    batches = free // distributed.local_world_size() // max(1, batch_bytes)
    fitting = max(0, min(workers, (batches - _HELD_BATCHES) // PREFETCH))
    if fitting < workers:
        _note_once(
            f"note: {fitting} of {workers} --workers, since /dev/shm has {free / 1e6:.0f} MB free and a batch takes "
            f"{batch_bytes / 1e6:.1f} MB; enlarge it (docker run --shm-size 8g), or lower --batch_size"
        )
    return fitting


_HELD_BATCHES = 2  # of the main process: one in use, one on its way
_note_once = functools.cache(distributed.log_rank0)


def init_worker(_):
    """worker_init_fn: workers ignore SIGINT, print nothing when the parent process dies, report failed transfers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles it
    sys.excepthook = _ignore_lost_connections
    Queue._on_queue_feeder_error = _send_error


def _send_error(queue, error, item):
    """Hook of a worker's queue: send an InputError instead of the batch that could not be sent.

    By default the queue prints a traceback and drops the batch, and the main process waits for it forever.
    """
    reason = first_line(error, None)
    message = f"a worker could not pass on a batch ({reason}); free some of /dev/shm, or use --workers 0"
    queue.put((item[0], ExceptionWrapper((InputError, InputError(message), None))))


def _ignore_lost_connections(kind, error, trace):
    """sys.excepthook of a worker: silent for connections that broke because the main process is gone."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


@dataclass(frozen=True)
class TrainingData:
    """Training data, and the held-back sketches for validation."""

    train_loader: DataLoader  # this rank's slice of each batch
    semantic_mask: torch.Tensor  # (C, J) the semantic mask, or (C, 1) zeros for none; on the training device
    file_lists: list[FileList]  # sketches, photos, held-back sketches (if any)
    val_loader: DataLoader | None = None  # this rank's slice of the held-back sketches
    val_size: int = 0  # their number on all ranks

    def end_workers(self):
        """End the processes that decode training images; the next epoch starts others."""
        self.train_loader._iterator = None  # garbage collection would end them later, and wait seconds for each


def open_training_data(
    benchmark, loading, seed=0, imagenet_classes=1000, validate=True, max_steps=None, sketches=None, augment="release"
):
    """TrainingData of a benchmark folder.

    loading: LoaderOptions, its batch_size that of a whole batch; seed: of order and augmentation; imagenet_classes:
    width of the semantic mask, None for no mask; validate: whether held-back sketches are read; max_steps: of an epoch;
    sketches: how many a batch has (default: the protocol's share); augment: a name in AUGMENTATIONS.
    Raises InputError for bad lists, missing images or mask, and a batch size that does not fit.
    """
    split = _split_batch(benchmark.protocol, loading.batch_size, sketches)
    sketch_list, photo_list = benchmark.read("sketch", "train"), benchmark.read("photo", "train")
    held_back = _read_validation_list(benchmark) if validate else None
    files = [sketch_list, photo_list, *filter(None, [held_back])]
    for each in files:
        check_images(each)
    loader = training_loader(
        sketch_list, photo_list, loading, split, seed, distributed.rank_slice, AUGMENTATIONS[augment]
    )
    batches = loader.batch_sampler
    batches.stop = min(batches.stop, max_steps or batches.stop)
    if (least := min(batches.size(step) for step in range(batches.stop))) < distributed.get_world_size():
        raise InputError(
            f"--batch_size {loading.batch_size}: the last batch of an epoch holds {least} images, fewer than the "
            f"{distributed.get_world_size()} processes; use another size, or fewer processes"
        )
    mask = torch.zeros(len(benchmark.seen_names), 1)
    if imagenet_classes is not None:
        mask = torch.from_numpy(benchmark.read_mask(imagenet_classes))
    data = TrainingData(loader, mask.to(loading.device), files)
    if not held_back:
        return data
    part = distributed.rank_slice(len(held_back))
    validation = evaluation_loader(held_back, loading, part.start, part.stop)
    return TrainingData(data.train_loader, data.semantic_mask, files, validation, len(held_back))


def _split_batch(protocol, batch_size, sketches=None):
    """(sketches, photos) of a batch: `sketches` of them, or the protocol's share.

    Raises InputError if the batch is too small for that or for the processes.
    """
    if sketches is not None and sketches >= batch_size:
        raise InputError(f"--sketches {sketches}: leaves no photos in a batch of {batch_size}; use fewer")
    split = protocol.split_batch(batch_size) if sketches is None else (sketches, batch_size - sketches)
    if not all(split):
        least = protocol.sketch_share + protocol.photo_share
        raise InputError(
            f"--batch_size {batch_size}: too small for {protocol.sketch_share} sketch and "
            f"{protocol.photo_share} photos; use {least} or more"
        )
    if split[1] < distributed.get_world_size():
        raise InputError(
            f"--batch_size {batch_size}: its {split[1]} photos cannot be shared by "
            f"{distributed.get_world_size()} processes; use a larger batch, or fewer processes"
        )
    return split


def _read_validation_list(benchmark):
    try:
        return benchmark.read("sketch", "test")
    except InputError as error:
        raise InputError(f"{error}; --no_validation trains without held-back sketches") from None
