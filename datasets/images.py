"""Image decoding, augmentation and resizing: from a file to an 8-bit array.

The augmentation is that of the release, an affine warp as scikit-image computes it. Images stay uint8 until they are on
the device, where models.networks.normalise converts them to the floating-point batch of the networks.
"""

import functools
import math
import os
import re
import threading
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFile, ImageOps, PngImagePlugin

from datasets.unreadable import is_cut_off, kind_of_damage, kind_of_file
from utils.cli import InputError
from utils.files import open_regular

DRAFT_PIXELS = 1 << 20  # width × height from which a JPEG may be decoded at a reduced scale
MAX_PIXELS = 100_000_000  # width × height of what is decoded: 0.3 GB
MAX_REDUCED_PIXELS = 4 * MAX_PIXELS  # of a JPEG that is decoded at a reduced scale; phones take 200 million
MAX_SCANS = 100  # of a JPEG; each takes the time of decoding the whole image, and encoders write about ten
MAX_PNG_TEXT_BYTES = 64 << 20  # of a text or colour profile in a PNG; Pillow's limit is a 64th of it
# Pillow hands EPS to Ghostscript, which runs programs, and knows the others by name only.
_REFUSED_FORMATS = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "PDF"}


@contextmanager
def no_pillow_warnings():
    """Suppress warnings: Pillow warns about large images, and about damage that does not stop decoding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def suffixes_of_formats():
    """Image formats that are decoded, by suffix: {".jpg": "JPEG", ...}; includes HEIC if pillow-heif is installed."""
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    # MPO, of cameras with two lenses, is a JPEG followed by others.
    names = Image.registered_extensions() | {".mpo": "JPEG"}
    return {suffix: name for suffix, name in names.items() if name in Image.OPEN and name not in _REFUSED_FORMATS}


@functools.cache
def decoded_formats():
    """Names of the formats that are decoded, whatever suffix a file has, in Pillow's order."""
    names = set(suffixes_of_formats().values())
    return tuple(name for name in Image.ID if name in names)


def decode_image(
    source, *, formats=None, exif_transpose=False, draft_side=None, max_pixels=None, max_side=None, truncated=False
):
    """Decode an image of any mode as 8-bit RGB (PIL.Image), see `as_rgb`; of an animation the first frame.

    source: path or binary file; formats: names of the formats that are decoded (default: decoded_formats()).
    exif_transpose: rotate the image upright by its EXIF orientation. draft_side: a JPEG of more than DRAFT_PIXELS is
    decoded at the smallest scale of which both sides are at least this long, in a fraction of the time. truncated: of
    a file that is cut off, decode what is there.
    Raises InputError for an image of more than `max_pixels` (default: MAX_PIXELS), or with a side longer than
    `max_side`, or with more work for the decoder than its size explains, before it is decoded; OSError for a file that
    cannot be read; any exception of Pillow for a damaged image.
    """
    with ExitStack() as files:
        files.enter_context(no_pillow_warnings())
        if isinstance(source, str | os.PathLike):
            source = files.enter_context(open_regular(source))
        image = files.enter_context(_open_image(source, formats))
        full_size, full = image.size, image.width * image.height
        if draft_side and full > DRAFT_PIXELS and _is_jpeg(image):
            image.draft(None, (draft_side, draft_side))
        pixels = image.width * image.height
        if pixels > (max_pixels or MAX_PIXELS) or max(image.size) > (max_side or math.inf) or full > MAX_REDUCED_PIXELS:
            raise InputError("{} × {} pixels are too many".format(*full_size))
        if _is_jpeg(image):
            _check_scans(source, full)
        files.enter_context(_truncated_allowed() if truncated else nullcontext())
        image.load()
        return as_rgb(upright(image) if exif_transpose else image)


def _open_image(source, formats):
    """Image.open(), but for JPEGs of any size, and for PNGs with long texts; formats: None for decoded_formats()."""
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_PNG_TEXT_BYTES
    start = source.read(3)
    source.seek(0)
    if start == b"\xff\xd8\xff" and (formats is None or "JPEG" in formats):
        Image.preinit()
        return Image.OPEN["JPEG"][0](source, None)  # Image.open() refuses what a reduced scale could decode
    if formats is None:  # what most sketches are needs no other plugins, which take long to load
        formats = ("PNG",) if start == b"\x89PN" else decoded_formats()
    try:
        return Image.open(source, formats=formats)
    except Image.DecompressionBombError as error:
        raise InputError(f"{re.search('[0-9]+|$', str(error))[0]} pixels are too many") from None


