import io
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

from datasets.images import (
    Augmentation,
    augment_strongly,
    decode_image,
    decoded_formats,
    draw_augmentation,
    read_rgb,
    resize,
    stack,
    warp,
)
from models.networks import normalise
from utils.cli import InputError


def test_augmentation_equals_golden(golden):
    z = golden("images")
    for index, params, expected in zip(z["image_index"], z["params"].tolist(), z["warped"], strict=True):
        warped = np.asarray(warp(Image.fromarray(z["images"][index].numpy()), Augmentation(*params)), dtype=int)
        assert (np.abs(warped - expected.numpy().astype(int)) <= 1).mean() >= 0.995


def test_resize_and_normalisation_equal_golden(golden):
    z = golden("images")
    images = torch.from_numpy(stack([resize(Image.fromarray(image.numpy()), 56) for image in z["images"]]))
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalise(images), z["tensor56"], rtol=0, atol=1e-5)


def test_augmentation_is_drawn_as_published():
    rng = np.random.default_rng(0)
    draws = [draw_augmentation(rng) for _ in range(20000)]
    changed = np.array([draw for draw in draws if draw is not None])
    assert len(changed) / len(draws) == pytest.approx(0.7, abs=0.02)
    flip, sx, sy, rotation, tx, ty = changed.T
    assert flip.mean() == pytest.approx(0.5, abs=0.02)
    for values, still, low, high in (
        (sx, 1, 0.7, 1.3),
        (sy, 1, 0.7, 1.3),
        (rotation, 0, -np.pi / 6, np.pi / 6),
        (tx, 0, -10, 10),
        (ty, 0, -10, 10),
    ):
        moved = values[values != still]
        assert len(moved) / len(values) == pytest.approx(0.5, abs=0.02)
        assert low <= moved.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < moved.max() <= high
    assert ((sx == 1) == (sy == 1)).all() and ((tx == 0) == (ty == 0)).all()
    assert abs(np.corrcoef(sx[sx != 1], sy[sx != 1])[0, 1]) < 0.05


def test_the_map_turns_about_the_top_left_pixel():
    image = Image.new("RGB", (30, 20))
    image.putpixel((10, 0), (255, 255, 255))
    turned = np.asarray(warp(image, Augmentation(False, 1, 1, np.pi / 2, 0, 0)))  # (10, 0) goes to (0, 10)
    assert turned[10, 0, 0] >= 254 and turned.sum() <= 3 * 256


def test_strong_augmentation_crops_and_leaves_a_sketch_white_outside():
    photo, sketch = Image.new("RGB", (120, 90), (200, 200, 200)), Image.new("RGB", (100, 100), "white")
    shares = {True: [], False: []}
    for seed in range(300):
        for is_photo in (True, False):
            image = photo if is_photo else sketch
            augmented, again = (augment_strongly(image, np.random.default_rng(seed), is_photo) for _ in range(2))
            assert np.array_equal(augmented, again)
            shares[is_photo].append(augmented.width * augmented.height / (image.width * image.height))
            assert is_photo or np.asarray(augmented).min() == 255  # rotated
    assert 0.3 < min(shares[True]) < 0.42 and 0.55 < min(shares[False]) < 0.65 and max(shares[True]) > 0.9
    half_white = Image.new("RGB", (60, 60))
    half_white.paste("white", (30, 0, 60, 60))
    flipped = [augment_strongly(half_white, np.random.default_rng(seed), True) for seed in range(60)]
    assert 10 < sum(np.asarray(each)[:, 0].mean() > 100 for each in flipped) < 50


def grey16(path):
    Image.fromarray(np.full((5, 4), 40000, dtype=np.uint16)).save(path)


def transparent(path):
    Image.new("RGBA", (4, 5), (0, 0, 0, 0)).save(path)


def palette(path):
    image = Image.new("P", (4, 5), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(path)


def transparent_palette(path):
    image = Image.new("P", (4, 5), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(path, transparency=1)


@pytest.mark.parametrize(
    ("save", "suffix", "expected"),
    [
        (lambda path: Image.new("L", (4, 5), 77).save(path), "png", (77, 77, 77)),
        (lambda path: Image.new("1", (4, 5), 1).save(path), "png", (255, 255, 255)),
        (grey16, "png", (156, 156, 156)),
        (lambda path: Image.new("CMYK", (4, 5), (0, 255, 255, 0)).save(path, quality=100), "jpg", (255, 0, 0)),
        (palette, "png", (10, 200, 30)),
        (transparent, "png", (255, 255, 255)),
        (transparent_palette, "png", (255, 255, 255)),
    ],
)
def test_images_of_every_mode_are_read_as_rgb(tmp_path, save, suffix, expected):
    path = tmp_path / f"image.{suffix}"
    save(path)
    image = read_rgb(path)
    assert image.mode == "RGB" and image.size == (4, 5)
    np.testing.assert_allclose(np.asarray(image).reshape(-1, 3), np.tile(expected, (20, 1)), atol=3)


def test_a_broken_image_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    for name in ("torn.jpg", "torn.png"):
        Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1500])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("torn.jpg", "torn.png", "text.png", "empty.jpg"):
        with pytest.raises(InputError, match=f"{name}: not a readable image"):
            read_rgb(tmp_path / name)
    with pytest.raises(InputError, match=r"gone\.png: no such image"):
        read_rgb(tmp_path / "gone.png")


