"""Student and teacher of SBKA (arXiv:2312.10320) on any image classifier of timm, ConvNeXt V2 as published among them
(weights.py translates its parameters' names). No data, no options."""

import copy
import difflib
import functools
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Whether CUDA may use TF32 in (convolutions, matrix products) of float32; elsewhere float32 is float32. "tf32" is
# PyTorch's own default. "bf16" runs the networks in bfloat16.
PRECISIONS = {"fp32": (False, False), "tf32": (True, False), "tf32_all": (True, True), "bf16": (True, False)}


class StudentOutput(NamedTuple):
    seen_logits: torch.Tensor  # y (B, seen classes)
    imagenet_logits: torch.Tensor  # g (B, ImageNet classes), aligned with the teacher's
    features: torch.Tensor  # f (B, width of the last stage), what retrieval compares


class Student(nn.Module):
    """The network that is kept: a backbone with its ImageNet head, and a linear classifier of the seen classes.

    Features are the backbone's pooled ones where it ends in a LayerNorm of some kind, as ConvNeXt V2 does. Those of
    other backbones are layer-normalised without parameters, but for the ImageNet head, which knows them as they are.
    Raises ValueError for a backbone whose head is not one linear layer of pooled features.
    """

    def __init__(self, backbone, seen_classes):
        super().__init__()
        self.normalises = not _ends_normalised(backbone)
        self.backbone = backbone
        self.linear = nn.Linear(self.head.in_features, seen_classes)
        nn.init.trunc_normal_(self.linear.weight, std=2e-5)
        nn.init.zeros_(self.linear.bias)
        self.train()

    @property
    def head(self):
        """The ImageNet classifier."""
        return self.backbone.get_classifier()

    @property
    def width(self):
        """D, the number of values of a feature."""
        return self.linear.in_features

    @property
    def statistics(self):
        """(mean, deviation) of the images that the backbone knows; see `normalise`."""
        return _known(self.backbone, "mean", IMAGENET_MEAN), _known(self.backbone, "std", IMAGENET_STD)

    def train(self, mode=True):
        """As nn.Module's, but BatchNorm keeps the statistics it was pretrained with.

        So training and evaluation compute one function, which does not depend on how a batch is shared out.
        """
        super().train(mode)
        for layer in self.modules():
            if getattr(layer, "running_mean", None) is not None:
                layer.eval()
        return self

    def features(self, images):
        """f (B, D): pooled, normalised features of normalised images (B, 3, H, W)."""
        return self._normed(_pooled(self.backbone, images))

    def compile_features(self):
        """Have torch.compile make `features` faster, which changes them by rounding at most."""
        self.features = torch.compile(self.features)

    def forward(self, images):
        pooled = _pooled(self.backbone, images)
        features = self._normed(pooled)
        return StudentOutput(seen_logits=self.linear(features), imagenet_logits=self.head(pooled), features=features)

    def _normed(self, pooled):
        return F.layer_norm(pooled, pooled.shape[1:]) if self.normalises else pooled


class Teacher(nn.Module):
    """The network that teaches and is taught in training: only its ImageNet head learns, the backbone is frozen."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.head.requires_grad_(True)
        self.train()

    @property
    def head(self):
        return self.backbone.get_classifier()

    def train(self, mode=True):
        """Does nothing: the backbone always computes as in evaluation, and the head knows no difference."""
        return super().train(False)

    def forward(self, images):
        """g (B, ImageNet classes), with gradients for the head alone."""
        with torch.no_grad():
            features = _pooled(self.backbone, images)
        return self.head(features)


def normalise(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Turn (B, 3, H, W) uint8 into float32, normalised with a network's mean and deviation, on the same device."""
    mean, std = _channels(mean, images.device), _channels(std, images.device)
    return (images / 255 - mean) / std


@functools.cache  # making these tensors for every batch would have the host wait for the device
def _channels(values, device):
    return torch.tensor(values, device=device).view(3, 1, 1)


def place(student, teacher, device, grad_checkpointing=False, compiled=False):
    """Move both networks to `device` and make them ready to train there; neither option changes what they compute.

    grad_checkpointing: compute the student's activations twice rather than keep them; compiled: torch.compile both.
    Raises ValueError if the backbone cannot compute them twice.
    """
    for network in (student, teacher):
        network.to(device, memory_format=torch.channels_last)
        if compiled:
            network.compile()
    if grad_checkpointing:
        try:
            student.backbone.set_grad_checkpointing()
        except (AssertionError, AttributeError):
            raise ValueError("this model cannot compute its activations twice") from None


