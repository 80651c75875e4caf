"""The page in a browser: what it finds, remembers, and shows in windows of every size."""

import os
import re
from pathlib import Path

import pytest
from browser import HARMFUL, NESTED, By, Visit, selenium, served
from pages import EXAMPLES, packed
from selenium.webdriver.common.keys import Keys

from models import export


def test_numbers_are_shown_on_request(visit):
    visit.example("bell")
    parts = visit.driver.find_element(By.CLASS_NAME, "parts")
    words = "one-to|score|distance|≈|Open alone|wait for"
    assert not parts.is_displayed() and not re.search(words, visit.run("return document.body.innerText"))
    visit.get("details").click()
    text = parts.text.replace("\u00a0", " ")
    score, distance, cluster = (float(part.split()[-1]) for part in text.replace(" d", " · d").split("·"))
    assert score == pytest.approx(0.2 * cluster + 0.8 * distance, abs=2e-3)
    assert "0.2 D + 0.8 d" in visit.get("legend").text and "one-to-many" in visit.get("legend").text


def test_the_page_without_pytorch_finds_the_same(visit, page_index, tmp_path):
    pytest.importorskip("onnxscript")
    found = visit.example("bell").names
    path = export.main([str(page_index.parent / "model.pth.tar"), "--to", str(tmp_path / "student.onnx")])
    with served(page_index, "--checkpoint", path, "--backend", "onnx") as address:
        assert Visit(visit.driver, address).open().example("bell").names == found
        visit.driver.get("about:blank")


SCORES = "return found.slice(0, 12).map(each => [each.score, each.distance, each.cluster_distance])"


def test_the_slider_goes_from_one_to_one_to_the_weight_of_the_paper(visit):
    visit.example("bell")
    for weight in (0, 0.8, 0.2):
        for score, distance, cluster in visit.set("weight", weight).run(SCORES):
            assert score == pytest.approx(weight * cluster + (1 - weight) * distance, abs=1e-6)
    before = visit.run(SCORES)
    for as_before in (False, True):
        visit.click("clean")
        assert (visit.run(SCORES) == before) is as_before


def test_a_folder_of_any_depth_is_chosen_by_typing(visit):
    visit.example("bell")
    options = visit.run("return [...at('folders').options].map(each => [each.value, each.label])")
    assert options[0] == ["album", "album (58)"] and [f"album/fish/{NESTED}", f"album/fish/{NESTED} (1)"] in options
    every = visit.names
    visit.get("folder").send_keys("album/fis")
    assert visit.wait().names == every and visit.run("return !at('folder').checkValidity()")
    visit.get("folder").send_keys("h")
    assert all("fish" in name or "copy" in name for name in visit.wait().names) and "in album/fish" in visit.status
    assert visit.run("return found.length") == 14
    assert visit.set("folder", f"album/fish/{NESTED}").names == ["a copy.jpg"]
    assert visit.run("return document.documentElement.scrollWidth <= innerWidth")
    assert visit.reload().names == ["a copy.jpg"]
    visit.get("folder").clear()
    assert visit.wait().names == every


def test_choices_are_remembered_and_part_of_the_link(visit):
    visit.example("bell").set("weight", 0.7).set("width", 40)
    visit.click("clean").get("details").click()
    visit.set("folder", "album/fish")
    found, link = visit.names, visit.driver.current_url
    assert re.search("#d=[^&]+&w=0.7&c=0&f=album%2Ffish$", link)
    visit.open(remembered=True).wait()
    choices = "return [at('weight').value, at('clean').checked, at('folder').value, document.body.className]"
    assert visit.run(choices) == ["0.7", False, "album/fish", "numbers"]
    visit.open(link).wait()
    assert visit.names == found and visit.run(choices) == ["0.7", False, "album/fish", ""]


def test_the_link_brings_the_drawing_back(visit):
    visit.example("bell")
    visit.get("eraser").click()
    visit.stroke(((-0.8, 0), (0.8, 0))).wait()
    before, found, link = visit.paper, visit.names, visit.driver.current_url
    assert len(link) < 1000
    visit.open(link)
    assert visit.wait().names == found and visit.paper == before
    assert visit.click("undo").paper != before
    damaged = visit.paper
    visit.run("location.hash = '#d=AAAA'")
    visit.until("return at('status').textContent.includes('damaged')")
    assert visit.paper == damaged and visit.names


