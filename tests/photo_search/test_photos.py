import os
import sys

import numpy as np
import pytest
from albums import write_album, write_photo
from PIL import Image

from datasets import images
from datasets.images import read_rgb, resize
from photo_search.photos import find_photos, read_photo, suffixes_of, thumbnail
from utils.cli import InputError


@pytest.fixture
def album(tmp_path):
    return write_album(tmp_path / "album")


def names(folder, *more, **options):
    found = find_photos([folder, *more], **options)
    unlisted, found = found.unlisted, found.files
    assert not unlisted
    return [os.path.relpath(each.path, folder) for each in found]


def test_photos_are_found_in_all_folders_once(album, tmp_path):
    (album / "notes.txt").write_text("no photo")
    (album / "UPPER.JPG").write_bytes((album / "0.png").read_bytes())
    expected = sorted(["UPPER.JPG", *(f"{('', 'a/', 'b/c/')[n % 3]}{n}.png" for n in range(12))])
    assert names(album) == expected == names(str(album) + "/", album / "a", album)
    write_photo(tmp_path / "other/1.png", 1)
    assert names(album, tmp_path / "other") == [*expected, "../other/1.png"]
    about = os.stat(album / "0.png")
    assert find_photos([album]).files[0] == (str(album / "0.png"), about.st_size, about.st_mtime_ns)


def test_patterns_leave_out_files_and_folders(album):
    assert names(album, exclude=["a", "b/c/1*"]) == [
        "0.png",
        "3.png",
        "6.png",
        "9.png",
        "b/c/2.png",
        "b/c/5.png",
        "b/c/8.png",
    ]
    assert names(album, exclude=["*.png"]) == []
    assert "a/10.png" in names(album, exclude=["a/1.png", "b/"]) and "a/1.png" not in names(album, exclude=["a/1.png"])


def test_no_link_is_followed(album, tmp_path):
    outside = write_photo(tmp_path / "outside/secret.png", 99)
    expected = names(album)
    (album / "loop").symlink_to(album)
    (album / "a/up").symlink_to("..")
    (album / "out").symlink_to(outside.parent)
    (album / "secret.png").symlink_to(outside)
    (album / "dangling.png").symlink_to("nowhere.png")
    (album / "self.png").symlink_to("self.png")
    os.mkfifo(album / "pipe.png")
    assert names(album) == expected
    (tmp_path / "link").symlink_to(album)  # a folder that is named may be one
    assert [each.path for each in find_photos([tmp_path / "link"]).files] == [str(album / name) for name in expected]


def test_names_of_any_bytes_are_found(tmp_path):
    odd = [b"\xff\xfe.png", "žluťoučký kůň 雪.png".encode(), b"new\nline.png", b"<b>&amp;.png"]
    for number, name in enumerate(odd):
        write_photo(tmp_path / os.fsdecode(name), number)
    found = find_photos([tmp_path]).files
    assert [os.fsencode(os.path.basename(each.path)) for each in found] == sorted(odd)
    for each in found:
        read_photo(each.path, 32)


def test_folders_that_cannot_be_read_are_told(album, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"none: cannot be searched for photos \(No such file or directory\)"):
        find_photos([album, tmp_path / "none"])
    with pytest.raises(InputError, match="Not a directory"):
        find_photos([album / "0.png"])
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_photos([album])
    assert len(found.files) == 8 and found.unlisted == {f"{album}/a": "Permission denied"}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff", "bmp"])
def test_formats_are_read(tmp_path, suffix):
    Image.new("RGB", (60, 40), (200, 40, 90)).save(tmp_path / f"photo.{suffix}")
    assert names(tmp_path) == [f"photo.{suffix}"]
    image = read_photo(tmp_path / f"photo.{suffix}", 32)
    assert image.mode == "RGB" and image.size == (60, 40)
    np.testing.assert_allclose(np.asarray(image)[20, 30], (200, 40, 90), atol=6)


def test_the_first_picture_of_a_film_is_taken(tmp_path):
    first, second = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "film.gif", save_all=True, append_images=[second])
    assert np.asarray(read_photo(tmp_path / "film.gif", 32))[10, 10].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (79, 119)), (6, (0, 79)), (8, (119, 0))])
