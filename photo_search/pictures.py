"""The pictures of the drawing page: those that come in, decoded in bounds, and the photos that go out."""

import io
import os

from PIL import Image

from datasets.images import decode_image
from photo_search.photos import read_photo
from utils.cli import InputError

MAX_UPLOAD_BYTES, MAX_UPLOAD_SIDE = 4 << 20, 4096  # of a picture that comes in, at most
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
CONVERTED_SIDE = 2048  # pixels of the longer side of a photo that is converted


def read_drawing(content):
    """A picture that came in (bytes) as an upright RGB PIL.Image. Raises InputError if it is none, or too large."""
    try:
        return decode_image(io.BytesIO(content), formats=UPLOAD_FORMATS, exif_transpose=True, max_side=MAX_UPLOAD_SIDE)
    except (InputError, Image.DecompressionBombError):
        raise InputError(f"the picture is too large; at most {MAX_UPLOAD_SIDE} pixels a side work") from None
    except Exception as error:  # a damaged image can fail in any way
        raise InputError("this is not a readable PNG, JPEG, WebP or GIF picture; choose another") from error


def open_photo(index, row):
    """(media type, open binary file) of a photo, as browsers show it: as it is, or converted to JPEG.

    Raises FileNotFoundError if it is no longer there, or not in the folders of the index; InputError if it cannot be
    shown. SVG, which can hold scripts, is never sent: what is not one of four formats by its first bytes is decoded.
    """
    path = _inside(index.path(row), index.metadata["folders"])
    try:
        file = open(path, "rb")  # noqa: SIM115, whoever asked reads and closes it
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
    """Where `path` leads to. Raises FileNotFoundError unless that is a file in one of `folders`."""
    try:
        real = os.path.realpath(path)
        roots = [os.path.join(os.path.realpath(folder), "") for folder in folders if os.path.isabs(folder)]
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise FileNotFoundError(path) from error
    if not real.startswith(tuple(roots)) or not os.path.isfile(real):
        raise FileNotFoundError(path)
    return real


def _kind(start):
    """The media type of what starts with these 12 bytes; None if it is not one that browsers show safely."""
    if start.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if start.startswith(b"RIFF") and start.endswith(b"WEBP"):
        return "image/webp"
    return None
