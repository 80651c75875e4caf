"""Weights by their published names, as they are on disk, and by timm's, as they are in memory.

    pretrained_model/convnextv2_*_1k_224_ema.pt     {'model': state dict}, as ConvNeXt V2's makers publish it
    any torch or safetensors file                   a state dict of timm's, bare, as 'model' or as 'state_dict'

Checkpoints (models.checkpoints) hold ConvNeXt V2 under its published names, other backbones under timm's.
"""

import os
import re

import torch

from datasets.errors import InputError
from models.networks import Student, Teacher, create_backbone, takes_size
from models.torchfiles import gist, is_plain_tensor, read_torch

_TO_PUBLISHED = [  # timm's name of a parameter, published name
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

_CONVNEXT = "stages.0.blocks.0.mlp.grn.weight"  # timm's name of a parameter that only ConvNeXt V2 has
_POINTWISE = re.compile(r"\.pwconv[12]\.weight$")

_STEM_WIDTHS = {40: "atto", 48: "femto", 64: "pico", 80: "nano", 96: "tiny", 128: "base", 192: "large", 352: "huge"}


def published_name(name):
    """Published name of a parameter that timm's ConvNeXt V2 calls `name`."""
    for pattern, replacement in _TO_PUBLISHED:
        name = re.sub(pattern, replacement, name)
    return name


def published_state(module):
    """State dict of a backbone, Student or Teacher as it is published: timm's own, but for ConvNeXt V2.

    There GRN parameters are (1, 1, 1, 4C), and pwconv1 and pwconv2 are linear layers, (4C, C) and (C, 4C), in every
    size; timm builds atto to nano with 1×1 convolutions instead.
    """
    state = {name.removeprefix("backbone."): value for name, value in module.state_dict().items()}
    return _as_published(state) if _CONVNEXT in state else state


def _as_published(state):
    """A state dict of timm's ConvNeXt V2 as it is published."""
    state = {published_name(name): value for name, value in state.items()}
    for name, value in state.items():
        if ".grn." in name:
            state[name] = value.reshape(1, 1, 1, -1)
        elif _POINTWISE.search(name):
            state[name] = value.flatten(1)
    return state


def load_published(module, state, source):
    """Copy a published state dict, or one of timm's, into a backbone, Student or Teacher; `module.` is understood.

    Strict: raises InputError naming `source` and the first parameter that is missing, unknown, no tensor or of another
    shape; the module is then untouched.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{source}: expected a state dict, parameters by name")
    state = {re.sub(r"^(module\.)+", "", name): value for name, value in state.items()}
    expected = published_state(module)
    for name, value in state.items():
        if name in expected and not (is_plain_tensor(value) or _is_counter(name, value)):
            raise InputError(f"{source}: {name} is no ordinary tensor; fetch the file again")
    if _CONVNEXT in state and _CONVNEXT not in expected:
        state = _as_published({name: value for name, value in state.items() if is_plain_tensor(value)})
    for name, value in expected.items():
        found = state.get(name, value)
        as_convolution = _POINTWISE.search(name) and found.shape == (*value.shape, 1, 1)  # earlier versions wrote these
        if found.shape != value.shape and not as_convolution:
            raise InputError(f"{source}: {_other_shape(name, tuple(found.shape), tuple(value.shape))}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise InputError(f"{source}: holds another network, with {unknown[0]} and {len(unknown) - 1} more; see --model")
    # BatchNorm's counters, which old files lack, change nothing.
    state = {name: value for name, value in expected.items() if _is_counter(name, value)} | state
    if missing := sorted(expected.keys() - state.keys()):
        raise InputError(
            f"{source}: holds another network, without {missing[0]} and {len(missing) - 1} more; see --model"
        )
    names = zip(module.state_dict(), expected, strict=True)  # in one order
    own = module.state_dict()
    module.load_state_dict({name: state[published].reshape(own[name].shape) for name, published in names})


def _is_counter(name, value):
    """Whether it is BatchNorm's number of batches."""
    is_number = isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.ndim == 0
    return name.endswith(".num_batches_tracked") and is_number


def check_size(student, model, size):
    """Raise InputError if a Student's backbone takes no images of `size` pixels a side."""
    if not takes_size(student.backbone, size):
        raise InputError(f"--input_size {size}: {model} takes no images of that size; try 224, or leave it out")


def student_of(model, classes, imagenet_classes=1000, drop_path=0.0, pretrained=False):
    """A new Student of `classes` seen classes on a user's --model. Raises InputError if it cannot be had."""
    try:
        return Student(create_backbone(model, imagenet_classes, drop_path, pretrained), classes)
    except ValueError as error:
        raise InputError(f"--model {model}: {error}") from None
    except Exception as error:
        if not pretrained:
            raise
        reason = f"{model} could not be fetched ({gist(error)})"
        raise InputError(f"--finetune timm: {reason}; give a downloaded file instead") from error


def create_pair(model, classes, finetune, imagenet_classes=1000, drop_path=0.0):
    """Student of `classes` seen classes and Teacher, both starting from the same weights.

    finetune: a file of weights, published or timm's; "timm" (those of timm's hub, for ConvNeXt V2 the published ones);
    or "none" (random).
    Raises InputError if the model or the weights cannot be had.
    """
    student = student_of(model, classes, imagenet_classes, drop_path, pretrained=finetune == "timm")
    if finetune not in ("timm", "none"):
        if not os.path.isfile(finetune):
            raise InputError(
                f"{finetune}: no pretrained weights; see pretrained_model/README.md, or use --finetune timm or none"
            )
        load_published(student.backbone, _state_in(read_torch(finetune)), finetune)
    frozen = create_backbone(model, imagenet_classes)
    frozen.load_state_dict(student.backbone.state_dict())
    return student, Teacher(frozen)


def _state_in(content):
    """The state dict of a file of weights: bare, or as ConvNeXt V2's makers and timm wrap it.

    That of a Student is without its `linear`, a classifier of other classes.
    """
    if not isinstance(content, dict):
        return None
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict):
        return state
    return {name: value for name, value in state.items() if not re.match(r"(module\.)*linear\.", str(name))}


def _other_shape(name, found, expected):
    """Why a parameter is not of the expected shape, and the way out."""
    if found and name.startswith("linear.") and found[1:] == expected[1:]:
        return (
            f"trained on {found[0]} seen classes, but cname_cid.txt lists {expected[0]}: "
            "they belong to different splits; see --zero_version"
        )
    if found and re.fullmatch(r"(head\.)?(head|fc|classifier)\.(weight|bias)", name) and found[1:] == expected[1:]:
        return f"its head has {found[0]} classes, not {expected[0]}; set --imagenet_classes {found[0]}"
    size = _STEM_WIDTHS.get(found[0]) if found and name.startswith("downsample_layers.0.") else None
    holds = f"the file holds a convnextv2_{size}" if size else "the file holds another network"
    return f"{name} is {found}, expected {expected}: {holds}, see --model"
