"""Draws the picture of `find`: each sketch beside its first photos, with their numbers in the table and scores."""

import io

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from utils.files import atomic_write
from utils.pictures import SOFTWARE

MAX_DRAWN_SKETCHES, MAX_DRAWN_PHOTOS, COLUMNS = 20, 40, 10  # at most in a picture; photos in a row of it
CELL, MARGIN, CAPTION, FONT_SIZE = 144, 4, 18, 12  # pixels: a picture with its margins; the line below; its letters


def draw_found(path, rows):
    """Draw the first sketches, each beside the first of its photos, as PNG.

    rows: [(name, PIL.Image of the sketch, [(photo as JPEG bytes, score), ...]), ...]. Raises InputError if `path`
    cannot be written.
    """
    lines = [line for row in rows[:MAX_DRAWN_SKETCHES] for line in _lines(*row)]
    size = (1 + max(len(photos) for _, photos in lines)) * CELL, len(lines) * (CELL + CAPTION)
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(FONT_SIZE)
    draw = ImageDraw.Draw(sheet)
    for line, (sketch, photos) in enumerate(lines):
        for column, (picture, caption) in enumerate([sketch, *photos]):
            left, top = column * CELL, line * (CELL + CAPTION)
            if picture:
                picture.thumbnail((CELL - 2 * MARGIN, CELL - 2 * MARGIN))
                sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
            caption = _fitting(caption, font)
            draw.text((left + (CELL - font.getlength(caption)) / 2, top + CELL), caption, "black", font)
    program = PngInfo()
    program.add_text("Software", SOFTWARE)  # find_results.OWN_PICTURE
    with atomic_write(path) as file:
        sheet.save(file, "PNG", compress_level=1, pnginfo=program)


def _lines(name, sketch, photos):
    """The lines of a sketch: [((picture, caption), [(picture, caption), ...]), ...]; after the first without sketch."""
    shown = [
        (_decoded(photo), f"{number}:  {score:.3f}")
        for number, (photo, score) in enumerate(photos[:MAX_DRAWN_PHOTOS], 1)
    ]
    parts = [shown[start : start + COLUMNS] for start in range(0, len(shown), COLUMNS)] or [[]]
    return [((sketch.copy(), name) if number == 0 else (None, ""), part) for number, part in enumerate(parts)]


def _decoded(photo):
    try:
        return Image.open(io.BytesIO(photo), formats=["JPEG"]).convert("RGB")
    except Exception:  # a damaged thumbnail can fail in any way; the table has the path
        return Image.new("RGB", (8, 8), "lightgrey")


def _fitting(text, font):
    """A text that fits into a cell; the font has no control characters, and no bytes that are not UTF-8."""
    text = "".join(each if each.isprintable() else "?" for each in text)
    while font.getlength(text) > CELL - 2 * MARGIN:
        text = text.removesuffix("...")[:-1] + "..."
    return text
