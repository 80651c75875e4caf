import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_info, threadpool_limits

from models.eval import codebooks, gmm
from models.eval.codebooks import CollapsedComponent, fit_codebook
from models.eval.matching import cluster_distances, euclidean_distances, fused_scores, nearest_codes
from models.eval.metrics import SameClass, average_precision, class_means, precision_at, rank


@pytest.mark.parametrize(("subspaces", "clusters"), [(2, 5), (2, 6), (2, 7), (4, 5), (4, 6), (4, 7)])
@pytest.mark.parametrize("mixture", ["torch", "sklearn"])
def test_own_codebooks_retrieve_as_well_as_golden_ones(golden, subspaces, clusters, mixture):
    z = golden("matching")
    codebook, unconverged = fit_codebook(z["gallery"].numpy(), subspaces, clusters, int(z["seed"]), mixture)
    assert not unconverged
    assert codebook.dtype == np.float32
    np.testing.assert_allclose(codebook, z[f"M{subspaces}K{clusters}_codebook"], rtol=0, atol=1e-4)
    query, gallery, means = z["query"].double(), z["gallery"].double(), torch.from_numpy(codebook).double()
    cluster = cluster_distances(query, means, nearest_codes(gallery, means))
    scores = fused_scores(cluster, euclidean_distances(query, gallery))
    relevant = rank(scores, SameClass(z["query_labels"], z["gallery_labels"]))
    for name, values in (
        ("map_all", average_precision(relevant)),
        ("map_200", average_precision(relevant, 200)),
        ("mprec_100", precision_at(relevant, 100)),
    ):
        mean = class_means(values, z["query_labels"])[1].mean().item()
        assert mean == pytest.approx(z[f"M{subspaces}K{clusters}_{name}"].item(), abs=1e-3)


def test_the_global_random_state_is_left_alone(golden):
    gallery = golden("matching")["gallery"].numpy()
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    fit_codebook(gallery[:100], 2, 3)
    assert np.random.rand() == expected


def test_too_many_clusters_or_uneven_subspaces():
    gallery = np.eye(6, dtype=np.float32)
    with pytest.raises(ValueError, match="7 clusters need as many gallery photos, there are 6"):
        fit_codebook(gallery, 2, 7)
    with pytest.raises(ValueError, match="4 equal sub-spaces"):
        fit_codebook(gallery, 4, 2)


@pytest.mark.parametrize("mixture", ["torch", "sklearn"])
def test_equal_photos_give_a_codebook(mixture):
    gallery = np.full((30, 8), 8**-0.5, np.float32)
    codebook, _ = fit_codebook(gallery, 2, 3, mixture=mixture)
    assert np.isfinite(codebook).all()
    assert np.abs(codebook - gallery[0, 0]).min() < 1e-6


@pytest.mark.parametrize("mixture", ["torch", "sklearn"])
def test_the_collapsed_sub_space_is_named(mixture, monkeypatch):
    gallery = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    gallery[:, 4:] = 1e6 * gallery[:, 4:5]  # so flat that 1e-6 on the diagonal is lost in rounding
    with pytest.raises(CollapsedComponent, match=r"^sub-space 1: (a )?component .*collapsed onto too few photos"):
        fit_codebook(gallery, 2, 2, mixture=mixture)


def test_without_a_bar_the_remaining_time_is_printed_once(monkeypatch, capsys):
    monkeypatch.setattr(codebooks, "ETA_ABOVE_S", 0)
    gallery = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    codebooks.fit_codebooks(gallery, [(2, 3), (4, 2)])
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "minutes" in line] == ["note: the other 2 mixtures take about 0 minutes"]
    monkeypatch.setattr(codebooks, "ETA_ABOVE_S", 1e9)
    codebooks.fit_codebooks(gallery, [(2, 3), (4, 2)])
    assert "minutes" not in capsys.readouterr().err


def test_without_a_bar_progress_is_printed_once(monkeypatch, capsys):
    class Timer:
        """Rings at once."""

        def __init__(self, seconds, ring):
            self.ring, self.cancelled = ring, False
            timers.append((seconds, self))

        def start(self):
            self.ring()

        def cancel(self):
            self.cancelled = True

    timers = []
    monkeypatch.setattr(codebooks.threading, "Timer", Timer)
    gallery = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    codebooks.fit_codebooks(gallery, [(2, 3), (4, 2)])
    assert capsys.readouterr().err == "note: 0 of 6 mixtures are fitted after 10 seconds\n"
    assert [(seconds, timer.cancelled) for seconds, timer in timers] == [(10, True)]


def test_k_means_and_mixture_of_a_sub_space_come_before_the_next(monkeypatch):
    """So that the remaining time can be estimated from the first few mixtures."""
    order, k_means, em = [], KMeans.fit, gmm.fit_mixture
    monkeypatch.setattr(KMeans, "fit", lambda *each: order.append("k-means") or k_means(*each))
    monkeypatch.setattr(gmm, "fit_mixture", lambda *each: order.append("EM") or em(*each))
    gallery = np.random.default_rng(0).normal(size=(60, 9)).astype(np.float32)
    codebooks.fit_codebooks(gallery, [(3, 2)])
    assert order == 3 * ["k-means", "EM"]


def test_scikit_learn_fits_on_one_thread(monkeypatch):
    gallery, threads = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32), []
    expected = fit_codebook(gallery, 2, 3, seed=5)
    fit = GaussianMixture.fit

    def watched(*arguments):
        threads.extend(pool["num_threads"] for pool in threadpool_info())
        return fit(*arguments)

    monkeypatch.setattr(GaussianMixture, "fit", watched)
    with threadpool_limits(2):
        codebook, unconverged = fit_codebook(gallery, 2, 3, seed=5, mixture="sklearn")
    np.testing.assert_allclose(codebook, expected[0], rtol=0, atol=1e-4)
    assert unconverged == expected[1] and set(threads) == {1}


def test_scikit_learn_needs_no_torch():
    """The photo search fits clusters this way with an exported network, where PyTorch need not be installed."""
    script = """
import sys

import numpy as np

class NoTorch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise ImportError(name)

sys.meta_path.insert(0, NoTorch())
from models.eval.codebooks import CollapsedComponent, fit_codebook

print(fit_codebook(np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32), 2, 3, mixture="sklearn")[0].shape)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "(2, 3, 4)\n", run.stderr
