"""How much memory features of images need at least, so that a run that cannot fit ends before it begins."""

import functools

import torch

from models.networks import on_meta


def least_memory(student, size, images, training=False, bytes_a_value=4):
    """Bytes that features of images (images, 3, size, size) need at least on the CPU, beside the weights.

    In training, that is what the backward pass needs of the inputs of layers whose weights are trained; else the input
    and the output of the largest layer. 0 where that cannot be found.
    """
    inputs, largest = [0], [0]
    network = on_meta(student).eval()

    def count(own, module, given, result):
        values = sum(value.numel() for value in given if isinstance(value, torch.Tensor))
        inputs[0] += values * any(value.requires_grad for value in own.parameters())
        largest[0] = max(largest[0], values + (result.numel() if isinstance(result, torch.Tensor) else 0))

    for own, module in zip(student.modules(), network.modules(), strict=True):
        if next(module.children(), None) is None:
            module.register_forward_hook(functools.partial(count, own))
    try:
        with torch.inference_mode():
            network.features(torch.empty(1, 3, size, size, device="meta"))
    except Exception:  # a backbone of timm that does not run without values
        return 0
    return images * bytes_a_value * max(largest[0], inputs[0] if training else 0)


def inference_memory(student, size, images):
    """Bytes that a batch (images, 3, size, size) uint8 needs at least, where a network takes one by one."""
    return least_memory(student, size, 1) + 3 * images * size**2