def test_undo_survives_a_reload(visit):
    visit.example("bell").stroke().wait()
    bell = visit.click("undo").paper
    assert visit.reload().paper == bell
    assert visit.click("redo").paper != bell
    visit.click("undo").click("undo")
    assert visit.paper != bell


FRAGMENTS = ["#d=AAAA", "#d=x", "#d=____", "#d=Y2QAAA", "#d=%3Cscript%3E", "#like=x", "#like=abc.1"]


def test_a_damaged_link_leaves_the_paper_empty(visit):
    empty = visit.paper
    visit.open(visit.address + FRAGMENTS[0])
    for number, fragment in enumerate(FRAGMENTS):
        if number:
            visit.run("showMessage(''); location.hash = arguments[0]", fragment)
            visit.until("return at('status').textContent")
        assert visit.paper == empty and visit.names == []
        said = "damaged" if re.match("#(d=|like=x)", fragment) else "earlier index"
        assert said in visit.status, fragment


def test_answers_that_come_late_are_dropped(visit):
    visit.run("""
        const real = fetch;
        window.answers = [];
        window.fetch = (path, options) => path.startsWith("find") && !answers.length
          ? new Promise(resolve => answers.push(() => real(path, {...options, signal: null}).then(resolve)))
          : real(path, options);
    """)
    visit.stroke().until("return answers.length === 1")
    assert visit.status == "Searching …" and visit.get("status").get_attribute("class") == "busy"
    visit.stroke(((-0.5, 0.5), (0.5, 0))).wait()
    found = visit.names
    visit.run("window.shown = 0; new MutationObserver(() => shown++).observe(list, {childList: true});")
    visit.driver.execute_async_script("answers[0]().then(() => setTimeout(arguments[0]))")
    assert visit.names == found and visit.run("return shown") == 0


def test_a_click_opens_a_photo(visit):
    visit.example("fish")
    names = visit.names
    visit.driver.find_elements(By.CLASS_NAME, "photo")[1].click()
    visit.until("return view.naturalWidth === 128")
    assert visit.get("title").text == names[1] and f"album{os.sep}" in visit.get("path").text
    assert visit.run("return document.activeElement.id") == "close" and not visit.get("facts").is_displayed()
    visit.get("viewer").send_keys(Keys.ARROW_RIGHT)
    visit.until("return at('title').textContent === arguments[0]", names[2])
    assert visit.get("save").get_attribute("download") == names[2]
    visit.get("copypath").click()
    visit.until("return at('copypath').textContent === 'Copied'")
    x, y = visit.run(
        "const {left, top, width, height} = view.getBoundingClientRect(); return [left + width / 2, top + 50]"
    )
    for by, expected in ((-80, names[3]), (80, names[2])):
        visit._input("Touch", type="touchStart", touchPoints=[{"x": x, "y": y}])
        visit._input("Touch", type="touchMove", touchPoints=[{"x": x + by, "y": y}])
        visit._input("Touch", type="touchEnd", touchPoints=[])
        visit.until("return at('title').textContent === arguments[0]", expected)
    visit.get("close").click()
    visit.until("return document.activeElement.ariaLabel === arguments[0]", f"3. {names[2]}")


def test_more_like_this_is_shown_left_out_and_mixed_with_strokes(visit):
    bell = visit.example("bell").paper
    names = visit.names
    visit.run("list.querySelectorAll('.more')[2].focus()")
    visit.keys(Keys.ENTER)
    assert names[2] not in visit.names and visit.status == f"Photos like {names[2]}" and visit.paper != bell
    assert visit.run("return [...list.querySelectorAll('.more')].indexOf(document.activeElement)") == 2
    alone, link = visit.names, visit.driver.current_url
    assert re.search(r"#like=\w+\.\d+$", link)
    visit.stroke().wait()
    assert visit.status == f"Photos between {names[2]} and the drawing"
    assert visit.names != alone and names[2] not in visit.names
    mixed, link = visit.names, visit.driver.current_url
    assert visit.reload().names == mixed
    visit.open(link).wait()
    assert visit.names == mixed and visit.status == f"Photos between {names[2]} and the drawing"
    visit.open().example("bell").run("list.querySelectorAll('.more')[2].click()")
    assert visit.wait().click("back").names == names and visit.paper == bell


