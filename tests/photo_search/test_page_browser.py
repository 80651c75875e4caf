"""The page in a browser: drawn on by a real pointer, it shows photos of what is drawn."""

import base64
import http.client
import http.server
import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import EXAMPLES, drawing, packed
from pages import served as served_here
from PIL import Image

import search_photos
from datasets.images import resize, stack
from datasets.prepare.drawings import CATEGORIES
from datasets.prepare.miniature import draw_photo, draw_sketch
from models import export
from models.checkpoints import save_checkpoint
from models.networks import Student, create_backbone, normalise
from photo_search.server import ReloadingIndex

ROOT = Path(__file__).resolve().parent.parent.parent
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not BROWSER or not DRIVER, reason="chromium and chromium-driver are not installed")
selenium = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.actions.action_builder import ActionBuilder  # noqa: E402
from selenium.webdriver.common.actions.pointer_input import PointerInput  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

NAMES, SIZE = ("bell", "bicycle", "fish", "umbrella"), 48
SKETCHES, PHOTOS = 30, 14  # of each
NESTED = "Summer سمكة"
HARMFUL = "<img src=x onerror=document.title='owned'>.jpg"


def learnt(photos):
    """A very small network that tells sketches of the four categories apart, and `photos`: {name: images}."""
    torch.manual_seed(0)
    student, rng = Student(create_backbone("test_convnext"), len(NAMES)), np.random.default_rng(0)
    images = [image for name in NAMES for image in photos[name] + [draw_sketch(name, rng) for _ in range(SKETCHES)]]
    pixels = torch.from_numpy(stack([resize(image.convert("RGB"), SIZE) for image in images]))
    labels = torch.arange(len(NAMES)).repeat_interleave(SKETCHES + PHOTOS)
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3)
    for _ in range(100):
        batch = torch.from_numpy(rng.integers(len(pixels), size=32))
        loss = torch.nn.functional.cross_entropy(student(normalise(pixels[batch])).seen_logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    photos = {name: [draw_photo(name, np.random.default_rng((9, each))) for each in range(PHOTOS)] for name in NAMES}
    for name in NAMES:
        (folder / "album" / name).mkdir(parents=True)
        for number, photo in enumerate(photos[name]):
            photo.save(folder / f"album/{name}/{name} {number}.jpg")
    draw_photo("bell", np.random.default_rng((9, 99))).save(folder / "album/bell" / HARMFUL)
    (folder / f"album/fish/{NESTED}").mkdir()
    shutil.copy(folder / "album/fish/fish 3.jpg", folder / f"album/fish/{NESTED}/a copy.jpg")
    options = {"model": "test_convnext", "input_size": SIZE, "imagenet_classes": 1000}
    save_checkpoint(folder / "model.pth.tar", learnt(photos), options=options)
    own = ["--index", folder / "index", "--checkpoint", folder / "model.pth.tar", "--device", "cpu", "--workers", "0"]
    search_photos.main(["index", str(folder / "album"), "--clusters", "4", *map(str, own)])
    return folder / "index"


@contextmanager
def served(index, *more):
    """The address of a page that the command serves; Ctrl-C ends it quietly."""
    command = [sys.executable, "search_photos.py", "page", "--index", index, "--device", "cpu", "--port", "0", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    wake = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731, jobs of a shell ignore Ctrl-C
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=wake, **pipes
    ) as page:
        try:
            line = page.stdout.readline()
            assert line.startswith(f"{index}: 58 photos; draw at http://127.0.0.1:"), (line, page.stderr.read())
            yield line.split()[-1]
        finally:
            page.send_signal(signal.SIGINT)
            said = page.communicate(timeout=60)
    assert (page.returncode, *said) == (130, "", "interrupted\n")


@pytest.fixture(scope="module")
def shelf(index):
    return ReloadingIndex(index, device="cpu")


@pytest.fixture(scope="module")
def address(shelf):
    with served_here(shelf) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def driver():
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with selenium.Chrome(options, selenium.ChromeService(DRIVER)) as driver:
        yield driver


class Visit:
    """A visit of the page, in a window of some size."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def open(self, address=None, width=1200, height=850, dark=False, scale=1, remembered=False):
        """Open an address, of this page unless another is given, with nothing that earlier visits left."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        if not remembered and self.driver.current_url.startswith("http"):
            self.run("sessionStorage.clear(); localStorage.clear()")
        self.driver.get("about:blank")
        self.driver.get(address or self.address)
        self.driver.execute_async_script("ready.then(arguments[0])")
        return self

    def reload(self):
        """Open the same address again, in the same tab."""
        self.until("return kept === 0 || sessionStorage.getItem('page') !== null")
        return self.open(self.driver.current_url, remembered=True).wait()

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, script, *arguments):
        return WebDriverWait(self.driver, 30, 0.02).until(lambda _: self.run(script, *arguments))

    def wait(self):
        """Wait until the answer to the last stroke is shown."""
        self.until("return list.dataset.turn === String(turn) && list.ariaBusy === 'false' && !adding")
        return self

    def get(self, name):
        return self.driver.find_element(By.ID, name)

    def click(self, name):
        self.get(name).click()
        return self.wait()

    def set(self, name, value):
        """Change an input as a user does."""
        self.run(
            "const each = at(arguments[0]); each.value = arguments[1];"
            "each.dispatchEvent(new Event('input')); each.dispatchEvent(new Event('change'));",
            name, value,
        )  # fmt: skip
        return self.wait()

    def example(self, name="bell"):
        """Begin with the drawing of a category that the page offers."""
        self.run("document.querySelectorAll('#examples button')[arguments[0]].click()", EXAMPLES.index(name))
        return self.wait()

    def draw(self, name="bell", kind="mouse"):
        """Draw a category, a stroke after the other, and wait for what is found."""
        for points, closed in CATEGORIES[name](np.random.default_rng(1)):
            self.stroke(np.vstack([points, points[:1]]) if closed else points, kind)
        return self.wait()

    def stroke(self, points=((-0.5, -0.5), (0.5, 0)), kind="mouse"):
        paper, before = self.get("paper"), self.run("return done")
        actions = ActionBuilder(self.driver, mouse=PointerInput(kind, kind), duration=0)
        for number, (x, y) in enumerate(0.38 * paper.size["width"] * np.asarray(points)):
            actions.pointer_action.move_to(paper, int(x), int(y))
            if not number:
                actions.pointer_action.pointer_down()
        actions.pointer_action.pointer_up()
        actions.perform()
        self.until("return done > arguments[0]", before)
        return self

    def pen(self, type_, x, y, force=0.5):
        """A real event of a pen at a point of the paper, from 0 to 1."""
        self._input("Mouse", type=f"mouse{type_}", button="left", buttons=int(type_ != "Released"), clickCount=1,
                    pointerType="pen", force=force, **self._at(x, y))  # fmt: skip

    def touch(self, type_, *points):
        """A real event of fingers at points of the paper."""
        self._input("Touch", type=f"touch{type_}", touchPoints=[self._at(*point) for point in points])

    def _input(self, kind, **event):
        self.driver.execute_cdp_cmd(f"Input.dispatch{kind}Event", event)

    def _at(self, x, y):
        left, top, side = self.run("const {x, y, width} = paper.getBoundingClientRect(); return [x, y, width]")
        return {"x": left + x * side, "y": top + y * side}

    def keys(self, *keys):
        chain = selenium.ActionChains(self.driver)
        for key in keys:
            chain.key_down(key)
        for key in reversed(keys):
            chain.key_up(key)
        chain.perform()
        return self.wait()

    @property
    def names(self):
        """The names of the photos that are shown, nearest first."""
        return self.run("return [...list.querySelectorAll('.name')].map(each => each.textContent)")

    @property
    def paper(self):
        return self.run("return paper.toDataURL()")

    @property
    def dark(self):
        """How many pixels of the paper are dark."""
        return int((pixels(self.paper) < 128).sum())

    @property
    def status(self):
        return self.get("status").text.replace("\u2068", "").replace("\u2069", "")


