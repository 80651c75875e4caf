"""The picture of `find`: every sketch with its photos, whatever their names and thumbnails are."""

import io

import numpy as np
import pytest
from PIL import Image

from photo_search import find_picture
from photo_search.find_picture import CAPTION, CELL, draw_found


def thumbnail(colour, size=(60, 40)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


def drawn(path, rows):
    draw_found(path, rows)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def test_each_sketch_begins_a_line_and_photos_fill_ten_columns(tmp_path):
    sketch = Image.new("RGB", (300, 300), "black")
    photos = [(thumbnail((250, 20 * number, 0)), number / 10) for number in range(12)]
    picture = drawn(tmp_path / "found.png", [("a.png", sketch, photos), ("b.png", sketch, photos[:1])])
    assert picture.shape == (3 * (CELL + CAPTION), 11 * CELL, 3)
    middle = [[picture[line * (CELL + CAPTION) + CELL // 2, column * CELL + CELL // 2] for column in range(11)]
              for line in range(3)]  # fmt: skip
    white = [255] * 3
    assert [line[0].tolist() for line in middle] == [[0] * 3, white, [0] * 3]
    for number in range(12):
        line, column = divmod(number, 10)
        assert np.abs(middle[line][column + 1] - np.array([250, 20 * number, 0])).max() < 8
    assert middle[1][3].tolist() == middle[2][2].tolist() == white
    assert picture[CELL + 2 : CELL + CAPTION, CELL : 2 * CELL].min() < 100  # a caption
    assert sketch.size == (300, 300)


@pytest.mark.parametrize("name", ["", "\n\n\n", "\u202e\x1b[2J", "猫 кот.png", "\udcff.png", "x" * 999])
def test_any_name_and_any_thumbnail_is_drawn(tmp_path, name):
    photos = [(b"no JPEG", 0.5), (thumbnail("red")[:200], 1.25), (thumbnail("red", (1, 192)), float("nan"))]
    drawn(
        tmp_path / "found.png",
        [(name, Image.new("RGB", (2000, 3), "white"), photos), (name, Image.new("RGB", (9, 9)), [])],
    )


def test_long_names_keep_their_beginning():
    font = find_picture.ImageFont.load_default(find_picture.FONT_SIZE)
    fitting = find_picture._fitting("a long name of a sketch, " * 9, font)
    assert fitting.startswith("a long name") and fitting.endswith("...") and font.getlength(fitting) < CELL
    assert find_picture._fitting("bell.png", font) == "bell.png"
