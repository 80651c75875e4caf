"""Files as this project treats them: written whole or not at all, and read as data, never as programs."""

import hashlib
import json
import os
import pickle
import re
import tempfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from datasets.errors import InputError


@contextmanager
def write_whole(path):
    """Open `path` for binary writing so that it appears complete or not at all (beside it, fsync, rename).

    Raises InputError if the folder cannot be made or written.
    """
    path = Path(path)
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            beside = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(0o666 & ~_umask())  # a temporary file is private; the result is an ordinary one
        beside.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{path.parent}: {path.name} cannot be written ({reason}); make room, or choose another folder"
        ) from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, content):
    """Write `content` as indented JSON, whole or not at all."""
    with write_whole(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def check_writable(folder):
    """Make `folder` and try a file in it, before hours of work are lost. Raises InputError if that fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error


def digest(path):
    """SHA-256 of a file, in hex."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def read_pickle(path):
    """Read a pickle of arrays and plain containers, from Python 2 or 3, without executing anything in it.

    Arrays hold numbers, truth values or strings. Raises InputError if the file is missing, torn, or asks for more.
    """
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a torn or foreign pickle can fail in any way
        raise InputError(f"{path}: not a readable pickle ({type(error).__name__}: {error}); fetch it again") from error


# NumPy's own builders trust a pickle with the memory of objects, so arrays are built by the functions below instead.


class _Kind:
    """Stands for numpy.dtype: a type of numbers, truth values or strings, without fields or objects."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[biufcSU]\d+", code):
            raise InputError(f"the pickle holds an array of type {code!r}; only numbers and strings are read")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        _, self.order, *rest = state
        if rest[:3] != [None, None, None] or self.order not in ("<", ">", "=", "|"):
            raise InputError("the pickle holds an array with fields; only numbers and strings are read")

    def numpy_type(self):
        return np.dtype(self.order + self.code)


class _Array(np.ndarray):
    """An array that takes its state from a pickle only with a _Kind for its type."""

    def __setstate__(self, state):
        *_, shape, kind, fortran, raw = state
        super().__setstate__((1, shape, kind.numpy_type(), fortran, raw))


def _empty_array(*_):
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _scalar(kind, raw):
    return np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, kind.numpy_type())[0]


def _from_buffer(buffer, kind, shape, order):
    return np.frombuffer(buffer, kind.numpy_type()).reshape(shape, order=order)


# All that a pickle of arrays in plain containers calls, as Python 2 and 3 and NumPy 1 and 2 name it.
_BUILDERS = {
    ("numpy", "dtype"): _Kind,
    ("numpy", "ndarray"): None,  # named, never called
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "bytes"): bytes,
    ("__builtin__", "bytes"): bytes,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # how protocol 2 spells bytes
}
for _core in ("numpy.core", "numpy._core"):
    _BUILDERS[f"{_core}.multiarray", "_reconstruct"] = _empty_array
    _BUILDERS[f"{_core}.multiarray", "scalar"] = _scalar
    _BUILDERS[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays, numbers, strings and plain containers; refuses to look up anything else."""

    def find_class(self, module, name):
        if (module, name) not in _BUILDERS:
            raise InputError(f"the pickle asks for {module}.{name}, which no array needs: refused, nothing was run")
        return _BUILDERS[module, name]
