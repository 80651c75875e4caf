"""The drawing page: time from the end of a stroke to photos, in a browser, and what many who draw at once do to it.

    .venv/bin/python benchmarks/page.py                                              # the demo's network
    .venv/bin/python benchmarks/page.py --model convnextv2_tiny --input_size 224
    .venv/bin/python benchmarks/page.py --backend onnx
    .venv/bin/python benchmarks/page.py --index photo_index                          # an index that is there

Makes an index of --photos drawn photos with a network of random weights, or takes --index, serves it with
search_photos.py page on a free port of this machine, and stops it at the end. The browser is headless chromium (Debian:
chromium, chromium-driver): strokes of a mouse, from the event that ends one to the moment when all its photos are
decoded. "start to first answer" is from the start of the command to the answer to one sketch. Then --clients threads
search for --seconds, each pausing --pause seconds between an answer and its next stroke. Memory is resident memory.
"""

import argparse
import http.client
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import numpy_sort  # noqa: E402

numpy_sort.choose_sort_kernel()  # before NumPy, as in the scripts
import numpy as np  # noqa: E402
import torch  # noqa: E402

import search_photos  # noqa: E402
from datasets.prepare.drawings import CATEGORIES  # noqa: E402
from datasets.prepare.miniature import draw_photo, draw_sketch  # noqa: E402
from models import export  # noqa: E402
from models.checkpoints import save_checkpoint  # noqa: E402
from models.networks import Student, create_backbone  # noqa: E402
from photo_search.encoder import backend_of  # noqa: E402
from photo_search.index import open_index  # noqa: E402

SHOWN = "return list.dataset.turn === String(turn) && list.ariaBusy === 'false'"
TOOK = (
    "const {startTime, duration} = performance.getEntriesByName('photos').at(-1); return startTime + duration - penUp"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="convnextv2_atto")
    add("--input_size", type=int, default=48)
    add("--backend", choices=("torch", "onnx"), default="torch")
    add("--photos", type=int, default=500)
    add("--index", type=Path, help="an index, instead of --model, --input_size, --backend and --photos")
    add("--strokes", type=int, default=60, help="in the browser, after 10 to warm up")
    add("--clients", type=int, default=20)
    add("--seconds", type=float, default=60)
    add("--pause", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index, load = options.index, os.getloadavg()[0]
        if index is None:
            index = make_index(Path(folder), options.model, options.input_size, options.photos, options.backend)
        about = open_index(index).metadata
        network = f"{about['model']}, {about['input_size']} pixels, {backend_of(about['checkpoint'])}"
        print(f"{os.cpu_count()} cores, load {load:.1f}; {network}", flush=True)
        with Served(index) as served:
            print(f"start to first answer: {served.first_answer():.1f} s", flush=True)
            if shutil.which("chromedriver"):
                print_times("browser, stroke to photos", in_a_browser(served.port, options.strokes))
            before = served.memory()
            times, errors = at_once(served.port, options.clients, options.seconds, options.pause)
            print_times(f"{options.clients} at once, {options.pause:g} s apart", times)
            print(f"{errors} errors; memory {before:.0f} MB before, {served.memory():.0f} MB after")


def print_times(what, seconds):
    median, most = 1000 * np.quantile(seconds, [0.5, 0.95])
    print(f"{what}: {len(seconds)}, median {median:.0f} ms, 95 % {most:.0f} ms", flush=True)


def make_index(folder, model, size, photos, backend):
    torch.manual_seed(0)
    options = {"model": model, "input_size": size, "imagenet_classes": 1000}
    save_checkpoint(folder / "model.pth.tar", Student(create_backbone(model), len(CATEGORIES)), options=options)
    (folder / "album").mkdir()
    names = list(CATEGORIES)
    for number in range(photos):
        draw_photo(names[number % len(names)], np.random.default_rng(number)).save(folder / f"album/{number}.jpg")
    checkpoint = folder / "model.pth.tar"
    if backend == "onnx":
        checkpoint = export.main([str(checkpoint), "--to", str(folder / "model.onnx")])
    own = ["--index", folder / "index", "--checkpoint", checkpoint, "--workers", "0", "--device", "cpu"]
    search_photos.main(["index", str(folder / "album"), *map(str, own)])
    return folder / "index"


class Served:
    """The page, served by a process of its own on a free port."""

    def __init__(self, index):
        self.began = time.perf_counter()
        command = [sys.executable, "search_photos.py", "page", "--index", index, "--port", "0", "--device", "cpu"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        self.port = int(self.process.stdout.readline().rstrip("/\n").rsplit(":", 1)[1])
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def first_answer(self):
        """Seconds from the start to the answer to one sketch, the first."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        ask(connection, "POST", "/find?k=20", png(draw_sketch("bell", np.random.default_rng(0))))
        connection.close()
        return time.perf_counter() - self.began

    def memory(self):
        """Resident memory in MB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def in_a_browser(port, strokes, warm=10):
    """Seconds from the end of each stroke to its photos."""
    from selenium import webdriver
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    rng, times = random.Random(0), []
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        driver.get(f"http://127.0.0.1:{port}/")
        driver.execute_async_script("ready.then(arguments[0])")
        driver.execute_script("addEventListener('pointerup', event => { window.penUp = event.timeStamp; }, true)")
        for number in range(warm + strokes):
            if number % 10 == 0:
                driver.execute_script("at('clear').click()")
            actions = ActionBuilder(driver, duration=0)
            for place in range(20):
                x, y = (rng.randint(-150, 150) for _ in range(2))
                actions.pointer_action.move_to(driver.find_element("id", "paper"), x, y)
                if not place:
                    actions.pointer_action.pointer_down()
            actions.pointer_action.pointer_up()
            actions.perform()
            WebDriverWait(driver, 60, 0.05).until(lambda driver: driver.execute_script(SHOWN))
            times.append(driver.execute_script(TOOK) / 1000)
    return times[warm:]


def at_once(port, clients, seconds, pause):
    """(seconds of each search, errors) of threads that search, and take the thumbnails that they have not yet seen."""
    rng, times, errors = np.random.default_rng(1), [], []
    sketches = [png(draw_sketch(name, rng)) for name in CATEGORIES]
    end = time.monotonic() + seconds

    def draw(number):
        own, seen = random.Random(number), set()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        time.sleep(own.uniform(0, pause))
        while time.monotonic() < end:
            start = time.perf_counter()
            try:
                found = json.loads(ask(connection, "POST", "/find?k=20", own.choice(sketches)))
                times.append(time.perf_counter() - start)
                for photo in {each["photo"] for each in found["found"]} - seen:
                    ask(connection, "GET", f"/thumbnail/{found['index']}/{photo}")
                    seen.add(photo)
            except (OSError, http.client.HTTPException, ValueError) as error:
                errors.append(error)
                connection.close()
            time.sleep(pause)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors[:3]:
        print(f"error: {type(error).__name__} {error}")
    return times, len(errors)


def ask(connection, method, path, body=None):
    connection.request(method, path, body)
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise ValueError(f"status {answer.status}: {content[:100]}")
    return content


def png(image):
    file = io.BytesIO()
    image.resize((448, 448)).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
