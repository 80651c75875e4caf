"""Drawing on the page in a browser, by real pointers, and pictures instead of strokes."""

import base64
import itertools

import numpy as np
import pytest
from browser import HAND_OVER, hand_over, pixels, selenium
from pages import drawing
from selenium.webdriver.common.keys import Keys

from datasets.prepare.miniature import draw_sketch


def test_a_drawn_bell_finds_bells(visit):
    empty = visit.paper
    assert visit.status == "58 photos" and visit.get("hint").text.startswith("Draw something")
    visit.draw("bell")
    assert visit.paper != empty and not visit.get("hint").is_displayed()
    assert visit.status == "Photos that look like the drawing" and not visit.get("start").is_displayed()
    assert sum("bell" in name for name in visit.names[:5]) >= 3, visit.names
    assert visit.run("return [...list.querySelectorAll('img')].every(image => image.naturalWidth > 0)")


def test_strokes_are_undone_redone_erased_and_cleared(visit):
    empty = visit.paper
    bell = visit.example("bell").paper
    visit.get("eraser").click()
    erased = visit.stroke(((-0.8, 0), (0.8, 0))).wait().paper
    assert visit.get("eraser").get_attribute("aria-pressed") == "true"
    assert erased != bell and (pixels(erased) >= pixels(bell)).all()
    visit.keys(Keys.CONTROL, "z")
    assert visit.paper == bell
    found = visit.names
    visit.click("clear")
    assert visit.paper == empty and visit.names == [] and visit.get("hint").is_displayed()
    assert visit.click("undo").paper == bell and visit.names == found
    assert visit.click("redo").paper == empty and not visit.get("redo").is_enabled()
    visit.keys(Keys.CONTROL, "z").keys(Keys.CONTROL, "z")
    one_less = visit.paper
    assert one_less not in (bell, empty)
    visit.keys(Keys.CONTROL, Keys.SHIFT, "z")
    assert visit.paper == bell


def test_keys_work_wherever_the_focus_is_but_in_a_text(visit):
    visit.stroke().wait()
    width = "return at('width').valueAsNumber"
    before = visit.run(width)
    visit.run("at('clean').focus()")
    selenium.ActionChains(visit.driver).send_keys("]]e").perform()
    assert visit.run(width) == before + 8 and visit.run("return erasing")
    selenium.ActionChains(visit.driver).send_keys("fp").perform()  # f goes to the folder, where p is a letter
    assert visit.run("return erasing && at('folder').value") == "p"
    visit.set("folder", "").run("paper.focus()")
    selenium.ActionChains(visit.driver).send_keys(Keys.DELETE).perform()
    assert visit.wait().names == []


@pytest.mark.parametrize("kind", ["mouse", "touch", "pen"])
def test_a_tap_draws_a_dot_that_is_searched(visit, kind):
    visit.set("width", 30)
    if kind == "mouse":
        visit.stroke([(0, 0)])
    elif kind == "touch":
        visit.touch("Start", (0.5, 0.5))
        visit.touch("End")
    else:
        visit.pen("Pressed", 0.5, 0.5)
        visit.pen("Released", 0.5, 0.5)
    visit.until("return done === 1")
    assert visit.wait().dark == pytest.approx(np.pi / 4 * (1.4 * 30 / 1023 * 1280) ** 2, rel=0.1)
    assert visit.names and visit.status == "Photos that look like the drawing"
    visit.get("eraser").click()
    assert visit.stroke([(0, 0)]).wait().dark == 0 and visit.get("hint").is_displayed()


def test_a_dot_too_small_to_search_asks_for_more(visit):
    visit.set("width", 8).stroke([(0, 0)]).wait()
    assert visit.dark > 0 and visit.names == []
    assert visit.status == "Draw a little more" and not visit.get("status").get_attribute("class")
    (entry,) = visit.driver.get_log("browser")
    assert "400" in entry["message"]


