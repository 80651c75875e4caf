"""Search by rounds of questions gives what comparing every photo gives, whatever rounding the answers have."""

import dataclasses

import numpy as np
import pytest
from test_cells import WEIGHTS, brute_force, build, clustered, drawn_codebook, galleries, queries

from photo_search import remote_search
from photo_search.remote_search import find_nearest_remote


class Holder:
    """Answers questions as Milvus does: squared distances in float32, with some error."""

    def __init__(self, cells, query, error=1e-6, allowed=None):
        self.cells, self.asked = cells, []
        self.rows_by_cell = np.argsort(cells.path_order)  # from row by path to row by cell
        self.numbers = cells.cell_ends.searchsorted(self.rows_by_cell, side="right")
        squares = ((cells.features[self.rows_by_cell].astype(np.float64) - query) ** 2).sum(axis=1)
        noise = np.random.default_rng(0).uniform(-error, error, len(squares))
        self.squares = np.maximum(squares + noise, 0).astype(np.float32)
        self.allowed = np.ones(len(squares), bool) if allowed is None else allowed

    def ask(self, questions):
        self.asked.append(questions)
        return [self.answer(*question) for question in questions]

    def answer(self, chosen, limit):
        assert 0 < limit <= remote_search.MAX_PHOTOS_PER_REQUEST
        there = self.allowed if chosen is None else self.allowed & np.isin(self.numbers, chosen)
        rows = np.flatnonzero(there)
        rows = rows[np.argsort(self.squares[rows], kind="stable")][::-1][-limit:][::-1]  # ties: the last comes first
        return rows, self.numbers[rows], self.squares[rows]

    def fetch(self, rows):
        return self.cells.features[self.rows_by_cell[rows]], self.numbers[rows]


def without_photos(cells):
    none = np.empty((0, 0), np.float32)
    return dataclasses.replace(cells, features=none, pca_projection=none, path_order=np.empty(0, np.int32))


@pytest.mark.parametrize(
    ("name", "features"), list(galleries()), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize(("subspaces", "clusters"), [(0, 0), (2, 5), (4, 30)])
def test_rounds_equal_brute_force(name, features, subspaces, clusters, monkeypatch):
    monkeypatch.setattr(remote_search, "FIRST_ROUND_PHOTOS", 100)
    monkeypatch.setattr(remote_search, "MIN_FIRST_PHOTOS", 8)
    rng = np.random.default_rng(1)
    codebook = drawn_codebook(features, subspaces, clusters, rng)
    cells, _ = build(features, codebook)
    for query in queries(features, rng):
        for weight in WEIGHTS if subspaces else (0,):
            for k in (1, 20, 2 * len(features)):
                holder = Holder(cells, query)
                found = find_nearest_remote(without_photos(cells), query, k, holder.ask, holder.fetch, weight)
                photos, scores = brute_force(features, codebook, query, k, weight)
                np.testing.assert_array_equal(found.rows, photos)
                np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-14)


def gallery(count=4000):
    features = clustered(np.random.default_rng(3), count, 64, classes=40, noise=0.4)
    codebook = np.ascontiguousarray(features[:40].reshape(40, 2, 32).swapaxes(0, 1))
    return features, codebook, build(features, codebook)[0]


@pytest.mark.parametrize("share", [0.005, 0.6])
def test_only_photos_that_are_allowed_are_found(share, monkeypatch):
    monkeypatch.setattr(remote_search, "MAX_PHOTOS_PER_REQUEST", 500)
    features, codebook, cells = gallery(2000)
    allowed = np.random.default_rng(4).random(len(features)) < share
    rows = np.flatnonzero(allowed)
    for weight in WEIGHTS:
        holder = Holder(cells, features[5], allowed=allowed)
        found = find_nearest_remote(cells, features[5], 30, holder.ask, holder.fetch, weight, len(rows))
        photos, _ = brute_force(features[rows], codebook, features[5], 30, weight)
        np.testing.assert_array_equal(found.rows, rows[photos])
        assert share > 0.5 or len(holder.asked) == 1


def test_few_questions_are_asked_and_few_photos_come():
    features, _, cells = gallery(20_000)
    for weight, most in ((0.8, 0.3), (0, 0.01)):
        holder = Holder(cells, features[7])
        found = find_nearest_remote(cells, features[7], 20, holder.ask, holder.fetch, weight)
        assert sum(map(len, holder.asked)) <= 4 and found.scanned < 100
        assert 20 <= found.projected < most * len(features)


def test_more_ties_than_asked_for_are_all_looked_at(monkeypatch):
    """Of 900 photos that are the same the 20 first by row are found, though any may come first."""
    monkeypatch.setattr(remote_search, "MAX_PHOTOS_PER_REQUEST", 1000)
    features, codebook, _ = gallery(1000)
    features[100:] = features[100]
    cells, _ = build(features, codebook)
    for weight in WEIGHTS:
        holder = Holder(cells, features[100], error=0)
        found = find_nearest_remote(cells, features[100], 20, holder.ask, holder.fetch, weight)
        np.testing.assert_array_equal(found.rows, np.arange(100, 120))
        assert len(holder.asked) > 1


def test_photos_that_do_not_come_are_an_error():
    features, _, cells = gallery(500)
    holder = Holder(cells, features[0], allowed=np.arange(500) < 10)
    for weight in WEIGHTS:
        with pytest.raises(ValueError, match="10 photos came where there are 20"):
            find_nearest_remote(cells, features[0], 20, holder.ask, holder.fetch, weight)
