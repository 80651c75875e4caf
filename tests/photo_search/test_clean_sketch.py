"""Drawings cleaned up: paper, size and lines come out the same, however the drawing went in."""

import numpy as np
import pytest
from albums import FakeEncoder, update, write_album
from PIL import Image, ImageChops, ImageDraw
from scipy import ndimage

from datasets.images import resize, stack
from photo_search.clean_sketch import (
    DRAWING_SIDE,
    LINE_WIDTH,
    PAPER_SIDE,
    SUPERSAMPLING,
    WORK_SIDE,
    _dilate,
    clean_up,
    framed,
    ink_of,
    peeled,
    thinned,
)
from photo_search.index import open_index
from photo_search.search import Searcher, read_sketch
from utils.cli import InputError


def drawing(side=256, width=3, scale=1.0, at=(0, 0), colour="black", paper="white", size=None):
    """A face: a circle with two eyes, a nose of one stroke and a mouth, 200 × 200 before it is scaled and moved."""
    image = Image.new("RGB", size or (side, side), paper)
    draw = ImageDraw.Draw(image)

    def place(*numbers):
        return [scale * number + at[index % 2] for index, number in enumerate(numbers)]

    draw.ellipse(place(28, 28, 228, 228), outline=colour, width=width)
    draw.ellipse(place(80, 80, 110, 110), outline=colour, width=width)
    draw.ellipse(place(150, 80, 180, 110), outline=colour, width=width)
    draw.line(place(128, 110, 128, 150), fill=colour, width=width)
    draw.arc(place(80, 110, 180, 195), 20, 160, fill=colour, width=width)
    return image


def speck():
    image = Image.new("RGB", (256, 256), "white")
    image.putpixel((40, 50), (0, 0, 0))
    return image


def dark(image):
    return np.asarray(image.convert("L")) < 128


def box(drawn):
    """(top, bottom, left, right) of the pixels that are drawn."""
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def line_width(drawn):
    """Twice the area by the length of the edge, which is counted along both axes."""
    edge = (drawn[1:] != drawn[:-1]).sum() + (drawn[:, 1:] != drawn[:, :-1]).sum()
    return 2 * drawn.sum() / (edge * np.pi / 4)


def topology(drawn):
    """(parts, holes with what is around)."""
    return ndimage.label(drawn, np.ones((3, 3)))[1], ndimage.label(~np.pad(drawn, 1))[1]


def overlap(one, other):
    """Share of drawn pixels that lie within two pixels of one of the other drawing, the lesser of both ways."""
    near = [ndimage.distance_transform_edt(~each) <= 2 for each in (one, other)]
    return min((one & near[1]).sum() / one.sum(), (other & near[0]).sum() / other.sum())