@contextmanager
def matmul_rules(precision):
    """Whether CUDA computes float32 convolutions and matrix products in TF32, whatever the environment says.

    These switches hold for the backward passes and for all threads, too.
    """
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch, allowed in zip(switches, PRECISIONS[precision], strict=True):
        switch.allow_tf32 = allowed
    try:
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


@contextmanager
def arithmetic(precision, device):
    """Compute forward passes on `device` in one of PRECISIONS."""
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
    with matmul_rules(precision), autocast:
        yield


class Facts(NamedTuple):
    """What timm knows of a model before it is built."""

    imagenet_classes: int  # outputs of its pretrained head
    size: int | None  # side of the images that it takes, None for any


def facts_of(model):
    """Facts of timm's `model`. Raises ValueError where timm knows none of that name, or it has no ImageNet head."""
    import timm  # takes seconds, and stored features need no network

    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), 3)
        raise ValueError(f"timm knows no {model!r}" + (f"; there is {', '.join(near)}" if near else ""))
    try:
        known = timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # no pretrained weights of that name
        raise ValueError(str(error)) from None
    if not known.num_classes:
        raise ValueError(f"{model} has no ImageNet head to align")
    return Facts(known.num_classes, known.input_size[-1] if known.fixed_input_size else None)


def create_backbone(model, imagenet_classes=1000, drop_path=0.0, pretrained=False):
    """timm's `model`, any image classifier; `pretrained` fetches its ImageNet-1K weights from timm's hub.

    Raises ValueError for a model that timm does not know, that has no ImageNet head, or with options it does not take,
    and what timm raises where the hub cannot be reached.
    """
    import timm

    published = model.startswith("convnextv2_")
    if pretrained and published and "." not in model:
        # The names of timm's hub: masked autoencoding, then fine-tuned on ImageNet-1K, as the published weights are.
        model = f"{model}.fcmae_ft_in1k"
    classes = facts_of(model).imagenet_classes
    if pretrained and classes != imagenet_classes:
        raise ValueError(f"the head of {model} has {classes} classes; set --imagenet_classes {classes}")
    more = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        backbone = timm.create_model(model, pretrained=pretrained, num_classes=imagenet_classes, **more)
    except TypeError:
        if drop_path:
            raise ValueError(f"{model} takes no --drop_path") from None
        raise
    if not isinstance(backbone.get_classifier(), nn.Linear):
        raise ValueError(f"the ImageNet head of {model} is not a linear layer")
    if published and not pretrained:
        # timm starts every size at deviation 0.02, so flat for the narrow ones that a random start hardly learns.
        for layer in backbone.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    return backbone


def _pooled(backbone, images):
    return backbone.forward_head(backbone.forward_features(images), pre_logits=True)


def _known(backbone, name, default):
    """What timm has on record of a backbone; one that was built by hand has no record."""
    return tuple(getattr(backbone, "pretrained_cfg", {}).get(name, default))


def takes_size(backbone, size):
    """Whether a backbone takes images of `size` pixels a side."""
    try:
        _without_values(backbone).eval()(torch.empty(1, 3, size, size, device="meta"))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def _ends_normalised(backbone):
    """Whether the last layer before a backbone's head is a LayerNorm or the like, whatever pools its output.

    Raises ValueError unless the head is the last layer of all, and takes what `_pooled` gives.
    """
    backbone = _without_values(backbone).eval()
    called, head = [], backbone.get_classifier()
    for layer in backbone.modules():
        if not any(layer.children()) and not isinstance(layer, nn.Identity | nn.Dropout | nn.Flatten):
            layer.register_forward_hook(lambda layer, given, _: called.append((layer, given[0].shape)))
    backbone(torch.empty(1, *_known(backbone, "input_size", (3, 224, 224)), device="meta"))
    if called[-1] != (head, (1, head.in_features)):
        raise ValueError("its ImageNet head does not come last, after pooling")
    kinds = [type(layer).__name__.lower() for layer, _ in called[:-1]]
    last = next(kind for kind in reversed(kinds) if "pool" not in kind)
    return any(norm in last for norm in ("layernorm", "groupnorm", "rmsnorm"))


def _without_values(module):
    """A copy of a module that holds shapes alone, on the meta device: it can be called, and computes nothing."""
    shapes = {id(value): nn.Parameter(value.to("meta"), requires_grad=False) for value in module.parameters()}
    shapes |= {id(value): value.to("meta") for value in module.buffers()}
    return copy.deepcopy(module, shapes)
