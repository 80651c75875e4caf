"""Torch files read as data: tensors, numbers and plain containers, never code, in memory that the file's size bounds.

A file of weights_only=True can name few things. Of those, NumPy's types and scalars, which the authors' checkpoints
hold, trust a file with memory, so stand-ins read them here.
"""

import argparse
import pathlib
import pickle
import re
import warnings
import zipfile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from datasets.errors import InputError


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
