"""Student and teacher of SBKA (arXiv:2312.10320) on timm's ConvNeXt V2, which computes the published network's
function under other parameter names (weights.py translates). Stands alone: no data, no options."""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

# Whether CUDA may use TF32 in (convolutions, matrix products) of float32; elsewhere float32 is float32. "tf32" is
# PyTorch's own default. "bf16" runs the networks in bfloat16.
PRECISIONS = {"fp32": (False, False), "tf32": (True, False), "tf32_all": (True, True), "bf16": (True, False)}


class StudentOutput(NamedTuple):
    seen_logits: torch.Tensor  # y (B, seen classes)
    imagenet_logits: torch.Tensor  # g (B, ImageNet classes), aligned with the teacher's
    features: torch.Tensor  # f (B, width of the last stage), what retrieval compares


class Student(nn.Module):
    """The network that is kept: a backbone with its ImageNet head, and a linear classifier of the seen classes."""

    def __init__(self, backbone, seen_classes):
        super().__init__()
        self.backbone = backbone
        self.linear = nn.Linear(backbone.num_features, seen_classes)
        nn.init.trunc_normal_(self.linear.weight, std=2e-5)
        nn.init.zeros_(self.linear.bias)

    @property
    def width(self):
        """D, the number of values of a feature."""
        return self.linear.in_features

    def features(self, images):
        """f (B, D): global average pool and LayerNorm of normalised images (B, 3, H, W)."""
        return _features(self.backbone, images)

    def forward(self, images):
        features = self.features(images)
        return StudentOutput(
            seen_logits=self.linear(features), imagenet_logits=self.backbone.head.fc(features), features=features
        )


class Teacher(nn.Module):
    """The network that teaches and is taught in training: only its ImageNet head learns, the backbone is frozen."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.head.requires_grad_(True)

    @property
    def head(self):
        return self.backbone.head.fc

    def forward(self, images):
        """g (B, ImageNet classes), with gradients for the head alone."""
        with torch.no_grad():
            features = _features(self.backbone, images)
        return self.head(features)


def place(student, teacher, device, grad_checkpointing=False, compiled=False):
    """Move both networks to `device` and make them ready to train there; neither option changes what they compute.

    grad_checkpointing: compute the student's activations twice rather than keep them; compiled: torch.compile both.
    """
    for network in (student, teacher):
        network.to(device, memory_format=torch.channels_last)
        if compiled:
            network.compile()
    if grad_checkpointing:
        student.backbone.set_grad_checkpointing()


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


def create_backbone(model, imagenet_classes=1000, drop_path=0.0, pretrained=False):
    """timm's `model` (any convnextv2_*); `pretrained` fetches its ImageNet-1K weights from timm's hub.

    Raises ValueError for another kind of model, and what timm raises where the hub cannot be reached.
    """
    import timm  # takes seconds, and stored features need no network

    sizes = timm.list_models("convnextv2_*")
    if model not in sizes:
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(sizes)}")
    # The names of timm's hub: masked autoencoding, then fine-tuned on ImageNet-1K, as the published weights are.
    name = f"{model}.fcmae_ft_in1k" if pretrained else model
    backbone = timm.create_model(name, pretrained=pretrained, num_classes=imagenet_classes, drop_path_rate=drop_path)
    if not pretrained:
        # timm starts every size at deviation 0.02, so flat for the narrow ones that a random start hardly learns.
        for layer in backbone.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    return backbone


def _features(backbone, images):
    return backbone.forward_head(backbone.forward_features(images), pre_logits=True)
