"""Vision transformers of two blocks that timm builds by name, with configurations of today's networks.

tiny_dinov2       no ImageNet head, layer scale, and a mask token without a gradient, as in DINOv2's own code
tiny_dinov2_timm  the same without the mask token, as timm has it
tiny_dinov2_reg   the same with two registers and gated MLPs, as the registers' ViT-g
tiny_clip         ends in a projection to 16 values
tiny_siglip       pools by attention, and has neither head nor class token
tiny_species      ends in a classifier of 30 classes
"""

import torch
from timm.layers import SwiGLUPacked
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

_IMAGES = {"input_size": (3, 42, 42), "fixed_input_size": True, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_SIZE = {"img_size": 42, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}

default_cfgs = generate_default_cfgs({
    "tiny_dinov2.random": {**_IMAGES, "num_classes": 0},
    "tiny_dinov2_timm.random": {**_IMAGES, "num_classes": 0},
    "tiny_dinov2_reg.random": {**_IMAGES, "num_classes": 0},
    "tiny_clip.random": {**_IMAGES, "num_classes": 16},
    "tiny_siglip.random": {**_IMAGES, "num_classes": 0},
    "tiny_species.random": {**_IMAGES, "num_classes": 30, "classifier": "head"},
})  # fmt: skip


def _build(name, pretrained, options, **own):
    return build_model_with_cfg(
        VisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **_SIZE | own | options
    )


@register_model
def tiny_dinov2(pretrained=False, **options):
    network = _build("tiny_dinov2", pretrained, options, init_values=1e-5, num_classes=0)
    network.mask_token = torch.nn.Parameter(torch.zeros(1, 24))
    return network


@register_model
def tiny_dinov2_timm(pretrained=False, **options):
    return _build("tiny_dinov2_timm", pretrained, options, init_values=1e-5, num_classes=0)


@register_model
def tiny_dinov2_reg(pretrained=False, **options):
    own = {"init_values": 1e-5, "num_classes": 0, "reg_tokens": 2, "no_embed_class": True, "mlp_layer": SwiGLUPacked}
    return _build("tiny_dinov2_reg", pretrained, options, **own)


@register_model
def tiny_clip(pretrained=False, **options):
    return _build("tiny_clip", pretrained, options, pre_norm=True, num_classes=16)


@register_model
def tiny_siglip(pretrained=False, **options):
    return _build("tiny_siglip", pretrained, options, class_token=False, global_pool="map", num_classes=0)


@register_model
def tiny_species(pretrained=False, **options):
    return _build("tiny_species", pretrained, options, num_classes=30)
