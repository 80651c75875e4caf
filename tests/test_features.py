import os
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from datasets.errors import InputError
from datasets.images import normalise
from models.eval.features import Features, extract, is_ours, read_features, why_stale, write_features


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
    for one, two in zip(vars(f).values(), vars(back).values(), strict=True):
        assert one.dtype == two.dtype and np.array_equal(one, two)


def test_features_of_any_length_are_scaled_to_one_and_said(features, tmp_path):
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


def test_features_are_stale_when_what_they_came_from_changed(features, tmp_path):
    path, checkpoint = tmp_path / "features_zero.pickle", tmp_path / "model_best.pth.tar"
    checkpoint.write_bytes(b"weights")
    write_features(path, features, {"checkpoint": "a", "input_size": 224})
    assert why_stale(path, {"checkpoint": "a", "input_size": 224}, checkpoint) is None
    assert why_stale(path, {"checkpoint": "b", "input_size": 224}, checkpoint) == "computed with another checkpoint"
    assert why_stale(path, {"checkpoint": "a", "input_size": 64}, checkpoint) == "computed with another input_size"
    (tmp_path / "features_zero.json").write_text("[]")
    assert not is_ours(path)
    # Somebody else's pickle has no record, or one that is not its own: the older file loses.
    save(path, features.query)
    os.utime(checkpoint, (1000, 1000))
    assert why_stale(path, {"checkpoint": "b"}, checkpoint) is None
    os.utime(path, (999, 999))
    assert why_stale(path, {"checkpoint": "b"}, checkpoint) == "older than model_best.pth.tar beside it"


class Means(torch.nn.Module):
    """Features whose right answer is known: the mean colour."""

    def features(self, images):
        return images.mean(dim=(2, 3))


def test_extraction_keeps_the_order_and_normalises():
    images = torch.randint(0, 255, (10, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(10)), batch_size=4)
    expected = F.normalize(normalise(images).mean(dim=(2, 3)), dim=1)
    extracted = extract(Means(), loader, "cpu")
    assert extracted.dtype == np.float32
    np.testing.assert_allclose(extracted, expected, atol=1e-6)
