"""torch datasets over lists of images, and the paired loader of a training step.

Everything random is a function of (seed, epoch, place in the list), so neither the number of workers nor a restart
changes a run.
"""

import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.images import draw_augmentation, read_rgb, resize, warp


class ImageList(Dataset):
    """Images of a FileList in order, from index `start` on, as they are: ((3, size, size) uint8, label)."""

    def __init__(self, files, size, start=0):
        self.files, self.size, self.start = files, size, start

    def __len__(self):
        return len(self.files) - self.start

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        index += self.start
        image = read_rgb(self.files.root / self.files.paths[index])
        return resize(image, self.size), int(self.files.labels[index])


class TrainingImages(Dataset):
    """Augmented sketches and photos, indexed by (epoch, index): sketches first, then photos.

    An item is ((3, size, size) uint8, label, 1.0 for a photo or 0.0 for a sketch).
    """

    def __init__(self, sketches, photos, size, seed):
        self.sketches, self.photos = sketches, photos
        self.size, self.seed = size, seed

    def __getitem__(self, key):
        epoch, index = key
        is_photo = index >= len(self.sketches)
        files, place = (self.photos, index - len(self.sketches)) if is_photo else (self.sketches, index)
        image = read_rgb(files.root / files.paths[place])
        augmentation = draw_augmentation(np.random.default_rng((self.seed, epoch, index)))
        if augmentation is not None:
            image = warp(image, *augmentation)
        return resize(image, self.size), int(files.labels[place]), float(is_photo)


class PairedBatches(Sampler):
    """Batches of n_s sketches and n_p photos, joined and shuffled, in the order of (seed, epoch).

    The epoch ends when the shorter list does; the last batch of either list may be short. Yields lists of
    (epoch, index) as TrainingImages takes them.
    """

    def __init__(self, sketches, photos, sketches_per_batch, photos_per_batch, seed):
        self.counts = sketches, photos
        self.per_batch = sketches_per_batch, photos_per_batch
        self.seed, self.epoch = seed, 0

    def __len__(self):
        return min(-(-count // size) for count, size in zip(self.counts, self.per_batch, strict=True))

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        sketches, photos = rng.permutation(self.counts[0]), self.counts[0] + rng.permutation(self.counts[1])
        for step in range(len(self)):
            batch = np.concatenate(
                [
                    order[step * size : (step + 1) * size]
                    for order, size in zip((sketches, photos), self.per_batch, strict=True)
                ]
            )
            yield [(self.epoch, int(index)) for index in rng.permutation(batch)]


def training_loader(sketches, photos, split, size, seed, workers, device):
    """Loader of (images uint8, labels int64, is_photo float32) batches; `split` = (sketches, photos) in a batch.

    Set `loader.batch_sampler.epoch` before each epoch.
    """
    batches = PairedBatches(len(sketches), len(photos), *split, seed)
    return DataLoader(
        TrainingImages(sketches, photos, size, seed),
        batch_sampler=batches,
        collate_fn=_collate_training,
        **_workers(workers, device),
    )


def evaluation_loader(files, size, batch_size, workers, device, start=0):
    """Loader of (images uint8, labels int64) batches in list order, from the image with index `start` on."""
    return DataLoader(ImageList(files, size, start), batch_size=batch_size, **_workers(workers, device))


def _collate_training(items):
    images, labels, is_photo = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(is_photo, dtype=torch.float32)


def _workers(workers, device):
    pinned = torch.device(device).type == "cuda"
    return dict(num_workers=workers, pin_memory=pinned, worker_init_fn=_leave_interrupts_to_the_main_process)


def _leave_interrupts_to_the_main_process(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