def test_back_and_forward_of_the_browser_go_from_search_to_search(visit):
    tab = visit.driver.current_window_handle
    visit.driver.switch_to.new_window("tab")  # a full history of 50 loses entries that scripts made
    bell, first = visit.open().example("bell").paper, visit.names
    visit.run("list.querySelectorAll('.more')[2].click()")
    second = visit.wait().names
    visit.run("list.querySelectorAll('.more')[1].click()")
    third, link = visit.wait().stroke().wait().names, visit.driver.current_url
    for by, found in ((-1, second), (-1, first), (1, second), (1, third)):
        visit.run("window.before = turn; history.go(arguments[0])", by)
        visit.until("return turn > before")
        assert visit.wait().names == found
    assert visit.driver.current_url == link
    visit.click("back").click("back")
    assert visit.paper == bell and not visit.get("back").is_displayed()
    visit.driver.close()
    visit.driver.switch_to.window(tab)


def test_copies_are_one_card(visit):
    visit.example("fish").set("folder", "album/fish")
    (card,) = [each for each in visit.driver.find_elements(By.CLASS_NAME, "photo") if "copies" in each.accessible_name]
    assert card.text == "2 copies"
    card.click()
    visit.until("return viewer.open")
    assert {path.split("/")[-1] for path in visit.get("path").text.splitlines()} == {"a copy.jpg", "fish 3.jpg"}


def test_several_photos_are_selected_and_their_list_copied(visit):
    visit.example("bell").get("select").click()
    photos = visit.driver.find_elements(By.CLASS_NAME, "photo")
    for place in (0, 2, 3, 2):
        photos[place].click()
    assert [photo.get_attribute("aria-pressed") for photo in photos[:4]] == ["true", "false", "false", "true"]
    assert visit.run("return paths()") == "".join(photos[place].get_attribute("title") + "\n" for place in (0, 3))
    visit.get("copylist").click()
    visit.until("return at('number').textContent === 'The paths of 2 are copied'")
    visit.get("done").click()
    assert not visit.get("picked").is_displayed() and photos[0].get_attribute("aria-pressed") is None


def test_a_photo_that_is_gone_is_told_in_the_page(visit):
    visit.example("bell")
    path = visit.driver.find_element(By.CLASS_NAME, "photo").get_attribute("title")
    content = Path(path).read_bytes()
    os.remove(path)
    visit.driver.find_element(By.CLASS_NAME, "photo").click()
    visit.until("return !at('trouble').hidden")
    Path(path).write_bytes(content)
    assert visit.get("trouble").text == "this photo does not exist any more; index again to remove it"
    (entry,) = visit.driver.get_log("browser")
    assert "404" in entry["message"]


def test_more_photos_come_as_one_scrolls_in_whole_rows(visit):
    visit.example("bell")
    first, columns = visit.names, visit.run("return columns()")
    assert columns > 2 and len(first) % columns == 0 and 12 <= len(first) < 57
    visit.run("scrollTo(0, 1e6)")
    visit.until("return found.length > arguments[0]", len(first))
    visit.run("scrollTo(0, 1e6)")
    visit.until("scrollTo(0, 1e6); return found.length === 57")  # of 58 photos two are copies
    assert visit.names[: len(first)] == first
    assert HARMFUL in visit.names and visit.driver.title == "Draw, and find photos"
    assert not visit.run("return document.querySelector('[onerror]')")


# A laptop, a low one, a phone in both directions, a small phone, 200 % zoom of a laptop, a large screen.
WINDOWS = [(1280, 800), (1280, 577), (390, 844), (844, 390), (320, 640), (640, 288), (2560, 1300)]
TOOLS = "return [...document.querySelectorAll('.tools button')].filter(each => each.offsetParent)"


