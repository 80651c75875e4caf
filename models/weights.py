"""Every file of weights, in and out: published names on disk, timm's in memory.

    pretrained_model/convnextv2_*_1k_224_ema.pt     {'model': state dict}, as ConvNeXt V2's makers publish it
    checkpoint/.../{model_best,checkpoint}.pth.tar  {'epoch', 'state_dict', 'best_acc1', 'optimizer', 'optimizer_1'},
                                                    the student with `linear`, each name prefixed `module.`

What this project adds to a checkpoint (teacher, options, history) stands beside the authors' keys, so checkpoints move
both ways. Files are read as data: tensors, numbers and plain containers, never code.
"""

import argparse
import pickle
import re
from pathlib import Path

import numpy as np
import torch

from datasets.files import InputError, write_whole
from models.networks import Student, Teacher, create_backbone

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

_STEM_WIDTHS = {40: "atto", 48: "femto", 64: "pico", 80: "nano", 96: "tiny", 128: "base", 192: "large", 352: "huge"}


def published_name(name):
    """Published name of a parameter of a backbone, Student or Teacher."""
    for pattern, replacement in _TO_PUBLISHED:
        name = re.sub(pattern, replacement, name)
    return name


def published_state(module):
    """State dict of a backbone, Student or Teacher as it is published: GRN parameters are (1, 1, 1, 4C)."""
    state = {}
    for name, value in module.state_dict().items():
        name = published_name(name)
        state[name] = value.reshape(1, 1, 1, -1) if ".grn." in name else value
    return state


def load_published(module, state, source):
    """Copy a published state dict into a backbone, Student or Teacher; `module.` prefixes are understood.

    Strict: raises InputError naming `source` and the first parameter that is missing, unknown or of another shape;
    the module is then untouched.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    wanted = {published_name(name): (name, value) for name, value in module.state_dict().items()}
    expected = published_state(module)
    for name in wanted.keys() & state.keys():
        if state[name].shape != expected[name].shape:
            raise InputError(_other_shape(source, name, state, expected[name].shape))
    if unknown := sorted(state.keys() - wanted.keys()):
        raise InputError(f"{source}: unknown parameter {unknown[0]} (of {len(unknown)}); {_is_model(state)}")
    if missing := sorted(wanted.keys() - state.keys()):
        raise InputError(f"{source}: parameter {missing[0]} is missing (of {len(missing)}); {_is_model(state)}")
    module.load_state_dict({name: state[published].reshape(value.shape) for published, (name, value) in wanted.items()})


def read_torch(path):
    """Read a torch file of tensors, numbers and plain containers, on the CPU, without executing anything in it.

    Raises InputError if the file is missing, torn or holds anything else.
    """
    scalar = np.float64(0).__reduce__()[0]  # NumPy's builder of scalars, by either of its names
    harmless = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
        argparse.Namespace,  # the options that some published files carry along
    ]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is torn or no torch file"
        raise InputError(f"{path}: refused, {reason}; only tensors and plain data are read, nothing was run") from error
    except Exception as error:  # a torn file can fail in any way
        raise InputError(f"{path}: not a readable torch file ({_gist(error)}); fetch it again") from error


def read_checkpoint(path):
    """Read a training checkpoint, ours or the authors'. Raises InputError unless it has a 'state_dict'."""
    checkpoint = read_torch(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{path}: not a training checkpoint, it has no 'state_dict'")
    return checkpoint


def save_checkpoint(path, student, teacher=None, **rest):
    """Write a checkpoint, whole or not at all: the student as the authors name it, the teacher and `rest`."""
    content = {"state_dict": {f"module.{name}": value for name, value in published_state(student).items()}, **rest}
    if teacher is not None:
        content["teacher"] = published_state(teacher)
    with write_whole(path) as file:
        torch.save(content, file)


def seen_classes(checkpoint):
    """Number of seen classes that the student in a checkpoint was trained on."""
    return next((len(v) for name, v in checkpoint["state_dict"].items() if name.endswith("linear.bias")), 0)


def create_pair(model, classes, finetune, imagenet_classes=1000, drop_path=0.0):
    """Student of `classes` seen classes and Teacher, both starting from the same weights.

    finetune: a published file, "timm" (the same weights from timm's hub), or "none" (random).
    Raises InputError if the model or the weights cannot be had.
    """
    try:
        pretrained = finetune == "timm"
        backbones = [create_backbone(model, imagenet_classes, rate, pretrained) for rate in (drop_path, 0.0)]
    except ValueError as error:
        raise InputError(f"--model: {error}") from None
    except Exception as error:
        if finetune != "timm":
            raise
        raise InputError(
            f"--finetune timm: {model} could not be fetched ({_gist(error)}); give a downloaded file instead"
        ) from error
    if finetune not in ("timm", "none"):
        if not Path(finetune).is_file():
            raise InputError(
                f"{finetune}: no pretrained weights; see pretrained_model/README.md, or use --finetune timm or none"
            )
        content = read_torch(finetune)
        state = content.get("model", content) if isinstance(content, dict) else None
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise InputError(f"{finetune}: not pretrained weights, expected {{'model': state dict}}")
        load_published(backbones[0], state, finetune)
    backbones[1].load_state_dict(backbones[0].state_dict())
    return Student(backbones[0], classes), Teacher(backbones[1])


def _other_shape(source, name, state, expected):
    found = tuple(state[name].shape)
    if name.startswith("linear."):
        return (
            f"{source}: trained on {found[0]} seen classes, not {expected[0]}; it belongs to another split or data set"
        )
    if name.startswith("head.") and found[1:] == tuple(expected)[1:]:
        return f"{source}: its head has {found[0]} classes, not {expected[0]}; set --nb_classes {found[0]}"
    return f"{source}: {name} is {found}, expected {tuple(expected)}; {_is_model(state)}"


def _is_model(state):
    stem = state.get("downsample_layers.0.0.weight")
    size = _STEM_WIDTHS.get(len(stem)) if stem is not None else None
    return f"the file holds a convnextv2_{size}: see --model" if size else "the file holds no known ConvNeXt V2"


def _gist(error):
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