def test_photos_are_turned_upright(tmp_path, orientation, corner):
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[:20, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95, exif=exif)
    upright = np.asarray(read_photo(tmp_path / "photo.jpg", 32))
    assert upright.shape[:2] == ((80, 120) if orientation in (1, 3) else (120, 80))
    assert upright[corner].min() > 240 and (upright > 128).mean() == pytest.approx(400 / 9600, abs=0.01)


def test_large_jpegs_are_reduced_while_they_are_decoded(tmp_path):
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(
        (2000, 1500), Image.Resampling.BICUBIC
    )
    rough.save(tmp_path / "large.jpg", quality=90)
    reduced, full = read_photo(tmp_path / "large.jpg", 56), read_rgb(tmp_path / "large.jpg")
    assert full.size == (2000, 1500) and reduced.size == (500, 375)
    apart = np.abs(resize(reduced, 56).astype(float) - resize(full, 56))
    assert apart.mean() < 0.5 and apart.max() <= 4  # grey levels
    small = rough.resize((1000, 750))
    small.save(tmp_path / "small.jpg")
    assert (np.asarray(read_photo(tmp_path / "small.jpg", 32)) == np.asarray(read_rgb(tmp_path / "small.jpg"))).all()


def test_what_cannot_be_read_is_said_in_a_few_words(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    noise.save(tmp_path / "torn.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "torn.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "empty.gif").write_bytes(b"")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")  # for Ghostscript
    for name in ("torn.jpg", "text.png", "empty.gif", "script.png", "gone.png"):
        with pytest.raises(InputError) as told:
            read_photo(tmp_path / name, 32)
        assert len(str(told.value)) < 80 and "\n" not in str(told.value)
    noise.save(tmp_path / "large.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 3599)
    with pytest.raises(InputError, match="60 × 60 pixels are too many"):
        read_photo(tmp_path / "large.png", 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="3600 pixels are too many"):
        read_photo(tmp_path / "large.png", 32)


def test_thumbnails_are_small_jpegs():
    image = Image.new("RGB", (400, 200), (10, 200, 30))
    small = thumbnail(image)
    assert small[:2] == b"\xff\xd8" and len(small) < 3000 and image.size == (400, 200)


def test_the_folder_of_the_index_is_left_out(tmp_path):
    album = write_album(tmp_path / "album", 2)
    photos = [each.path for each in find_photos([album]).files]
    write_photo(album / "photo_index" / "found.png", 3)
    assert len(find_photos([album]).files) == 3
    assert [each.path for each in find_photos([album], index=album / "photo_index").files] == photos


def test_the_picture_of_find_is_left_out_where_photos_and_index_are_in_one_folder(album):
    write_photo(album / "found.png", 90)
    assert "found.png" in names(album)
    assert len(names(album, index=album)) == 12 and "found.png" not in names(album, index=album)


def test_hidden_files_and_folders_of_systems_are_left_out(tmp_path):
    write_photo(tmp_path / "a.png", 0)
    for name in (".Trash-1000/b.png", "@eaDir/c.png", "#recycle/d.png", "._a.png", "sub/.thumbnails/e.png"):
        write_photo(tmp_path / name, 1)
    found = find_photos([tmp_path])
    assert names(tmp_path) == ["a.png"] and found.hidden == 5
    assert len(names(tmp_path, hidden=True)) == 6
    assert names(tmp_path / "@eaDir") == ["c.png"]  # a folder that is named is not hidden


def test_files_that_are_not_decoded_are_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(
        Image, "registered_extensions", lambda: {".jpg": "JPEG", ".png": "PNG"}
    )  # which another test may have extended
    for name in ("a.HEIC", "b.heic", "c.CR2", "d.mp4", "e.txt"):
        (tmp_path / name).write_bytes(b"1")
    photo = Image.new("RGB", (30, 20))
    photo.save(tmp_path / "two.mpo", "MPO", save_all=True, append_images=[photo])
    found = find_photos([tmp_path])
    assert suffixes_of(found.unread) == {".heic": 2, ".cr2": 1} and names(tmp_path) == ["two.mpo"]
    assert read_photo(tmp_path / "two.mpo", 32).size == (30, 20)


def test_a_time_that_no_record_holds_is_the_last_one(tmp_path):
    os.utime(write_photo(tmp_path / "a.png", 0), ns=(10**19, 10**19))  # in the year 2286
    assert np.array([find_photos([tmp_path]).files[0].mtime], np.int64) == 2**63 - 1
