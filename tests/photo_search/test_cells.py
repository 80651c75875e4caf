"""Search by cells gives what comparing every photo gives."""

import dataclasses

import numpy as np
import pytest
import torch

from models.eval import matching
from photo_search import cells as search_cells
from photo_search.cells import Cells, Nearest, find_nearest

WEIGHTS = (0, 0.2, 0.8, 1)  # of the cluster distance


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def build(features, codebook, places=None):
    """Cells of features (N, D) in the order of their paths, and the permutation that sorted them."""
    codes = search_cells.assign_codes(features, codebook)
    order, codes, ends = search_cells.sort_by_cell(codes)
    basis = search_cells.fit_pca_basis(features)
    features = features[order]
    projections = search_cells.project_features(features, basis)
    spheres = search_cells.bounding_spheres(projections, ends)
    return Cells(features, order.astype(np.int32), codebook, codes, ends, *spheres, basis, projections), order


def brute_force(features, codebook, query, k, weight, photos=None):
    """(photos, scores) of the k nearest, of all or of `photos` alone, by the definition, in float64."""
    difference = features.astype(np.float64) - query.astype(np.float64)
    scores = np.sqrt((difference**2).sum(axis=1))
    if weight:
        parts, words = np.split(features.astype(np.float64), len(codebook), axis=1), codebook.astype(np.float64)
        nearest = [
            ((part[:, None] - own) ** 2).sum(axis=2).argmin(axis=1) for part, own in zip(parts, words, strict=True)
        ]
        query = query.astype(np.float64).reshape(len(codebook), 1, -1)
        squares = ((words - query) ** 2).sum(axis=2)
        cluster = sum(own[codes] for own, codes in zip(squares, nearest, strict=True))
        scores = weight * cluster + round(1 - weight, 12) * scores
    order = np.lexsort([np.arange(len(scores)), scores])
    order = order[:k] if photos is None else order[np.isin(order, photos)][:k]
    return order, scores[order]


def clustered(rng, count, width, classes=12, noise=0.5):
    centres = unit(rng.normal(size=(classes, width)))
    return unit(centres[rng.integers(classes, size=count)] + noise * rng.normal(size=(count, width)) / width**0.5)


def galleries():
    rng = np.random.default_rng(0)
    plain = unit(rng.normal(size=(2000, 32)))
    yield "structureless", plain
    yield "clustered", clustered(rng, 2500, 96)
    yield "narrow clusters", clustered(rng, 2000, 32, noise=0.05)
    yield "all the same", np.repeat(plain[:1], 700, axis=0)
    yield "many ties", np.repeat(plain[:40], 30, axis=0)[rng.permutation(1200)]
    yield "opposite", np.concatenate([plain[:300], -plain[:300]])
    yield "in a plane", unit(np.pad(rng.normal(size=(900, 2)), ((0, 0), (0, 30))))
    yield "one photo", plain[:1]
    yield "more than a block of one cell", np.repeat(unit(plain[:3, :8]), 3000, axis=0)


def queries(features, rng):
    yield features[0]  # one of the photos, at distance 0
    yield -features[len(features) // 2]
    yield from unit(features[rng.integers(len(features), size=2)] + 0.1 * rng.normal(size=(2, features.shape[1])))
    yield from unit(rng.normal(size=(1, features.shape[1])))


def drawn_codebook(features, subspaces, clusters, rng):
    """A codebook (M, K, D/M) near photos that are drawn; an empty one for no sub-spaces."""
    own = features.reshape(len(features), subspaces, -1) if subspaces else None
    chosen = rng.integers(len(features), size=clusters)
    return np.ascontiguousarray(own[chosen].swapaxes(0, 1) * 0.9) if subspaces else np.empty((0, 0, 0), np.float32)


@pytest.mark.parametrize(
    ("name", "features"), list(galleries()), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize(("subspaces", "clusters"), [(0, 0), (2, 5), (4, 30)])
def test_search_equals_brute_force(name, features, subspaces, clusters):
    rng = np.random.default_rng(1)
    codebook = drawn_codebook(features, subspaces, clusters, rng)
    cells, order = build(features, codebook)
    for query in queries(features, rng):
        for weight in WEIGHTS if subspaces else (0,):
            for k in (1, 20, 2 * len(features)):
                found = find_nearest(cells, query, k, weight)
                photos, scores = brute_force(features, codebook, query, k, weight)
                np.testing.assert_array_equal(order[found.rows], photos)
                np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-14)


@pytest.mark.parametrize("share", ["one", "few", "most", "a cell", "all"])
@pytest.mark.parametrize(("name", "features"), list(galleries())[:5], ids=lambda value: str(value)[:20])
def test_search_among_some_photos_equals_brute_force_over_them(name, features, share):
    rng = np.random.default_rng(6)
    starts = features[rng.integers(len(features), size=10)].reshape(10, 2, -1)
    codebook = np.ascontiguousarray(starts.swapaxes(0, 1) * 0.9)
    cells, order = build(features, codebook)
    allowed = rng.random(len(features)) < {"one": 0, "few": 0.02, "most": 0.9, "a cell": 0, "all": 1}[share]
    allowed[: cells.cell_ends[0]] |= share == "a cell"
    allowed[rng.integers(len(features))] = True
    for query in queries(features, rng):
        for weight in WEIGHTS:
            for k in (1, 20, len(features)):
                found = find_nearest(cells, query, k, weight, allowed)
                photos, scores = brute_force(features, codebook, query, k, weight, order[allowed])
                np.testing.assert_array_equal(order[found.rows], photos)
                np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-14)


