"""Student and teacher networks of SBKA (arXiv:2312.10320) on any image network of timm; precision of arithmetic.

Uses no data and no options. models.weights translates between timm's and the published names of parameters.
"""

import copy
import difflib
import functools
import logging
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
    imagenet_logits: torch.Tensor  # g (B, ImageNet classes), aligned with the teacher's; (B, 0) without ImageNet head
    features: torch.Tensor  # f (B, D), what retrieval compares


class TeacherOutput(NamedTuple):
    imagenet_logits: torch.Tensor  # g (B, ImageNet classes)
    features: torch.Tensor  # f (B, D), without a gradient: the backbone is frozen


class Student(nn.Module):
    """The network used for retrieval: a backbone with its ImageNet head, and a linear classifier of the seen classes.

    Features f are the pooled output of the backbone if its last layer is a LayerNorm or the like, as in ConvNeXt V2.
    For other backbones a LayerNorm without parameters follows; their ImageNet head gets the pooled output without it.
    The pooled output of an image-text model, such as CLIP, is its projection.
    Raises ValueError for a backbone whose head is not one linear layer of pooled features.
    """

    def __init__(self, backbone, seen_classes):
        super().__init__()
        width, ends_normalised = _pooled_output(backbone)
        self.needs_norm = not ends_normalised
        self.backbone, self.has_head = backbone, has_imagenet_head(backbone)
        self.added_head = None  # see models.teacher_head, for a backbone without ImageNet head
        self.cosine_scale = 0.0  # above 0: seen-class logits are cosines times this scale, plus the bias
        self.linear = nn.Linear(width, seen_classes)
        nn.init.trunc_normal_(self.linear.weight, std=2e-5)
        nn.init.zeros_(self.linear.bias)
        self.train()

    @property
    def head(self):
        """The ImageNet classifier, a module of pooled features; None if there is none."""
        return self.backbone.get_classifier() if self.has_head else self.added_head

    @property
    def width(self):
        """D, the width of a feature."""
        return self.linear.in_features

    @property
    def statistics(self):
        """(mean, standard deviation) of the images that the backbone was pretrained on; see `normalise`."""
        return _pretrained_cfg(self.backbone, "mean", IMAGENET_MEAN), _pretrained_cfg(
            self.backbone, "std", IMAGENET_STD
        )

    def train(self, mode=True):
        """As nn.Module.train, but BatchNorm always uses its pretrained running statistics.

        Training and evaluation then compute the same function, independent of the size of micro-batches.
        """
        super().train(mode)
        for layer in self.modules():
            if getattr(layer, "running_mean", None) is not None:
                layer.eval()
        return self

    def features(self, images):
        """f (B, D): pooled, normalised features of normalised images (B, 3, H, W)."""
        return _features(_pool(self.backbone, images, self.has_head), self.needs_norm)

    def compile_features(self):
        """Compile `features` with torch.compile, which changes them by rounding at most."""
        self.features = torch.compile(self.features)

    def forward(self, images):
        pooled = _pool(self.backbone, images, self.has_head)
        features = _features(pooled, self.needs_norm)
        imagenet_logits = self.head(pooled) if self.head is not None else pooled[:, :0]
        return StudentOutput(
            seen_logits=self._seen_logits(features), imagenet_logits=imagenet_logits, features=features
        )

    def _seen_logits(self, features):
        if not self.cosine_scale:
            return self.linear(features)
        weight = F.normalize(self.linear.weight, dim=1) * self.cosine_scale
        return F.linear(F.normalize(features, dim=1), weight, self.linear.bias)


class Teacher(nn.Module):
    """The network that the student is aligned with, in training only: its backbone is frozen, its head is trained.

    added_head: the ImageNet head of a backbone that has none, see models.teacher_head; needs_norm: that of a Student of
    the same backbone, where it is known, since finding it takes a while.
    """

    def __init__(self, backbone, added_head=None, needs_norm=None):
        super().__init__()
        self.needs_norm = not _pooled_output(backbone)[1] if needs_norm is None else needs_norm
        self.backbone, self.has_head = backbone.requires_grad_(False), has_imagenet_head(backbone)
        self.added_head = added_head
        self.head.requires_grad_(True)
        self.train()

    @property
    def head(self):
        return self.backbone.get_classifier() if self.has_head else self.added_head

    def train(self, mode=True):
        """Ignores `mode`: the frozen backbone is always in evaluation mode, and the head is the same in both."""
        return super().train(False)

    def forward(self, images):
        with torch.no_grad():
            pooled = _pool(self.backbone, images, self.has_head)
            features = _features(pooled, self.needs_norm)
        return TeacherOutput(imagenet_logits=self.head(pooled), features=features)


