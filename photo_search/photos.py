"""Finds photos in folders, decodes them upright in bounded time and memory, and makes thumbnails and browser images.

Paths are strings of Python's os module, so bytes that are not UTF-8 are preserved (os.fsencode).
"""

import fnmatch
import io
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from datasets.images import decode_image, suffixes_of_formats, why_unreadable
from datasets.unreadable import HEIF_ADVICE
from utils.cli import InputError
from utils.files import open_regular

# What photos are in that are not decoded, and what reads them.
_RAW_ADVICE = "save them as JPEG in the program that reads them"
UNREAD_SUFFIXES = dict.fromkeys((".heic", ".heif", ".hif"), HEIF_ADVICE) | dict.fromkeys(
    (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f", ".jxl"), _RAW_ADVICE
)
# Folders of systems and of network storage for thumbnails and deleted files; hidden names start with a dot.
_SYSTEM_FOLDERS = {"@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"}
MAX_TIME_NS = (1 << 63) - 1  # nanoseconds, in the year 2262; file systems know later ones

MAX_UPLOAD_BYTES, MAX_UPLOAD_SIDE = 4 << 20, 4096  # of an uploaded picture

PICTURE = "found.png"  # which `find` draws into the folder of the index
THUMBNAIL_SIDE = 192  # pixels of its longer side


def suffixes_of(paths):
    """How many paths have each suffix: a Counter."""
    return Counter(os.path.splitext(path)[1].lower() for path in paths)


class PhotoFile(NamedTuple):
    """A file with the suffix of an image format. It counts as unchanged while all three fields are the same."""

    path: str  # absolute
    size: int  # bytes
    mtime: int  # nanoseconds


@dataclass
class FoundPhotos:
    """What find_photos finds."""

    files: list[PhotoFile] = field(default_factory=list)  # sorted by the bytes of their paths
    unlisted: dict[str, str] = field(default_factory=dict)  # {folder: why it cannot be listed}
    unread: list[str] = field(default_factory=list)  # paths of files with one of UNREAD_SUFFIXES
    hidden: int = 0  # photos and folders that are hidden
    excluded: set[str] = field(default_factory=set)  # patterns that excluded something


class Rules(NamedTuple):
    """Which files find_photos takes."""

    suffixes: frozenset[str]
    exclude: tuple[str, ...]
    hidden: bool
    own: tuple[str, ...]  # paths of the folder of the index, and of the picture of `find` in it


def find_photos(folders, exclude=(), may_be_missing=(), index=None, hidden=False):
    """The FoundPhotos in folders. Symbolic links inside the folders are not followed.

    exclude: glob patterns such as "*.gif", "private" or "2019/raw/*", matched with the name of a file or folder, and
    with its path inside its folder. may_be_missing: those of `folders` that need not exist. index: a folder that is
    left out, since the pictures in it are not photos of the user. hidden: take hidden files and folders as well, and
    those of systems, such as @eaDir.
    Raises InputError for any other folder that does not exist or cannot be read.
    """
    own = (os.path.realpath(index), os.path.realpath(os.path.join(index, PICTURE))) if index else ()
    rules = Rules(frozenset(suffixes_of_formats()), tuple(exclude), hidden, own)
    result, found = FoundPhotos(), {}
    for folder in folders:
        root = os.path.realpath(folder)
        try:
            os.scandir(root).close()
        except OSError as error:
            if folder not in may_be_missing:
                raise InputError(f"{folder}: cannot be searched for photos ({error.strerror}); name a folder") from None
            result.unlisted[folder] = error.strerror
            continue
        rest = [root]
        while rest:
            rest += _look_into(rest.pop(), root, rules, found, result)
    result.files = [found[path] for path in sorted(found, key=os.fsencode)]
    return result


def _look_into(folder, root, rules, found, result):
    """Add the photos of a folder to `found`, all else to the FoundPhotos `result`; returns its subfolders."""
    folders = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                is_folder = entry.is_dir(follow_symlinks=False)
                suffix = os.path.splitext(entry.name)[1].lower()
                if not is_folder and (suffix not in rules.suffixes and suffix not in UNREAD_SUFFIXES):
                    continue
                if not (is_folder or entry.is_file(follow_symlinks=False)) or entry.path in rules.own:
                    continue
                if pattern := _excluding(os.path.relpath(entry.path, root) if rules.exclude else "", rules.exclude):
                    result.excluded.add(pattern)
                elif not rules.hidden and (entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FOLDERS):
                    result.hidden += 1
                elif is_folder:
                    folders.append(entry.path)
                elif suffix in rules.suffixes:
                    about = entry.stat(follow_symlinks=False)
                    time = max(-MAX_TIME_NS, min(about.st_mtime_ns, MAX_TIME_NS))
                    found[entry.path] = PhotoFile(entry.path, about.st_size, time)
                else:
                    result.unread.append(entry.path)
    except OSError as error:  # a folder without permission, or one that has just gone
        result.unlisted[folder] = error.strerror
    return folders


def is_excluded_below(path, root, patterns):
    """Whether patterns exclude a path in the folder `root`, or one of the folders between."""
    parts = os.path.relpath(path, root).split(os.sep)
    return any(_excluding(os.path.join(*parts[:end]), patterns) for end in range(1, len(parts) + 1))


def _excluding(path, patterns):
    """The first of `patterns` that excludes a path inside its folder; None if none does."""
    names = path, os.path.basename(path)
    return next((each for each in patterns if any(fnmatch.fnmatchcase(name, each.rstrip("/")) for name in names)), None)


def read_photo(path, side, truncated=False, file=None):
    """Decode a photo upright as 8-bit RGB (PIL.Image); of an animation its first frame.

    side: of the square that the photo is resized to later. A large JPEG is decoded at a reduced scale of at least four
    times that, which is much faster. truncated: of a file that is cut off, decode what is there. file: the photo, open.
    Raises InputError, with only the reason, if it cannot be decoded.
    """
    try:
        draft_side = max(4 * side, THUMBNAIL_SIDE)
        if file:
            file.seek(0)
        return decode_image(file or path, exif_transpose=True, draft_side=draft_side, truncated=truncated)
    except InputError:
        raise
    except Exception as error:  # a damaged image can fail in any way
        raise InputError(f"not a readable image ({why_unreadable(path, error)})") from error


def thumbnail(image):
    """A PIL.Image as a small JPEG (bytes)."""
    image = image.copy()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
CONVERTED_SIDE = 2048  # pixels of the longer side of a photo that is converted to JPEG


def read_drawing(content):
    """Decode an uploaded picture (bytes) upright as RGB PIL.Image. Raises InputError if unreadable or too large."""
    try:
        return decode_image(io.BytesIO(content), formats=UPLOAD_FORMATS, exif_transpose=True, max_side=MAX_UPLOAD_SIDE)
    except InputError as error:
        raise InputError(f"the picture is too large ({error}); at most {MAX_UPLOAD_SIDE} pixels a side work") from None
    except Exception as error:  # a damaged image can fail in any way
        raise InputError("this is not a readable PNG, JPEG, WebP or GIF picture; choose another") from error


def open_photo(index, row):
    """(media type, open binary file) of a photo for browsers: the file itself, or converted to JPEG.

    Raises FileNotFoundError if it does not exist any more, or is not in the folders of the index; InputError if it
    cannot be decoded. What is not JPEG, PNG, GIF or WebP by its first bytes is converted: SVG can contain scripts.
    """
    path = _inside(index.path(row), index.metadata["folders"])
    try:
        file = open_regular(path)
    except OSError as error:
        raise FileNotFoundError(path) from error
    if kind := _kind(file.read(12)):
        file.seek(0)
        return kind, file
    file.close()
    image = read_photo(path, CONVERTED_SIDE)
    image.thumbnail((CONVERTED_SIDE, CONVERTED_SIDE))
    converted = io.BytesIO()
    image.save(converted, "JPEG", quality=90)
    converted.seek(0)
    return "image/jpeg", converted


def _inside(path, folders):
    """`path` with links resolved. Raises FileNotFoundError unless it is a file in one of `folders`."""
    try:
        real = os.path.realpath(path)
        roots = [os.path.join(os.path.realpath(folder), "") for folder in folders if os.path.isabs(folder)]
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise FileNotFoundError(path) from error
    if not real.startswith(tuple(roots)) or not os.path.isfile(real):
        raise FileNotFoundError(path)
    return real


def _kind(start):
    """The media type of a file by its first 12 bytes; None if it is not one that browsers show safely."""
    if start.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if start.startswith(b"RIFF") and start.endswith(b"WEBP"):
        return "image/webp"
    return None
