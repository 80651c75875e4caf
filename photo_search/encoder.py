"""The network of a checkpoint, without the benchmark that it was trained on, and what it makes of photos.

PyTorch computes with checkpoints (trained.py), ONNX Runtime with those that models.export wrote as .onnx (exported.py).
Nothing else of the search knows which; with the latter, PyTorch is never loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from datasets.images import resize, stack
from photo_search.photos import read_photo, thumbnail
from utils.cli import InputError
from utils.distributed import bar_disabled
from utils.files import sha256_of
from utils.process_pool import parallel_map

BACKENDS = ("torch", "onnx")


@dataclass(frozen=True)
class Encoder:
    """A network that is ready to compute features, which several threads may do."""

    metadata: dict  # "checkpoint", "sha256", "model", "imagenet_classes", "input_size", "width": ready for JSON
    compute: Callable  # from (n, 3, size, size) uint8 to L2-normalised features (n, D) float32, both arrays

    def features(self, images):
        """L2-normalised features of RGB images (PIL.Image): (n, D) float32."""
        return self.embed(stack([resize(image, self.metadata["input_size"]) for image in images]))

    def embed(self, images):
        """L2-normalised features of (n, 3, size, size) uint8: (n, D) float32. Raises InputError if not finite."""
        rows = self.compute(images)
        if not np.isfinite(rows).all():
            raise InputError(f"{self.metadata['checkpoint']}: its features are not finite; take another checkpoint")
        return rows


def backend_of(checkpoint):
    """Which of BACKENDS computes with a file: its name tells."""
    return "onnx" if Path(checkpoint).suffix.lower() == ".onnx" else "torch"


def _room(checkpoint):
    if backend_of(checkpoint) == "onnx":
        from photo_search import exported as room
    else:
        from photo_search import trained as room
    return room


def load_encoder(checkpoint, model=None, input_size=None, imagenet_classes=None, device=None):
    """The Encoder of a checkpoint, ours or the authors', or of one that models.export wrote as .onnx.

    model, input_size, imagenet_classes: what it was trained with, if it does not tell. The authors' do not, and are
    taken for convnextv2_tiny's. device: None for a GPU where there is one. Raises InputError if it is none, or of
    another model, or there is no such device.
    """
    path = Path(checkpoint).absolute()
    return Encoder(*_room(path).load(path, model, input_size, imagenet_classes, device))


def encoder_of(metadata, checkpoint=None, device=None):
    """The Encoder that an index was made with.

    metadata: of the index; checkpoint: its present path, if the file was moved.

    Raises InputError if it is not there, or another one.
    """
    path = checkpoint or metadata["checkpoint"]
    if not Path(path).is_file():
        raise InputError(f"{path}: the checkpoint of the index is not there; name its place with --checkpoint")
    check_checkpoint(metadata, path)
    own = {name: metadata[name] for name in ("model", "input_size", "imagenet_classes")}
    network = load_encoder(path, **own, device=device)
    if network.metadata["width"] != metadata["width"]:
        raise InputError(f"{path}: gives features of {network.metadata['width']} values, the index {metadata['width']}")
    return network


def check_checkpoint(metadata, path):
    """Raise InputError unless the file at `path` is the checkpoint of an index with these metadata, or its export."""
    try:
        own = _room(path).read_metadata(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); see --checkpoint") from None
    if own["sha256"] != metadata["sha256"]:
        raise InputError(
            f"{path}: not the checkpoint that the index was made with, and features of two do not mix; "
            "name that one with --checkpoint, or another index"
        )
    for name, value in own.items():
        if metadata[name] != value:
            raise InputError(
                f"{path}: exported with {name} {value}, while the index has {metadata[name]}; export it again with "
                f"--{name} {metadata[name]}, or name another index"
            )


def fit_codebook(checkpoint, features, subspaces, clusters):
    """The codebook (M, K, D/M) of features (N, D), fitted by our EM where PyTorch computes, else by scikit-learn.

    Both take long to load, and most commands need neither. Raises CollapsedComponent.
    """
    from models.eval import codebooks

    mixture = "sklearn" if backend_of(checkpoint) == "onnx" else "torch"
    return codebooks.fit_codebook(features, subspaces, clusters, mixture=mixture)[0]


def share_cores(checkpoint, threads):
    """Have what this thread computes take its share of the cores, where as many `threads` compute at a time."""
    _room(checkpoint).share_cores(threads)


def add_photos(network, metadata, found, unfinished, batch_size=64, workers=0):
    """Compute the features of Founds, and add them to an PartialIndex batch by batch.

    network: a function that gives the Encoder, called where a photo can be read; metadata: those of the Encoder.
    workers: processes that decode; with 0 the calling process decodes.
    """
    decode = partial(_decoded, size=metadata["input_size"])
    decoded = parallel_map(decode, found, "photos", workers, -(-batch_size // max(workers, 1)), bar_disabled())
    while items := list(islice(decoded, batch_size)):
        batch, found = list(zip(found[: len(items)], items, strict=True)), found[len(items) :]
        unreadable = {each: item for each, item in batch if isinstance(item, str)}
        good = [(each, *item) for each, item in batch if not isinstance(item, str)]
        own, images, thumbnails, digests = zip(*good, strict=True) if good else ((), (), (), ())
        rows = network().embed(stack(images)) if good else np.empty((0, metadata["width"]), np.float32)
        unfinished.add(own, rows, digests, thumbnails, unreadable)


def _decoded(found, size):
    """A photo decoded: (pixels (3, size, size) uint8, thumbnail, digest), or why it cannot be read."""
    try:
        image = read_photo(found.path, size)
        return resize(image, size), thumbnail(image), sha256_of(found.path)
    except InputError as error:
        return str(error)
    except OSError as error:
        return error.strerror or type(error).__name__
