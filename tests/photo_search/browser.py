"""A browser on the page: an index of drawn photos, the page that serves it, and a visit of it."""

import base64
import io
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import packed
from PIL import Image

import search_photos
from datasets.images import resize, stack
from datasets.prepare.drawings import CATEGORIES
from datasets.prepare.miniature import draw_photo, draw_sketch
from models.checkpoints import save_checkpoint
from models.networks import Student, create_backbone, normalise

ROOT = Path(__file__).resolve().parent.parent.parent
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
if not BROWSER or not DRIVER:
    pytest.skip("chromium and chromium-driver are not installed", allow_module_level=True)
selenium = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.actions.action_builder import ActionBuilder  # noqa: E402
from selenium.webdriver.common.actions.pointer_input import PointerInput  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

NAMES, SIZE = ("bell", "bicycle", "fish", "umbrella"), 48
SKETCHES, PHOTOS = 30, 14  # of each
NESTED = "Summer سمكة " + "of a name of two hundred letters " * 6
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


def make_index(folder):
    """An index of drawn photos of NAMES in `folder`, and the network that it was made with."""
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


@contextmanager
def browser():
    """A headless browser whose log is kept."""
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
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.colours(dark)
        if not remembered and self.driver.current_url.startswith("http"):
            self.run("sessionStorage.clear(); localStorage.clear()")
        self.driver.get("about:blank")
        self.driver.get(address or self.address)
        self.driver.execute_async_script("ready.then(arguments[0])")
        return self

    def colours(self, dark):
        """What the browser prefers: light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def online(self, on):
        speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": not on, **speed})

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
        """Begin with the drawing of a category, as a tap on one that the page offers does."""
        self.run("act(...unpack(decode(arguments[0])))", packed(name))
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


def pixels(url):
    """A picture as grey levels, from its data URL."""
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
        return np.asarray(image.convert("L"))


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
