"""Weights by their published names, as they are on disk, and by timm's, as they are in memory.

    pretrained_model/convnextv2_*_1k_224_ema.pt     {'model': state dict}, as ConvNeXt V2's makers publish it

Checkpoints (models.checkpoints) hold the same names.
"""

import os
import re

from datasets.errors import InputError
from models.networks import Student, Teacher, create_backbone
from models.torchfiles import gist, is_plain_tensor, read_torch

_TO_PUBLISHED = [  # timm's name of a parameter, published name
    (r"^backbone\.", ""),
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc1\.", ".pwconv1."),
    (r"\.mlp\.fc2\.", ".pwconv2."),
    (r"\.mlp\.grn\.weight$", ".grn.gamma"),
    (r"\.mlp\.grn\.bias$", ".grn.beta"),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
]

_POINTWISE = re.compile(r"\.pwconv[12]\.weight$")

_STEM_WIDTHS = {40: "atto", 48: "femto", 64: "pico", 80: "nano", 96: "tiny", 128: "base", 192: "large", 352: "huge"}


def published_name(name):
    """Published name of a parameter of a backbone, Student or Teacher."""
    for pattern, replacement in _TO_PUBLISHED:
        name = re.sub(pattern, replacement, name)
    return name


def published_state(module):
    """State dict of a backbone, Student or Teacher as it is published.

    GRN parameters are (1, 1, 1, 4C), and pwconv1 and pwconv2 are linear layers, (4C, C) and (C, 4C), in every size;
    timm builds atto to nano with 1×1 convolutions instead.
    """
    state = {}
    for name, value in module.state_dict().items():
        name = published_name(name)
        if ".grn." in name:
            value = value.reshape(1, 1, 1, -1)
        elif _POINTWISE.search(name):
            value = value.flatten(1)
        state[name] = value
    return state


def load_published(module, state, source):
    """Copy a published state dict into a backbone, Student or Teacher; `module.` prefixes are understood.

    Strict: raises InputError naming `source` and the first parameter that is missing, unknown, no tensor or of another
    shape; the module is then untouched.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{source}: expected a state dict, parameters by name")
    state = {re.sub(r"^(module\.)+", "", name): value for name, value in state.items()}
    if "stem.0.weight" in state:
        raise InputError(f"{source}: has timm's parameter names; give the published file, or --finetune timm")
    expected = published_state(module)
    for name, value in expected.items():
        found = state.get(name, value)
        if not is_plain_tensor(found):
            raise InputError(f"{source}: {name} is no ordinary tensor; fetch the file again")
        as_convolution = _POINTWISE.search(name) and found.shape == (*value.shape, 1, 1)  # earlier versions wrote these
        if found.shape != value.shape and not as_convolution:
            raise InputError(f"{source}: {_other_shape(name, tuple(found.shape), tuple(value.shape))}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise InputError(f"{source}: holds another network, with {unknown[0]} and {len(unknown) - 1} more; see --model")
    if missing := sorted(expected.keys() - state.keys()):
        raise InputError(
            f"{source}: holds another network, without {missing[0]} and {len(missing) - 1} more; see --model"
        )
    own = module.state_dict()
    module.load_state_dict({name: state[published_name(name)].reshape(value.shape) for name, value in own.items()})


def create_pair(model, classes, finetune, imagenet_classes=1000, drop_path=0.0):
    """Student of `classes` seen classes and Teacher, both starting from the same weights.

    finetune: a published file, "timm" (the same weights from timm's hub), or "none" (random).
    Raises InputError if the model or the weights cannot be had.
    """
    backbone = backbone_of(model, imagenet_classes, drop_path, pretrained=finetune == "timm")
    if finetune not in ("timm", "none"):
        if not os.path.isfile(finetune):
            raise InputError(
                f"{finetune}: no pretrained weights; see pretrained_model/README.md, or use --finetune timm or none"
            )
        content = read_torch(finetune)
        state = content.get("model", content) if isinstance(content, dict) else None
        load_published(backbone, state, finetune)
    frozen = backbone_of(model, imagenet_classes)
    frozen.load_state_dict(backbone.state_dict())
    return Student(backbone, classes), Teacher(frozen)


def backbone_of(model, imagenet_classes, drop_path=0.0, pretrained=False):
    """`create_backbone` of a user's --model. Raises InputError if it cannot be had."""
    try:
        return create_backbone(model, imagenet_classes, drop_path, pretrained)
    except ValueError as error:
        raise InputError(f"--model: {error}") from None
    except Exception as error:
        if not pretrained:
            raise
        reason = f"{model} could not be fetched ({gist(error)})"
        raise InputError(f"--finetune timm: {reason}; give a downloaded file instead") from error


def _other_shape(name, found, expected):
    """Why a parameter is not of the expected shape, and the way out."""
    if found and name.startswith("linear.") and found[1:] == expected[1:]:
        return (
            f"trained on {found[0]} seen classes, but cname_cid.txt lists {expected[0]}: "
            "they belong to different splits; see --zero_version"
        )
    if found and name.startswith("head.") and found[1:] == expected[1:]:
        return f"its head has {found[0]} classes, not {expected[0]}; set --imagenet_classes {found[0]}"
    size = _STEM_WIDTHS.get(found[0]) if found and name.startswith("downsample_layers.0.") else None
    holds = f"the file holds a convnextv2_{size}" if size else "the file holds another network"
    return f"{name} is {found}, expected {expected}: {holds}, see --model"