def photographed(image, seed=0, noise=6, slope=0.5, shadow=0.3, tint=(0.85, 0.8, 0.7)):
    """A sheet of tinted paper in light that falls off to the right, its lower half in shadow, with noise."""
    random = np.random.default_rng(seed)
    values = np.asarray(image, np.float64) * tint
    values *= np.linspace(1, 1 - slope, image.width)[None, :, None]
    values *= 1 - shadow * np.linspace(-20, 20, image.height).clip(0, 1)[:, None, None]
    values += random.normal(0, noise, values.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def test_a_drawing_like_those_of_sketchy_hardly_changes():
    image = drawing()
    before, after = dark(image), dark(clean_up(image))
    assert clean_up(image).size == image.size and clean_up(image).mode == "RGB"
    assert overlap(before, after) > 0.99
    assert line_width(after) == pytest.approx(line_width(before), rel=0.1)


def test_it_is_deterministic_and_leaves_its_input_alone():
    image = photographed(drawing(width=8))
    copy = image.copy()
    first, second = clean_up(image), clean_up(image)
    assert first.tobytes() == second.tobytes() and image.tobytes() == copy.tobytes()


@pytest.mark.parametrize("spoilt", [
    lambda image: photographed(image), lambda image: photographed(image, shadow=0, slope=0.6, noise=10),
    lambda image: photographed(image, tint=(0.5, 0.5, 0.5)), ImageChops.invert,
    lambda image: photographed(ImageChops.invert(image), slope=0.2, shadow=0, noise=4, tint=(1, 1, 1)),
])  # fmt: skip
@pytest.mark.parametrize("colour", ["black", (20, 40, 160), (170, 30, 30)])
def test_paper_becomes_white_whatever_it_was(spoilt, colour):
    wanted = dark(clean_up(drawing(colour="black")))
    cleaned = clean_up(spoilt(drawing(colour=colour)))
    assert overlap(dark(cleaned), wanted) > 0.98
    away = ndimage.distance_transform_edt(~wanted) > 5
    assert np.asarray(cleaned.convert("L"))[away].mean() > 253


@pytest.mark.parametrize(("ruled", "colour"), [(210, "black"), (190, (30, 40, 110))])
def test_ruled_paper_becomes_white(ruled, colour):
    sheet = np.full((512, 512, 3), 240, np.uint8)
    sheet[20::40] = ruled, ruled + 20, 235
    sheet = Image.fromarray(sheet)
    image = ImageChops.darker(sheet, drawing(512, width=6, scale=2, colour=colour))
    cleaned, wanted = clean_up(image), dark(clean_up(drawing(512, width=6, scale=2)))
    assert overlap(dark(cleaned), wanted) > 0.98
    assert np.asarray(cleaned)[ndimage.distance_transform_edt(~wanted) > 5].min() == 255


def test_a_filled_shape_stays_filled():
    image = drawing()
    ImageDraw.Draw(image).ellipse([60, 60, 200, 200], fill="black")
    assert dark(clean_up(image))[100:156, 100:156].all()
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).ellipse([60, 60, 200, 160], fill="black")
    assert dark(clean_up(image)).mean() == pytest.approx(
        np.pi / 4 * DRAWING_SIDE * DRAWING_SIDE / 1.4 / PAPER_SIDE**2, rel=0.03
    )


@pytest.mark.parametrize(("scale", "at", "size"), [
    (0.5, (10, 120), (256, 256)), (0.3, (300, 20), (400, 300)), (2, (1200, 300), (2000, 1000)),
    (1, (-20, -20), (216, 400)), (12, (500, 900), (4096, 4096)),
])  # fmt: skip
def test_size_and_place_come_out_the_same(scale, at, size):
    image = drawing(width=max(1, round(3 * scale)), scale=scale, at=at, size=size)
    cleaned = dark(clean_up(image))
    top, bottom, left, right = box(cleaned)
    assert max(bottom - top, right - left) == pytest.approx(DRAWING_SIDE, abs=4)
    assert (top + bottom) / 2 == pytest.approx(PAPER_SIDE / 2, abs=2) and (left + right) / 2 == pytest.approx(
        PAPER_SIDE / 2, abs=2
    )
    assert overlap(cleaned, dark(clean_up(drawing()))) > 0.97


def test_the_longer_side_counts_and_the_shape_is_kept():
    image = Image.new("RGB", (600, 200), "white")
    ImageDraw.Draw(image).rectangle([50, 60, 549, 159], outline="black", width=4)
    top, bottom, left, right = box(dark(clean_up(image)))
    assert (right - left, bottom - top) == (pytest.approx(DRAWING_SIDE, abs=2), pytest.approx(DRAWING_SIDE / 5, abs=2))


def test_specks_do_not_count_as_drawn():
    image = drawing(scale=0.5, at=(100, 100))
    clean = clean_up(image)
    for place in ((3, 3), (250, 9), (8, 250)):
        image.putpixel(place, (0, 0, 0))
    assert box(dark(clean_up(image))) == box(dark(clean))


@pytest.mark.parametrize("width", [6, 9, 13])
def test_thick_lines_become_thin_and_stay_whole(width):
    ink = framed(ink_of(drawing(512, width=2 * width, scale=2)))
    lines = thinned(ink) > 0.5
    assert line_width(lines) / SUPERSAMPLING == pytest.approx(LINE_WIDTH, abs=0.5)
    assert topology(lines) == topology(ink > 0.5) and topology(lines)[1] == 4
    assert ndimage.distance_transform_edt(ink <= 0.5)[lines].max() <= 2  # nothing is drawn elsewhere
    assert ndimage.distance_transform_edt(~lines)[ink > 0.5].max() <= 2 * width  # or has gone


