"""Opening of regular files only, atomic writes, checks of paths, SHA-256 digests and folder locks."""

import errno
import hashlib
import json
import math
import os
import pickle
import platform
import re
import stat
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

from utils.cli import InputError

STDOUT = Path("-")  # in the place of a file for results: standard output


def open_regular(path, mode="rb"):
    """open() of a regular file, or of a link to one; it never waits for a FIFO and opens no device.

    Raises OSError, with file name and reason, for anything else.
    """
    return open(path, mode, opener=_open_descriptor)


def open_own(path, mode="rb"):
    """open_regular() of a file of this program by a fixed name: a link is refused, whatever it leads to.

    A folder from elsewhere may have a link there, and writing through it would destroy a file of the user.
    Raises FileNotFoundError, and InputError for anything but a regular file.
    """
    try:
        return open(path, mode, opener=_open_own_descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EINVAL):
            raise
        raise InputError(
            f"{path}: a link, a FIFO or a device where a file of this program belongs; delete it"
        ) from None


def _open_own_descriptor(path, flags):
    return _open_descriptor(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _open_descriptor(path, flags):
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def read_bytes(path, limit):
    """Content of a regular file of at most `limit` bytes. Raises OSError, and InputError for a larger file."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{path}: larger than {limit >> 20:,} MiB, so not a file of this kind; choose another")
    return content


def read_npz(path, max_bytes, names=None):
    """{name: array} of an .npz file, read as data; names: of the arrays to read (default: all).

    max_bytes: of these arrays, unpacked: a small file could hold more than memory does. Raises FileNotFoundError, and
    ValueError, KeyError and what zipfile and NumPy raise for other and damaged files.
    """
    import numpy as np

    with open_regular(path) as file:
        npz_shapes(file, max_bytes, names)
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names or arrays.files}


def npz_shapes(file, max_bytes=None, names=None):
    """{name: shape} of the arrays in an open .npz, which are not unpacked; arguments: as of `read_npz`.

    Raises ValueError for arrays of more than `max_bytes`, and of another size than their header states.
    """
    from numpy.lib import format as npy

    shapes, left = {}, math.inf if max_bytes is None else max_bytes
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist() if names is None else [f"{name}.npy" for name in names]:
            size = archive.getinfo(member).file_size
            if (left := left - size) < 0:
                raise ValueError(f"its arrays are larger than {max_bytes >> 20:,} MiB")
            with archive.open(member) as array:
                read_header = (
                    npy.read_array_header_1_0 if npy.read_magic(array) == (1, 0) else npy.read_array_header_2_0
                )
                shape, _, dtype = read_header(array)
                if not dtype.hasobject and array.tell() + math.prod(shape) * dtype.itemsize != size:
                    raise ValueError(f"{member} holds another number of values than its header states")
            shapes[member.removesuffix(".npy")] = shape
    return shapes


@contextmanager
def atomic_write(path):
    """Open `path` for binary writing so that it appears complete or not at all (beside it, fsync, rename).

    Raises InputError if the folder cannot be made or written.
    """
    path = Path(path)
    beside = None
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.path.lexists(path) and not (path.is_file() or path.is_symlink()):
            raise OSError(errno.EINVAL, "a FIFO or a device has this name")
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
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "make room, or choose another folder" if is_full else "choose another name or folder"
        raise InputError(f"{path.parent}: {path.name} cannot be written ({reason}); {way_out}") from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def check_output(path, option, ours):
    """The path of a file for the results that a user names; of a link, the file that it leads to. Makes its folder.

    option: how messages begin, or an empty text; ours: a regular expression (bytes) that is found in the first or last
    64 KiB of what this program writes there.
    Raises InputError unless there is no such file yet, or an empty or regular one in which that is found, and if the
    folder cannot be written: before any work is done.
    """
    target, option = Path(os.path.realpath(path)), f"{option} " if option else ""
    no_file = f"{option}{path}: is not a file but a folder, a FIFO or a device; choose a file"
    if os.path.exists(path) and not os.path.isfile(path):  # standard output by its name, too
        raise InputError(no_file)
    try:
        with open_regular(target) as file:
            start = file.read(1 << 16)
            file.seek(max(file.tell(), file.seek(0, os.SEEK_END) - (1 << 16)))
            content = start + file.read()
    except FileNotFoundError:
        content = b""
    except NotADirectoryError as error:
        raise InputError(f"{option}{path}: cannot be written ({error.strerror}); choose another folder") from None
    except PermissionError as error:
        raise InputError(f"{option}{path}: {error.strerror}; choose another file") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{option}{path}: {error.strerror}; choose a shorter one") from None
        raise InputError(no_file) from None
    if content and not re.search(ours, content):
        raise InputError(f"{option}{path}: holds something that this command did not write; choose another file")
    check_writable(target.parent)
    return target


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, content):
    """Write `content` as indented JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_pickle(path, content, protocol):
    """Write `content` as a pickle of `protocol` 2 or 3 that every version of NumPy can read, whole or not at all."""
    with atomic_write(path) as file:
        dump_pickle(file, content, protocol)


def dump_pickle(file, content, protocol):
    """Write the pickle of `write_pickle` to an open binary file."""
    pickle.Pickler(_OldNumpyNames(file), protocol).dump(content)


class _OldNumpyNames:
    """A file that takes pickles with NumPy's module names from before version 2, which later versions know, too."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        """Called with opcodes or with the data of one large array. Neither is copied without such a name."""
        self.file.write(bytes(data).replace(b"cnumpy._core.", b"cnumpy.core."))


def unused_name(path):
    """`path`, or the first of path.2, path.3, ... where something has that name."""
    path, number = Path(path), 1
    while os.path.lexists(candidate := path if number == 1 else path.with_name(f"{path.name}.{number}")):
        number += 1
    return candidate


def check_writable(folder):
    """Make `folder` and try a file in it, so that a bad folder fails at once. Raises InputError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error


def stat_error(path):
    """strerror of os.stat() unless the file simply does not exist: no permission, a link that leads to itself.

    None otherwise. os.path.isfile and the like return False in both cases.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        return error.strerror
    return None


def is_regular_file(entry):
    """Whether an os.DirEntry is a file or a link to one; False for a link that leads to itself."""
    try:
        return entry.is_file()
    except OSError:
        return False


def check_stat(path):
    """Raise InputError if os.stat() of `path` fails for another reason than a missing file; see `stat_error`."""
    if why := stat_error(path):
        raise InputError(f"{path}: cannot be read ({why}); correct its permissions or its link, or choose another")


def sha256_of(path, start=0, length=math.inf):
    """SHA-256 of a file, or of at most `length` bytes of it from `start` on, in hex."""
    with open_regular(path) as file:
        return sha256_of_file(file, start, length)


def sha256_of_file(file, start=0, length=math.inf):
    """As `sha256_of`, of an open binary file."""
    sha256 = hashlib.sha256()
    file.seek(start)
    while block := file.read(min(length, 1 << 20)):
        sha256.update(block)
        length -= len(block)
    return sha256.hexdigest()


@contextmanager
def folder_lock(folder, work):
    """Lock `folder` for one kind of `work`: a second process with the same work gets an InputError.

    A POSIX lock: the system releases it when this process ends, however it ends, and child processes do not inherit
    it. It works on local disks and on network disks with POSIX locks (NFS, between machines, too); on others, and on
    Windows, nothing is locked. work: one word, such as "training".
    Raises InputError if another process has the lock.
    """
    path = Path(folder) / f".{work}"
    file = _locked(path)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()


def _locked(path):
    """The file at `path`, open and locked; None if the system or the disk has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        file = open_own(path, "a+")  # open as long as the lock lasts
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read(200) or "another process"
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
            raise InputError(
                f"{path.parent}: {holder} is {path.name[1:]} there; wait until it ends, or choose another folder"
            ) from None
        if _is_at(file, path):
            break
        file.close()  # the last holder has just deleted it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def _is_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
