"""A picture of sketches, and of the photos that were found for them."""

import io

import numpy as np
from PIL import Image

from utils.files import atomic_write

MAX_DRAWN_SKETCHES, MAX_DRAWN_PHOTOS, COLUMNS = 20, 40, 10  # at most in a picture; photos in a row of it


def draw_found(path, rows):
    """Draw the first sketches, each beside the first of its photos.

    rows: [(name, PIL.Image of the sketch, [(photo as JPEG bytes, score), ...]), ...]. Raises ImportError without
    matplotlib, and InputError if `path` cannot be written.
    """
    from matplotlib.figure import Figure

    lines = [line for row in rows[:MAX_DRAWN_SKETCHES] for line in _lines(*row)]
    columns = 1 + max(len(photos) for _, photos in lines)
    figure = Figure(figsize=(1.25 * columns, 1.5 * len(lines) + 0.2), layout="constrained")
    for axes, (sketch, photos) in zip(figure.subplots(len(lines), columns, squeeze=False), lines, strict=True):
        for axis in axes:
            axis.set_axis_off()
        for axis, shown in zip(axes, [sketch, *photos], strict=False):
            if shown is not None:
                axis.imshow(np.asarray(shown[0]))
                axis.set_title(shown[1], fontsize=8, parse_math=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _lines(name, sketch, photos):
    """The lines of a sketch: [((picture, caption) or None, [(picture, caption), ...]), ...]."""
    sketch = sketch.copy()
    sketch.thumbnail((160, 160))
    shown = [(_decoded(photo), f"{score:.3f}") for photo, score in photos[:MAX_DRAWN_PHOTOS]]
    parts = [shown[start : start + COLUMNS] for start in range(0, len(shown), COLUMNS)]
    name = name.encode("utf-8", "replace").decode()[:24]  # of any bytes
    return [((sketch, name) if number == 0 else None, part) for number, part in enumerate(parts)]


def _decoded(photo):
    try:
        return Image.open(io.BytesIO(photo), formats=["JPEG"]).convert("RGB")
    except Exception:  # a damaged thumbnail can fail in any way, and the path is told all the same
        return Image.new("RGB", (8, 8), "lightgrey")