@pytest.mark.parametrize(("width", "height"), WINDOWS)
def test_tools_are_in_reach_in_every_window(visit, width, height):
    visit.open(width=width, height=height, dark=height < 600, scale=2).example("bell")
    assert visit.run("return document.documentElement.scrollWidth") <= width
    boxes = visit.run(f"{TOOLS}.concat(paper).map(each => each.getBoundingClientRect().toJSON())")
    assert len(boxes) == 8
    assert all(
        box["left"] >= 0 and box["right"] <= width and 0 <= box["top"] < box["bottom"] <= height for box in boxes
    )
    side, columns = boxes[-1]["width"], visit.run("return columns()")
    assert side >= min(0.5 * height, 0.9 * width) or side >= 0.3 * width
    assert visit.run("return found.length") % columns == 0
    visit.run("scrollTo(0, 700)")
    if width < 560:
        visit.until("return !at('mini').hidden")
        visit.get("mini").click()
        visit.until("return scrollY === 0 && at('mini').hidden && document.activeElement === paper")
    else:
        assert visit.run(f"{TOOLS}.concat(paper).map(each => each.getBoundingClientRect().toJSON())") == boxes
        assert visit.get("mini").get_attribute("hidden")
        right = visit.run("return list.lastElementChild && list.getBoundingClientRect().right")
        assert right > 0.97 * width - 10


def test_the_page_is_made_for_fingers(visit):
    visit.open(width=390, height=844).draw("bell", "touch")
    assert visit.run("return scrollY") == 0  # a finger on the paper draws, and does not scroll
    assert visit.run("return list.getBoundingClientRect().top") < 700
    assert sum("bell" in name for name in visit.names[:5]) >= 3
    assert not visit.run(f"{TOOLS}.filter(each => each.offsetHeight < 40)")


def test_the_paper_stays_white_in_the_dark(visit):
    colour = "return getComputedStyle(document.body).backgroundColor"
    light, paper = visit.run(colour), visit.paper
    visit.open(dark=True)
    assert visit.run(colour) != light and visit.paper == paper


def test_everything_has_a_name_and_a_place_in_the_order_of_the_keyboard(visit):
    visit.example("bell")
    nameless = visit.run("""
        const named = each => each.ariaLabel || each.labels?.[0]?.textContent.trim() || each.textContent.trim();
        const every = [...document.querySelectorAll("button, select, input, canvas, a")];
        return every.filter(each => each.offsetParent && !named(each)).map(each => each.outerHTML);
    """)
    assert nameless == []
    assert visit.get("status").get_attribute("aria-live") == "polite"
    visit.reload()
    order = []
    for _ in range(16):
        selenium.ActionChains(visit.driver).send_keys(Keys.TAB).perform()
        order.append(visit.run("return document.activeElement.id || document.activeElement.className"))
    tools = ["paper", "pen", "eraser", "undo", "clear", "choose", "link", "weight", "width", "clean", "folder"]
    assert order == [*tools, "select", "details", "help", "photo", "more"]


def test_two_tabs_have_a_drawing_each(visit):
    bell = visit.example("bell").set("width", 40).paper
    first = visit.driver.current_window_handle
    visit.driver.switch_to.new_window("tab")
    try:
        other = Visit(visit.driver, visit.address).open(remembered=True)
        assert other.get("width").get_attribute("value") == "40" and other.dark == 0
        fish = other.example("fish").set("width", 20).paper
        visit.driver.switch_to.window(first)
        assert visit.reload().paper == bell and visit.get("width").get_attribute("value") == "20"
        visit.driver.switch_to.window(visit.driver.window_handles[1])
        assert other.reload().paper == fish
    finally:
        visit.driver.close()
        visit.driver.switch_to.window(first)


def test_drawings_to_begin_with_are_those_of_the_miniature(visit):
    assert visit.run("return EXAMPLES") == {name: packed(name) for name in EXAMPLES}
    buttons = visit.driver.find_elements(By.CSS_SELECTOR, "#examples button")
    assert [button.text for button in buttons] == list(EXAMPLES)
    buttons[0].click()
    assert sum("bicycle" in name for name in visit.wait().names[:5]) >= 3
    visit.click("clear")
    assert visit.get("start").is_displayed()


def test_many_strokes_are_drawn_and_kept(visit):
    visit.run("""
        act(...Array.from({length: 500}, (_, i) => ({width: 8, erase: false, points: [2 * i, 0, 1000 - i, 1000]})));
    """)
    before = visit.wait().paper
    assert visit.names and visit.reload().paper == before
