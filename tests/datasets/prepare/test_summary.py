import errno
import io
import os
import sys
import warnings
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from datasets.lists import LIST_DESCRIPTIONS, open_benchmark, write_list
from datasets.prepare import __main__ as prepare
from datasets.prepare.statistics import collect_statistics, evenly_sampled
from datasets.prepare.summary import write_summary
from utils.cli import InputError

SKETCHES, PHOTOS = "sketch_tx_000000000000_ready_filelist_{}.txt", "all_photo_filelist_{}.txt"


def sketch(number):
    paper = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(paper).line([(8, 8 + 4 * number), (56, 50), (30, 8)], fill="black", width=3)
    return paper


def photo(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.fixture
def drawn(tiny):
    """The tiny benchmark with lines on paper for sketches and coloured noise for photos: nothing is odd about it."""
    for path in tiny.glob("*/*.png"):
        draw = sketch if path.parent.name.startswith("sketch") else photo
        draw(int(path.stem)).save(path)
    return tiny


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


class Page(HTMLParser):
    """The rows of the page's tables, its list items, headings of classes, images, and every tag."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.items, self.headings, self.images, self.tags = [], [], [], [], []
        self.inside = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        self.inside = {"th": self.rows[-1:], "td": self.rows[-1:], "li": [self.items], "h3": [self.headings]}.get(
            tag, [] if tag in ("p", "h2", "small", "style") else self.inside
        )
        if tag in ("th", "td", "li", "h3") and self.inside:
            self.inside[0].append("")
        if tag == "img" or "gone" in dict(attributes).get("class", ""):
            self.images.append(dict(attributes))

    def handle_data(self, data):
        if self.inside:
            self.inside[0][-1] += data.strip("\n")


def opened(root):
    """(Benchmark, {(kind, split): FileList} of the lists that exist)."""
    benchmark = open_benchmark("sketchy", root)
    return benchmark, {key: benchmark.read(*key) for key in LIST_DESCRIPTIONS if benchmark.path(*key).is_file()}


def page_of(root, folder, odd=()):
    paths = write_summary(*opened(root), folder, odd)
    assert paths[0] == folder / "summary.html"
    return Page(paths[0].read_text())


def odd_of(root):
    return collect_statistics(*opened(root)).odd


def add_lines(root, name, *rows):
    with open(root / "zeroshot1" / name, "a") as file:
        file.writelines(f"{path} {label}\n" for path, label in rows)


def test_samples_are_spread_evenly_and_never_come_twice():
    assert (
        evenly_sampled(range(10), 2) == [2, 7]
        and evenly_sampled("abc", 3) == list("abc")
        and evenly_sampled("ab", 5) == list("ab")
    )
    assert evenly_sampled([], 3) == []
    for length in range(1, 40):
        picked = evenly_sampled(range(length), 6)
        assert len(set(picked)) == min(6, length)
        assert max(np.diff(picked), default=0) - min(np.diff(picked), default=0) <= 1


def test_counts_are_those_of_the_lists(drawn, tmp_path, no_matplotlib):
    add_lines(drawn, SKETCHES.format("train"), ("sketch of train/0.png", 1))
    add_lines(drawn, PHOTOS.format("zero"), *[(f"photo of zero/{number}.png", 1) for number in range(3)])
    page = page_of(drawn, tmp_path / "out")

    def count(name):
        lines = (drawn / "zeroshot1" / name).read_text().splitlines()
        return Counter(int(line.split()[-1]) for line in lines)

    sketches = {split: count(SKETCHES.format(split)) for split in ("train", "test", "zero")}
    photos = {split: count(PHOTOS.format(split)) for split in ("train", "zero")}
    totals, classes = page.rows[:3], page.rows[3:]
    all_sketches = [sum(of.values()) for of in sketches.values()]
    assert totals[1] == ["sketches", *map(str, all_sketches), "13"]
    assert totals[2] == ["photos", "4", "–", "7", "11"]
    expected = [["label", "class", "", "training sketches", "validation sketches"]]
    expected[0] += ["unseen sketches", "training photos", "unseen photos"]
    for label, name in enumerate(["bell", "cow"]):
        expected.append([label, name, "unseen", "–", "–", sketches["zero"][label], "–", photos["zero"][label]])
    for label, name in enumerate(["alarm clock", "cat"]):
        seen = [sketches["train"][label], sketches["test"][label], "–", photos["train"][label], "–"]
        expected.append([label, name, "seen", *seen])
    assert classes == [[str(cell) for cell in row] for row in expected]


def test_every_class_shows_samples_and_they_are_what_lies_at_their_path(drawn, tmp_path, no_matplotlib):
    page = page_of(drawn, tmp_path / "out")
    assert page.headings == ["bell ", "cow ", "alarm clock ", "cat "]
    alts = Counter(image["alt"] for image in page.images)
    assert alts["sketches of bell"] == alts["photos of cat"] == 2
    assert alts["sketches of cat"] == 4  # two of them for validation
    assert {image["title"] for image in page.images} == {str(path.relative_to(drawn)) for path in drawn.glob("*/*.png")}


def test_the_page_is_one_file_that_asks_for_nothing(drawn, tmp_path, no_matplotlib):
    page = page_of(drawn, tmp_path / "out")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(image["src"].startswith("data:image/jpeg;base64,") and image["alt"] for image in page.images)
    text = (tmp_path / "out" / "summary.html").read_text()
    assert "http" not in text and "url(" not in text and "prefers-color-scheme: dark" in text and "viewport" in text


def test_the_same_folder_gives_the_same_bytes(drawn, tmp_path):
    first, second = (write_summary(*opened(drawn), tmp_path / name) for name in ("one", "two"))
    assert [path.name for path in first] == ["summary.html", "summary.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with Image.open(first[1]) as picture:
        picture.load()
        assert picture.width > 1000 and len(set(picture.convert("L").tobytes())) > 100


def test_nothing_is_odd_about_clean_data(drawn, tmp_path, no_matplotlib):
    assert odd_of(drawn) == []
    page = page_of(drawn, tmp_path / "out")
    assert page.items == []
    assert "Nothing that these checks look for" in (tmp_path / "out" / "summary.html").read_text()


def test_images_that_cannot_be_read_are_named_and_end_nothing(drawn, tmp_path):
    (drawn / "sketch of zero/0.png").unlink()
    (drawn / "photo of zero/1.png").write_bytes(b"no image")
    whole = (drawn / "photo of train/2.png").read_bytes()
    (drawn / "photo of train/2.png").write_bytes(whole[: len(whole) // 2])
    page = page_of(drawn, tmp_path / "out")
    (broken,) = page.items
    assert "2 of the 8 photos looked at (photo of zero/1.png, photo of train/2.png)." in broken
    gone = [image for image in page.images if "src" not in image]
    assert [image["title"] for image in gone] == ["sketch of zero/0.png", "photo of zero/1.png", "photo of train/2.png"]
    assert gone[0]["aria-label"] == "sketches of bell, missing: sketch of zero/0.png"
    assert (tmp_path / "out" / "summary.png").exists()


def test_a_folder_without_any_image_has_a_page(drawn, tmp_path):
    for path in drawn.glob("*/*.png"):
        path.unlink()
    page = page_of(drawn, tmp_path / "out")
    assert len([image for image in page.images if "src" not in image]) == 20
    assert (tmp_path / "out" / "summary.png").exists()


def test_names_are_shown_and_never_obeyed(drawn, tmp_path):
    names = ["<b>bold</b>", '"><script>$\\x$ &amp;']
    write_list(drawn / "zeroshot1" / "cname_cid_zero.txt", zip(names, [0, 1], strict=True))
    (drawn / "<i>").mkdir()
    sketch(0).save(drawn / "<i>" / '"><img src=x>.png')
    add_lines(drawn, SKETCHES.format("zero"), ('<i>/"><img src=x>.png', 0), ('<i>/"><img src=x>.png', 0))
    page = page_of(drawn, tmp_path / "out", odd=["<script>&$\\x$"])
    assert not {"script", "i"} & set(page.tags)
    assert page.headings[:2] == [name + " " for name in names]
    assert [row[1] for row in page.rows[4:6]] == names
    assert page.items == ["<script>&$\\x$"]
    assert '<i>/"><img src=x>.png' in {image["title"] for image in page.images}
    assert "<b>bold" not in (tmp_path / "out" / "summary.html").read_text()


def test_classes_with_few_images_are_named(drawn):
    add_lines(drawn, PHOTOS.format("zero"), *[(f"photo of zero/more {number}.png", 0) for number in range(40)])
    (few,) = [line for line in odd_of(drawn) if line.startswith("Far fewer")]
    assert few.startswith("Far fewer unseen photos than the median of 22: cow 2. ")


def test_a_class_without_photos_is_named(drawn):
    name = PHOTOS.format("zero")
    write_list(drawn / "zeroshot1" / name, [("photo of zero/0.png", 0), ("photo of zero/1.png", 0)])
    assert [line.split(". ")[0] for line in odd_of(drawn)] == ["Far fewer unseen photos than the median of 1: cow 0"]


@pytest.mark.parametrize(
    ("name", "image", "line"),
    [
        ("sketch of zero", ImageOps.invert(sketch(0)), "Mostly black: 1 of the 12 sketches"),
        ("sketch of zero", photo(0), "Not lines on light paper: 1 of the 12 sketches"),
        ("sketch of zero", Image.new("RGB", (64, 64), "white"), "All of one shade: 1 of the 12 sketches"),
        ("sketch of zero", Image.new("RGB", (64, 64)), "All of one shade: 1 of the 12 sketches"),
        ("photo of zero", sketch(0), "Grey on white, like sketches: 1 of the 8 photos"),
        ("photo of zero", photo(0).resize((20, 40)), "Under 32 pixels high or wide: 1 of the 8 photos"),
        ("photo of zero", photo(0).resize((320, 64)), "Over 4 times as long as wide: 1 of the 8 photos"),
    ],
)
def test_odd_images_are_named(drawn, name, image, line):
    image.save(drawn / name / "2.png")
    (found,) = odd_of(drawn)
    assert found.startswith(f"{line} looked at ({name}/2.png). ")


def test_huge_images_are_named(drawn, monkeypatch):
    monkeypatch.setattr("datasets.prepare.statistics.MAX_AREA_PX", 64 * 64)
    photo(0).resize((80, 80)).save(drawn / "photo of zero/2.png")
    (found,) = odd_of(drawn)
    assert found.startswith("Over 50 million pixels: 1 of the 8 photos looked at (photo of zero/2.png). ")


def test_a_photo_without_colour_or_one_on_white_is_not_odd(drawn):
    photo(0).convert("L").save(drawn / "photo of zero/2.png")
    on_white = Image.new("RGB", (64, 64), "white")
    on_white.paste(photo(1).crop((0, 0, 32, 32)), (16, 16))
    on_white.save(drawn / "photo of zero/3.png")
    assert odd_of(drawn) == []


def test_sizes_and_formats_come_most_frequent_first(drawn, tmp_path, no_matplotlib):
    photo(0).convert("L").resize((80, 50)).save(drawn / "photo of zero/2.png")
    page_of(drawn, tmp_path / "out")
    text = (tmp_path / "out" / "summary.html").read_text()
    assert "<p>64 × 64: 88 %<br>80 × 50: 12 %</p><p>PNG, RGB: 88 %<br>PNG, L: 12 %</p>" in text


def test_other_checks_have_the_first_word(drawn, tmp_path, no_matplotlib):
    (drawn / "photo of zero/1.png").write_text("no image")
    (own,) = odd_of(drawn)
    page = page_of(drawn, tmp_path / "out", odd=["a line of another check"])
    assert page.items == ["a line of another check", own]


def test_lists_that_are_not_there_are_left_out(drawn, tmp_path, no_matplotlib):
    lists = drawn / "zeroshot1"
    for name in (SKETCHES.format("train"), SKETCHES.format("test"), PHOTOS.format("train")):
        (lists / name).unlink()
    page = page_of(drawn, tmp_path / "out")
    assert page.rows[1:3] == [["sketches", "–", "–", "4", "4"], ["photos", "–", "–", "4", "4"]]


def test_without_matplotlib_only_the_html_is_left(drawn, tmp_path, no_matplotlib):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "summary.png").write_bytes(b"\x89PNG of an earlier time, Software\0SBKA")
    assert write_summary(*opened(drawn), folder) == [folder / "summary.html"]
    assert os.listdir(folder) == ["summary.html"]


def test_a_folder_that_cannot_be_written_is_said_before_the_work(drawn, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("datasets.prepare.summary.collect_statistics", lambda *_: pytest.fail("looked at images first"))
    with pytest.raises(InputError, match=r"file.*cannot be written.*choose another folder"):
        page_of(drawn, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_the_earlier_page_and_no_half_of_a_new_one(drawn, tmp_path, monkeypatch, no_matplotlib):
    page_of(drawn, tmp_path / "out")
    earlier = (tmp_path / "out" / "summary.html").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (drawn / "photo of zero/1.png").unlink()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"summary.html cannot be written \(No space left"):
        page_of(drawn, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["summary.html"]
    assert (tmp_path / "out" / "summary.html").read_bytes() == earlier


def test_the_picture_says_which_classes_it_leaves_out(drawn, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    said = []
    plain = Figure.savefig

    def listening(figure, *args, **options):
        said.extend(text.get_text() for text in figure.findobj(Text))
        plain(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", listening)
    lists = drawn / "zeroshot1"
    write_list(lists / "cname_cid_zero.txt", [(f"class {number}", number) for number in range(33)])
    page_of(drawn, tmp_path / "out")
    assert "Unseen classes, 30 of 33: summary.html shows all" in said and "Seen classes" in said
    assert sum(text.startswith("class ") for text in said) == 30


def test_no_warning_of_matplotlib_or_pillow_is_printed(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 3000)
    write_list(drawn / "zeroshot1/cname_cid_zero.txt", [("鐘", 0), ("牛", 1)])  # DejaVu Sans has no such letters
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = page_of(drawn, tmp_path / "out")
    assert page.headings[:2] == ["鐘 ", "牛 "] and page.items == [] and (tmp_path / "out/summary.png").exists()


def test_images_of_any_mode_are_shown(drawn, tmp_path, no_matplotlib):
    stored = io.BytesIO()
    photo(3).convert("CMYK").save(stored, "JPEG")
    (drawn / "photo of zero/0.png").write_bytes(stored.getvalue())
    paper = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(paper).line([(8, 8), (56, 50)], fill=(0, 0, 0, 255), width=3)
    paper.save(drawn / "sketch of zero/0.png")  # black lines on a transparent ground are lines on white paper
    page = page_of(drawn, tmp_path / "out")
    assert page.items == []
    assert "JPEG, CMYK: 12 %" in (tmp_path / "out" / "summary.html").read_text()


def test_a_folder_may_have_any_name(drawn, tmp_path):
    root = drawn.rename(tmp_path / os.fsdecode(b"no utf-8: \xff $\\x$"))
    page_of(root, tmp_path / "out", odd=[f"{root}: a line of another check"])
    assert "no utf-8: ? $\\x$" in (tmp_path / "out" / "summary.html").read_text()
    assert (tmp_path / "out" / "summary.png").exists()


def test_the_command_takes_any_layout_and_tells_what_the_check_found(miniature, tmp_path, capsys):
    prepare.main(["summary", str(miniature), "--out", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        f"page: {tmp_path / name}" for name in ("summary.html", "summary.png")
    ]
    page = Page((tmp_path / "summary.html").read_text())
    assert len(page.headings) == 37 and page.rows[1] == ["sketches", "116", "29", "32", "177"]
    assert [line.split(": ")[0] for line in page.items] == ["note"] and "like no ImageNet class" in page.items[0]


def test_the_command_without_matplotlib_and_with_faulty_lists(drawn, capsys, no_matplotlib, fails):
    add_lines(drawn, PHOTOS.format("zero"), ("a.png", "seven"))
    prepare.main(["summary", str(drawn)])
    printed = capsys.readouterr()
    assert printed.out == f"page: {drawn / 'zeroshot1/summary.html'}\n" and "no summary.png, matplotlib" in printed.err
    page = Page((drawn / "zeroshot1/summary.html").read_text())
    assert any(line.startswith("fault: ") and "txt:5: expected 'path label'" in line for line in page.items)
    for path in (drawn / "zeroshot1").glob("*filelist*"):
        path.write_text("")
    assert "zeroshot1: no list holds an image" in fails(prepare.main, "summary", drawn)
    assert "--zero_version" in fails(prepare.main, "summary", drawn / "photo of zero")
    assert "no such folder" in fails(prepare.main, "summary", drawn / "nowhere")


@pytest.mark.parametrize("name", ["summary.html", "summary.png"])
def test_no_file_of_the_user_is_replaced(drawn, tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(InputError, match=f"{name}: holds something that this command did not write"):
        write_summary(*opened(drawn), tmp_path)
    assert (tmp_path / name).read_bytes() == b"mine" and not list(tmp_path.glob(".*"))
