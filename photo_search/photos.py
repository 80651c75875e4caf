"""Photos in a user's folders: found, decoded upright in bounded time and memory, and as thumbnails.

Paths are texts as Python's os module gives them, so those that are not valid text survive (os.fsencode).
"""

import fnmatch
import io
import os
from typing import NamedTuple

from PIL import Image

from datasets.images import decode_image
from utils.cli import InputError

MAX_PIXELS = 100_000_000  # pixels that are decoded: 0.3 GB
THUMBNAIL_SIDE = 192  # pixels of its longer side
# Pillow hands EPS to Ghostscript, which runs programs, and knows the others by name only.
_REFUSED = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "PDF"}


class PhotoFile(NamedTuple):
    """A file that is named like an image. It is the same as long as all three are."""

    path: str  # absolute
    size: int  # bytes
    mtime: int  # nanoseconds


def decodable_formats():
    """The formats that are decoded: {".jpg": "JPEG", ...}, HEIC among them where pillow-heif is installed."""
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    names = Image.registered_extensions()
    return {suffix: name for suffix, name in names.items() if name in Image.OPEN and name not in _REFUSED}


def find_photos(folders, exclude=()):
    """([PhotoFile, ...] in the order of their paths' bytes, ["path: why it cannot be read", ...]).

    Links inside the folders are not followed: what they lead to is found where it is, or lies outside.
    exclude: patterns such as "*.gif", "private" or "2019/raw/*". One that fits a name, or a path inside its folder,
    leaves that file or folder out. Raises InputError for a folder that is not there or cannot be read.
    """
    suffixes, found, troubles = frozenset(decodable_formats()), {}, []
    for folder in folders:
        root = os.path.realpath(folder)
        try:
            os.scandir(root).close()
        except OSError as error:
            raise InputError(f"{folder}: cannot be searched for photos ({error.strerror}); name a folder") from None
        rest = [root]
        while rest:
            rest += _look_into(rest.pop(), root, (suffixes, exclude), found, troubles)
    return [found[path] for path in sorted(found, key=os.fsencode)], sorted(troubles)


def _look_into(folder, root, rules, found, troubles):
    """Add what a folder holds to `found` and `troubles`; returns the folders in it."""
    (suffixes, exclude), folders = rules, []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_excluded(os.path.relpath(entry.path, root) if exclude else "", exclude):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file(follow_symlinks=False) and os.path.splitext(entry.name)[1].lower() in suffixes:
                    about = entry.stat(follow_symlinks=False)
                    found[entry.path] = PhotoFile(entry.path, about.st_size, about.st_mtime_ns)
    except OSError as error:  # a folder without permission, or one that has just gone
        troubles.append(f"{folder}: {error.strerror}")
    return folders


def _is_excluded(path, patterns):
    return any(
        fnmatch.fnmatchcase(each, pattern.rstrip("/"))
        for pattern in patterns
        for each in (path, os.path.basename(path))
    )


def read_photo(path, side):
    """Decode a photo upright as 8-bit RGB (PIL.Image); of a film its first picture.

    side: of the square that the photo is then resized to. A large JPEG is decoded at a scale that keeps four times as
    many pixels each way, in a fraction of the time. Raises InputError, with the reason alone, if it cannot be decoded.
    """
    known = sorted(set(decodable_formats().values()))
    try:
        return decode_image(
            path,
            formats=known,
            exif_transpose=True,
            draft_side=max(4 * side, THUMBNAIL_SIDE),
            max_pixels=MAX_PIXELS,
        )
    except InputError:
        raise
    except OSError as error:
        raise InputError(error.strerror or "not a readable image") from None
    except Exception as error:  # a damaged image can fail in any way
        raise InputError(f"not a readable image, {type(error).__name__}") from error


def thumbnail(image):
    """A PIL.Image as a small JPEG (bytes)."""
    image = image.copy()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
