"""Search from Python: what is taken as a drawing, what comes back, and what a notebook shows."""

import ast
import base64
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from albums import FakeEncoder, update, write_album, write_photo
from pages import PageEncoder, drawing
from PIL import Image

import photo_search
from photo_search.result import image_of
from photo_search.search import MATCHINGS
from utils.cli import InputError

DOCS = Path(__file__).resolve().parents[2] / "docs/search.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an index and a drawing, to be left as it is."""
    folder = tmp_path_factory.mktemp("python")
    write_album(folder / "album", 24)
    update(folder / "photo_index", FakeEncoder(), folder / "album", clusters=3)
    (folder / "bell.png").write_bytes(drawing())
    return folder


@pytest.fixture
def index(folder, monkeypatch):
    monkeypatch.setattr("photo_search.search.encoder_of", lambda *_: PageEncoder())
    monkeypatch.chdir(folder)
    return photo_search.open_index()


def test_the_example_of_the_docs_runs(index, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(example.strip().splitlines()) <= 11
    names = {}
    exec(example, names)
    printed = capsys.readouterr().out.splitlines()
    assert len(names["result"]) == len(printed) == 20
    for line, hit in zip(printed, names["result"], strict=True):
        score, distance, cluster, path = line.split(" ", 3)
        assert path == hit.path and os.path.isfile(path)
        assert float(score) == pytest.approx(0.2 * float(cluster) + 0.8 * float(distance))
    assert all(hit.score == hit.distance for hit in names["alike"]) and names["paper"] != names["result"]
    assert names["more"][0].path == names["result"][0].path and len(names["more"]) == 5


def test_importing_the_package_loads_no_library():
    body = ast.parse(Path(photo_search.__file__).read_text(encoding="utf-8")).body
    assert not [statement for statement in body if isinstance(statement, ast.Import | ast.ImportFrom)]


def test_pictures_of_every_kind_are_drawings(index):
    with Image.open("bell.png") as image:
        image.load()
    grey = np.asarray(image.convert("L"))
    rgba, halves = np.dstack([np.asarray(image), np.full_like(grey, 255)]), (grey / 255).astype(np.float16)
    same = [
        Path("bell.png"),
        image,
        image.convert("L"),
        image.convert("RGBA"),
        np.asarray(image),
        grey,
        grey[..., None],
    ]
    same += [rgba, grey / 255, halves]
    expected = index.find("bell.png", k=7)
    for picture in same:
        assert index.find(picture, k=7) == expected
    black_or_white = index.find(grey > 127, k=7)
    assert black_or_white == index.find((grey > 127) * np.uint8(255), k=7)
    for matching in MATCHINGS:
        assert index.find(image, 3, matching) == index.find("bell.png", 3, matching)


def test_damaged_exif_leaves_a_picture_as_it_is(monkeypatch):
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda image: 1 / 0)
    assert image_of(Image.new("L", (60, 20))).size == (60, 20)


def test_a_phone_image_in_memory_is_upright():
    image, exif = Image.new("RGB", (60, 20), "white"), Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    assert image_of(Image.open(file)).size == (20, 60)


@pytest.mark.parametrize("array", [
    np.zeros(9), np.zeros((3, 40, 40), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8),
    np.full((4, 4), 255.0), np.full((4, 4), np.nan), np.full((4, 4), -1), np.zeros((4, 4), np.uint16), "name",
    None, np.zeros((4, 4), complex), np.array([["a"]]),
], ids=str)  # fmt: skip
def test_what_is_no_picture_is_refused_in_one_line(array):
    with pytest.raises(InputError) as refused:
        image_of(array)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


def test_images_that_cannot_be_decoded_are_refused_in_one_line(monkeypatch):
    file = io.BytesIO()
    Image.effect_noise((60, 60), 90).convert("RGB").save(file, "JPEG")
    closed = Image.open(io.BytesIO(file.getvalue()))
    closed.close()
    silent = Image.new("L", (9, 9))
    silent.load = lambda: (_ for _ in ()).throw(EOFError)  # an exception without a message
    for image in (Image.open(io.BytesIO(file.getvalue()[:900])), closed, silent):
        with pytest.raises(InputError, match="the picture cannot be decoded"):
            image_of(image)
    with pytest.raises(InputError, match="0 × 0 pixels cannot be searched"):
        image_of(Image.new("L", (0, 0)))
    monkeypatch.setattr("photo_search.result.MAX_PIXELS", 399)
    with pytest.raises(InputError, match="20 × 20 pixels cannot be searched"):
        image_of(Image.new("L", (20, 20)))
    with pytest.raises(InputError, match="too many pixels"):
        image_of(np.broadcast_to(np.uint8(255), (100000, 100000)))


@pytest.mark.parametrize("options", [
    {"weight": 1.1}, {"weight": float("nan")}, {"weight": -0.1}, {"weight": "0.2"}, {"k": 0}, {"k": -1}, {"k": 1.5},
    {"k": "2"}, {"matching": "x"}, {"matching": 1},
], ids=str)  # fmt: skip
def test_options_of_a_search_are_checked(index, options):
    with pytest.raises(InputError, match=f"^{next(iter(options))} .*: it is "):
        index.find("bell.png", **options)


def test_drawings_that_cannot_be_searched_are_named(index):
    for picture, line in (("none.png", "none.png: no such image"), (np.ones((40, 40)), "the sketch: no line differs")):
        with pytest.raises(InputError, match=line):
            index.find(picture)


def test_a_notebook_shows_thumbnails_and_paths_as_text(tmp_path, monkeypatch):
    names = ["<script>alert(1)<", "\u202e.png", 'x" onerror="y']
    for seed, name in enumerate(names):
        write_photo(tmp_path / "album" / (name if name.endswith(".png") else f"{name}.png"), seed)
    update(tmp_path / "index", FakeEncoder(), tmp_path / "album")
    monkeypatch.setattr("photo_search.search.encoder_of", lambda *_: PageEncoder())
    result = photo_search.open_index(tmp_path / "index").find(drawing_image(), k=9)
    shown = result._repr_html_()
    sources = re.findall(r'<img alt="" src="data:image/jpeg;base64,([^"]*)">', shown)
    assert [base64.b64decode(each) for each in sources] == result.index.thumbnails_of([hit.row for hit in result])
    assert len(sources) == 3 and "<script" not in shown and 'onerror="' not in shown
    assert shown.count("<bdi>") == 3 and f"<td>{result[0].score:.4f}<td>" in shown
    assert "http" not in shown


def drawing_image():
    return Image.open(io.BytesIO(drawing()))


def test_reprs_are_short(index):
    assert repr(index) == "<photo_index: 24 photos, M 2, K 3, features of fake>"
    result = index.find("bell.png", k=24)
    lines = repr(result).splitlines()
    assert lines[0] == "24 photos of photo_index" and len(lines) == 12 and lines[1].endswith(f"  {result[0].path!r}")
    assert result[:2] == list(result)[:2]
