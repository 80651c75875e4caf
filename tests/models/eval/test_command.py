"""python -m models.eval: the features of any method, from files of any form."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.lists import write_list
from models.eval import feature_files
from models.eval.__main__ import main

NAMES = np.array(["cat", "bell (brass)", "tea pot"])


@pytest.fixture
def arrays():
    """Features that are not of length 1, and their class names."""
    rng = np.random.default_rng(0)
    labels = np.arange(45) % 3, np.arange(8) % 3
    centres = rng.normal(size=(3, 16))
    gallery, query = (
        ((centres[each] + 3 * rng.normal(size=(len(each), 16))) * rng.uniform(1, 9, (len(each), 1))).astype(np.float32)
        for each in labels
    )
    return {"gallery": gallery, "gallery_labels": NAMES[labels[0]], "query": query, "query_labels": NAMES[labels[1]]}


def run(folder, *arguments):
    results = main([*map(str, arguments), "--device", "cpu"])
    assert json.loads((folder / "results.json").read_text()) == results
    return results


def plain_acnet_map(arrays, cosine):
    """ACNet's mAP@all by a plain loop."""
    gallery, query = arrays["gallery"].astype(float), arrays["query"].astype(float)
    if cosine:
        gallery, query = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (gallery, query))
    values = []
    for one, label in zip(query, arrays["query_labels"], strict=True):
        relevant = (arrays["gallery_labels"] == label)[np.argsort(((gallery - one) ** 2).sum(axis=1))]
        precision = relevant.cumsum() / np.arange(1, len(relevant) + 1)
        values.append(np.mean([precision[rank:].max() for rank in np.flatnonzero(relevant)]))
    return np.mean(values)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_every_definition_equals_a_plain_loop(arrays, distance, tmp_path, capsys):
    np.savez(tmp_path / "my.features.npz", **arrays)
    folder = tmp_path / "my.features_results"
    row = run(folder, tmp_path / "my.features.npz", "--distance", distance)["rows"][0]
    expected = plain_acnet_map(arrays, distance == "cosine")
    assert row["definitions"]["ACNet"]["mAP@all"] == pytest.approx(expected, abs=1e-12)
    assert sorted(row["per_class"]) == sorted(NAMES)
    assert "note: the features do not record which lists they follow" in (output := capsys.readouterr()).err
    assert all(name in output.out for name in ("ZSE-SBIR", "SEM-PCYC", "doodle2search", "CVAE"))
    assert plain_acnet_map(arrays, True) != pytest.approx(plain_acnet_map(arrays, False), abs=1e-3)


@pytest.mark.parametrize("scale", [1e160, 1e-170], ids=str)
def test_features_that_float32_cannot_hold_give_the_same_results(arrays, scale, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays | {side: arrays[side] * np.float64(scale) for side in ("gallery", "query")})
    row = run(tmp_path / "a_results", tmp_path / "a.npz")["rows"][0]
    assert row["definitions"]["ACNet"]["mAP@all"] == pytest.approx(plain_acnet_map(arrays, True), abs=1e-12)


def test_euclidean_distances_of_features_far_from_zero(arrays, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays | {side: arrays[side] + np.float64(1e8) for side in ("gallery", "query")})
    row = run(tmp_path / "a_results", tmp_path / "a.npz", "--distance", "euclidean")["rows"][0]
    assert row["definitions"]["ACNet"]["mAP@all"] == pytest.approx(plain_acnet_map(arrays, False), abs=1e-12)


@pytest.mark.parametrize(("scale", "word"), [(1e160, "large"), (1e-170, "small")])
def test_euclidean_distances_have_a_range(arrays, scale, word, tmp_path, fails):
    np.savez(tmp_path / "a.npz", **arrays | {side: arrays[side] * np.float64(scale) for side in ("gallery", "query")})
    message = fails(main, tmp_path / "a.npz", "--distance", "euclidean")
    assert f"too {word} for Euclidean distances; multiply all features by one number" in message


