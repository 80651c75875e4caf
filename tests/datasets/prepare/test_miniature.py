import errno

import numpy as np
import pytest
from PIL import Image

from datasets.lists import check_images, open_benchmark
from datasets.prepare import __main__ as prepare
from datasets.prepare.miniature import (
    CATEGORIES,
    SEEN_CATEGORIES,
    UNSEEN_CATEGORIES,
    draw_photo,
    draw_sketch,
    write_miniature,
)
from utils.cli import InputError


def test_it_is_a_benchmark_in_the_layout_of_sketchy(miniature):
    benchmark = open_benchmark("sketchy", miniature)
    assert (benchmark.seen_names, benchmark.unseen_names) == (SEEN_CATEGORIES, UNSEEN_CATEGORIES)
    for split, sketches, photos in (("train", 4, 6), ("zero", 4, 6)):
        names = UNSEEN_CATEGORIES if split == "zero" else SEEN_CATEGORIES
        for kind, count in (("sketch", sketches), ("photo", photos)):
            files = benchmark.read(kind, split)
            check_images(files)
            assert np.bincount(files.labels).tolist() == [count] * len(names)
            assert all(
                name.split("/")[3] == names[label] for name, label in zip(files.paths, files.labels, strict=True)
            )
    assert not set(benchmark.read("sketch", "test").paths) & set(benchmark.read("sketch", "train").paths)
    mask = benchmark.read_mask()
    assert mask.shape == (len(SEEN_CATEGORIES), 1000) and set(np.unique(mask)) == {0, np.float32(1 / 3), 1}


def test_seen_and_unseen_are_apart():
    assert len(CATEGORIES) >= 24
    assert sorted(SEEN_CATEGORIES + UNSEEN_CATEGORIES) == sorted(CATEGORIES)


def test_the_seed_decides_the_pixels(tmp_path, miniature):
    write_miniature(tmp_path / "again", seed=3, sketches=4, photos=6, held_back=1, workers=1)
    files = [path.relative_to(miniature) for path in miniature.rglob("*") if path.is_file()]
    assert files and all((miniature / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    write_miniature(tmp_path / "other", seed=4, sketches=1, photos=1, held_back=0, workers=1)
    bell = "256x256/photo/tx_000000000000_ready/bell/0000.jpg"
    assert (miniature / bell).read_bytes() != (tmp_path / "other" / bell).read_bytes()


@pytest.mark.parametrize("name", CATEGORIES)
def test_every_category_draws_lines_and_pictures(name):
    rng = np.random.default_rng(0)
    sketch, photo = draw_sketch(name, rng), draw_photo(name, rng)
    assert sketch.size == photo.size == (128, 128)
    ink = (np.asarray(sketch) < 128).mean()
    assert 0.01 < ink < 0.35
    assert np.asarray(photo).std(axis=(0, 1)).min() > 2


def test_a_folder_in_use_is_left_alone(tmp_path, fails):
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    assert "is not an empty folder" in fails(prepare.main, "miniature", tmp_path)
    assert "is not an empty folder" in fails(prepare.main, "miniature", tmp_path / "mine.png")
    assert "--seed" in fails(prepare.main, "miniature", tmp_path / "new", "--seed", -1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_a_full_disk_is_named_with_a_way_out(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(InputError, match=r"images cannot be written \(No space left on device\); make room"):
        write_miniature(tmp_path, sketches=1, photos=1, held_back=0, workers=1)
    monkeypatch.undo()
    write_miniature(tmp_path, sketches=1, photos=1, held_back=0, workers=1)
