"""search_photos.py as a user runs it; its ranking is that of the test script."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from albums import write_photo
from PIL import Image, ImageChops, ImageDraw

import search_photos
from datasets.lists import open_benchmark
from datasets.loaders import LoaderOptions
from datasets.prepare.miniature import UNSEEN_CATEGORIES
from models.checkpoints import save_checkpoint
from models.eval.evaluate import evaluate_rows
from models.eval.features import extract_all
from models.networks import Student, create_backbone
from photo_search.clean_sketch import clean_up
from photo_search.index import open_index

OPTIONS = {"model": "convnextv2_atto", "input_size": 32, "imagenet_classes": 1000}
HERE = ["--device", "cpu"]
INDEX = [*HERE, "--workers", "0"]


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return Student(create_backbone("convnextv2_atto"), 29)


@pytest.fixture(scope="module")
def checkpoint(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model_best.pth.tar"
    save_checkpoint(path, student, options=OPTIONS)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        write_photo(folder / f"{number}.png", number)
    return folder


@pytest.fixture(scope="module")
def small(photos, checkpoint, tmp_path_factory):
    """An index of five photos, to be left as it is."""
    folder = tmp_path_factory.mktemp("small") / "index"
    run("index", photos, "--checkpoint", checkpoint, "--index", folder, *INDEX)
    return folder


@pytest.fixture
def sketch(tmp_path):
    image = Image.new("RGB", (80, 80), "white")
    ImageDraw.Draw(image).line([(10, 10), (70, 40), (20, 70)], fill="black", width=3)
    image.save(tmp_path / "sketch.png")
    return tmp_path / "sketch.png"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr("photo_search.cli.draw_found", lambda *_: None)


def run(*arguments):
    return search_photos.main([str(argument) for argument in arguments])


def test_the_ranking_is_that_of_the_test_script(miniature, student, checkpoint, tmp_path):
    images = open_benchmark("sketchy", miniature).read_query_gallery()
    folders = [miniature / "256x256/photo/tx_000000000000_ready" / name for name in UNSEEN_CATEGORIES]
    run("index", *folders, "--checkpoint", checkpoint, "--clusters", 7, "--batch_size", 16, *INDEX)
    index = open_index("photo_index")
    features = extract_all(student, images, LoaderOptions(size=32, batch_size=16))
    codebooks = {"one-to-one": None, "one-to-many": index.cells.codebook}
    every = dict.fromkeys(codebooks, len(index))
    measured = evaluate_rows(features, codebooks, nearest=every, dtype=torch.float64)
    sketches = [images.query.root / path for path in images.query.paths]
    for matching in codebooks:
        weight = ["--cluster_weight", 0.8] if matching == "one-to-many" else []
        how = ["--as_drawn", "--matching", matching, *weight, "-k", 48]
        run("find", *sketches, *how, "--json", tmp_path / "found.json", *HERE)
        found = json.loads((tmp_path / "found.json").read_text())
        assert len(found) == len(sketches) == 32
        for own, sketch, nearest in zip(found, sketches, measured[matching]["nearest"], strict=True):
            assert (own["sketch"], own["matching"]) == (str(sketch), matching)
            expected = [str(images.gallery.root.resolve() / images.gallery.paths[photo]) for photo in nearest]
            assert [photo["photo"] for photo in own["found"]] == expected


def test_without_a_checkpoint_the_network_of_the_project_is_used(photos, checkpoint, monkeypatch, capsys, fails):
    monkeypatch.setattr("photo_search.cli.STARTER", checkpoint)
    run("index", photos, *INDEX)
    assert capsys.readouterr().err.startswith("note: features by the network in checkpoint/starter; ")
    assert open_index("photo_index").metadata["checkpoint"] == str(checkpoint)
    run("index", *INDEX)  # an index has its own
    assert "checkpoint/starter" not in capsys.readouterr().err
    monkeypatch.setattr("photo_search.cli.STARTER", checkpoint.with_name("lost.onnx"))
    line = fails(search_photos.main, "index", photos, "--index", "new", *INDEX)
    assert "lost.onnx: the network of the project is missing; restore it, or name one with --checkpoint" in line


@pytest.mark.draws
def test_index_find_and_index_again(photos, checkpoint, sketch, tmp_path, capsys):
    totals = run("index", photos, "--checkpoint", checkpoint, *INDEX)
    said = capsys.readouterr()
    assert totals.photos == 5 and "photos_index" not in said.out
    line = "photo_index: 5 photos (5 new, 0 changed, 0 moved, 0 removed, 0 unreadable), one-to-one matching alone; "
    assert said.out.startswith(line) and said.out.count("\n") == 1
    assert said.err == "note: clusters are fitted from 200 photos on, or with --clusters\n"
    found = run("find", sketch, "-k", 9, "--json", "out.json", *HERE)
    said = capsys.readouterr()
    assert "note: photo_index has no clusters, so matching is one-to-one" in said.err
    assert "note: the index has only 5 photos; all are shown" in said.err
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert [list(each) for each in found] == [["sketch", "matching", "cluster_weight", "found"]]
    assert [list(each) for each in found[0]["found"]] == [["photo", "score", "distance", "cluster_distance"]] * 5
    scores = [photo["score"] for photo in found[0]["found"]]
    assert scores == sorted(scores) and all(photo["cluster_distance"] is None for photo in found[0]["found"])
    assert {photo["photo"] for photo in found[0]["found"]} == {str(path) for path in photos.iterdir()}
    assert f"    1 {scores[0]:6.4f}" in said.out and found[0]["found"][0]["photo"] in said.out
    with Image.open("photo_index/found.png") as picture:
        assert picture.width > 500
    run("index", *INDEX)  # with the folders and the checkpoint that it knows
    assert "photo_index: 5 photos (0 new, 0 changed, 0 moved, 0 removed, 0 unreadable)" in capsys.readouterr().out


def test_a_batch_that_cannot_fit_ends_in_one_line(photos, checkpoint, fails, monkeypatch):
    monkeypatch.setattr("utils.memory.available_memory", lambda: 10**6)
    told = fails(search_photos.main, "index", photos, "--checkpoint", checkpoint, "--batch_size", 9999, *INDEX)
    assert "with --batch_size 9999: needs at least " in told and "lower --batch_size or --input_size" in told


def test_folders_are_added_and_removed(photos, checkpoint, tmp_path):
    for name, seed in (("other", 50), ("third", 60)):
        write_photo(tmp_path / name / f"{name}.png", seed)
    run("index", photos, "--checkpoint", checkpoint, *INDEX)
    assert run("index", "other", *INDEX).photos == 6
    assert run("index", "third", "--remove", "other", *INDEX).photos == 6
    assert open_index("photo_index").metadata["folders"] == [str(photos), str(tmp_path / "third")]
    assert run("index", "--only", "third", *INDEX).photos == 1
    shutil.rmtree("third")
    os.mkdir("third")
    assert run("index", *INDEX).photos == 1


def test_an_interrupted_first_indexing_is_continued_without_options(photos, checkpoint, monkeypatch, capsys):
    with monkeypatch.context() as interrupted:
        interrupted.setattr("photo_search.update.write_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("index", photos, "--checkpoint", checkpoint, "--input_size", 40, "--exclude", "3.png", *INDEX)
    totals = run("index", *INDEX)
    assert (totals.photos, totals.extracted) == (4, 0)
    assert f"note: continuing with {photos} and {checkpoint}\n" in capsys.readouterr().err
    metadata = open_index("photo_index").metadata
    assert (metadata["folders"], metadata["input_size"]) == ([str(photos)], 40)
    assert not list(open_index("photo_index").folder.glob("unfinished*"))


def test_an_interrupted_addition_of_a_folder_is_continued_without_options(
    photos, checkpoint, tmp_path, monkeypatch, capsys
):
    write_photo(tmp_path / "other/1.png", 50)
    run("index", photos, "--checkpoint", checkpoint, *INDEX)
    for options, count in (([], 5), (["--remove", "other"], 4), ([photos], 5)):
        with monkeypatch.context() as interrupted:
            interrupted.setattr("photo_search.update._write", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run("index", "other", "--exclude", "3.png", *INDEX)
        assert run("index", *options, *INDEX).photos == count
        continued = f"note: continuing with {photos}, {tmp_path / 'other'}\n" in capsys.readouterr().err
        assert continued == (options != [photos])
        run("index", "--only", photos, *INDEX, "--exclude", "none")


def test_photos_that_are_gone_are_told(photos, checkpoint, sketch, capsys, tmp_path):
    shutil.copytree(photos, "album")
    run("index", "album", "--checkpoint", checkpoint, "--clusters", 2, "--subspaces", 4, *INDEX)
    os.remove("album/3.png")
    capsys.readouterr()
    found = run("find", sketch, *HERE)[0]
    assert found["matching"] == "one-to-many" and len(found["found"]) == 4
    assert "note: 1 photo that would be shown does not exist now, or" in capsys.readouterr().err
    for photo in found["found"]:
        score = 0.2 * photo["cluster_distance"] + 0.8 * photo["distance"]
        assert photo["score"] == pytest.approx(score, abs=1e-12)
    one = run("find", sketch, "--matching", "one-to-one", *HERE)[0]
    assert [photo["score"] for photo in one["found"]] == [photo["distance"] for photo in one["found"]]


def test_a_drawing_is_cleaned_up_unless_as_drawn(small, sketch, tmp_path):
    with Image.open(sketch) as image:
        clean_up(image.convert("RGB")).save(tmp_path / "clean.png")
        ImageChops.invert(image.convert("RGB")).save(tmp_path / "dark.png")
    command = ["find", "sketch.png", "dark.png", "clean.png", "--index", small, *HERE]
    sketch, dark, _ = run(*command)
    as_drawn, as_drawn_dark, clean = run(*command, "--as_drawn")
    assert sketch["found"] == clean["found"] != as_drawn["found"]
    assert dark["found"] == sketch["found"] != as_drawn_dark["found"]


def test_a_checkpoint_of_the_authors_is_told_its_model(photos, student, sketch, tmp_path, fails):
    save_checkpoint(tmp_path / "theirs.pth.tar", student)
    options = [photos, "--checkpoint", tmp_path / "theirs.pth.tar", *INDEX]
    assert "see --model" in fails(search_photos.main, "index", *options)
    run("index", *options, "--model", "convnextv2_atto", "--input_size", 40)
    assert open_index("photo_index").metadata["input_size"] == 40
    run("find", sketch, *HERE)
    assert "--input_size 48: photo_index was made with 40" in fails(search_photos.main, "index", "--input_size", 48)
    assert "--model x: photo_index was made with convnextv2_atto" in fails(search_photos.main, "index", "--model", "x")


def test_another_checkpoint_is_not_mixed_in(photos, small, sketch, tmp_path, fails):
    torch.manual_seed(1)
    save_checkpoint(tmp_path / "other.pth.tar", Student(create_backbone("convnextv2_atto"), 29), options=OPTIONS)
    other = ["--index", small, "--checkpoint", tmp_path / "other.pth.tar", *HERE]
    for command in (["index", photos], ["find", sketch]):
        message = fails(search_photos.main, *command, *other)
        assert "other.pth.tar: not the checkpoint that the index was made with" in message


def test_a_checkpoint_may_move(photos, checkpoint, sketch, tmp_path, fails):
    shutil.copy(checkpoint, "c.pth.tar")
    run("index", photos, "--checkpoint", "c.pth.tar", *INDEX)
    os.rename("c.pth.tar", "d.pth.tar")
    assert "c.pth.tar: the checkpoint of the index does not exist; give its path" in fails(
        search_photos.main, "find", sketch
    )
    assert run("find", sketch, "--checkpoint", "d.pth.tar", *HERE)
    run("index", "--checkpoint", "d.pth.tar", *INDEX)
    assert run("find", sketch, *HERE)


def bad_sketches(folder):
    Image.new("RGB", (40, 40), "white").save(folder / "white.png")
    Image.new("L", (40, 40), 5).save(folder / "black.png")
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(folder / "clear.png")
    noise = np.random.default_rng(0).integers(235, 255, (40, 40), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "paper.png")
    Image.fromarray(np.tile(np.linspace(90, 250, 80).astype(np.uint8), (60, 1))).save(folder / "light.png")
    (folder / "text.png").write_text("no image")


@pytest.mark.parametrize(("arguments", "told"), [
    ("find white.png", "white.png: the sketch is blank"), ("find black.png", "black.png: the sketch is all black"),
    ("find clear.png", "clear.png: the sketch is blank"), ("find paper.png", "paper.png: the sketch is blank"),
    ("find sketch.png light.png", "light.png: no line differs from the paper; draw dark lines"),
    ("find text.png", "text.png: not a readable image"), ("find none.png", "none.png: no such image"),
    ("find sketch.png -k 0", "argument -k: '0' is not a whole number"), ("find", "required: sketch"),
    ("", "required: command"),
    ("find sketch.png --matching both", "argument --matching"),
    ("find sketch.png --index none", "none: no index of photos"),
    ("find sketch.png --index sketch.png", "sketch.png: no index of photos"),
    ("find sketch.png --index", "expected one"),
    ("find sketch.png --matching one-to-many", "has no clusters; index again with --clusters"),
    ("find sketch.png --cluster_weight 0.5", "--cluster_weight 0.5: photo_index has no clusters"),
    ("find sketch.png --matching one-to-one --cluster_weight 0.5", "one-to-one has no cluster distance"),
    ("find sketch.png --cluster_weight 1.1", "'1.1' is not a number from 0 to 1"),
    ("find sketch.png --device abacus", "--device abacus: there is no such device"),
    ("find sketch.png --json sketch.png/x.json", "--json sketch.png/x.json: cannot be written"),
    ("find sketch.png --json empty", "--json empty: is not a file but a folder"),
    ("find sketch.png --collection cats", "--collection cats: only for --engine milvus"),
    ("index --index new", "a new one needs a folder of photos"),
    ("index none --index new --checkpoint {}", "none: cannot be searched for photos"),
    ("index empty --index new --checkpoint {}", "empty: contains no photos"),
    ("index empty", "empty: contains no photos"),
    ("index empty --index sketch.png --checkpoint {}", "sketch.png: cannot be written"),
    ("index photos --index new --checkpoint none", "none: no such file"),
    ("index photos --index new --checkpoint sketch.png", "sketch.png: refused, it is torn or no torch file"),
    ("index photos --index new --checkpoint backbone.pt", "backbone.pt: holds no classifier of seen classes"),
    ("index photos --index new --checkpoint {} --subspaces 7", "--subspaces 7: features of 320 values"),
    ("index photos --index new --checkpoint {} --clusters 9", "--clusters 9: there are only 5 photos"),
    ("index photos --clusters 0", "argument --clusters"),
    ("index photos --device abacus", "--device abacus: there is no such device"),  # though nothing is to be computed
    ("index photos --exclude *.png", "photos0: contains no photos beside those of --exclude *.png; correct"),
    ("index --remove empty", "--remove empty: not a folder of the index; its folders are "),
    ("index --remove photos", "--remove: no folder would be left; to delete the index, delete photo_index"),
    ("index --only empty", "empty: contains no photos"), ("index ", "an empty string is not a file or folder"),
])  # fmt: skip
def test_bad_input_ends_in_one_line(arguments, told, small, photos, sketch, checkpoint, tmp_path, fails):
    bad_sketches(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").symlink_to(photos)
    torch.save({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "backbone.pt")
    shutil.copytree(small, tmp_path / "photo_index")
    assert told in fails(search_photos.main, *(arguments.format(checkpoint).split(" ") if arguments else ()))
    assert not (tmp_path / "new").exists()
    assert len(open_index("photo_index")) == 5


def test_help_tells_every_default(capsys):
    for command in ("index", "find"):
        with pytest.raises(SystemExit):
            run(command, "--help")
        said = capsys.readouterr().out
        assert "(default: photo_index)" in said and "(default: None)" not in said


def test_milvus_finds_the_same(photos, checkpoint, sketch, tmp_path, capsys, fails):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed (requirements-milvus.txt)")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed (requirements-milvus.txt)")
    milvus = ["--engine", "milvus", "--uri", "photos.db", "--collection", "album"]
    run("index", photos, "--checkpoint", checkpoint, "--clusters", 2, *milvus, *INDEX)
    assert "album at photos.db: now holds these photos\n" in capsys.readouterr().out
    run("index", *milvus, *INDEX)
    assert "album at photos.db: held these photos already\n" in capsys.readouterr().out
    for matching in ("one-to-many", "one-to-one"):
        one = run("find", sketch, "--matching", matching, *HERE)
        other = run("find", sketch, "--matching", matching, *milvus, "--index", tmp_path / "elsewhere", *HERE)
        assert one == other
    other = ["--index", "other", "--checkpoint", checkpoint]
    assert "album at photos.db: holds the photos of another index than other; name another --collection" in fails(
        search_photos.main, "index", photos, *other, *milvus, *INDEX
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("arguments", "told"), [
    ("find sketch.png --engine milvus", "--engine milvus: needs --uri"), ("index --engine milvus", "needs --uri"),
    ("find sketch.png --uri photos.db", "--uri photos.db: only for --engine milvus"),
    ("find sketch.png --engine faiss", "argument --engine"),
    ("find sketch.png --engine milvus --uri photos.db", "--engine milvus: needs pymilvus; pip install -r "),
])  # fmt: skip
def test_milvus_may_be_missing(arguments, told, small, photos, sketch, tmp_path, fails, monkeypatch):
    shutil.copytree(small, tmp_path / "photo_index")
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    monkeypatch.delitem(sys.modules, "photo_search.milvus", raising=False)
    monkeypatch.delattr("photo_search.milvus", raising=False)
    assert told in fails(search_photos.main, *arguments.split())