def _is_jpeg(image):
    return image.format in ("JPEG", "MPO")


def _check_scans(file, pixels):
    """Raise InputError for a JPEG with more scans than encoders write, or with several where they need much memory."""
    position, marker, last, count = file.seek(0), b"\xff\xda", b"", 0
    while block := file.read(1 << 20):
        count += (last + block).count(marker)
        last = block[-1:]
    file.seek(position)
    # Previews and films behind the image have such markers, too: only then the image itself is looked at.
    if count > MAX_SCANS or (count > 1 and pixels > MAX_PIXELS):
        count = _count_scans(file.read())
        file.seek(position)
    if count > MAX_SCANS:
        raise InputError(f"its {count:,} scans would take minutes to decode")
    if count > 1 and pixels > MAX_PIXELS:  # the decoder stores all coefficients until the last scan
        raise InputError(f"{pixels:,} pixels in a progressive JPEG are too many")


_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # of a JPEG, but for those within a scan


def _count_scans(content):
    """Number of the scans of a JPEG (bytes), without those of previews in it and of what follows its end."""
    count, position = 0, 2
    while (found := _MARKER.search(content, position)) and found[1] != b"\xd9":
        count += found[1] == b"\xda"
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return count


_truncated_lock = threading.Lock()


@contextmanager
def _truncated_allowed():
    """Within this block Pillow decodes what is there of a truncated file; its switch is one for the whole process."""
    with _truncated_lock:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def upright(image):
    """A loaded image rotated by its EXIF orientation; as it is where EXIF is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF can fail in any way
        return image


_IN_A_LIST = "fetch it again, or take it out of its list"


def read_rgb(path, exif_transpose=False, draft_side=None, way_out=_IN_A_LIST):
    """Decode an image file as 8-bit RGB (PIL.Image), see `decode_image`; the release ignores the EXIF orientation.

    Raises InputError naming the file if it does not exist, may not be read, is damaged or is no image; it ends with
    the advice `way_out`.
    """
    try:
        return decode_image(path, exif_transpose=exif_transpose, draft_side=draft_side)
    except FileNotFoundError:
        advice = "unpack the data again, or take it out of its list" if way_out == _IN_A_LIST else way_out
        raise InputError(f"{path}: no such image; {advice}") from None
    except PermissionError as error:
        raise InputError(f"{path}: {error.strerror}; change its permissions, or {way_out}") from None
    except Exception as error:  # a damaged image can fail in any way
        raise InputError(f"{path}: not a readable image ({why_unreadable(path, error)}); {way_out}") from error


def why_unreadable(path, error):
    """Why decoding the file at `path` raised `error`, in a few words: "an empty file", "cut off after 50 %"."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if kind := kind_of_file(path):
        return kind
    if is_cut_off(error):
        try:
            return f"cut off after {100 * _share_of_rows(path):.0f} %"
        except Exception:  # a damaged image can fail in any way
            return "cut off"
    return kind_of_damage(error)


def _share_of_rows(path):
    """The share of the rows of a truncated image that are there, 0 to 1."""
    image = decode_image(path, draft_side=256, truncated=True)
    rows = np.asarray(image).reshape(image.height, -1)
    filled = np.flatnonzero((rows != rows[-1, -1]).any(axis=1))  # the decoder leaves the others in one shade
    return (filled[-1] + 1) / image.height if len(filled) else 0.0


