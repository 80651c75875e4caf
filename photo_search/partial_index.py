"""What an interrupted indexing has computed: batches of photos, kept beside the index so that the next run continues.

    unfinished.features    features, float32
    unfinished.photos      a line of JSON with what the features depend on, then a line for each batch
    unfinished.json        the options of a run that makes an index, or changes its folders or patterns

A batch is complete once its line is written, which happens last. Its thumbnails are in the index's file of thumbnails.
"""

import errno
import json
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from photo_search.index import has_fields, is_absolute_path
from photo_search.photos import MAX_TIME_NS, PhotoFile
from utils.cli import InputError
from utils.files import open_own, read_bytes, write_json

MAX_OPTIONS_BYTES = 1 << 24
BLOCK_FEATURES = 8192  # features that are checked at a time
FEATURES_FILE, PHOTOS_FILE, OPTIONS_FILE = "unfinished.features", "unfinished.photos", "unfinished.json"
# Of an interrupted run, and their types.
UNFINISHED_OPTIONS = {
    "checkpoint": str, "model": str, "input_size": int, "imagenet_classes": int, "folders": list, "exclude": list,
}  # fmt: skip


def unfinished_options(folder):
    """The options of an interrupted run in `folder`, in the form of an index's metadata; None if there are none.

    Keys: UNFINISHED_OPTIONS.
    """
    try:
        content = json.loads(read_bytes(folder / OPTIONS_FILE, MAX_OPTIONS_BYTES))
    except (OSError, ValueError, RecursionError, InputError):
        return None
    is_valid = has_fields(content, UNFINISHED_OPTIONS) and content["folders"]
    return content if is_valid and all(map(is_absolute_path, content["folders"])) else None