def test_all_forms_give_the_same_results(arrays, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    tensors = {name: torch.from_numpy(arrays[name]) for name in ("gallery", "query")}
    labels = {name: arrays[name].tolist() for name in ("gallery_labels", "query_labels")}
    torch.save(tensors | labels, tmp_path / "a.pt")
    numbers = {name: np.searchsorted(np.sort(NAMES), arrays[name]) for name in labels}
    with open(tmp_path / "a.pickle", "wb") as file:
        pickle.dump(
            [arrays["gallery"], numbers["gallery_labels"], arrays["query"], numbers["query_labels"], None], file
        )
    for side in ("gallery", "query"):
        np.save(tmp_path / f"{side}.npy", arrays[side])
        rows = [f"{side}/{number}.png,{label}" for number, label in enumerate(arrays[f"{side}_labels"])]
        (tmp_path / f"{side}.csv").write_text("\n".join(["file,label", *rows]))
    four = [tmp_path / name for name in ("gallery.npy", "gallery.csv", "query.npy", "query.csv")]
    inputs = [[tmp_path / "a.npz"], [tmp_path / "a.pt"], [tmp_path / "a.pickle"], four]
    rows = [run(tmp_path / "out", *files, "--subspaces", 2, "--out", tmp_path / "out")["rows"] for files in inputs]
    assert [(row.get("M"), row.get("K")) for row in rows[0]] == [(None, None), (2, 3)]
    for other in rows[1:]:
        for row, first in zip(other, rows[0], strict=True):
            assert row["definitions"] == first["definitions"]
    assert [*rows[2][0]["per_class"]] == ["0", "1", "2"]  # without names
    with np.load(tmp_path / "out" / "per_query.npz", allow_pickle=False) as kept:
        assert kept["sketch"].tolist() == [f"query/{number}.png" for number in range(8)]


@pytest.mark.draws
def test_pictures_of_files_inside_the_features(arrays, tmp_path):
    names = {side: [f"{side}{n}.png" for n in range(len(arrays[side]))] for side in ("gallery", "query")}
    for name in (*names["gallery"], *names["query"]):
        Image.new("RGB", (20, 20), "red").save(tmp_path / name)
    np.savez(tmp_path / "a.npz", **arrays, gallery_files=names["gallery"], query_files=names["query"])
    run(tmp_path / "a_results", tmp_path / "a.npz", "--data_root", tmp_path)
    assert (tmp_path / "a_results" / "retrievals.png").stat().st_size > 1000


def test_order_names_files_and_classes(arrays, tmp_path, fails):
    lists = tmp_path / "data" / "zeroshot1"
    labels = {"photo": np.arange(45) % 3, "sketch": np.arange(8) % 3}
    write_list(lists / "cname_cid.txt", [("dog", 0)])
    write_list(lists / "cname_cid_zero.txt", [("cat", 0), ("bell", 1), ("pot", 2)])
    files = {"photo": "all_photo_filelist_zero.txt", "sketch": "sketch_tx_000000000000_ready_filelist_zero.txt"}
    for kind, name in files.items():
        write_list(lists / name, [(f"{kind}{n}.png", label) for n, label in enumerate(labels[kind])])
    numbers = arrays | {"gallery_labels": labels["photo"] + 7, "query_labels": labels["sketch"] + 7}
    np.savez(tmp_path / "a.npz", **numbers)
    results = run(tmp_path / "a_results", tmp_path / "a.npz", "--order", lists)
    assert [*results["rows"][0]["per_class"]] == ["cat", "bell", "pot"]
    with np.load(tmp_path / "a_results" / "per_query.npz", allow_pickle=False) as kept:
        assert kept["sketch"].tolist() == [f"sketch{n}.png" for n in range(8)]
        assert kept["class"].tolist()[:3] == ["cat", "bell", "pot"]
    write_list(
        lists / files["sketch"], [(f"sketch{n}.png", label) for n, label in enumerate(np.sort(labels["sketch"]))]
    )
    assert "its images have other classes than the features" in fails(main, tmp_path / "a.npz", "--order", lists)
    write_list(lists / files["sketch"], [("sketch0.png", 0)])
    assert "lists 1 sketches, the features are of 8" in fails(main, tmp_path / "a.npz", "--order", lists)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gallery": np.full((45, 16), np.nan)}, "gallery feature 0 is zero, or holds NaN"),
        ({"query": np.zeros((8, 16))}, "query feature 0 is zero"),
        ({"query": np.ones((8, 5))}, "query features have 5 values, gallery features 16"),
        ({"query": np.ones(8)}, "query features must be an array of numbers"),
        ({"query_labels": np.array(["cat"] * 7)}, "7 query labels for 8 features"),
        ({"query_labels": np.arange(8)}, "labels of one side are numbers, of the other names"),
        ({"query_labels": np.array(["dog"] * 8)}, "1 query classes have no photo in the gallery, first 'dog'"),
        ({"query_labels": np.array(["cat"] * 7 + [""])}, "query label 7 is empty"),
        ({"query_labels": np.array(["cat"] * 8, dtype=object)}, "holds Python objects"),
        ({"query_labels": None}, "expected the arrays gallery, gallery_labels, query, query_labels"),
        ({"query_files": np.array(["a.png"])}, "1 query_files for 8 features"),
        ({"query": np.zeros((0, 16)), "query_labels": NAMES[:0]}, "there are no query features, their array is empty"),
    ],
)
def test_unusable_features_end_in_one_line(arrays, change, words, tmp_path, fails):
    content = {name: value for name, value in (arrays | change).items() if value is not None}
    np.savez(tmp_path / "a.npz", **content)
    assert words in fails(main, tmp_path / "a.npz")
    assert not (tmp_path / "a_results").exists()