def as_rgb(image):
    """A loaded PIL.Image of any mode as 8-bit RGB.

    16-bit grey is scaled to 8 bits, so are integers of 32 bits and floats, by the smallest of 1, 255, 65535 and their
    maximum that is not below them; transparent pixels become white. Pillow's own conversion would clip the former and
    make the latter black.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # 16-bit grey
        return Image.fromarray(_rounded_to_8_bits()[np.asarray(image).clip(0, 65535)]).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, np.float32), nan=0, posinf=0, neginf=0).clip(0)
        highest = max(float(values.max()), 1e-30)
        white = next(white for white in (1, 255, 65535, highest) if highest <= white)
        return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


@functools.cache
def _rounded_to_8_bits():
    """Each number of 16 bits scaled to 8 bits: (65536,) uint8."""
    return ((np.arange(1 << 16) + 128) // 257).astype(np.uint8)


class Augmentation(NamedTuple):
    """Parameters of the augmentation of one image: a horizontal flip, then scale, rotation and translation."""

    flip: bool
    sx: float
    sy: float
    rotation: float  # radians
    tx: float  # pixels
    ty: float


def draw_augmentation(rng):
    """Draw the Augmentation of one image. For 30 % of the images it is None: they stay unchanged.

    rng: numpy Generator.
    """
    if rng.random() >= 0.7:
        return None
    flip = rng.random() < 0.5
    sx, sy = rng.uniform(0.7, 1.3, size=2) if rng.random() < 0.5 else (1.0, 1.0)
    rotation = math.radians(rng.uniform(-30, 30)) if rng.random() < 0.5 else 0.0
    tx, ty = rng.uniform(-10, 10, size=2) if rng.random() < 0.5 else (0.0, 0.0)
    return Augmentation(flip, sx, sy, rotation, tx, ty)


def warp(image, augmentation):
    """Apply an Augmentation to an RGB image (bilinear). The size stays the same; pixels outside the image are black.

    A flipped image is mirrored first. Then the point (x, y) moves to x' = sx·cos·x − sy·sin·y + tx and
    y' = sx·sin·x + sy·cos·y + ty, where (0, 0) is the centre of the top-left pixel.
    """
    flip, sx, sy, rotation, tx, ty = augmentation
    if flip:
        image = ImageOps.mirror(image)
    if (sx, sy, rotation, tx, ty) == (1, 1, 0, 0, 0):
        return image
    cos, sin = math.cos(rotation), math.sin(rotation)
    # Pillow takes the inverse map, output to input: scale⁻¹ · rotation⁻¹ · (p − t).
    a, b = cos / sx, sin / sx
    d, e = -sin / sy, cos / sy
    c, f = -(a * tx + b * ty), -(d * tx + e * ty)
    # Pillow also counts from the corner of a pixel, not from its centre: half a pixel more on both sides. Pillow cuts
    # an image off at its edge, while scikit-image lets it fade into the black outside; a black border of one pixel has
    # the same effect.
    c, f = c + 0.5 - 0.5 * (a + b) + 1, f + 0.5 - 0.5 * (d + e) + 1
    return ImageOps.expand(image, 1).transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR
    )


def augment_as_release(image, rng, is_photo):
    """The release's augmentation of an RGB image, the same for sketches and photos: see draw_augmentation and warp."""
    augmentation = draw_augmentation(rng)
    return image if augmentation is None else warp(image, augmentation)


def augment_strongly(image, rng, is_photo):
    """Random crop, horizontal flip, rotation of sketches and colour jitter of photos, of an RGB image.

    The crop has 35 to 100 % of a photo's area or 60 to 100 % of a sketch's, as far as the image's sides allow, and an
    aspect ratio from 3:4 to 4:3. Sketches are rotated by up to 15 degrees before, with white outside; brightness,
    contrast and saturation of photos are scaled by 0.6 to 1.4.
    """
    if not is_photo:
        image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, fillcolor="white")
    (width, height), ratio = image.size, math.exp(rng.uniform(-0.29, 0.29))
    area = width * height * rng.uniform(0.35 if is_photo else 0.6, 1)
    w, h = min(width, round(math.sqrt(area * ratio))), min(height, round(math.sqrt(area / ratio)))
    left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    image = image.crop((left, top, left + w, top + h))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color) if is_photo else ():
        image = enhancer(image).enhance(rng.uniform(0.6, 1.4))
    return image


# Functions of (RGB image, numpy Generator, whether it is a photo) that return the augmented RGB image.
AUGMENTATIONS = {"release": augment_as_release, "strong": augment_strongly}


def resize(image, size):
    """Resize a PIL.Image (bilinear, antialiased); returns a (3, size, size) uint8 array, channels last in memory."""
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(image).transpose(2, 0, 1)


def stack(images):
    """Stack images (3, H, W) as one (B, 3, H, W), channels last in memory, which is what the networks take."""
    return np.stack([image.transpose(1, 2, 0) for image in images]).transpose(0, 3, 1, 2)