def test_scores_are_those_of_matching():
    rng = np.random.default_rng(2)
    features, codebook = clustered(rng, 400, 32), rng.normal(size=(2, 6, 16)).astype(np.float32) / 6
    cells, order = build(features, codebook)
    query, gallery, words = (torch.from_numpy(each).double() for each in (features[:1], features, codebook))
    codes = matching.nearest_codes(gallery, words)
    np.testing.assert_array_equal(search_cells.assign_codes(features, codebook), codes)
    cluster = matching.cluster_distances(query, words, codes)
    distances = matching.euclidean_distances(query, gallery)
    fused = matching.fused_scores(cluster, distances)[0].numpy()
    found = find_nearest(cells, features[0], 400, matching.CLUSTER_WEIGHT)
    np.testing.assert_allclose(found.scores, fused[order[found.rows]], atol=1e-7)  # at d = 0 the product rounds most
    np.testing.assert_allclose(found.scores[1:], fused[order[found.rows]][1:], atol=1e-13)
    np.testing.assert_allclose(found.cluster_distances, cluster[0, order[found.rows]], atol=1e-13)
    np.testing.assert_allclose(found.distances[1:], distances[0, order[found.rows]][1:], atol=1e-13)


def test_most_photos_of_other_clusters_are_left_out():
    rng = np.random.default_rng(3)
    features = clustered(rng, 40_000, 128, classes=40, noise=0.4)
    starts = features[:40].reshape(40, 2, 64).swapaxes(0, 1)
    cells, _ = build(features, np.ascontiguousarray(starts))
    for weight, most in ((0.8, 0.2), (0, 0.3)):
        found = find_nearest(cells, features[7], 20, weight)
        assert 20 <= found.scanned < most * len(features)


def test_bounds_hold():
    """No photo is nearer than the bounds of its cell and of its projection, except for rounding."""
    rng = np.random.default_rng(4)
    features = clustered(rng, 2000, 96)
    cells, _ = build(features, np.ascontiguousarray(features[:9].reshape(9, 2, 48).swapaxes(0, 1)))
    sizes = np.diff(cells.cell_ends, prepend=0)
    apart = np.linalg.norm(cells.pca_projection - np.repeat(cells.centres, sizes, axis=0), axis=1)
    assert (apart <= np.repeat(cells.radii, sizes) + 1e-6).all()
    assert (np.maximum.reduceat(apart, cells.cell_ends - sizes) >= cells.radii - 1e-5).all()
    projected = np.linalg.norm(cells.pca_projection[:, None] - cells.pca_projection[:50], axis=2)
    distances = np.linalg.norm(cells.features[:, None] - cells.features[:50], axis=2)
    assert (projected <= distances + 1e-6).all() and projected.mean() > 0.5 * distances.mean()


def test_features_that_are_not_finite_are_an_error():
    cells, _ = build(unit(np.random.default_rng(5).normal(size=(50, 8))), np.empty((0, 0, 0), np.float32))
    sick = dataclasses.replace(cells, features=cells.features * np.float32("nan"))
    with pytest.raises(ValueError, match="not finite"):
        find_nearest(sick, cells.features[0], 3, 0)
    assert isinstance(find_nearest(cells, cells.features[0], 3, 0), Nearest)
