"""Weights by their published names, as they are on disk, and by timm's, as they are in memory.

    pretrained_model/convnextv2_*_1k_224_ema.pt     {'model': state dict}, as ConvNeXt V2's makers publish it
    any torch or safetensors file                   a state dict of timm's, bare, as 'model' or as 'state_dict'

Checkpoints (models.checkpoints) hold ConvNeXt V2 under its published names, other backbones under timm's.
"""

import argparse
import os
import pathlib
import pickle
import re
import warnings
import zipfile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from models.networks import Student, Teacher, create_backbone, facts_of, takes_size
from utils.cli import InputError

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


def fit_input_size(model, size=None, source="--model"):
    """`size`, the side of the images for timm's `model`, or the model's own where that is None.

    source: how the message about an unknown model begins. Raises InputError.
    """
    if model.startswith("convnextv2_"):
        return size or 224  # without timm, which takes seconds to import
    try:
        own = facts_of(model).size
    except ValueError as error:
        raise InputError(f"{source} {model}: {error}") from None
    if own and size not in (None, own):
        raise InputError(f"--input_size {size}: {model} takes images of {own} pixels only; leave --input_size out")
    return size or own or 224


def student_of(model, classes, imagenet_classes=1000, drop_path=0.0, pretrained=False, source="--model"):
    """A new Student of `classes` seen classes on timm's `model`.

    source: how the message about an unknown model begins. Raises InputError if the model or its weights cannot be had.
    """
    try:
        return Student(create_backbone(model, imagenet_classes, drop_path, pretrained), classes)
    except ValueError as error:
        raise InputError(f"{source} {model}: {error}") from None
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
        return other_split(found[0], expected[0])
    if found and re.fullmatch(r"(head\.)?(head|fc|classifier)\.(weight|bias)", name) and found[1:] == expected[1:]:
        return f"its head has {found[0]} classes, not {expected[0]}; set --imagenet_classes {found[0]}"
    size = _STEM_WIDTHS.get(found[0]) if found and name.startswith("downsample_layers.0.") else None
    holds = f"the file holds a convnextv2_{size}" if size else "the file holds another network"
    return f"{name} is {found}, expected {expected}: {holds}, see --model"


def other_split(found, expected):
    """Why a network with `found` seen classes is not one of a benchmark with `expected`."""
    return (
        f"trained on {found} seen classes, but cname_cid.txt lists {expected}: "
        "they belong to different splits; see --zero_version"
    )


class UnreadableFile(InputError):
    """A file is torn, or no file of its kind: `what` is wrong, without the way out that the message ends with."""

    def __init__(self, what, way_out):
        super().__init__(f"{what}; {way_out}")
        self.what = what


class _NumberType:
    """Stands for numpy.dtype: a type of plain numbers or truth values."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"numbers of type {str(code)[:20]!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        _, self.order, *rest = state
        if self.order not in ("<", ">", "=", "|") or any(rest[:3]):
            raise pickle.UnpicklingError("numbers of a type with parts")


def _number(kind, content):
    """Stands for NumPy's builder of scalars: a plain number."""
    content = content.encode("latin1") if isinstance(content, str) else bytes(content)
    kind = np.dtype(kind.order + kind.code)
    if len(content) != kind.itemsize:
        raise pickle.UnpicklingError("a number of another length than its type's")
    return np.frombuffer(content, kind)[0].item()


_HARMLESS = [
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    (_NumberType, "numpy.dtype"),
    argparse.Namespace,  # the options that some published files carry along, paths among them
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
]


def read_torch(path):
    """Read a torch file of tensors, numbers and plain containers, on the CPU, without executing anything in it.

    A file whose name ends in .safetensors is read as what that says. Raises InputError if the file is missing or holds
    anything else, and UnreadableFile if it is torn.
    """
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        _refuse_compressed(path)
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old and odd forms of files: what cannot be used is refused in a line
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except pickle.UnpicklingError as error:
        harmless = "only tensors and plain data are read, nothing was run"
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(f"{path}: refused, it asks for {asked[1]}; {harmless}") from error
        raise UnreadableFile(f"{path}: refused, it is torn or no torch file", harmless) from error
    except SafetensorError as error:
        raise UnreadableFile(f"{path}: not a readable safetensors file ({gist(error)})", "fetch it again") from error
    except Exception as error:  # a torn file can fail in any way
        raise UnreadableFile(f"{path}: not a readable torch file ({gist(error)})", "fetch it again") from error


def safetensors_metadata(path):
    """The metadata of a safetensors file that read_torch has read: {name: text}."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def is_whole(path):
    """Whether the sums in a torch file of ours agree with its parts: a torn disk can leave zeros, which load, too."""
    try:
        with zipfile.ZipFile(path) as parts:
            return parts.testzip() is None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return False


def _refuse_compressed(path):
    """Raise InputError for a zip file with compressed parts: torch writes none, and a few bytes could become many."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as parts:
            compressed = [part.filename for part in parts.infolist() if part.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError):
        return  # torch reads the directory in its own way, and says what is wrong
    if compressed:
        raise InputError(f"{path}: refused, {compressed[0]!r} in it is compressed, as no torch file is; fetch it again")


def is_plain_tensor(value):
    """Whether a value from a file is an ordinary tensor of real floating-point numbers, with values."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.is_floating_point()
        and not (value.is_meta or value.is_quantized or value.is_nested)
    )


def gist(error):
    """The first sentence of an error's message, or its type where it has no words."""
    text = re.split(r"\n|\. ", str(error).strip())[0][:160]
    return text if re.search("[A-Za-z]{2}", text) else type(error).__name__
