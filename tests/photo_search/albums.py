"""Photos and a network that cost nothing."""

import os

import numpy as np
from PIL import Image

from models.eval.codebooks import fit_codebook
from photo_search.update import IndexOptions, update_index


class FakeEncoder:
    """Stands for photo_search.encoder.Encoder: features are random projections of the pixels."""

    def __init__(self, width=16, size=32, sha256="ab" * 32):
        self.metadata = {
            "checkpoint": "/none/model_best.pth.tar", "sha256": sha256, "model": "fake", "imagenet_classes": 1000,
            "input_size": size, "width": width,
        }  # fmt: skip
        self.projection = np.random.default_rng(0).normal(size=(3 * size * size, width))
        self.seen = 0

    def __call__(self):
        return self

    def embed(self, images):
        self.seen += len(images)
        rows = (images.reshape(len(images), -1) / 255.0 - 0.4) @ self.projection
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write_photo(path, seed, side=40):
    """A photo of coloured noise; the same seed gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side, side)).save(path)
    os.utime(path, ns=(10**18 + seed, 10**18 + seed))
    return path


def write_album(folder, photos=12):
    """A folder of photos, some of them in folders of it."""
    for number in range(photos):
        write_photo(folder / f"{('', 'a/', 'b/c/')[number % 3]}{number}.png", number)
    return folder


def update(index, network, *folders, batch_size=5, **more):
    """Bring an index up to date; returns its UpdateStats."""
    plan = IndexOptions([str(each) for each in folders], batch_size=batch_size, **more)
    return update_index(index, network, lambda *each: fit_codebook(*each)[0], plan)
