import functools
import io
import itertools
import os
import pickle
import sys
from concurrent.futures import Future
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.eval import features as eval_features
from models.eval import inference
from models.eval.features import (
    Features,
    PartialFeatures,
    extract,
    is_ours,
    read_features,
    why_stale,
    write_features,
)
from models.networks import normalise
from utils.cli import InputError


def unit(count, width=8, seed=0):
    values = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.fixture
def features():
    return Features(unit(6), np.array([0, 0, 1, 1, 2, 2]), unit(3, seed=1), np.array([0, 1, 2]))


def save(path, *content):
    path.write_bytes(pickle.dumps(list(content), protocol=2))
    return path


def test_features_in_the_authors_form_are_read_as_they_are(features, tmp_path):
    f = features
    path = save(tmp_path / "f.pickle", f.gallery, f.gallery_labels, f.query, f.query_labels.tolist(), np.zeros((3, 6)))
    back, rescaled = read_features(path)
    assert not rescaled
    for name in ("gallery", "gallery_labels", "query", "query_labels"):
        one, two = getattr(f, name), getattr(back, name)
        assert one.dtype == two.dtype and np.array_equal(one, two)


def test_features_of_any_length_are_normalised(features, tmp_path):
    f = features
    path = save(tmp_path / "f.pickle", 3 * f.gallery, f.gallery_labels, f.query, f.query_labels, None)
    back, rescaled = read_features(path)
    assert rescaled
    np.testing.assert_allclose(back.gallery, f.gallery, atol=1e-6)
    assert np.array_equal(back.query, f.query)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: np.full((6, 8), np.nan)}, "gallery feature 0 is zero, or holds NaN or infinity"),
        ({2: np.array([[1.0] * 8, [np.inf] * 8, [1.0] * 8])}, "query feature 1 is zero, or holds NaN"),
        ({2: np.array([[1.0] * 8, [1.0] * 8, [0.0] * 8])}, "query feature 2 is zero"),
        ({2: unit(3, 7)}, "gallery features have 8 values, query features 7"),
        ({1: np.zeros(5)}, "gallery labels must be one whole number for each of 6 features"),
        ({3: np.array([0, 1, 0.5])}, "query labels must be whole numbers"),
        ({3: np.array([0, 1, -1])}, "query labels must be whole numbers"),
        ({3: np.array([0, 1, np.nan])}, "query labels must be whole numbers"),
        ({3: [0, 1, 10**30]}, "query labels must be one whole number"),
        ({0: "photos"}, "gallery features must be an array of numbers"),
        ({0: unit(6).astype(complex)}, "gallery features must be an array of numbers"),
        ({0: [[1.0], [1.0, 2.0]]}, "gallery features must be an array of numbers"),
        ({0: np.zeros((0, 8)), 1: np.zeros(0)}, "gallery features must be an array of numbers"),
        ({0: np.zeros((6, 0))}, "gallery features must be an array of numbers"),
        ({1: np.array([None] * 6)}, "only numbers and strings are read"),
    ],
)
def test_unusable_features_are_named(features, tmp_path, change, words):
    f = features
    content = {0: f.gallery, 1: f.gallery_labels, 2: f.query, 3: f.query_labels, 4: None} | change
    with pytest.raises(InputError, match=rf"f\.pickle: .*{words}"):
        read_features(save(tmp_path / "f.pickle", *content.values()))
    with pytest.raises(InputError, match=r"f\.pickle: expected \[gallery features"):
        read_features(save(tmp_path / "f.pickle", f.gallery))


def test_features_of_another_source_are_stale(features, tmp_path):
    path, checkpoint = tmp_path / "features_zero.pickle", tmp_path / "model_best.pth.tar"
    checkpoint.write_bytes(b"weights")
    write_features(path, features, {"checkpoint": "a", "input_size": 224})
    assert why_stale(path, {"checkpoint": "a", "input_size": 224}, checkpoint) is None
    assert why_stale(path, {"checkpoint": "b", "input_size": 224}, checkpoint) == "computed with another checkpoint"
    assert why_stale(path, {"checkpoint": "a", "input_size": 64}, checkpoint) == "computed with another input_size"
    (tmp_path / "features_zero.json").write_text("[]")
    assert not is_ours(path)
    # A pickle from elsewhere has no record, or that of another file: it is stale if it is older than the checkpoint.
    save(path, features.query)
    os.utime(checkpoint, (1000, 1000))
    assert why_stale(path, {"checkpoint": "b"}, checkpoint) is None
    os.utime(path, (999, 999))
    assert why_stale(path, {"checkpoint": "b"}, checkpoint) == "older than model_best.pth.tar beside it"


class Means(torch.nn.Module):
    """A network whose features are the mean colour."""

    statistics = (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)

    def features(self, images):
        return images.mean(dim=(2, 3))


SOURCE = {"checkpoint": "a"}


@pytest.fixture
def images():
    return torch.randint(1, 255, (11, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def loader(images):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(len(images))), batch_size=4)


def expected_of(images):
    return F.normalize(normalise(images, *Means.statistics).mean(dim=(2, 3)), dim=1)


def fill(partial, student, loader):
    for rows in extract(student, loader, "cpu", done=partial.done):
        partial.add(rows)