@pytest.fixture
def visit(driver, address):
    yield Visit(driver, address).open()
    assert driver.get_log("browser") == []  # neither errors nor violations of the policy


def test_a_drawn_bell_finds_bells(visit):
    empty = visit.paper
    assert visit.status == "58 photos" and visit.get("hint").text.startswith("Draw something")
    visit.draw("bell")
    assert visit.paper != empty and not visit.get("hint").is_displayed()
    assert visit.status == "Photos that look like the drawing" and not visit.get("start").is_displayed()
    assert sum("bell" in name for name in visit.names[:5]) >= 3, visit.names
    assert visit.run("return [...list.querySelectorAll('img')].every(image => image.naturalWidth > 0)")


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


def test_the_page_without_pytorch_finds_the_same(visit, index, tmp_path):
    pytest.importorskip("onnxscript")
    found = visit.example("bell").names
    path = export.main([str(index.parent / "model.pth.tar"), "--to", str(tmp_path / "student.onnx")])
    with served(index, "--checkpoint", path, "--backend", "onnx") as address:
        assert Visit(visit.driver, address).open().example("bell").names == found
        visit.driver.get("about:blank")


def pixels(url):
    """A picture as grey levels, from its data URL."""
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
        return np.asarray(image.convert("L"))


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


HAND_OVER = """
const [kind, content, name, type] = arguments;
const data = new DataTransfer();
if (name) data.items.add(new File([Uint8Array.from(atob(content), each => each.charCodeAt(0))], name, {type}));
else data.setData("text/plain", content);
const kinds = {drop: [DragEvent, {dataTransfer: data}], paste: [ClipboardEvent, {clipboardData: data}]};
document.dispatchEvent(new kinds[kind][0](kind, kinds[kind][1]));
"""