def test_thin_lines_stay_thin():
    ink = framed(ink_of(drawing(width=1)))
    assert thinned(ink) is ink


def plainly_peeled(drawn):
    """One round of Zhang and Suen's thinning, pixel by pixel, as their paper has it."""
    drawn = np.pad(drawn, 1)
    for turn in range(2):
        goes = []
        for y, x in zip(*np.nonzero(drawn), strict=True):
            around = [
                int(drawn[y + dy, x + dx])
                for dy, dx in ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
            ]
            p2, p4, p6, p8 = around[::2]
            steps = sum(a == 0 and b == 1 for a, b in zip(around, [*around[1:], p2], strict=True))
            sides = (p2 * p4 * p6, p4 * p6 * p8) if turn == 0 else (p2 * p4 * p8, p2 * p6 * p8)
            if 2 <= sum(around) <= 6 and steps == 1 and sides == (0, 0):
                goes.append((y, x))
        for place in goes:
            drawn[place] = False
    return drawn[1:-1, 1:-1]


def test_peeling_is_that_of_zhang_and_suen():
    drawn = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(60, 60)), 2) > 0.02
    expected = drawn
    for times in range(4):
        assert np.array_equal(peeled(drawn, times), expected)
        expected = plainly_peeled(expected)
    assert drawn.sum() > 1.5 * expected.sum()


def test_large_pictures_are_looked_at_at_a_reduced_size():
    assert ink_of(drawing(4096, width=40, scale=16)).shape == (WORK_SIDE, WORK_SIDE)
    assert ink_of(Image.new("RGB", (4000, 2), "white")).shape == (1, WORK_SIDE)


@pytest.mark.parametrize("image", [
    Image.new("RGB", (64, 64), "white"), Image.new("RGB", (1, 1), "black"), speck(),
    photographed(Image.new("RGB", (300, 200), "white")),
    photographed(Image.new("RGB", (300, 200), "white"), slope=0.7, noise=0, shadow=0),
])  # fmt: skip
def test_a_sheet_without_lines_is_refused(image):
    with pytest.raises(InputError, match=r"^page.png: no line differs from the paper; .*on light paper$"):
        clean_up(image, "page.png")


def test_a_finder_cleans_up_unless_told_not_to(tmp_path):
    network = Seeing()
    update(tmp_path / "index", network, write_album(tmp_path / "album"))
    searcher, image = Searcher(open_index(tmp_path / "index"), network), drawing(width=8)
    cleaned = searcher.find(image)
    assert network.images[-1].tobytes() == clean_up(image).tobytes()
    as_drawn = searcher.find(image, as_drawn=True)
    assert network.images[-1] is image and cleaned != as_drawn
    assert searcher.find(clean_up(image), as_drawn=True) == cleaned
    with pytest.raises(InputError, match="the sketch: no line"):
        searcher.find(Image.new("RGB", (9, 9), "white"))


class Seeing(FakeEncoder):
    """Keeps the drawings whose features were asked for."""

    def __init__(self):
        super().__init__()
        self.images = []

    def features(self, images):
        self.images += images
        return self.embed(stack([resize(image, 32) for image in images]))


def test_a_photographed_sketch_is_rotated_upright(tmp_path):
    image, exif = Image.new("L", (60, 20), "white"), Image.Exif()
    image.paste(0, (0, 0, 20, 20))
    exif[0x0112] = 6  # rotate clockwise
    image.save(tmp_path / "sketch.jpg", exif=exif)
    upright = np.asarray(read_sketch(tmp_path / "sketch.jpg").convert("L"))
    assert upright.shape == (60, 20) and upright[:18].mean() < 20 and upright[22:].mean() > 235


def test_lines_are_dilated_by_a_disc():
    rng = np.random.default_rng(0)
    for share in (0.01, 0.2, 0.9):
        drawn = rng.random((40, 50)) < share
        for radius in (0, 1, 2.3, 5):
            within = ndimage.distance_transform_edt(~drawn) <= radius
            np.testing.assert_array_equal(_dilate(drawn, radius), within)