def test_unusable_files_end_in_one_line(arrays, tmp_path, fails, trap):
    np.savez(tmp_path / "a.npz", **arrays)
    assert "no such file" in fails(main, tmp_path / "b.npz")
    assert "give one, or four" in fails(main, *[tmp_path / "a.npz"] * 2)
    assert "one file of features is a .npz" in fails(main, tmp_path / "a.mat")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    assert "not a readable NumPy file" in fails(main, tmp_path / "torn.npz")
    pairs = [(arrays[side], arrays[f"{side}_labels"].tolist()) for side in ("gallery", "query")]
    (tmp_path / "pairs.pickle").write_bytes(pickle.dumps(pairs))
    words = "it holds a list of 2 (list of 2 (numbers (45, 16), list of 45), list of 2 (numbers (8, 16), list of 8))"
    assert f"{words}; docs/testing.md has the lines that save it as .npz" in fails(main, tmp_path / "pairs.pickle")
    for suffix in ("pickle", "pt", "npz"):
        (tmp_path / f"trap.{suffix}").write_bytes(pickle.dumps([trap] * 4))
        fails(main, tmp_path / f"trap.{suffix}")
    assert not trap.sprung()
    wrong = fails(main, tmp_path / "a.npz", "--mixture_device", "gpu", "--device", "cpu")
    assert "--mixture_device gpu: there is no such device here" in wrong
    assert "--clusters 99: the gallery has only 45 photos" in fails(main, tmp_path / "a.npz", "--clusters", "99")
    assert "cannot be cut into 3" in fails(main, tmp_path / "a.npz", "--subspaces", "3")


def test_no_file_is_waited_for(tmp_path, fails):
    for name in ("f.npz", "f.pickle", "f.pt", "f.safetensors"):
        os.mkfifo(tmp_path / name)
        assert "not a regular file" in fails(main, tmp_path / name)


def test_arrays_of_an_npz_are_not_unpacked_before_their_sizes_fit(arrays, tmp_path, fails, monkeypatch):
    np.savez(tmp_path / "a.npz", **arrays | {"gallery": np.zeros((100, 16))})
    monkeypatch.setattr(feature_files, "available_memory", lambda: 10_000)
    assert "a.npz: not a readable NumPy file (its arrays are larger than" in fails(main, tmp_path / "a.npz")
    monkeypatch.setattr(feature_files, "available_memory", lambda: None)
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", None)
    assert "a.npz: 45 gallery labels for 100 features" in fails(main, tmp_path / "a.npz")
