"""What a search returns: a list of hits that a notebook shows with thumbnails; and what it takes as a drawing."""

import base64
import html
import os

import numpy as np
from PIL import Image

from datasets.images import MAX_PIXELS, as_rgb, upright
from utils.cli import InputError, first_line

MAX_SHOWN_ROWS = 200  # of a result in a notebook, which keeps the thumbnails in its file


class SearchResult(list):
    """The search.SearchHits of a query, nearest first. A notebook shows it as a table with thumbnails."""

    def __init__(self, hits, index):
        super().__init__(hits)
        self.index = index

    def __repr__(self):
        lines = [f"{number:4d}  {hit.score:.4f}  {hit.path!r}" for number, hit in enumerate(self[:10], 1)]
        return "\n".join([f"{len(self)} photos of {self.index.name}", *lines, *["   ..."] * (len(self) > 10)])

    def _repr_html_(self):
        """The table as HTML: photo, path, score, distance d and cluster distance D."""
        shown = self[:MAX_SHOWN_ROWS]
        thumbnails = self.index.thumbnails_of([hit.row for hit in shown])
        rows = "".join(map(_html_row, range(1, len(shown) + 1), shown, thumbnails))
        return f"<table><tr><th><th>photo<th>path<th>score<th>d<th>D</tr>{rows}</table>"


def _html_row(number, hit, thumbnail):
    source = base64.b64encode(thumbnail).decode()
    path = html.escape(os.fsencode(hit.path).decode("utf-8", "replace"))
    cluster = "" if hit.cluster_distance is None else f"{hit.cluster_distance:.4f}"
    return (
        f'<tr><td>{number}<td><img alt="" src="data:image/jpeg;base64,{source}"><td><bdi>{path}</bdi>'
        f"<td>{hit.score:.4f}<td>{hit.distance:.4f}<td>{cluster}</tr>"
    )


def image_of(picture):
    """A picture in memory as upright RGB PIL.Image.

    picture: PIL.Image of any mode, or array (height, width) or (height, width, 1, 3 or 4) of uint8, of bool, or of
    floats from 0 (black) to 1. Raises InputError for anything else.
    """
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(_pixels(np.asarray(picture)))
    if not 0 < picture.width * picture.height <= MAX_PIXELS:
        raise InputError(f"{picture.width} × {picture.height} pixels cannot be searched; give a picture of a drawing")
    try:
        picture.load()
        if picture.mode == "RGB" and not picture.info:  # without transparency or EXIF
            return picture
        return as_rgb(upright(picture))
    except Exception as error:  # of a file that is damaged, or closed
        raise InputError(f"the picture cannot be decoded ({first_line(error)}); open it again") from error


def _pixels(array):
    """An array of `image_of` as uint8, (height, width) or (height, width, 3 or 4)."""
    if array.size > 4 * MAX_PIXELS:
        raise InputError(f"an array {array.shape} has too many pixels; give a smaller picture")
    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not is_picture or not array.size or array.dtype.kind not in "buf":
        raise InputError(
            f"an array {array.shape} of {array.dtype} is no picture; give the path of a file, a PIL.Image, or an array "
            "(height, width) or (height, width, 3) of uint8, or of floats from 0 to 1"
        )
    if array.dtype.kind != "u":
        if not (array.min() >= 0 and array.max() <= 1):
            raise InputError("the values of the picture are not from 0 to 1, as those of an array of floats must be")
        array = np.rint(array * 255.0)
    elif array.dtype != np.uint8:
        raise InputError(f"the picture is an array of {array.dtype}; uint8, or floats from 0 to 1, can be searched")
    return np.ascontiguousarray(array.squeeze(2) if array.ndim == 3 and array.shape[2] == 1 else array, np.uint8)
