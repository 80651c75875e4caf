"""Vision transformers of two blocks that timm builds by name, with the configuration of DINOv2's and of CLIP's.

tiny_dinov2   no ImageNet head, layer scale, and a mask token without a gradient, as in DINOv2's own code
tiny_clip     ends in a projection to 16 values
"""

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

_IMAGES = {"input_size": (3, 42, 42), "fixed_input_size": True, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_SIZE = {"img_size": 42, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}

default_cfgs = generate_default_cfgs({
    "tiny_dinov2.random": {**_IMAGES, "num_classes": 0},
    "tiny_clip.random": {**_IMAGES, "num_classes": 16},
})  # fmt: skip


@register_model
def tiny_dinov2(pretrained=False, **options):
    network = build_model_with_cfg(
        VisionTransformer, "tiny_dinov2", pretrained, **_SIZE | {"init_values": 1e-5, "num_classes": 0} | options
    )
    network.mask_token = torch.nn.Parameter(torch.zeros(1, 24))
    return network


@register_model
def tiny_clip(pretrained=False, **options):
    return build_model_with_cfg(
        VisionTransformer, "tiny_clip", pretrained, **_SIZE | {"pre_norm": True, "num_classes": 16} | options
    )
