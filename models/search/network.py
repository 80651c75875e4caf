"""The network of a checkpoint, without the benchmark that it was trained on, and what it makes of photos."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.errors import InputError
from datasets.files import digest
from datasets.images import resize
from datasets.zeroshot import prepare_worker, stack
from models.checkpoints import read_checkpoint, trained_with
from models.eval.features import embed
from models.networks import Student
from models.options import input_size as fitting_size
from models.search.photos import read_photo, thumbnail
from models.speaker import no_bar
from models.weights import load_published, student_of

PRECISION = "tf32"  # as test scripts have it


@dataclass(frozen=True)
class Network:
    """A student that is ready to compute features on `device`, which several threads may do."""

    student: Student
    device: str
    facts: dict  # "checkpoint", "sha256", "model", "imagenet_classes", "input_size", "width": ready for JSON

    def features(self, images):
        """L2-normalised features of RGB images (PIL.Image): (n, D) float32."""
        batch = torch.stack([resize(image, self.facts["input_size"]) for image in images])
        return self.embed(batch)

    def embed(self, images):
        """L2-normalised features of (n, 3, size, size) uint8: (n, D) float32. Raises InputError if not finite."""
        rows = embed(self.student, images, self.device, PRECISION)
        if not np.isfinite(rows).all():
            raise InputError(f"{self.facts['checkpoint']}: its features are not finite; take another checkpoint")
        return rows


def load_network(checkpoint, model=None, input_size=None, imagenet_classes=None, device="cpu"):
    """The Network of a checkpoint, ours or the authors'.

    model, input_size, imagenet_classes: what it was trained with, if it does not tell. The authors' do not, and are
    taken for convnextv2_tiny's. Raises InputError if it is none, or of another model.
    """
    path = Path(checkpoint).absolute()
    content = read_checkpoint(path)
    options = trained_with(content)
    model = model or _of_kind(options, "model", str, "convnextv2_tiny")
    imagenet_classes = imagenet_classes or _of_kind(options, "imagenet_classes", int, 1000)
    size = fitting_size(model, input_size or _of_kind(options, "input_size", int, None))
    student = student_of(model, _seen_classes(content["state_dict"], path), imagenet_classes)
    load_published(student, content["state_dict"], path)
    student.to(device).eval().to(memory_format=torch.channels_last)
    facts = {
        "checkpoint": str(path), "sha256": digest(path), "model": model, "imagenet_classes": imagenet_classes,
        "input_size": size, "width": student.width,
    }  # fmt: skip
    return Network(student, device, facts)


def network_of(facts, checkpoint=None, device="cpu"):
    """The Network that an index was made with; facts: its Index.facts; checkpoint: where that is now, if it has moved.

    Raises InputError if it is not there, or another one.
    """
    path = checkpoint or facts["checkpoint"]
    if not Path(path).is_file():
        raise InputError(f"{path}: the checkpoint of the index is not there; name its place with --checkpoint")
    check_checkpoint(facts, path)
    own = {name: facts[name] for name in ("model", "input_size", "imagenet_classes")}
    network = load_network(path, **own, device=device)
    if network.facts["width"] != facts["width"]:
        raise InputError(f"{path}: gives features of {network.facts['width']} values, the index {facts['width']}")
    return network


def check_checkpoint(facts, path):
    """Raise InputError unless the file at `path` is the checkpoint of an index with these facts."""
    try:
        own = digest(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); see --checkpoint") from None
    if own != facts["sha256"]:
        raise InputError(
            f"{path}: not the checkpoint that the index was made with, and features of two do not mix; "
            "name another --index"
        )


def _of_kind(options, name, kind, default):
    value = options.get(name)
    fits = isinstance(value, kind) and (kind is str or 1 <= value <= 10**6)
    return value if fits else default


def _seen_classes(state, path):
    """The number of classes that a checkpoint's network was trained on."""
    for name, value in state.items():
        if str(name).endswith("linear.weight") and isinstance(value, torch.Tensor) and value.ndim == 2:
            return max(1, len(value))
    raise InputError(f"{path}: holds no classifier of seen classes; take a checkpoint that a train script wrote")


class _Photos(Dataset):
    """Photos decoded: (pixels (3, size, size) uint8, thumbnail, digest), or why one cannot be read."""

    def __init__(self, found, size):
        self.found, self.size = found, size

    def __len__(self):
        return len(self.found)

    def __getitem__(self, index):
        path = self.found[index].path
        try:
            image = read_photo(path, self.size)
            return resize(image, self.size), thumbnail(image), digest(path)
        except InputError as error:
            return str(error)
        except OSError as error:
            return error.strerror or type(error).__name__


def add_photos(network, found, unfinished, batch_size=64, workers=0):
    """Compute the features of Founds, and add them to an Unfinished batch by batch.

    workers: processes that decode; with 0 the calling process decodes.
    """
    size = network.facts["input_size"]
    loader = DataLoader(
        _Photos(found, size), batch_size, collate_fn=list, num_workers=min(workers, -(-len(found) // batch_size)),
        worker_init_fn=prepare_worker,
    )  # fmt: skip
    with tqdm(total=len(found), desc="photos", unit="photo", leave=False, disable=no_bar()) as bar:
        for number, items in enumerate(loader):
            batch = list(zip(found[number * batch_size :], items, strict=False))
            unreadable = {each: item for each, item in batch if isinstance(item, str)}
            good = [(each, *item) for each, item in batch if not isinstance(item, str)]
            own, images, thumbnails, digests = zip(*good, strict=True) if good else ((), (), (), ())
            rows = network.embed(stack(images)) if good else np.empty((0, network.facts["width"]), np.float32)
            unfinished.add(own, rows, digests, thumbnails, unreadable)
            bar.update(len(batch))
