"""Normalises drawings of users to the form of the training sketches, those of Sketchy: paper, size and line width.

Sketchy's are 256 × 256: black lines on white paper, 2.5 to 3 pixels wide; the longer side of nine in ten drawings is 80
to 235 pixels, at any position. Drawings of users may be photos of a sheet in bad light, thick, small, or white on
black.
The effect of each step is measured in benchmarks/sketches.py. Needs Pillow and SciPy.
"""

import functools

import numpy as np
from PIL import Image
from scipy import ndimage

from utils.cli import InputError

PAPER_SIDE = 256  # pixels of the paper
DRAWING_SIDE = 200  # pixels of the longer side of a drawing
LINE_WIDTH = 2.8  # pixels of a line
SUPERSAMPLING = 2  # lines are drawn at this multiple of the final size
FILLED_SHARE = 1 / 8  # of a drawing's longer side; wider strokes are filled shapes, not lines
MAX_THINNING_STEPS = 40
WORK_SIDE = 1024  # pixels of the longer side of the image that is analysed
MIN_PAPER_BRIGHTNESS = 0.25  # of paper in a shadow, as a share of the brightest
MIN_LINE_SHARE = 1 / 16  # pixels of a line, as a share of the longer side
MIN_LINE_CONTRAST = 0.08  # to the paper, of lines


def clean_up(image, name="the sketch"):
    """Normalise a drawing's paper, size and line width: PIL.Image, RGB, PAPER_SIDE × PAPER_SIDE.

    image: PIL.Image, RGB, of any size. Larger images than WORK_SIDE take no more time. Raises InputError, which
    names the drawing `name`, if no line differs from the paper.
    """
    ink = ink_of(image)
    if not _drawn(ink).any():
        raise InputError(f"{name}: no line differs from the paper; draw dark lines on light paper")
    return picture_of(thinned(framed(ink)))


