"""A ConvNeXt V2 of 3,000 parameters that timm builds by name."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt

NAME, WIDTH = "convnextv2_for_tests", 8

_IMAGES = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HEAD = {"num_classes": 1000, "classifier": "head.fc", "first_conv": "stem.0"}
default_cfgs = generate_default_cfgs({f"{NAME}.random": _IMAGES | _HEAD})


@register_model
def convnextv2_for_tests(pretrained=False, **options):
    shape = {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, WIDTH), "use_grn": True, "ls_init_value": None}
    return build_model_with_cfg(ConvNeXt, NAME, pretrained, **shape | options)