def test_extraction_keeps_the_order_and_normalises(images, tmp_path):
    partial = PartialFeatures(tmp_path / "part", SOURCE, 3, 4)
    fill(partial, Means(), loader(images))
    assert partial.read().dtype == np.float32
    np.testing.assert_allclose(partial.read(), expected_of(images), atol=1e-6)
    partial.remove()
    assert not list(tmp_path.iterdir())


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Running:
    """A pool whose jobs are done when they are submitted, or only when their result is asked for."""

    def __init__(self, at_once):
        self.at_once = at_once

    def submit(self, function, argument):
        future = Future()
        if self.at_once:
            future.set_result(function(argument))
        future.result = lambda _=None: function(argument)
        return future


@pytest.mark.parametrize(("at_once", "slower"), [(True, "reading"), (False, "network")])
@pytest.mark.parametrize("on_threads", [True, False])
def test_the_bar_names_the_slower_stage(images, monkeypatch, at_once, slower, on_threads):
    clock = itertools.count()
    monkeypatch.setattr(inference, "thread_pool", lambda *_: nullcontext(Running(at_once)))
    monkeypatch.setattr(inference.time, "perf_counter", lambda: next(clock))
    network = Means()
    if not on_threads:
        network.features, compute = network.features, network.features  # as compile_features leaves it

        def slow(images):
            _ = slower == "network" and [next(clock) for _ in range(100)]
            return compute(images)

        network.features = slow
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(eval_features, "tqdm", functools.partial(eval_features.tqdm, mininterval=0))
    list(extract(network, loader(images), "cpu"))
    lines = [line for line in terminal.getvalue().split("\r") if "slower: " in line]
    assert lines and all(f"slower: {slower}]" in line for line in lines)


def test_no_bar_is_drawn_without_a_terminal(images, capfd):
    list(extract(Means(), loader(images), "cpu"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("torn", [0, 5, 17])
def test_a_killed_extraction_is_resumed_at_its_last_whole_batch(images, tmp_path, torn):
    partial = PartialFeatures(tmp_path / "part", SOURCE, 3, 4)
    assert partial.done == 0
    fill(partial, Means(), loader(images[:8]))
    with open(partial.path, "ab") as file:
        file.write(b"\1" * torn)  # the kill came in the middle of a write
    again = PartialFeatures(tmp_path / "part", SOURCE, 3, 4)
    assert again.done == 8
    fill(again, Means(), loader(images[8:]))
    np.testing.assert_allclose(again.read(), expected_of(images), atol=1e-6)


@pytest.mark.parametrize("damage", ["another source", "another width", "no header", "zeros"])
def test_other_or_damaged_partial_features_are_extracted_anew(images, tmp_path, damage):
    path = tmp_path / "part"
    fill(PartialFeatures(path, SOURCE, 3, 4), Means(), loader(images[:8]))
    content = bytearray(path.read_bytes())
    if damage == "no header":
        path.write_bytes(b"")
    if damage == "zeros":
        content[-5 * 12 :] = bytes(5 * 12)
        path.write_bytes(content)
    source = {"checkpoint": "b"} if damage == "another source" else SOURCE
    partial = PartialFeatures(path, source, 4 if damage == "another width" else 3, 2)
    assert partial.done == (2 if damage == "zeros" else 0)  # three rows of length 1, batches of two
    assert len(partial.read()) == partial.done


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk is Linux's /dev/full")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    partial = PartialFeatures(tmp_path / "part", SOURCE, 3, 4)
    monkeypatch.setattr("models.eval.features.open_own", lambda _, mode: open("/dev/full", mode))  # noqa: SIM115
    with pytest.raises(InputError, match=r"features cannot be written \(No space left on device\); make room"):
        partial.add(np.zeros((1, 3), np.float32))


def test_features_that_we_write_are_read_by_a_numpy_before_version_2(features, tmp_path):
    class OldNumpy(pickle.Unpickler):
        def find_class(self, module, name):
            if module.startswith("numpy._core"):
                raise ModuleNotFoundError(module)
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)

    write_features(tmp_path / "features_zero.pickle", features, SOURCE)
    assert b"numpy._core" not in (tmp_path / "features_zero.pickle").read_bytes()
    with open(tmp_path / "features_zero.pickle", "rb") as file:
        gallery, gallery_labels, query, query_labels, nothing = OldNumpy(file).load()
    assert nothing is None and gallery.flags.writeable
    for one, two in ((gallery, features.gallery), (query, features.query)):
        assert one.dtype == np.float32 and np.array_equal(one, two)
    assert np.array_equal(gallery_labels, features.gallery_labels) and np.array_equal(
        query_labels, features.query_labels
    )
    back, rescaled = read_features(tmp_path / "features_zero.pickle")
    assert not rescaled and np.array_equal(back.gallery, features.gallery)


def test_an_array_too_large_for_one_buffer_is_written_whole(tmp_path):
    large = Features(unit(40_000), np.arange(40_000), unit(3), np.arange(3))
    write_features(tmp_path / "features_zero.pickle", large, SOURCE)
    assert np.array_equal(read_features(tmp_path / "features_zero.pickle")[0].gallery, large.gallery)
    assert b"numpy._core" not in (tmp_path / "features_zero.pickle").read_bytes()