def hand_over(visit, content, name, type_, kind="drop", number=1):
    visit.run(HAND_OVER, kind, base64.b64encode(content).decode(), name, type_)
    visit.until("return items.length === arguments[0]", number)
    return visit.wait()


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


def test_a_photo_is_searched_as_it_is(visit, index):
    content = (index.parent / "album/fish/fish 5.jpg").read_bytes()
    hand_over(visit, content, "holiday.jpg", "image/jpeg")
    assert visit.names[0] == "fish 5.jpg" and visit.status == "Photos that look like this photo"
    as_photo = visit.names
    assert visit.get("as").text == "It is a drawing"
    assert visit.click("as").names != as_photo and visit.status == "Photos that look like the drawing"
    assert visit.click("as").names == as_photo
    assert visit.reload().names[0] == "fish 5.jpg"


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
            visit.run("tell(''); location.hash = arguments[0]", fragment)
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


def test_a_server_that_stops_is_asked_again(visit):
    visit.example("bell")
    before = visit.names
    visit.run("window.real = fetch; window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    visit.stroke()
    visit.until("return at('status').textContent === 'No answer from the server; asking again …'")
    assert visit.names == before and visit.run("return list.ariaBusy") == "true"  # the old photos stay, faded
    visit.run("window.fetch = real; dispatchEvent(new Event('online'))")
    assert visit.wait().names != before and visit.status == "Photos that look like the drawing"


def test_a_page_that_opens_before_its_server_answers_loses_no_stroke(visit):
    visit.run("""
        window.real = fetch;
        window.fetch = () => Promise.reject(new TypeError('Failed to fetch'));
        index = about = null;
        window.again = begin();
    """)
    visit.until("return at('status').textContent.startsWith('No answer')")
    visit.stroke()
    assert visit.get("status").get_attribute("class") == "busy"
    visit.run("window.fetch = real; wake()")
    visit.driver.execute_async_script("again.then(arguments[0])")
    assert visit.wait().names


def test_an_index_that_is_gone_is_told_and_asked_for_again(visit, index):
    visit.example("bell")
    before = visit.names
    os.rename(index / "index.json", index / "elsewhere.json")
    try:
        visit.stroke()
        visit.until("return at('status').textContent.endsWith('asking again …')")
        assert "no index of photos" in visit.status and visit.names == before
    finally:
        os.rename(index / "elsewhere.json", index / "index.json")
    visit.run("wake()")
    assert visit.wait().names != before
    assert {"503" in entry["message"] for entry in visit.driver.get_log("browser")} == {True}


def test_drawings_to_begin_with_are_those_of_the_miniature(visit):
    assert visit.run("return EXAMPLES") == {name: packed(name) for name in EXAMPLES}
    buttons = visit.driver.find_elements(By.CSS_SELECTOR, "#examples button")
    assert [button.text for button in buttons] == list(EXAMPLES)
    buttons[1].click()
    assert sum("bicycle" in name for name in visit.wait().names[:5]) >= 3
    visit.click("clear")
    assert visit.get("start").is_displayed()


def test_many_strokes_are_drawn_and_kept(visit):
    visit.run("""
        act(...Array.from({length: 500}, (_, i) => ({width: 8, erase: false, points: [2 * i, 0, 1000 - i, 1000]})));
    """)
    before = visit.wait().paper
    assert visit.names and visit.reload().paper == before


PREFIX = "/sketch"


@contextmanager
def behind_a_path(port):
    """The address of a proxy that serves another port of this machine under PREFIX, and / with a link to it."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def answer(self):
            own = self.path.startswith(PREFIX + "/")
            if own:
                other = http.client.HTTPConnection("127.0.0.1", port)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                other.request(self.command, self.path.removeprefix(PREFIX), body or None, dict(self.headers.items()))
                answer = other.getresponse()
                status, headers, content = answer.status, answer.getheaders(), answer.read()
            else:
                link = f"http://127.0.0.1:{self.server.server_port}{PREFIX}/?token={TOKEN}"
                status, headers, content = 200, [("Content-Type", "text/html")], f"<a href='{link}'>draw</a>".encode()
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield proxy.server_port
        finally:
            proxy.shutdown()
            thread.join()


TOKEN = "abcdefgh-123"


def test_a_link_of_another_site_opens_the_page_under_a_path_behind_a_proxy(visit, shelf):
    with served_here(shelf, token=TOKEN) as port, behind_a_path(port) as proxy:
        visit.driver.get(f"http://localhost:{proxy}/")  # another site than 127.0.0.1
        visit.driver.find_element(By.TAG_NAME, "a").click()
        visit.until("return location.href === arguments[0]", f"http://127.0.0.1:{proxy}{PREFIX}/")
        visit.driver.execute_async_script("ready.then(arguments[0])")
        assert visit.example("bell").names
        assert visit.run("return [...list.querySelectorAll('img')].every(image => image.naturalWidth > 0)")
        visit.driver.find_element(By.CLASS_NAME, "photo").click()
        visit.until("return view.naturalWidth === 128")
        visit.driver.get("about:blank")