def first_run_progress(folder):
    """(photos computed so far, photos in all) of an unfinished first run in `folder`; None without one."""
    options = unfinished_options(folder) or {}
    total, width = options.get("photos"), options.get("width")
    if not all(isinstance(each, int) and each > 0 for each in (total, width)):
        return None
    try:
        return min((folder / FEATURES_FILE).stat().st_size // (4 * width), total), total
    except OSError:
        return 0, total


class ComputedPhoto(NamedTuple):
    """A photo of a PartialIndex."""

    file: PhotoFile
    digest: str  # SHA-256 in hex
    thumbnail: int  # offset in the file of thumbnails
    thumbnail_size: int


class PartialIndex:
    """The batches of photos that have been computed for the index in `folder`.

    source: what the features depend on, JSON; thumbnails: (path of their file, bytes of it that the index uses).
    Raises InputError if an interrupted run in this folder had another source.
    """

    def __init__(self, folder, source, width, thumbnails):
        self.folder, self.width = folder, width
        self.thumbnails, self.end = thumbnails
        self.photos, self.unreadable = [], {}  # {PhotoFile: why}
        header = json.dumps([source, width, self.thumbnails.name]).encode() + b"\n"
        length = self._read(header)
        with write_errors_as_input_errors(folder):
            with open_own(folder / PHOTOS_FILE, "ab") as file:
                file.truncate(length)
                if not length:
                    file.write(header)
            for path, length in ((folder / FEATURES_FILE, 4 * width * len(self.photos)), (self.thumbnails, self.end)):
                with open_own(path, "ab") as file:
                    file.truncate(length)

    def _read(self, header):
        """Read the complete batches; returns the length of their lines."""
        try:
            with open_own(self.folder / PHOTOS_FILE) as file:
                lines = file.read().splitlines(keepends=True)
            is_unit = self._have_unit_length()
            stored = self.thumbnails.stat().st_size
        except FileNotFoundError:
            return 0
        if not lines or not lines[0].endswith(b"\n"):
            return 0
        if lines[0] != header:
            if _source_of(lines[0]) == json.loads(header)[:2]:
                return 0  # of an index with another file of thumbnails
            raise InputError(
                f"{self.folder}: contains an unfinished index of another checkpoint, model or input size; continue "
                "with the same, or delete the folder"
            )
        length = len(header)
        for line in lines[1:]:
            photos = _parse_batch(line)  # unreadable files are read again: their disk may have been away
            rows = is_unit[len(self.photos) : len(self.photos) + len(photos or ())]
            end = max([self.end, *(photo.thumbnail + photo.thumbnail_size for photo in photos or ())])
            if photos is None or len(rows) < len(photos) or not rows.all() or end > stored:
                break
            self.photos += photos
            self.end, length = end, length + len(line)
        return length

    def _have_unit_length(self):
        """Whether each of the features in their file has length 1; a crash can leave blocks of zeros: (n,) bool."""
        checked = [np.empty(0, bool)]
        with open_own(self.folder / FEATURES_FILE) as file, np.errstate(all="ignore"):
            while content := file.read(4 * self.width * BLOCK_FEATURES):
                count = len(content) // (4 * self.width)
                features = np.frombuffer(content, np.float32, count * self.width).reshape(count, self.width)
                checked.append(np.abs(np.linalg.norm(features.astype(np.float64), axis=1) - 1) < 0.01)
        return np.concatenate(checked)

    def record_options(self, content, photos):
        """Record the UNFINISHED_OPTIONS in `content`, with which this run can be continued.

        photos: how many it finds.
        """
        options = {name: content[name] for name in (*UNFINISHED_OPTIONS, "hidden")}
        with write_errors_as_input_errors(self.folder):
            write_json(self.folder / OPTIONS_FILE, options | {"width": self.width, "photos": photos})

    def add(self, files, rows, digests, thumbnails, unreadable):
        """Add a batch: PhotoFiles, their features (n, width), digests, thumbnails, and unreadable {PhotoFile: why}."""
        photos = []
        for file, digest, thumbnail in zip(files, digests, thumbnails, strict=True):
            photos.append(ComputedPhoto(file, digest, self.end, len(thumbnail)))
            self.end += len(thumbnail)
        line = [[[*photo.file, *photo[1:]] for photo in photos], [[*file, why] for file, why in unreadable.items()]]
        with write_errors_as_input_errors(self.folder):
            for path, content in (
                (self.thumbnails, b"".join(thumbnails)),
                (self.folder / FEATURES_FILE, np.ascontiguousarray(rows, np.float32).tobytes()),
                (self.folder / PHOTOS_FILE, json.dumps(line).encode() + b"\n"),
            ):
                with open_own(path, "ab") as file:
                    file.write(content)
        self.photos += photos
        self.unreadable |= unreadable

    def rows(self):
        """All features so far, (n, width) float32, mapped."""
        if not self.photos:
            return np.empty((0, self.width), np.float32)
        path = self.folder / FEATURES_FILE
        try:
            return np.memmap(path, np.float32, "r", shape=(len(self.photos), self.width))
        except (OSError, ValueError):  # removed, or shorter than what was written
            raise InputError(f"{path}: was changed meanwhile; run the command again to continue") from None

    def remove(self):
        """Delete its files, once its photos are in the index."""
        for name in (PHOTOS_FILE, FEATURES_FILE, OPTIONS_FILE):
            (self.folder / name).unlink(missing_ok=True)


@contextmanager
def write_errors_as_input_errors(folder):
    """Within this block, which writes the index in `folder`, an OSError becomes an InputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        first = "free some space, and " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise InputError(
            f"{folder}: the index cannot be written ({reason}); {first}run the command again to continue"
        ) from error


def _source_of(header):
    """[source, width] of a first line, or None."""
    try:
        return json.loads(header)[:2]
    except (ValueError, TypeError, RecursionError):
        return None


def _parse_batch(line):
    """The photos of a line, None if it is damaged."""
    try:
        photos, _ = json.loads(line if line.endswith(b"\n") else b"")
        return [ComputedPhoto(_photo_file(*values[:3]), *_checked_record(*values[3:])) for values in photos]
    except (ValueError, TypeError, IndexError, RecursionError):
        return None


def _photo_file(path, size, mtime):
    if not isinstance(path, str) or not is_absolute_path(path):
        raise ValueError("not an absolute path")
    if not 0 <= int(size) <= MAX_TIME_NS or abs(int(mtime)) > MAX_TIME_NS:
        raise ValueError("not the size and time of a file")
    return PhotoFile(path, int(size), int(mtime))


def _checked_record(digest, thumbnail, size):
    if len(bytes.fromhex(digest)) != 32 or min(int(thumbnail), int(size)) < 0:
        raise ValueError("not the record of a photo")
    return digest, int(thumbnail), int(size)
