"""Which parameters of a student's backbone are trained: --tune, --freeze, and those that have a gradient at all.

The groups of layers are those of timm's layer-wise learning rates: the stem, the first stage or block, ... The linear
classifier of the seen classes and the ImageNet head are always trained.
"""

import itertools
import re

import torch

from models.networks import has_imagenet_head, on_meta


def tune_layers(backbone, tune):
    """Freeze what `tune` leaves out: "all" nothing, "norm" all but normalisation layers, "last:N" all before the last
    N groups of layers.

    What is frozen stays so. Raises ValueError if there are no such layers, or timm does not group the layers of this
    model.
    """
    if tune == "norm":
        _train_norms(backbone)
    elif tune != "all":
        count, groups = int(tune.removeprefix("last:")), _groups(backbone)
        # timm's last groups can be no more than a norm, the classifier, or what is in no layer.
        frozen = {name for name, value in backbone.named_parameters() if not value.requires_grad}
        ends = frozen | _normalisation(backbone) | _classifier(backbone)
        layers = sum(not set(group) <= ends for group in groups)
        if count > layers:
            raise ValueError(f"this model has {layers} groups of layers")
        _freeze(backbone, itertools.chain(*groups[: layers - count]))


def freeze_layers(backbone, count):
    """Freeze the parameters of the first `count` groups of layers of a backbone: the stem, the first stage, ...

    Raises ValueError if there are fewer before the head, or timm does not group the layers of this model.
    """
    if not count:
        return
    groups = _groups(backbone)
    if count >= len(groups):
        raise ValueError(f"this model has {len(groups) - 1} groups of layers before its head")
    _freeze(backbone, itertools.chain(*groups[:count]))


def freeze_unused(backbone, size):
    """Freeze parameters that have no gradient, such as a mask token: DistributedDataParallel would wait for them.

    size: side of the images. Nothing is computed, see models.networks.on_meta.
    """
    meta = on_meta(backbone).eval().requires_grad_(True)
    names, parameters = zip(*meta.named_parameters(), strict=True)
    output = meta(torch.empty(1, 3, size, size, device="meta"))
    try:
        gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    except RuntimeError:  # an operator without a backward pass on the meta device: not known, so all are trained
        return
    _freeze(backbone, [name for name, value in zip(names, gradients, strict=True) if value is None])


def check_tune(text):
    """`text` if tune_layers takes it. Raises ValueError."""
    if not re.fullmatch(r"all|norm|last:[1-9]\d{0,3}", text):
        raise ValueError(f"{text!r} is not all, norm or last:N with a whole number N from 1")
    return text


def _groups(backbone):
    """Names of the parameters of each group, from the stem on."""
    from timm.models import group_parameters

    try:
        groups = group_parameters(backbone, backbone.group_matcher(coarse=True))
    except AttributeError:
        raise ValueError("timm does not group the layers of this model") from None
    return [groups[number] for number in sorted(groups)]


def _freeze(backbone, names):
    for name in names:
        backbone.get_parameter(name).requires_grad_(False)


def _train_norms(backbone):
    norms = _normalisation(backbone)
    if not norms:
        raise ValueError("this model has no normalisation layers with parameters")
    kept = norms | (_classifier(backbone) if has_imagenet_head(backbone) else set())
    _freeze(backbone, [name for name, _ in backbone.named_parameters() if name not in kept])


def _normalisation(backbone):
    """Names of the parameters of normalisation layers."""
    return {
        f"{path}.{name}"
        for path, layer in backbone.named_modules()
        if "norm" in type(layer).__name__.lower()
        for name, _ in layer.named_parameters(recurse=False)
    }


def _classifier(backbone):
    """Names of the parameters of the last layer: the ImageNet head, or the projection of an image-text model."""
    last = {id(value) for value in backbone.get_classifier().parameters()}
    return {name for name, value in backbone.named_parameters() if id(value) in last}
