"""Files as this project treats them: written whole or not at all, and read as data, never as programs.

`InputError` is what a user can cause and mend. Every command line of the project ends such an error in one line
with exit status 2; anything else is a bug and keeps its traceback.
"""

import functools
import json
import os
import pickle
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and the way out."""


def ends_in_one_line(command):
    """Let a command line end an InputError in one line (status 2) and Ctrl-C in one word (status 130)."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except InputError as error:
            # A DataLoader worker wraps the message in its own traceback, of which the last line is ours.
            last = str(error).strip().splitlines()[-1]
            print("error:", re.sub(r"^[\w.]*InputError: ", "", last), file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped


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
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another folder") from error
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
    """Make `folder` and try a file in it, so that hours of work do not end at a closed door. Raises InputError."""
    probe = Path(folder) / ".writable"
    with write_whole(probe):
        pass
    probe.unlink()


# All that a pickle of arrays in plain containers calls, as Python 2 and 3 and NumPy 1 and 2 name it.
_ARRAY_GLOBALS = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("builtins", "bytes"),
    ("__builtin__", "bytes"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("collections", "OrderedDict"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays, numbers, strings and plain containers; refuses to look up anything else."""

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 spells bytes
            return lambda text, encoding: text.encode("latin1")
        if (module, name) not in _ARRAY_GLOBALS:
            raise InputError(f"the pickle asks for {module}.{name}, which no array needs: refused, nothing was run")
        return super().find_class(module, name)


def read_pickle(path):
    """Read a pickle of arrays and plain containers, from Python 2 or 3, without executing anything in it.

    Raises InputError if the file is missing, torn, or asks for any other class or function.
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
