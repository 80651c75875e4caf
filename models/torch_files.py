"""Reads torch and safetensors files as data: nothing in them is run, only tensors and plain values are taken."""

import argparse
import json
import pathlib
import pickle
import re
import warnings
import zipfile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from models.export import CONTENT_SHA256, HEADER_SHA256, header_sha256
from utils.cli import InputError
from utils.files import open_regular, sha256_of


class UnreadableFile(InputError):
    """A file is torn or of another kind. `what`: the message without the way out at its end."""

    def __init__(self, what, way_out):
        super().__init__(f"{what}; {way_out}")
        self.what = what


class _NumberType:
    """Safe replacement of numpy.dtype in unpickling: numbers and booleans only."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"numbers of type {str(code)[:20]!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        _, self.order, *rest = state
        if self.order not in ("<", ">", "=", "|") or any(rest[:3]):
            raise pickle.UnpicklingError("numbers of a structured type")


def _number(kind, content):
    """Safe replacement of NumPy's scalar constructor in unpickling: returns a Python number."""
    content = content.encode("latin1") if isinstance(content, str) else bytes(content)
    kind = np.dtype(kind.order + kind.code)
    if len(content) != kind.itemsize:
        raise pickle.UnpicklingError("a number of another length than its type's")
    return np.frombuffer(content, kind)[0].item()


_SAFE_GLOBALS = [
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    (_NumberType, "numpy.dtype"),
    argparse.Namespace,  # options, including paths, in some published files
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
]


def read_torch(path):
    """Read a torch file of tensors, numbers and plain containers to the CPU, without executing anything in it.

    A file whose name ends in .safetensors is read as safetensors. Raises InputError if the file is missing or contains
    anything else, and UnreadableFile if it is torn.
    """
    try:
        open_regular(path).close()  # the libraries would wait for a FIFO
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        if str(path).endswith(".safetensors"):
            _check_digest(path)
            return load_file(path)
        _refuse_archives(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual tensors, which load_published refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        harmless = "only tensors and plain data are read, nothing was run"
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(f"{path}: refused, it asks for {asked[1]}; {harmless}") from error
        raise UnreadableFile(f"{path}: refused, it is torn or no torch file", harmless) from error
    except SafetensorError as error:
        raise UnreadableFile(
            f"{path}: not a readable safetensors file ({first_sentence(error)})", "fetch it again"
        ) from error
    except Exception as error:  # a torn file can fail in any way
        raise UnreadableFile(
            f"{path}: not a readable torch file ({first_sentence(error)})", "fetch it again"
        ) from error


def safetensors_metadata(path):
    """The metadata of a safetensors file: {name: text}."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _check_digest(path):
    """Raise InputError if a safetensors file of models.export does not have the SHA-256s that it records."""
    recorded = safetensors_metadata(path)
    if not recorded.keys() & {CONTENT_SHA256, HEADER_SHA256}:
        return
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        digests = {HEADER_SHA256: header_sha256(json.loads(file.read(length)))}
    digests[CONTENT_SHA256] = sha256_of(path, start=8 + length)
    if any(recorded.get(name, digest) != digest for name, digest in digests.items()):
        raise UnreadableFile(f"{path}: damaged, its SHA-256 is another one", "export it again")


def zip_crc_ok(path):
    """Whether the CRCs of a torch file (a zip archive) are right; torch.load does not check them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return False


def _refuse_archives(path):
    """Raise InputError for a zip file with compressed members, and for TorchScript.

    Torch compresses no tensors, and a small file of compressed ones could fill memory.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            compressed = [
                member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED
            ]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError):
        return  # torch.load reports what is wrong
    if any(re.match(r"[^/]+/code/", name) for name in names):
        way_out = 'where you trust it, torch.save(torch.jit.load(FILE).state_dict(), "weights.pt") saves its weights'
        raise InputError(f"{path}: refused, a TorchScript archive, which holds a program; {way_out}")
    if compressed:
        raise InputError(f"{path}: refused, {compressed[0]!r} in it is compressed, as no torch file is; fetch it again")


def is_plain_tensor(value):
    """Whether a value from a file is a dense tensor of real floating-point numbers, not a meta or quantised one.

    Its values are in the file: with a stride of 0, a few bytes would say that they are a tensor of any size.
    """
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.is_floating_point()
        and not (value.is_meta or value.is_quantized or value.is_nested)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def first_sentence(error):
    """The first sentence of an error's message, or the name of its type if the message has no words."""
    text = re.split(r"\n|\. ", str(error).strip())[0][:160]
    return text if re.search("[A-Za-z]{2}", text) else type(error).__name__
