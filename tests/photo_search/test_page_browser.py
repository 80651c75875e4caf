"""The page in a browser: drawn on by a real pointer, it shows photos of what is drawn."""

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import drawing
from PIL import Image

import search_photos
from datasets.images import resize, stack
from datasets.prepare.drawings import CATEGORIES
from datasets.prepare.miniature import draw_photo, draw_sketch
from models import export
from models.checkpoints import save_checkpoint
from models.networks import Student, create_backbone, normalise

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
            assert line.startswith(f"{index}: 57 photos; draw at http://127.0.0.1:"), (line, page.stderr.read())
            yield line.split()[-1]
        finally:
            page.send_signal(signal.SIGINT)
            said = page.communicate(timeout=60)
    assert (page.returncode, *said) == (130, "", "interrupted\n")


@pytest.fixture(scope="module")
def address(index):
    with served(index) as address:
        yield address


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

    def open(self, address=None, width=1200, height=850, dark=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get("about:blank")
        self.driver.get(address or self.address)
        self.driver.execute_async_script("ready.then(arguments[0])")
        return self

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def until(self, script, *arguments):
        return WebDriverWait(self.driver, 30, 0.02).until(lambda _: self.run(script, *arguments))

    def wait(self):
        """Wait until the answer to the last stroke is shown."""
        self.until("return list.dataset.turn === String(turn) && list.ariaBusy === 'false'")
        return self

    def get(self, name):
        return self.driver.find_element(By.ID, name)

    def draw(self, name="bell", kind="mouse"):
        """Draw a category, a stroke after the other, and wait for what is found."""
        for points, closed in CATEGORIES[name](np.random.default_rng(1)):
            self.stroke(np.vstack([points, points[:1]]) if closed else points, kind)
        return self.wait()

    def stroke(self, points=((-0.5, -0.5), (0.5, 0)), kind="mouse"):
        paper = self.get("paper")
        actions = ActionBuilder(self.driver, mouse=PointerInput(kind, kind), duration=0)
        for number, (x, y) in enumerate(0.38 * paper.size["width"] * np.asarray(points)):
            actions.pointer_action.move_to(paper, int(x), int(y))
            if not number:
                actions.pointer_action.pointer_down()
        actions.pointer_action.pointer_up()
        actions.perform()
        return self

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
        return [each.text for each in self.driver.find_elements(By.CLASS_NAME, "name")]

    @property
    def paper(self):
        return self.run("return paper.toDataURL()")

    @property
    def status(self):
        return self.get("status").text


@pytest.fixture
def visit(driver, address):
    yield Visit(driver, address).open()
    assert driver.get_log("browser") == []  # neither errors nor violations of the policy


def test_a_drawn_bell_finds_bells(visit):
    empty = visit.paper
    assert visit.status == "57 photos wait for a drawing" and visit.get("hint").is_displayed()
    visit.draw("bell")
    assert visit.paper != empty and not visit.get("hint").is_displayed()
    assert len(visit.names) == 20 and visit.status.startswith("20 photos found, one-to-many, ")
    assert sum("bell" in name for name in visit.names[:5]) >= 3, visit.names
    shown = visit.run("return [...list.querySelectorAll('img')].every(image => image.naturalWidth > 0)")
    parts = visit.driver.find_element(By.CLASS_NAME, "parts").text.replace("\u00a0", " ")
    score, distance, cluster = (float(part.split()[-1]) for part in parts.replace(" d", " · d").split("·"))
    assert shown and score == pytest.approx(0.2 * cluster + 0.8 * distance, abs=2e-3)


def test_the_page_without_pytorch_finds_the_same(visit, index, tmp_path):
    pytest.importorskip("onnxscript")
    found = visit.draw("bell").names
    path = export.main([str(index.parent / "model.pth.tar"), "--to", str(tmp_path / "student.onnx")])
    with served(index, "--checkpoint", path, "--backend", "onnx") as address:
        assert Visit(visit.driver, address).open().draw("bell").names == found


def pixels(url):
    """A picture as grey levels, from its data URL."""
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
        return np.asarray(image.convert("L"))


def test_strokes_are_undone_redone_erased_and_cleared(visit):
    empty = visit.paper
    bell = visit.draw("bell").paper
    visit.get("eraser").click()
    erased = visit.draw("umbrella").paper
    assert visit.get("eraser").get_attribute("aria-pressed") == "true"
    assert erased != bell and (pixels(erased) >= pixels(bell)).all()
    for _ in CATEGORIES["umbrella"](np.random.default_rng(1)):
        visit.keys(Keys.CONTROL, "z")
    assert visit.paper == bell
    found = visit.names
    visit.get("clear").click()
    visit.wait()
    assert visit.paper == empty and visit.names == [] and visit.get("hint").is_displayed()
    visit.get("undo").click()
    visit.wait()
    assert visit.paper == bell and visit.names == found
    visit.get("redo").click()
    visit.wait()
    assert visit.paper == empty and not visit.get("redo").is_enabled()
    visit.keys(Keys.CONTROL, "z").keys(Keys.CONTROL, "z")
    one_less = visit.paper
    assert one_less not in (bell, empty)
    visit.keys(Keys.CONTROL, Keys.SHIFT, "z")
    assert visit.paper == bell


def test_keys_of_the_paper_work_while_it_has_the_focus(visit):
    visit.stroke().wait()
    width = "return at('width').valueAsNumber"
    before = visit.run(width)
    selenium.ActionChains(visit.driver).send_keys("]]e").perform()
    assert visit.run(width) == before + 8 and visit.run("return erasing")
    visit.run("at('count').focus()")
    selenium.ActionChains(visit.driver).send_keys("p").perform()
    assert visit.run("return erasing")
    visit.run("paper.focus()")
    selenium.ActionChains(visit.driver).send_keys(Keys.DELETE).perform()
    assert visit.wait().names == []


def sketch_of(name):
    return draw_sketch(name, np.random.default_rng(4))


HAND_OVER = """
const [kind, content, name, type] = arguments;
const file = new File([Uint8Array.from(atob(content), each => each.charCodeAt(0))], name, {type});
const data = new DataTransfer();
data.items.add(file);
const kinds = {drop: [DragEvent, {dataTransfer: data}], paste: [ClipboardEvent, {clipboardData: data}]};
document.dispatchEvent(new kinds[kind][0](kind, kinds[kind][1]));
"""


def test_a_picture_may_come_instead_of_strokes(visit, tmp_path):
    sketch_of("umbrella").save(tmp_path / "umbrella.png")
    visit.get("file").send_keys(str(tmp_path / "umbrella.png"))
    visit.until("return items.length === 1")
    chosen = visit.wait().names
    assert sum("umbrella" in name for name in chosen[:5]) >= 3, chosen
    visit.keys(Keys.CONTROL, "z")
    assert visit.names == []
    content = base64.b64encode((tmp_path / "umbrella.png").read_bytes()).decode()
    for number, kind in enumerate(("drop", "paste"), 1):
        visit.run(HAND_OVER, kind, content, "umbrella.png", "image/png")
        visit.until("return items.length === arguments[0]", number)
        assert visit.wait().names == chosen
    visit.draw("bell")
    assert visit.names != chosen and visit.run("return visible().length") > 2
    assert not visit.get("link").is_enabled()


@pytest.mark.parametrize(("form", "type_", "side"), [("PNG", "image/png", 5000), ("BMP", "image/bmp", 100)])
def test_pictures_that_are_not_taken_as_they_are_get_converted(visit, form, type_, side):
    content = base64.b64encode(drawing(form, side)).decode()
    visit.run(HAND_OVER, "drop", content, "a picture", type_)
    visit.until("return items.length === 1")
    assert len(visit.wait().names) == 20


def test_what_is_no_picture_is_told(visit):
    visit.stroke().wait()
    found = visit.names
    for content, type_ in ((b"hello", "text/plain"), (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")):
        visit.run(HAND_OVER, "drop", base64.b64encode(content).decode(), "x.svg", type_)
        visit.until("return at('status').textContent.startsWith('x.svg is not a picture')")
        assert visit.names == found


def choose(visit, name, text):
    for option in visit.get(name).find_elements(By.TAG_NAME, "option"):
        if option.text.strip() == text:
            option.click()
    return visit.wait()


def test_matching_clean_up_number_and_folder_are_chosen(visit):
    visit.draw("bell")
    many = visit.names
    choose(visit, "matching", "one-to-one")
    assert "one-to-one" in visit.status and sorted(visit.names) != [] and "cluster" in visit.get("legend").text
    choose(visit, "count", "12")
    assert len(visit.names) == 12
    choose(visit, "matching", "one-to-many")
    assert visit.names == many[:12]
    cleaned = visit.run("return found.map(each => each.score)")
    for as_before in (False, True):
        visit.get("clean").click()
        assert (visit.wait().run("return found.map(each => each.score)") == cleaned) is as_before
    choose(visit, "folder", "fish")
    assert len(visit.names) == 12 and all("fish" in name for name in visit.names)


def test_the_link_brings_the_drawing_back(visit):
    visit.draw("bell")
    visit.get("eraser").click()
    visit.draw("fish")
    visit.until("return location.hash.startsWith('#d=') && kept === turn")
    before, found, link = visit.paper, visit.names, visit.driver.current_url
    assert len(link) < 1000
    visit.open(link)
    assert visit.wait().names == found and visit.paper == before
    visit.get("undo").click()
    assert visit.wait().paper != before


FRAGMENTS = ["#d=AAAA", "#d=x", "#d=____", "#d=Y2QAAA", "#d=%3Cscript%3E", "#other"]


def test_a_damaged_link_leaves_the_paper_empty(visit):
    empty = visit.paper
    for fragment in FRAGMENTS:
        visit.open(visit.address + fragment)
        assert visit.paper == empty and visit.names == []
        assert ("damaged" in visit.status) == bool(re.fullmatch(r"#d=\w+", fragment)), fragment


def test_answers_that_come_late_are_dropped(visit):
    visit.run("""
        const real = fetch;
        window.answers = [];
        window.fetch = (path, options) => path.startsWith("/find") && !answers.length
          ? new Promise(resolve => answers.push(() => real(path, {...options, signal: null}).then(resolve)))
          : real(path, options);
    """)
    visit.stroke().until("return answers.length === 1")
    visit.draw("bell")
    found = visit.names
    visit.run("window.shown = 0; new MutationObserver(() => shown++).observe(list, {childList: true});")
    visit.driver.execute_async_script("answers[0]().then(() => setTimeout(arguments[0]))")
    assert visit.names == found and visit.run("return shown") == 0


def test_a_click_opens_a_photo_and_finds_more_like_it(visit, index):
    visit.stroke().wait()
    names = visit.names
    visit.driver.find_elements(By.CLASS_NAME, "photo")[1].click()
    visit.until("return viewer.querySelector('img').naturalWidth === 128")
    assert visit.get("title").text == names[1] and f"album{os.sep}" in visit.get("facts").text
    visit.get("viewer").send_keys(Keys.ARROW_RIGHT)
    visit.until("return at('title').textContent === arguments[0]", names[2])
    visit.get("similar").click()
    visit.until("return like !== null")
    assert not visit.wait().get("viewer").is_displayed()
    assert visit.names[0] == names[2] and visit.status.startswith(f"20 photos like {names[2]}, one-to-many, ")
    visit.get("like").find_element(By.TAG_NAME, "button").click()
    assert visit.wait().names == names


def test_a_photo_that_is_gone_is_told_in_the_page(visit, index):
    visit.stroke().wait()
    path = visit.driver.find_element(By.CLASS_NAME, "photo").get_attribute("title")
    content = Path(path).read_bytes()
    os.remove(path)
    visit.driver.find_element(By.CLASS_NAME, "photo").click()
    visit.until("return !at('trouble').hidden")
    assert visit.get("trouble").text == "this photo is no longer there; index again to leave it out"
    Path(path).write_bytes(content)
    (entry,) = visit.driver.get_log("browser")
    assert "404" in entry["message"]


def test_names_of_photos_are_text(visit):
    visit.stroke().wait()
    choose(visit, "count", "100")
    assert HARMFUL in visit.names and visit.driver.title == "Draw, and find photos"
    assert not visit.run("return document.querySelector('[onerror]')")


def test_the_page_fits_a_phone_and_fingers(visit):
    visit.open(width=390, height=844)
    visit.draw("bell", "touch")
    assert visit.run("return document.documentElement.scrollWidth") <= 390
    assert visit.run("return scrollY") == 0  # a finger on the paper draws, and does not scroll
    boxes = visit.run("return ['paper', 'photos'].map(id => at(id).getBoundingClientRect().toJSON())")
    assert boxes[0]["right"] <= 390 and boxes[1]["top"] > boxes[0]["bottom"] and boxes[1]["top"] < 700
    assert sum("bell" in name for name in visit.names[:5]) >= 3
    small = visit.run(
        "return [...document.querySelectorAll('.tools button')].filter(e => e.offsetHeight && e.offsetHeight < 40)"
    )
    assert not small


def test_the_paper_stays_white_in_the_dark(visit):
    colour = "return getComputedStyle(document.body).backgroundColor"
    light, paper = visit.run(colour), visit.paper
    visit.open(dark=True)
    assert visit.run(colour) != light and visit.paper == paper


def test_everything_has_a_name_and_a_place_in_the_order_of_the_keyboard(visit):
    visit.stroke().wait()
    nameless = visit.run("""
        const named = each => each.ariaLabel || each.labels?.[0]?.textContent.trim() || each.textContent.trim();
        const every = [...document.querySelectorAll("button, select, input, canvas, a")];
        return every.filter(each => each.offsetParent && !named(each)).map(each => each.outerHTML);
    """)
    assert nameless == []
    assert visit.get("status").get_attribute("aria-live") == "polite"
    visit.until("return location.hash.startsWith('#d=') && kept === turn")
    visit.open(visit.driver.current_url).wait()
    order = []
    for _ in range(14):
        selenium.ActionChains(visit.driver).send_keys(Keys.TAB).perform()
        order.append(visit.run("return document.activeElement.id || document.activeElement.className"))
    tools = ["paper", "pen", "eraser", "undo", "clear", "choose", "link", "width", "clean", "matching"]
    assert order == [*tools, "count", "folder", "", "photo"]


def test_a_page_whose_server_has_ended_says_so(visit):
    visit.run("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    visit.stroke().wait()
    assert visit.status == "The page gets no answer; is search_photos.py still running?"
    assert "alarm" in visit.get("status").get_attribute("class")