def test_exif_orientation_is_obeyed_only_where_asked_for(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise
    Image.new("L", (60, 20)).save(tmp_path / "photo.jpg", exif=exif)
    assert read_rgb(tmp_path / "photo.jpg").size == (60, 20)
    assert read_rgb(tmp_path / "photo.jpg", exif_transpose=True).size == (20, 60)


def test_formats_and_sizes_are_checked_before_an_image_is_decoded(tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (60, 40)).save(file, "PNG")
    with pytest.raises(OSError, match="cannot identify"):
        decode_image(file, formats=["JPEG"])
    assert decode_image(file, formats=["PNG"], max_pixels=2400, max_side=60).size == (60, 40)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    for limit in ({"max_pixels": 2399}, {"max_side": 59}):
        with pytest.raises(InputError, match="60 × 40 pixels are too many"):
            decode_image(file, **limit)


def test_postscript_is_not_decoded_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    file = tmp_path / "bell.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="not a readable image"):
        read_rgb(file)
    assert not {"EPS", "WMF", "PDF"} & {*decoded_formats()} and {"PNG", "JPEG", "TIFF", "WEBP"} < {*decoded_formats()}


def test_a_fifo_or_a_folder_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for path, reason in ((tmp_path / "fifo.png", "not a regular file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=reason):
            read_rgb(path)


def test_sixteen_bit_grey_is_rounded_to_eight(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "grey.png"))[..., 0], (values / 257).round())


def jpeg(width, height, scans=None, **options):
    """A JPEG (bytes) of one grey; scans: how often its last one is repeated."""
    file = io.BytesIO()
    Image.new("L", (width, height), 128).save(file, "JPEG", quality=20, **options)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * (scans or 1) + content[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "bomb.jpg").write_bytes(jpeg(64, 64, 3000, progressive=True))
    for path in (tmp_path / "bomb.jpg", io.BytesIO(jpeg(64, 64, 3000))):
        with pytest.raises(InputError, match="scans would take minutes to decode"):
            decode_image(path)
    film = jpeg(64, 64) + b"\xff\xda\x00\x00" * 3000  # behind the image, as in a photo with a film
    assert decode_image(io.BytesIO(film)).size == (64, 64)
    assert decode_image(io.BytesIO(jpeg(64, 64, progressive=True))).size == (64, 64)


def test_the_limit_of_pixels_applies_to_what_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.images.DRAFT_PIXELS", 1000)
    monkeypatch.setattr("datasets.images.MAX_PIXELS", 2000)
    monkeypatch.setattr("datasets.images.MAX_REDUCED_PIXELS", 8000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # that of Pillow, exceeded by phones with 200 megapixels
    photo = io.BytesIO(jpeg(80, 80))
    assert decode_image(photo, draft_side=20).size == (20, 20)
    for content, options in (
        (jpeg(80, 80), {}),
        (jpeg(160, 80), {"draft_side": 20}),
        (jpeg(80, 80, progressive=True), {"draft_side": 20}),
    ):
        with pytest.raises(InputError, match="are too many"):
            decode_image(io.BytesIO(content), **options)
    file = io.BytesIO()
    Image.new("L", (30, 30)).save(file, "PNG")
    with pytest.raises(InputError, match="900 pixels are too many"):
        decode_image(file)


def test_a_png_with_a_long_text_or_colour_profile_is_read(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * (3 << 20), zip=True)
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "text.png", pnginfo=text)
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "profile.png", icc_profile=b"x" * (2 << 20))
    for name in ("text.png", "profile.png"):
        assert read_rgb(tmp_path / name).getpixel((3, 3)) == (0, 128, 128)


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0, 1e6])
def test_floats_and_integers_of_32_bits_are_scaled(tmp_path, white):
    values = np.linspace(0, white, 20, dtype=np.float32).reshape(4, 5)
    Image.fromarray(values).save(tmp_path / "float.tif")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "int.tif")
    expected = np.linspace(0, 255, 20).round().reshape(4, 5)
    assert np.abs(np.asarray(read_rgb(tmp_path / "float.tif"))[..., 0] - expected).max() <= 1
    if white > 1:
        assert np.abs(np.asarray(read_rgb(tmp_path / "int.tif"))[..., 0] - expected).max() <= 1
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert read_rgb(tmp_path / "float.tif").getpixel((4, 3)) == (255, 255, 255)


def test_damaged_exif_leaves_the_image_as_it_is(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "photo.jpg")
    monkeypatch.setattr("PIL.ImageOps.exif_transpose", lambda image: 1 / 0)
    assert read_rgb(tmp_path / "photo.jpg", exif_transpose=True).size == (30, 20)


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "an empty file"), (bytes(5000), "zeros only"), (b"hello", "a text"), ("grüße".encode(), "a text"),
    (b"\0\0\0\x18ftypmp42" + bytes(20), "a video"), (b"RIFF\1\2\3\4AVI LIST", "a video"), (b"%PDF-1.7\n\xff", "a PDF"),
    (b"<?xml version='1.0'?>\n<svg/>", "SVG, which only browsers show"), (b"PK\3\4\xff", "an archive"),
    (b"\0\5\26\7xxxx", "a file of attributes that macOS wrote"), (b"\x81\x82\x83 \xff", "of no known format"),
])  # fmt: skip
def test_what_an_unreadable_file_is_instead(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_rgb(tmp_path / "a.jpg")
    expected = f"{tmp_path}/a.jpg: not a readable image ({reason}); fetch it again, or take it out of its list"
    assert str(error.value) == expected


def test_how_much_of_a_truncated_image_is_there(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png"):
        noise.save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=r"not a readable image \(cut off after (4\d|5[0-7]) %\)"):
            read_rgb(tmp_path / name)
        whole = decode_image(tmp_path / name, truncated=True)
        assert whole.size == (200, 200) and not ImageFile.LOAD_TRUNCATED_IMAGES


def test_heic_is_named_where_its_reader_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    with pytest.raises(InputError, match=r"not a readable image \(HEIC; pip install pillow-heif"):
        read_rgb(tmp_path / "a.jpg")