def normalise(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """(B, 3, H, W) uint8 to float32, normalised with a network's mean and standard deviation, on the same device."""
    mean, std = _channels(mean, images.device), _channels(std, images.device)
    return (images / 255 - mean) / std


@functools.cache  # a new tensor for every batch would be a synchronous copy to the device
def _channels(values, device):
    return torch.tensor(values, device=device).view(3, 1, 1)


def prepare_models(student, teacher, device, grad_checkpointing=False, compiled=False, precision="fp32"):
    """Move both networks, or the student if `teacher` is None, to `device` in channels-last format, for training.

    grad_checkpointing: recompute the student's activations in the backward pass instead of storing them; compiled:
    torch.compile both networks. Neither changes what they compute, but for rounding. precision: of the training, see
    `arithmetic`.
    Raises ValueError if timm's backbone does not support gradient checkpointing.
    """
    for network in (student, teacher) if teacher else (student,):
        network.to(device, memory_format=torch.channels_last)
        if precision == "bf16" and torch.device(device).type == "cpu":
            _keep_depthwise_in_float32(network)
        if compiled:
            network.compile()
    if grad_checkpointing:
        try:
            student.backbone.set_grad_checkpointing()
        except (AssertionError, AttributeError):
            raise ValueError("this model does not support gradient checkpointing") from None


def _keep_depthwise_in_float32(network):
    """Compute depthwise convolutions of stride 2, or wider than 3, in float32 where the network runs in bfloat16.

    Their backward passes in bfloat16 take ten times as long on a CPU.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1 and (max(layer.stride) > 1 or max(layer.kernel_size) > 3):
            layer.forward = functools.partial(_in_float32, layer.forward)


def _in_float32(forward, images):
    with torch.autocast("cpu", enabled=False):
        return forward(images.float())


@contextmanager
def matmul_rules(precision):
    """Set whether CUDA may use TF32 for float32 convolutions and matrix products, and restore the flags at the end.

    The flags are those of the process: they also apply to backward passes and other threads.
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
    """Context for forward passes on `device` in one of PRECISIONS: TF32 flags, and autocast for bf16."""
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
    with matmul_rules(precision), autocast:
        yield


class TimmInfo(NamedTuple):
    """What timm records of a model, read without building it."""

    imagenet_classes: int  # outputs of its pretrained ImageNet head; 0 if it has none
    input_size: int | None  # side of its images in pixels if that is fixed, else None


def timm_info(model):
    """TimmInfo of timm's `model`. Raises ValueError if timm has no model of that name."""
    import timm  # takes seconds to import, and tests of stored features need no network

    if not timm.is_model(model):
        similar = difflib.get_close_matches(model, timm.list_models(), 3)
        raise ValueError(f"timm knows no {model!r}" + (f"; there is {', '.join(similar)}" if similar else ""))
    try:
        config = timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # no pretrained weights of that name
        raise ValueError(str(error)) from None
    classes = 0 if _is_projection(config.to_dict()) else config.num_classes
    return TimmInfo(classes, config.input_size[-1] if config.fixed_input_size else None)


def _is_projection(config):
    """Whether the last layer of a network projects to a space shared with texts, as CLIP's does, and is no classifier.

    config: timm's record of the network, a dict. timm's own classifiers have ImageNet's 1,000 classes or more than
    10,000, its projections 384 to 1,280 values, and networks without either have 0 outputs. A network that other code
    registers in timm can have a classifier of any size, which its record names as "classifier".
    """
    outputs = config.get("num_classes", 1000)
    return 0 < outputs < 10_000 and outputs != 1000 and not (config.get("classifier") and _is_registered(config))


def _is_registered(config):
    """Whether other code than timm registered the network of a record."""
    import timm

    model = config.get("architecture")
    return timm.is_model(model) and not timm.model_entrypoint(model).__module__.startswith("timm.")


def projections_of(model, width):
    """timm's names of weights of the architecture of `model` that end in a projection to `width` values."""
    import timm

    names = timm.list_models(f"{model.partition('.')[0]}.*", pretrained=True)
    configs = ((name, timm.get_pretrained_cfg(name).to_dict()) for name in names)
    return [name for name, config in configs if config["num_classes"] == width and _is_projection(config)]


class DownloadError(Exception):
    """timm could not load the weights that it publishes; `__cause__` is the reason."""


def pretrained_tag(model):
    """timm's full name of the weights that it publishes for `model`, such as "convnextv2_tiny.fcmae_ft_in1k".

    Where `model` has no tag, those of ConvNeXt V2 are the ones that its authors fine-tuned on ImageNet-1K alone; of
    other models timm's default. Raises ValueError if timm publishes none.
    """
    import timm

    if model.startswith("convnextv2_") and timm.models.is_model_pretrained(f"{model}.fcmae_ft_in1k"):
        return f"{model}.fcmae_ft_in1k"
    config = timm.get_pretrained_cfg(model)
    if not config.has_weights:
        raise ValueError("timm publishes no ImageNet weights of it; use --finetune FILE or none")
    return f"{config.architecture}.{config.tag}"


def create_backbone(model, imagenet_classes=1000, drop_path=0.0, pretrained=False):
    """Create timm's `model`; pretrained: with the weights that timm publishes, see pretrained_tag.

    imagenet_classes: outputs of its ImageNet head; without effect on a model that has none (DINOv2, SigLIP, CLIP, ...).
    Raises ValueError for a model that timm does not have, whose ImageNet head is not linear, or that does not support
    drop_path, or has no published weights; DownloadError if these can be neither fetched nor read.
    """
    import timm

    published = model.startswith("convnextv2_")
    if pretrained:
        timm_info(model)  # raises ValueError
        model = pretrained_tag(model)
    classes = timm_info(model).imagenet_classes
    if pretrained and classes not in (0, imagenet_classes):
        raise ValueError(f"the head of {model} has {classes} classes; set --imagenet_classes {classes}")
    options = {"num_classes": imagenet_classes} if classes else {}
    if drop_path:
        options["drop_path_rate"] = drop_path
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # DownloadError says what its warnings say
    try:
        backbone = timm.create_model(model, pretrained=pretrained, **options)
    except TypeError:
        if drop_path:
            raise ValueError(f"{model} takes no --drop_path") from None
        raise
    except Exception as error:
        if pretrained:
            raise DownloadError from error
        raise
    if classes and not isinstance(backbone.get_classifier(), nn.Linear):
        raise ValueError(f"the ImageNet head of {model} is not a linear layer")
    if published and not pretrained:
        # timm initialises all sizes with standard deviation 0.02, too small for the narrow ones to train from scratch.
        for layer in backbone.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    return backbone


def has_imagenet_head(backbone):
    """Whether a backbone ends in an ImageNet classifier: not in pooled features (DINOv2) nor in a projection (CLIP).

    create_backbone leaves the latter as timm has them.
    """
    return backbone.num_classes > 0 and not _is_projection(getattr(backbone, "pretrained_cfg", {}))


def _pool(backbone, images, has_head):
    """(B, D): the input of the backbone's ImageNet head; the output of a backbone without one."""
    return backbone.forward_head(backbone.forward_features(images), pre_logits=has_head)


def _features(pooled, needs_norm):
    return F.layer_norm(pooled, (int(pooled.shape[1]),)) if needs_norm else pooled  # int(): torch.onnx wants a constant


def _pretrained_cfg(backbone, name, default):
    """A value of a backbone's pretrained_cfg, as a tuple; `default` for one that timm.create_model did not build."""
    return tuple(getattr(backbone, "pretrained_cfg", {}).get(name, default))


def set_input_size(backbone, size):
    """Let a backbone of a fixed input size take images of `size` × `size` pixels; None: its own size.

    timm interpolates its position embeddings, parameters that then have another shape. Raises ValueError if it cannot.
    """
    config = getattr(backbone, "pretrained_cfg", {})
    if size is None or not config.get("fixed_input_size") or size == (own := config["input_size"][-1]):
        return
    if not hasattr(backbone, "set_input_size"):
        raise ValueError(f"takes images of {own} pixels only")
    backbone.set_input_size(img_size=(size, size))
    backbone.pretrained_cfg = config | {"input_size": (3, size, size)}


def takes_size(backbone, size):
    """Whether a backbone accepts images of `size` × `size` pixels."""
    try:
        on_meta(backbone).eval()(torch.empty(1, 3, size, size, device="meta"))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def _pooled_output(backbone):
    """(D, whether a LayerNorm or the like comes last, whatever pools its output) of the pooled features of a backbone.

    Raises ValueError unless its ImageNet head, if it has one, is the last layer of all and takes what `_pool` gives.
    """
    backbone = on_meta(backbone).eval()
    calls, head = [], backbone.get_classifier() if has_imagenet_head(backbone) else None
    for layer in backbone.modules():
        if not any(layer.children()) and not isinstance(layer, nn.Identity | nn.Dropout | nn.Flatten):
            layer.register_forward_hook(lambda layer, given, _: calls.append((layer, given[0].shape)))
    output = backbone(torch.empty(1, *_pretrained_cfg(backbone, "input_size", (3, 224, 224)), device="meta"))
    if head is not None and calls.pop() != (head, (1, head.in_features)):
        raise ValueError("its ImageNet head does not come last, after pooling")
    if output.ndim != 2:
        raise ValueError("it does not pool its output to one feature an image")
    kinds = [type(layer).__name__.lower() for layer, _ in calls]
    last = next(kind for kind in reversed(kinds) if "pool" not in kind)
    normalised = any(norm in last for norm in ("layernorm", "groupnorm", "rmsnorm"))
    return output.shape[1] if head is None else head.in_features, normalised


def on_meta(module):
    """A copy of a module on the meta device: it can be called to get shapes, and computes no values."""
    shapes = {id(value): nn.Parameter(value.to("meta"), requires_grad=False) for value in module.parameters()}
    shapes |= {id(value): value.to("meta") for value in module.buffers()}
    return copy.deepcopy(module, shapes)
