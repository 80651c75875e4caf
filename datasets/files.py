"""Files as this project treats them: written whole or not at all, and known by their digest."""

import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

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