def test_a_pen_takes_over_from_the_palm(visit):
    visit.touch("Start", (0.8, 0.8))
    visit.pen("Pressed", 0.2, 0.2)
    for place in (0.3, 0.4):
        visit.touch("Move", (0.8, place))  # the palm moves, and a finger comes: neither draws, nor ends the line
        visit.pen("Moved", place, place)
    visit.touch("Move", (0.8, 0.5), (0.9, 0.1))
    visit.touch("Cancel")
    visit.pen("Released", 0.4, 0.4)
    visit.until("return done === 1")
    rows, columns = np.nonzero(pixels(visit.wait().paper) < 128)
    assert {rows.min() // 64, columns.min() // 64, rows.max() // 64, columns.max() // 64} == {3, 8}


def test_pressure_widens_the_line_of_a_pen(visit):
    assert not visit.get("pressing").is_displayed()

    def drawn(force):
        visit.pen("Pressed", 0.2, 0.5, force)
        for place in (0.4, 0.6, 0.8):
            visit.pen("Moved", place, 0.5, force)
        visit.pen("Released", 0.8, 0.5, 0)
        visit.until("return visible().length === 1")
        dark = visit.dark
        visit.click("clear")
        return dark

    soft, hard = drawn(0.1), drawn(1)
    assert 1.5 * soft < hard < 3 * soft
    visit.click("pressure")
    assert drawn(0.1) == drawn(1)
    assert soft < drawn(1) < hard


def test_lines_are_smooth_and_corners_stay(visit):
    square = [(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]
    dark = pixels(visit.stroke(square).wait().paper) < 128
    rows, columns = np.nonzero(dark)
    for row, column in itertools.product((rows.min(), rows.max()), (columns.min(), columns.max())):
        near = dark[max(row - 30, 0) : row + 30, max(column - 30, 0) : column + 30]
        assert near.sum() > 100
    visit.click("clear")
    angles = np.linspace(0, 2 * np.pi, 80)
    visit.stroke(np.column_stack([np.cos(angles), np.sin(angles)]))
    rows, columns = np.nonzero(pixels(visit.wait().paper) < 128)
    radius = np.hypot(rows - rows.mean(), columns - columns.mean())
    assert radius.max() - radius.min() < 30  # the line is 23 wide


def sketch_of(name):
    return draw_sketch(name, np.random.default_rng(4))


def test_a_picture_may_come_instead_of_strokes(visit, tmp_path):
    sketch_of("umbrella").save(tmp_path / "umbrella.png")
    visit.get("file").send_keys(str(tmp_path / "umbrella.png"))
    visit.until("return items.length === 1")
    chosen = visit.wait().names
    assert sum("umbrella" in name for name in chosen[:5]) >= 3, chosen
    assert visit.get("as").text == "It is a photo"
    visit.keys(Keys.CONTROL, "z")
    assert visit.names == []
    for number, kind in enumerate(("drop", "paste"), 1):
        content = (tmp_path / "umbrella.png").read_bytes()
        assert hand_over(visit, content, "umbrella.png", "image/png", kind, number).names == chosen
    visit.stroke().wait()
    assert visit.names != chosen and visit.run("return visible().length") == 2
    assert not visit.get("link").is_enabled()


def test_a_photo_is_searched_as_it_is(visit, page_index):
    content = (page_index.parent / "album/fish/fish 5.jpg").read_bytes()
    hand_over(visit, content, "holiday.jpg", "image/jpeg")
    assert visit.names[0] == "fish 5.jpg" and visit.status == "Photos that look like this photo"
    as_photo = visit.names
    assert visit.get("as").text == "It is a drawing"
    assert visit.click("as").names != as_photo and visit.status == "Photos that look like the drawing"
    assert visit.click("as").names == as_photo
    assert visit.reload().names[0] == "fish 5.jpg"
    white = (pixels(visit.paper) == 255).sum()
    visit.stroke().wait()
    edge = (pixels(visit.paper) == 255).sum() - white
    visit.click("as")  # a line on a drawing has no edge
    assert edge > 5000 and abs((pixels(visit.paper) == 255).sum() - white) < 1000


@pytest.mark.parametrize(("form", "type_", "side"), [("PNG", "image/png", 4100), ("BMP", "image/bmp", 100)])
def test_pictures_that_are_not_taken_as_they_are_get_converted(visit, form, type_, side):
    assert len(hand_over(visit, drawing(form, side), "a picture", type_).names) >= 12


SVG = "<svg xmlns='http://www.w3.org/2000/svg' {}><path d='M10 10L70 40L20 70' fill='none' stroke='black'/></svg>"


def test_svg_is_drawn_by_the_browser(visit):
    for number, size in enumerate(("width='80' height='80'", "viewBox='0 0 80 80'", ""), 1):
        hand_over(visit, SVG.format(size).encode(), "x.svg", "image/svg+xml", number=number)
        assert visit.dark > 100 and len(visit.names) >= 12
    found = visit.names
    visit.run(HAND_OVER, "paste", SVG.format(""), None, None)
    visit.until("return items.length === 4")
    assert visit.wait().names == found


def test_what_is_no_picture_is_told(visit):
    visit.stroke().wait()
    found = visit.names
    for content, type_ in ((b"hello", "text/plain"), (b"<svg", "image/svg+xml")):
        visit.run(HAND_OVER, "drop", base64.b64encode(content).decode(), "x.svg", type_)
        visit.until("return at('status').textContent.startsWith('x.svg is not a picture')")
        assert visit.names == found
    visit.run(HAND_OVER, "paste", "hello", None, None)
    visit.until("return at('status').textContent.startsWith('That is no picture')")
    assert visit.names == found
