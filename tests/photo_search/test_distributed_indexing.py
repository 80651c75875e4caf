"""Several processes (gloo) make the index that one makes."""

import numpy as np
import pytest
import torch
from albums import write_album
from helpers.forked import run_ranks

import search_photos
from models.checkpoints import save_checkpoint
from models.networks import Student, create_backbone
from photo_search.index import open_index

OPTIONS = "--device cpu --batch_size 3 --workers 0".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model_best.pth.tar"
    options = {"model": "convnextv2_atto", "input_size": 32, "imagenet_classes": 1000}
    save_checkpoint(path, Student(create_backbone("convnextv2_atto"), 29), options=options)
    return path


def index(*arguments):
    """`search_photos.py index` in two processes; what it says, once it has ended well."""
    status, said, told = run_ranks(2, "search_photos.py", "index", *arguments, *OPTIONS)
    assert status == 0 and "error" not in told, told
    return said, told


def test_two_processes_make_the_index_that_one_makes(checkpoint, tmp_path):
    album = write_album(tmp_path / "album", 14)  # 5 batches, so that the first process has one more
    (album / "torn.png").write_text("torn")
    made = [album, "--checkpoint", checkpoint, "--clusters", 3, "--index"]
    search_photos.main(["index", *map(str, made), str(tmp_path / "one"), *OPTIONS])
    said, told = index(*made, tmp_path / "two")
    assert said.startswith(f"{tmp_path}/two: 14 photos (14 new, 0 changed, 0 moved, 0 removed, 1 unreadable)")
    assert said.count("\n") == 1 and told.count("torn.png: not a readable image") == 1
    one, two = (open_index(tmp_path / name) for name in ("one", "two"))
    assert one.metadata == two.metadata and not list((tmp_path / "two").glob("unfinished*"))
    for name in ("records", "path_bytes"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert one.thumbnails_of(range(14)) == two.thumbnails_of(range(14))
    np.testing.assert_allclose(one.cells.features, two.cells.features, atol=1e-6)
    np.testing.assert_allclose(one.cells.codebook, two.cells.codebook, atol=1e-5)
    np.testing.assert_array_equal(one.cells.codes, two.cells.codes)
    (album / "torn.png").unlink()
    assert "14 photos (0 new," in index("--index", tmp_path / "two")[0]  # where nothing is to be computed


def test_bad_input_is_told_by_the_first_process(tmp_path, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("utils.cli.time.sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            search_photos.main(["index", "--clusters", "0"])
        assert end.value.code == 2 and ("argument --clusters" in capsys.readouterr().err) == (rank == "0")
    assert waited == [30]
