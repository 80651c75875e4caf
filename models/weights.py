"""Every file of weights, in and out: published names on disk, timm's in memory.

    pretrained_model/convnextv2_*_1k_224_ema.pt     {'model': state dict}, as ConvNeXt V2's makers publish it
    checkpoint/.../{model_best,checkpoint}.pth.tar  {'epoch', 'state_dict', 'best_acc1', 'optimizer', 'optimizer_1'},
                                                    the student with `linear`, each name prefixed `module.`

What this project adds to a checkpoint (teacher, options, history) stands beside the authors' keys, so checkpoints move
both ways. Files are read as data: tensors, numbers and plain containers, never code.
"""

import argparse
import os
import pathlib
import pickle
import re

import numpy as np
import torch

from datasets.errors import InputError
from datasets.files import write_whole
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
        if not isinstance(found, torch.Tensor) or found.layout != torch.strided or found.is_meta:
            raise InputError(f"{source}: {name} is no ordinary tensor; fetch the file again")
        if found.shape != value.shape:
            raise InputError(f"{source}: {_other_shape(name, tuple(found.shape), tuple(value.shape))}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise InputError(f"{source}: holds another network, with {unknown[0]} and {len(unknown) - 1} more; see --model")
    if missing := sorted(expected.keys() - state.keys()):
        raise InputError(
            f"{source}: holds another network, without {missing[0]} and {len(missing) - 1} more; see --model"
        )
    own = module.state_dict()
    module.load_state_dict({name: state[published_name(name)].reshape(value.shape) for name, value in own.items()})


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
        argparse.Namespace,  # the options that some published files carry along, paths among them
        (pathlib.PurePosixPath, "pathlib.PosixPath"),
        (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
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
    """Read a training checkpoint, ours or the authors', or a bare state dict, which becomes its 'state_dict'.

    Raises InputError if the file holds neither.
    """
    checkpoint = read_torch(path)
    if isinstance(checkpoint, dict) and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{path}: not a training checkpoint, it has no 'state_dict'")
    return checkpoint


def save_checkpoint(path, student, teacher=None, **rest):
    """Write a checkpoint, whole or not at all: the student as the authors name it, the teacher and `rest`."""
    content = {"state_dict": {f"module.{name}": value for name, value in published_state(student).items()}, **rest}
    if teacher is not None:
        content["teacher"] = published_state(teacher)
    with write_whole(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch reports a write that failed
            raise OSError(f"{_gist(error)}; is the disk full?") from error


def create_pair(model, classes, finetune, imagenet_classes=1000, drop_path=0.0):
    """Student of `classes` seen classes and Teacher, both starting from the same weights.

    finetune: a published file, "timm" (the same weights from timm's hub), or "none" (random).
    Raises InputError if the model or the weights cannot be had.
    """
    backbone = _create_backbone(model, imagenet_classes, drop_path, pretrained=finetune == "timm")
    if finetune not in ("timm", "none"):
        if not os.path.isfile(finetune):
            raise InputError(
                f"{finetune}: no pretrained weights; see pretrained_model/README.md, or use --finetune timm or none"
            )
        content = read_torch(finetune)
        state = content.get("model", content) if isinstance(content, dict) else None
        load_published(backbone, state, finetune)
    frozen = _create_backbone(model, imagenet_classes)
    frozen.load_state_dict(backbone.state_dict())
    return Student(backbone, classes), Teacher(frozen)


def load_student(path, model, classes, imagenet_classes=1000):
    """(student of a checkpoint, options it was trained with; {} for the authors').

    Raises InputError if the checkpoint is of another model or split.
    """
    student = Student(_create_backbone(model, imagenet_classes), classes)
    checkpoint = read_checkpoint(path)
    load_published(student, checkpoint["state_dict"], path)
    options = checkpoint.get("options")
    return student, options if isinstance(options, dict) else {}


def _create_backbone(model, imagenet_classes, drop_path=0.0, pretrained=False):
    try:
        return create_backbone(model, imagenet_classes, drop_path, pretrained)
    except ValueError as error:
        raise InputError(f"--model: {error}") from None
    except Exception as error:
        if not pretrained:
            raise
        reason = f"{model} could not be fetched ({_gist(error)})"
        raise InputError(f"--finetune timm: {reason}; give a downloaded file instead") from error


def _other_shape(name, found, expected):
    """Why a parameter is not of the expected shape, and the way out."""
    if found and name.startswith("linear.") and found[1:] == expected[1:]:
        return (
            f"trained on {found[0]} seen classes, but cname_cid.txt lists {expected[0]}: "
            "they belong to different splits; see --zero_version"
        )
    if found and name.startswith("head.") and found[1:] == expected[1:]:
        return f"its head has {found[0]} classes, not {expected[0]}; set --nb_classes {found[0]}"
    size = _STEM_WIDTHS.get(found[0]) if found and name.startswith("downsample_layers.0.") else None
    holds = f"the file holds a convnextv2_{size}" if size else "the file holds another network"
    return f"{name} is {found}, expected {expected}: {holds}, see --model"


def _gist(error):
    return re.split(r"\n|\. ", str(error).strip())[0][:160] or type(error).__name__
