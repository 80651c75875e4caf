"""Computes features of batches of images, in the fastest of the ways that give the same features up to rounding.

BatchNorms are folded into convolutions. On a CPU each core computes a few images alone, so that none waits for another
that is decoding, and by ONNX Runtime where that is installed, agrees with PyTorch and is not slower.
"""

import functools
import itertools
import time
from collections import deque

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from models.eval.batch_norm import TOLERANCE, fold_batch_norms
from models.export import feature_session
from models.networks import arithmetic, matmul_rules, normalise
from utils.distributed import log_rank0
from utils.process_pool import thread_pool

MIN_IMAGES = 2000  # from which ONNX Runtime is tried: export and check take a second, or that of a hundred images
# (Fewest, most) images that a core computes at a time, so that activations fit its cache.
ONNX_IMAGES = 1, 4
TORCH_IMAGES = 1, 8
SMALL_KERNEL_IMAGES = 16, 32  # by PyTorch, of networks for which `_has_small_kernels`


def embed(student, images, device, precision="fp32"):
    """L2-normalised features of images (n, 3, H, W) uint8: (n, D) float32 array.

    student: in evaluation mode and channels_last, as `extract` sets it; precision: see models.networks.arithmetic.
    """
    with torch.inference_mode(), arithmetic(precision, device):
        images = normalise(images.to(device, non_blocking=True), *student.statistics)
        features = student.features(images.contiguous(memory_format=torch.channels_last))
        return F.normalize(features.float(), dim=1).cpu().numpy()


class Inference:
    """Computes the features of a student's images; how it computes them is chosen with the first ones.

    student: in evaluation mode and channels_last; precision: see models.networks.arithmetic.
    waiting: seconds that the network has waited for images.
    """

    def __init__(self, student, device, precision="fp32"):
        self.student, self.device, self.precision = student, device, precision
        self.compute = None  # a function of a tensor of images
        self.sizes = None  # (fewest, most) images that it takes at a time; None for whole batches
        self.waiting = 0.0

    def features(self, batches, count=0):
        """Yield the features of each of `batches` (n, 3, H, W) uint8, in order: (n, D) float32 arrays.

        count: number of images in all.
        """
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            return
        if self.compute is None:
            self._choose(first, count)
        batches = self._timed(itertools.chain([first], batches), running := deque())
        if self.sizes is None:
            yield from map(self.compute, batches)
            return
        threads, cores, size = _shares(len(first), self.sizes)
        with matmul_rules(self.precision), thread_pool(threads, cores) as pool:
            for images in batches:
                running.append([pool.submit(self.compute, part) for part in images.split(size)])
                if len(running) > 1:  # cores go on with a batch while the next one is read
                    yield _joined(running.popleft())
            yield from map(_joined, running)

    def _timed(self, batches, running):
        """Yield from `batches`, and count the time as `waiting` if `running`, lists of futures, are done by then."""
        while True:
            start = time.perf_counter()
            images = next(batches, None)
            if images is None:
                return
            if all(future.done() for futures in running for future in futures):
                self.waiting += time.perf_counter() - start
            yield images

    def _choose(self, images, count):
        """Set `compute` and `sizes`. images: the first batch; count: number of images in all."""
        device, precision = self.device, self.precision
        network = fold_batch_norms(self.student, functools.partial(embed, images=images[:4], device=device))
        self.compute = functools.partial(embed, network, device=device, precision=precision)
        if torch.device(device).type != "cpu" or "features" in vars(self.student):  # as compile_features leaves it
            return
        self.sizes = SMALL_KERNEL_IMAGES if _has_small_kernels(self.student) else TORCH_IMAGES
        if count < MIN_IMAGES or precision == "bf16":
            return
        with thread_pool(1) as pool:
            onnx = pool.submit(_onnx_function, self.student, self.compute, images[: self.sizes[1]]).result()
        if onnx:
            self.compute, self.sizes = onnx, ONNX_IMAGES
            with tqdm.external_write_mode():
                _log_once(f"features: by ONNX Runtime, whose values differ from PyTorch's by less than {TOLERANCE:.0e}")


def _shares(batch, sizes):
    """(threads, cores of each, images of each) that compute a batch; no more than the batch at a time."""
    cores, (fewest, most) = torch.get_num_threads(), sizes
    size = max(fewest, min(most, batch // cores))
    threads = max(1, min(cores, batch // size))
    return threads, cores // threads, size


def _joined(futures):
    return np.concatenate([future.result() for future in futures])


def _has_small_kernels(student):
    """Whether a student has convolutions that PyTorch computes without oneDNN for fewer than 16 images on one thread.

    That takes twice as long.
    """
    return any(
        isinstance(layer, nn.Conv2d) and layer.groups == 1 and max(layer.kernel_size) <= 3 and max(layer.stride) == 1
        for layer in student.modules()
    )


def _onnx_function(student, compute, images):
    """A function of images that computes features by ONNX Runtime on the calling thread; None where PyTorch's is taken.

    compute: that of PyTorch, which is taken if ONNX Runtime is not installed or does not know an operator, if features
    of `images` differ by more than TOLERANCE, or if ONNX Runtime takes 1.2 times as long.
    """
    try:
        session = feature_session(student, images[:2])

        def by_onnx(images):
            return session.run(["features"], {"images": np.ascontiguousarray(images.numpy())})[0]

        onnx_rows, onnx_seconds = _measured(by_onnx, images, ONNX_IMAGES[1])
    except Exception:  # of torch.onnx and ONNX Runtime, which have many
        return None
    rows, seconds = _measured(compute, images, len(images))
    return by_onnx if np.abs(rows - onnx_rows).max() <= TOLERANCE and onnx_seconds <= 1.2 * seconds else None


def _measured(function, images, size):
    """(features of images, CPU seconds of this thread that their second computation took)."""
    for _ in range(2):
        start = time.thread_time()
        rows = np.concatenate([function(part) for part in images.split(size)])
        seconds = time.thread_time() - start
    return rows, seconds


_log_once = functools.cache(log_rank0)
