"""What `index` and `find` print and write: notes, tables, JSON and the picture, and which files they replace."""

import json
import os
from pathlib import Path

import pytest
from albums import FakeEncoder, update, write_photo
from PIL import Image, ImageDraw

import search_photos
from datasets.images import resize, stack
from photo_search.index import open_index
from photo_search.search import Searcher


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Three photos, of which one has two copies, and one a name that acts on terminals."""
    folder = tmp_path_factory.mktemp("album")
    for name, seed in (
        ("a.png", 0),
        ("b.png", 1),
        ("copy.png", 0),
        ("sub/copy.png", 0),
        ("new\nline \x1b[2J\u202e.png", 2),
    ):
        write_photo(folder / name, seed)
    return folder


@pytest.fixture
def index(album, tmp_path, monkeypatch):
    """An index of them; the encoder costs nothing."""
    encoder = FakeEncoder()
    encoder.features = lambda images: encoder.embed(stack([resize(image, 32) for image in images]))
    monkeypatch.setattr("photo_search.search.encoder_of", lambda *_: encoder)
    monkeypatch.chdir(tmp_path)
    update(tmp_path / "index", encoder, album)
    image = Image.new("RGB", (80, 80), "white")
    ImageDraw.Draw(image).line([(10, 10), (70, 40), (20, 70)], fill="black", width=3)
    image.save(tmp_path / "sketch.png")
    return tmp_path / "index"


def find(*arguments):
    return search_photos.main(["find", "sketch.png", "--index", "index", *map(str, arguments)])


def test_copies_take_one_place(index, album, capsys):
    hits = find("-k", 3)[0]["found"]
    first = next(hit for hit in hits if hit["photo"] == str(album / "a.png"))
    assert len(hits) == 3 and first["copies"] == [str(album / "copy.png"), str(album / "sub/copy.png")]
    assert f"{album}/a.png  and 2 copies\n" in capsys.readouterr().out
    assert len(find("-k", 2)[0]["found"]) == 2


def test_names_cannot_act_on_the_terminal(index, capsys):
    find("--picture", "p.png")
    printed = capsys.readouterr().out
    assert r"/new\nline \x1b[2J\u202e.png" in printed and "\x1b" not in printed and "\u202e" not in printed
    find("--json", "found.json")
    assert any(
        "new\nline \x1b[2J\u202e" in hit["photo"] for hit in json.loads(Path("found.json").read_text())[0]["found"]
    )


def test_json_on_standard_output_is_all_that_is_printed(index, capsys):
    result = find("--json", "-")
    assert json.loads(capsys.readouterr().out) == result
    assert not os.path.exists("-") and not (index / "found.png").exists()


def test_only_own_results_are_replaced(index, fails, capsys):
    for _ in range(2):  # the second time they replace those of the first
        find("--json", "found.json", "--picture", "p.png")
    before = Path("sketch.png").read_bytes()
    os.mkfifo("fifo")
    os.symlink("sketch.png", "link.png")
    Path("thesis.txt").write_text("thesis")
    other = [("--json", "p.png"), ("--json", "sketch.png"), ("--json", "thesis.txt"), ("--picture", "found.json"),
             ("--picture", "sketch.png"), ("--picture", "link.png")]  # fmt: skip
    Path("empty.json").write_text("[]")
    other.append(("--json", "empty.json"))
    pipe = os.pipe()[1]
    odd = [("--json", "fifo"), ("--json", "/dev/null"), ("--picture", "."), ("--picture", "fifo"),
           ("--json", f"/dev/fd/{pipe}")]  # fmt: skip
    command = search_photos.main, "find", "sketch.png", "--index", "index"
    for pairs, message in ((other, "holds something that this command did not write"), (odd, "is not a file but a")):
        for option, path in pairs:
            assert f"{option} {path}: {message}" in fails(*command, option, path)
    assert "is the file of --json" in fails(*command, "--json", "new", "--picture", "new")
    assert Path("sketch.png").read_bytes() == before and Path("thesis.txt").read_text() == "thesis"
    find("--json", "linked.json", "--picture", "p.png")
    os.symlink("linked.json", "link.json")
    find("--json", "link.json")
    assert os.path.islink("link.json")


def test_a_read_only_index_is_searched_without_a_picture(index, monkeypatch, capsys):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("utils.files.tempfile.TemporaryFile", lambda dir: refuse(dir))
    find()
    printed = capsys.readouterr()
    assert "picture: " not in printed.out
    assert f"note: found.png is not drawn: {index}: cannot be written (Permission denied); " in printed.err


def test_a_picture_of_the_user_in_the_index_stays(index, capsys):
    write_photo(index / "found.png", 5)
    before = (index / "found.png").read_bytes()
    find()
    assert (
        "note: found.png is not drawn: index/found.png: holds something that this command did not write"
        in capsys.readouterr().err
        and (index / "found.png").read_bytes() == before
    )


def test_photos_that_are_not_there_are_left_out(index, album, capsys):
    away = album / "b.png"
    away.rename(album / "b.away")
    hits = find("-k", 3)[0]["found"]
    (album / "b.away").rename(away)
    assert len(hits) == 2 and str(away) not in [hit["photo"] for hit in hits]
    assert "note: 1 photo that would be shown does not exist now" in capsys.readouterr().err


def test_photos_of_another_machine_are_not_missing(index, album):
    class Remote:  # as an index in Milvus
        def __init__(self, folders):
            self.local, self.metadata = open_index(index), {"folders": folders}

        def __len__(self):
            return len(self.local)

        def __getattr__(self, name):
            return getattr(self.local, name)

    away = album / "b.png"
    away.rename(album / "b.away")
    for folder, count in (("/none", 3), (str(album), 2)):
        searcher = Searcher(Remote([folder]), None)
        assert len(searcher.find_present(open_index(index).features_of([0])[0])[0]) == count
    (album / "b.away").rename(away)


def test_a_photo_in_the_place_of_a_sketch_is_noticed(index, album, capsys):
    command = ["find", str(album / "a.png"), "--index", "index"]
    for options, said in (([], True), (["--as_drawn"], False)):
        search_photos.main([*command, *options])
        note = f"note: {album}/a.png: looks like a photo, not like a drawing; --as_drawn compares it as it is\n"
        assert (note in capsys.readouterr().err) == said
    find()
    assert "looks like a photo" not in capsys.readouterr().err


def test_notes_say_what_was_not_indexed(tmp_path, monkeypatch, capsys):
    encoder = FakeEncoder()
    monkeypatch.setattr("photo_search.cli._load_encoder", lambda *_: encoder)
    monkeypatch.chdir(tmp_path)
    write_photo(tmp_path / "photos/a.png", 0)
    write_photo(tmp_path / "photos/.b.png", 1)
    for name, content in (("c.cr2", b"1"), ("d.cr2", b"1"), ("e.dng", b"1"), ("f.png", b"")):
        (tmp_path / "photos" / name).write_bytes(content)
    command = ["index", "photos", "--checkpoint", "c", "--workers", "0", "--exclude", "none", "--exclude", "?.dng"]
    search_photos.main(command)
    lines = capsys.readouterr().err.splitlines()
    assert f"note: not indexed: {tmp_path}/photos/f.png: not a readable image (an empty file)" in lines
    assert "note: not indexed: 2 .cr2 files; save them as JPEG in the program that reads them" in lines
    assert "note: not indexed: 1 hidden files and folders; --hidden takes them" in lines
    assert "note: --exclude none: fits nothing" in lines and not any("?.dng" in line for line in lines)
    assert search_photos.main(["index", "--hidden", "--workers", "0"]).photos == 2
    assert search_photos.main(["index", "--workers", "0"]).photos == 2  # as recorded
    assert open_index("photo_index").metadata["hidden"]
    assert search_photos.main(["index", "--no-hidden", "--workers", "0"]).photos == 1


def test_photos_that_are_cut_off_are_taken_where_asked_for(tmp_path, capsys):
    encoder = FakeEncoder()
    photo = write_photo(tmp_path / "photos/a.png", 0, 200)
    write_photo(tmp_path / "photos/b.png", 1)
    photo.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    totals = update(tmp_path / "index", encoder, tmp_path / "photos")
    assert totals.photos == 1 and "(cut off after " in totals.unreadable[0]
    assert update(tmp_path / "index", encoder, tmp_path / "photos", truncated=True).photos == 2
    assert "note: 1 photo is cut off; what is there of it is indexed" in capsys.readouterr().err
    assert update(tmp_path / "index", encoder, tmp_path / "photos").photos == 2  # and they stay
