"""Checkpoints as they were trained, computed by PyTorch."""

import torch

from models.checkpoints import read_checkpoint, trained_with
from models.eval.features import embed
from models.options import check_device
from models.options import input_size as fitting_size
from models.weights import load_published, student_of
from utils.cli import InputError
from utils.distributed import local_device
from utils.files import sha256_of
from utils.process_pool import available_cores

PRECISION = "tf32"  # as test scripts have it


def told_by(path):
    """What a checkpoint tells without being read: {"sha256"}. Raises OSError."""
    return {"sha256": sha256_of(path)}


def load(path, model, input_size, imagenet_classes, device):
    """(facts, compute) of a photo_search.encoder.Network; see load_network there."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device("--device", device)
    device = local_device(device)
    student, facts, _ = load_student(path, model, input_size, imagenet_classes)
    student.to(device).to(memory_format=torch.channels_last)
    return facts, lambda images: embed(student, torch.from_numpy(images), device, PRECISION)


def load_student(path, model=None, input_size=None, imagenet_classes=None):
    """(Student in evaluation mode on the CPU, facts of a Network, the checkpoint's content).

    model, input_size, imagenet_classes: as load_network has them. Raises InputError.
    """
    content = read_checkpoint(path)
    options = trained_with(content)
    model = model or _of_kind(options, "model", str, "convnextv2_tiny")
    imagenet_classes = imagenet_classes or _of_kind(options, "imagenet_classes", int, 1000)
    size = fitting_size(model, input_size or _of_kind(options, "input_size", int, None))
    student = student_of(model, _seen_classes(content["state_dict"], path), imagenet_classes)
    load_published(student, content["state_dict"], path)
    facts = {
        "checkpoint": str(path), "sha256": sha256_of(path), "model": model, "imagenet_classes": imagenet_classes,
        "input_size": size, "width": student.width,
    }  # fmt: skip
    return student.eval(), facts, content


def share_cores(threads):
    """See photo_search.encoder: PyTorch takes all cores in each thread."""
    torch.set_num_threads(max(1, available_cores() // threads))


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
