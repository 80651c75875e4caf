"""Photos that are being indexed, kept batch by batch, so that a killed indexing goes on.

    unfinished.features    features, float32
    unfinished.photos      a line of JSON that says what the features depend on, then a line a batch

A batch is there once its line is, which is written last. Its thumbnails are in the index's file of thumbnails.
"""

import json
import os
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from photo_search.photos import PhotoFile
from utils.cli import InputError

FEATURES_FILE, PHOTOS_FILE = "unfinished.features", "unfinished.photos"


class ComputedPhoto(NamedTuple):
    """What is known of a photo beside its features."""

    found: PhotoFile
    digest: str  # SHA-256 in hex
    thumbnail: int  # where it begins in the file of thumbnails
    thumbnail_size: int


class PartialIndex:
    """The photos of an index that is being made in `folder`.

    source: what the features depend on, JSON; thumbnails: (path of their file, bytes that an index uses already).
    Raises InputError if what a killed run left there is of another source.
    """

    def __init__(self, folder, source, width, thumbnails):
        self.folder, self.width = folder, width
        self.thumbnails, self.end = thumbnails
        self.photos, self.unreadable = [], {}  # {PhotoFile: why}
        header = json.dumps([source, width, self.thumbnails.name]).encode() + b"\n"
        length = self._read(header)
        with write_errors_as_input_errors(folder):
            with open(folder / PHOTOS_FILE, "ab") as file:
                file.truncate(length)
                if not length:
                    file.write(header)
            for path, length in ((folder / FEATURES_FILE, 4 * width * len(self.photos)), (self.thumbnails, self.end)):
                with open(path, "ab") as file:
                    file.truncate(length)

    def _read(self, header):
        """Read the batches that are whole; returns the length of their lines."""
        try:
            lines = (self.folder / PHOTOS_FILE).read_bytes().splitlines(keepends=True)
            features = np.fromfile(self.folder / FEATURES_FILE, np.float32)
            stored = self.thumbnails.stat().st_size
        except FileNotFoundError:
            return 0
        if not lines or not lines[0].endswith(b"\n"):
            return 0
        if lines[0] != header:
            if _source(lines[0]) == json.loads(header)[:2]:
                return 0  # it came into an index with another file of thumbnails
            raise InputError(
                f"{self.folder}: holds an unfinished index of another checkpoint, model or input size; go on with the "
                "same, or delete the folder"
            )
        features = features[: len(features) // self.width * self.width].reshape(-1, self.width)
        sound = np.abs(np.linalg.norm(features, axis=1) - 1) < 0.01  # a torn disk can leave zeros
        length = len(header)
        for line in lines[1:]:
            photos, unreadable = _batch(line)
            rows = sound[len(self.photos) : len(self.photos) + len(photos or ())]
            end = max([self.end, *(photo.thumbnail + photo.thumbnail_size for photo in photos or ())])
            if photos is None or len(rows) < len(photos) or not rows.all() or end > stored:
                break
            self.photos += photos
            self.unreadable |= unreadable
            self.end, length = end, length + len(line)
        return length

    def add(self, found, rows, digests, thumbnails, unreadable):
        """Add a batch: PhotoFiles, their features (n, width), digests, thumbnails, and unreadable {PhotoFile: why}."""
        photos = []
        for each, digest, thumbnail in zip(found, digests, thumbnails, strict=True):
            photos.append(ComputedPhoto(each, digest, self.end, len(thumbnail)))
            self.end += len(thumbnail)
        line = [[[*photo.found, *photo[1:]] for photo in photos], [[*each, why] for each, why in unreadable.items()]]
        with write_errors_as_input_errors(self.folder):
            for path, content in (
                (self.thumbnails, b"".join(thumbnails)),
                (self.folder / FEATURES_FILE, np.ascontiguousarray(rows, np.float32).tobytes()),
                (self.folder / PHOTOS_FILE, json.dumps(line).encode() + b"\n"),
            ):
                with open(path, "ab") as file:
                    file.write(content)
        self.photos += photos
        self.unreadable |= unreadable

    def rows(self):
        """All features so far, (n, width) float32, mapped."""
        if not self.photos:
            return np.empty((0, self.width), np.float32)
        return np.memmap(self.folder / FEATURES_FILE, np.float32, "r", shape=(len(self.photos), self.width))

    def remove(self):
        """Delete it, once its photos are in the index."""
        (self.folder / PHOTOS_FILE).unlink()
        (self.folder / FEATURES_FILE).unlink()


@contextmanager
def write_errors_as_input_errors(folder):
    """Within this block, which writes the index in `folder`, an OSError becomes an InputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{folder}: the index cannot be kept ({reason}); make room, and start again to go on"
        ) from error


def _source(header):
    """[source, width] of a first line, or None."""
    try:
        return json.loads(header)[:2]
    except (ValueError, TypeError, RecursionError):
        return None


def _batch(line):
    """(photos, unreadable) of a line, (None, None) if it is torn."""
    try:
        photos, unreadable = json.loads(line if line.endswith(b"\n") else b"")
        photos = [ComputedPhoto(_found(*values[:3]), *_kept_as(*values[3:])) for values in photos]
        return photos, {_found(*values[:3]): str(values[3]) for values in unreadable}
    except (ValueError, TypeError, IndexError, RecursionError):
        return None, None


def _found(path, size, mtime):
    if not isinstance(path, str) or not os.path.isabs(path):
        raise ValueError("not a path")
    os.fsencode(path)
    return PhotoFile(path, int(size), int(mtime))


def _kept_as(digest, thumbnail, size):
    if len(bytes.fromhex(digest)) != 32 or min(int(thumbnail), int(size)) < 0:
        raise ValueError("not a photo's record")
    return digest, int(thumbnail), int(size)