def looks_like_photo(image):
    """Whether a picture (PIL.Image, RGB) is a photo rather than a drawing, by the rule of page_paper.js.

    More than a 20th of it has another colour than its brightest quarter, which is paper in a drawing, or a quarter is
    darker than what is bright beside it. Hardly any drawing is a photo by this; 95 % of photos are.
    """
    side, block = 64, 8
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32)
    pixels = 255 - pixels if np.median(pixels.mean(axis=2)) < 90 else pixels
    grey = pixels.mean(axis=2)
    tint = np.maximum(pixels[grey >= np.quantile(grey, 0.75)].mean(axis=0), 30)
    coloured = np.ptp(pixels / tint, axis=2) > 0.15
    blocks = grey.reshape(side // block, block, -1, block).swapaxes(1, 2).reshape(-1, block * block)
    paper = np.maximum(np.quantile(blocks, 0.85, axis=1, keepdims=True), 30)
    return bool(coloured.mean() > 0.05 or (1 - blocks / paper > 0.12).mean() > 0.25)


def ink_of(image):
    """The darkness of a drawing (PIL.Image, RGB) relative to its paper: (H, W) float32, 0 (paper) to 1 (line).

    The paper may have any colour, be lit unevenly, or be dark with light lines. The longer side has at most WORK_SIDE
    pixels.
    """
    image = image.copy()
    image.thumbnail((WORK_SIDE, WORK_SIDE), Image.Resampling.BOX)
    grey = np.asarray(image, np.float32).mean(axis=2)
    # Closing removes what is narrower than its window (lines), and preserves slopes and edges of shadows.
    window = max(grey.shape) // 8 | 1
    grey = 255 - grey if _is_dark(grey, 2 * window + 1) else grey
    blurred = np.pad(ndimage.gaussian_filter(grey, 2), window, mode="edge")
    paper = ndimage.grey_closing(blurred, (window, window))[window:-window, window:-window]
    paper = np.maximum(
        paper, MIN_PAPER_BRIGHTNESS * np.percentile(grey, 95)
    )  # a filled shape may be wider than the window
    darker = paper - ndimage.gaussian_filter(grey, 0.5)
    noise = 1.5 * np.median(np.abs(darker))  # its deviation, if less than half of the sheet is drawn on
    contrast = (darker - 3 * noise).clip(min=0) / np.maximum(paper, 1)
    lines = contrast[contrast > MIN_LINE_CONTRAST]
    if not lines.size:
        return contrast * 0
    # Noise and ruling are far from half as dark as lines are.
    return np.clip(2 * contrast / np.percentile(lines, 90) - 0.5, 0, 1)


def _is_dark(grey, window):
    """Whether lines are lighter than the paper: the differences to the local mean are then skewed to the light."""
    difference = grey - ndimage.uniform_filter(grey, window, mode="nearest")
    return (difference**3).mean() > 0.5 * (difference**2).mean() ** 1.5


def framed(ink):
    """The drawing in ink (H, W) cropped and centred: (SUPERSAMPLING · PAPER_SIDE)² float32.

    Its longer side is DRAWING_SIDE of PAPER_SIDE pixels.
    """
    rows, columns = ndimage.find_objects(_drawn(ink).astype(np.int8))[0]
    half = max(rows.stop - rows.start, columns.stop - columns.start) * PAPER_SIDE / DRAWING_SIDE / 2
    middle = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
    pad = int(half) + 1
    box = [pad + each + sign * half for sign in (-1, 1) for each in middle]
    image = Image.fromarray(np.pad(ink, pad)).resize(
        (SUPERSAMPLING * PAPER_SIDE, SUPERSAMPLING * PAPER_SIDE), Image.Resampling.BICUBIC, box=box
    )
    return np.asarray(image).clip(0, 1)


def _drawn(ink):
    """The mask of the drawing in ink (H, W): bool. Components far smaller than the largest one are dirt."""
    parts, count = ndimage.label(ink > 0.25, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    largest = sizes.max()
    return (sizes >= largest / 50)[parts] & (largest >= MIN_LINE_SHARE * max(ink.shape)) & (parts > 0)


def thinned(ink):
    """`framed` ink with thicker lines thinned to LINE_WIDTH. Thin lines are not changed: networks recognise them."""
    drawn = ink > 0.5
    depth = ndimage.distance_transform_edt(np.pad(drawn, 1))[1:-1, 1:-1]
    width = 2 * np.median(depth[drawn & (depth == ndimage.maximum_filter(depth, 3))]) - 1
    if not SUPERSAMPLING * (LINE_WIDTH + 1) < width < SUPERSAMPLING * DRAWING_SIDE * FILLED_SHARE:
        return ink
    # Lines shrink to one pixel, thicker shapes by the same amount.
    left = peeled(drawn, min(MAX_THINNING_STEPS, round(1.5 * width))) | (depth > width / 2 + 1)
    return _dilate(left, (SUPERSAMPLING * LINE_WIDTH - 1) / 2).astype(np.float32)


def _dilate(drawn, radius):
    """Dilate a mask (H, W) bool by a disc of `radius` pixels."""
    reach = int(radius)
    padded = np.pad(drawn, reach)
    near = np.zeros_like(drawn)
    height, width = drawn.shape
    for y, x in np.ndindex(2 * reach + 1, 2 * reach + 1):
        if (y - reach) ** 2 + (x - reach) ** 2 <= radius**2:
            near |= padded[y : y + height, x : x + width]
    return near


def peeled(drawn, times):
    """Remove the boundary pixels of lines (H, W) bool `times` times; lines stay connected and at least one pixel wide.

    Source: Zhang and Suen, A fast parallel algorithm for thinning digital patterns, 1984.
    """
    left = np.pad(drawn, 1).astype(np.uint8)
    flat, below = left.reshape(-1), left.shape[1]  # steps from a pixel to its neighbours, clockwise from the one above
    steps = (-below, 1 - below, 1, below + 1, below, below - 1, -1, -below - 1)
    pixels = np.flatnonzero(flat)
    for _ in range(times):
        before = len(pixels)
        for is_removed in _removal_tables():
            neighbours = np.zeros(len(pixels), np.uint8)
            for bit, step in enumerate(steps):
                neighbours |= flat[pixels + step] << bit
            removed = is_removed[neighbours]
            flat[pixels[removed]] = 0
            pixels = pixels[~removed]
        if len(pixels) == before:
            break
    return left[1:-1, 1:-1] > 0


@functools.cache
def _removal_tables():
    """Which pixels are removed, by their neighbours (bit 0: above, then clockwise): (2, 256) bool, used in turn."""
    tables = np.zeros((2, 256), bool)
    for code in range(256):
        around = [code >> bit & 1 for bit in range(8)]
        above, right, below, left = around[::2]
        begins = sum(around[bit - 1] < around[bit] for bit in range(8))
        if 2 <= sum(around) <= 6 and begins == 1:
            tables[:, code] = not (right and below and (above or left)), not (above and left and (right or below))
    return tables


def picture_of(ink):
    """Ink (SUPERSAMPLING · PAPER_SIDE)², 0 to 1, as black on white: PIL.Image, RGB, PAPER_SIDE × PAPER_SIDE."""
    return Image.fromarray((255 - 255 * ink).round().astype(np.uint8)).reduce(SUPERSAMPLING).convert("RGB")
