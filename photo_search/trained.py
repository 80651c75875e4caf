"""Checkpoints as they were trained, computed by PyTorch."""

import torch

from models.checkpoints import load_student
from models.eval.features import embed
from models.options import check_device
from utils.distributed import local_device
from utils.files import sha256_of
from utils.process_pool import available_cores

PRECISION = "tf32"  # as test scripts have it


def read_metadata(path):
    """What a checkpoint tells without being read: {"sha256"}. Raises OSError."""
    return {"sha256": sha256_of(path)}


def load(path, model, input_size, imagenet_classes, device):
    """(metadata, compute) of a photo_search.encoder.Network; see load_encoder there."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device("--device", device)
    device = local_device(device)
    student, metadata, _ = load_student(path, model, input_size, imagenet_classes)
    del metadata["seen_classes"]  # no part of an index
    student.to(device).to(memory_format=torch.channels_last)
    return metadata, lambda images: embed(student, torch.from_numpy(images), device, PRECISION)


def share_cores(threads):
    """See photo_search.encoder: PyTorch takes all cores in each thread."""
    torch.set_num_threads(max(1, available_cores() // threads))
