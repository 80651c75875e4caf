"""BatchNorm folded into the convolutions before it: the same features, up to rounding, in less time."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-5  # largest difference of a feature of length 1; rounding moves it by some 1e-7


def fold_batch_norms(student, embed):
    """A copy of `student` without the BatchNorms that follow a convolution; `student` itself where that is impossible.

    embed: a function of a student that returns the features of a few images. If those of the copy differ by more than
    TOLERANCE, a BatchNorm does not use the convolution that is listed before it, and the copy is not used.
    """
    is_compiled = "features" in vars(student)  # torch.compile folds them itself
    if is_compiled or not any(isinstance(module, nn.BatchNorm2d) for module in student.modules()):
        return student
    folded = copy.deepcopy(student)
    _fold(folded)
    # The weights are new tensors, in another layout.
    folded.to(memory_format=torch.channels_last)
    return folded if abs(embed(folded) - embed(student)).max() <= TOLERANCE else student


def _fold(module):
    """Fold the BatchNorms of a module, in place. One with an activation, as timm has them, leaves the activation."""
    last = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and isinstance(last, nn.Conv2d) and child.running_mean is not None:
            statistics = child.running_mean, child.running_var, child.eps, child.weight, child.bias
            last.weight, last.bias = fuse_conv_bn_weights(last.weight, last.bias, *statistics)
            setattr(module, name, getattr(child, "act", nn.Identity()))
        _fold(child)
        last = child
