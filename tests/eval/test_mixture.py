import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from models.eval import mixture
from models.eval.mixture import CollapsedComponent, fit_mixture


def cloud(kind, rng):
    """(points, components) that are easy for our EM, or hard: little to leave out, weak or empty components."""
    if kind == "far apart":
        return rng.normal(size=(6, 48))[rng.integers(6, size=900)] * 3 + rng.normal(size=(900, 48)), 6
    if kind == "overlapping":
        return rng.normal(size=(5, 12))[rng.integers(5, size=1500)] + rng.normal(size=(1500, 12)), 5
    if kind == "one cloud":
        return rng.normal(size=(700, 20)), 6
    if kind == "few points a component":
        return rng.normal(size=(4, 30))[rng.integers(4, size=160)] * 2 + rng.normal(size=(160, 30)), 12
    if kind == "far from the origin":
        return 30 + rng.normal(size=(5, 16))[rng.integers(5, size=600)] + 0.3 * rng.normal(size=(600, 16)), 5
    return np.repeat(rng.normal(size=(6, 10)), 30, axis=0) + 1e-4 * rng.normal(size=(180, 10)), 15  # "K too large"


KINDS = ["far apart", "overlapping", "one cloud", "few points a component", "far from the origin", "K too large"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_em_equals_scikit_learn_from_the_same_start(kind, seed):
    points, components = cloud(kind, np.random.default_rng(seed))
    start = KMeans(components, n_init=1, random_state=np.random.RandomState(seed)).fit(points).labels_
    theirs = GaussianMixture(components, random_state=np.random.RandomState(seed)).fit(points)
    ours = fit_mixture(torch.from_numpy(points), torch.from_numpy(start), components)
    assert (ours.iterations, ours.converged) == (theirs.n_iter_, theirs.converged_)
    np.testing.assert_allclose(ours.means, theirs.means_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.weights, theirs.weights_, rtol=0, atol=1e-8)
    assert ours.lower_bound == pytest.approx(theirs.lower_bound_, abs=1e-7)


def test_em_equals_the_golden_fit(golden):
    z = golden("matching")
    for row in ("M2K5", "M2K7", "M4K6"):
        parts = z["gallery"].split(z["gallery"].shape[1] // int(row[1]), dim=1)
        for index, part in enumerate(parts):
            fitted = fit_mixture(part, z[f"{row}_gmm_start"][index], int(row[3]))
            assert fitted.iterations == z[f"{row}_gmm_n_iter"][index]
            for ours, theirs in (
                (fitted.means, z[f"{row}_codebook"][index]),
                (fitted.weights, z[f"{row}_gmm_weights"][index]),
                (torch.tensor(fitted.lower_bound), z[f"{row}_gmm_lower_bound"][index]),
            ):
                torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", ["one empty", "empty, with points where it begins", "one point each"])
def test_components_that_hold_almost_nothing_are_computed_in_full(start, monkeypatch):
    rng = np.random.default_rng(5)
    points = rng.normal(size=(400, 8)) + 4 * rng.integers(2, size=(400, 1))
    if start == "empty, with points where it begins":
        points[:30] *= 1e-5  # an empty component begins at 0, as narrow as the regularisation lets it be
    labels = np.zeros(400, int)
    labels[200:] = 1
    if start == "one point each":
        labels[:3] = [2, 3, 4]
    theirs = GaussianMixture(5, random_state=0)
    responsibilities = np.eye(5)[labels]
    monkeypatch.setattr(theirs, "_initialize_parameters", lambda X, *_, **__: theirs._initialize(X, responsibilities))
    theirs.fit(points)
    ours = fit_mixture(torch.from_numpy(points), torch.from_numpy(labels), 5)
    assert ours.iterations == theirs.n_iter_
    np.testing.assert_allclose(ours.means, theirs.means_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.weights, theirs.weights_, rtol=0, atol=1e-8)


def test_float32_points_are_fitted_in_float64():
    points, components = cloud("overlapping", np.random.default_rng(0))
    start = torch.arange(len(points)) % components
    single = torch.from_numpy(points.astype(np.float32))
    assert torch.equal(
        fit_mixture(single, start, components).means, fit_mixture(single.double(), start, components).means
    )


def test_what_the_screen_leaves_out_is_below_the_last_bit(monkeypatch):
    points, components = cloud("far apart", np.random.default_rng(1))
    points, start = torch.from_numpy(points), torch.arange(len(points)) % components
    screened = fit_mixture(points, start, components)
    computed = []
    survivors = mixture._Screen.survivors
    monkeypatch.setattr(mixture, "NEGLIGIBLE", 1e6)

    def count(*arguments):
        for part in survivors(*arguments):
            computed.append(len(part))
            yield part

    monkeypatch.setattr(mixture._Screen, "survivors", count)
    full = fit_mixture(points, start, components)
    assert sum(computed) == (components - 1) * len(points) * full.iterations  # nothing was left out this time
    assert full.iterations == screened.iterations
    torch.testing.assert_close(screened.means, full.means, rtol=0, atol=1e-12)
    assert screened.lower_bound == pytest.approx(full.lower_bound, abs=1e-12)


@pytest.mark.parametrize("kind", ["one cloud", "far apart"])
def test_a_bound_is_never_on_the_wrong_side_of_the_distance(kind, monkeypatch):
    points, components = cloud(kind, np.random.default_rng(2))
    points, start = torch.from_numpy(points), torch.arange(len(points)) % components
    survivors, looked = mixture._Screen.survivors, []

    def check(screen, fitted, limits):
        parts = list(survivors(screen, fitted, limits))
        for component, (mean, root) in enumerate(zip(fitted.means, fitted.roots, strict=True)):
            distances = ((fitted.points - mean) @ root.T).norm(dim=1)
            assert (screen.bounds[component] <= distances).all()
            assert (screen.own >= distances * (1 - 1e-12))[screen.likeliest == component].all()
            left_out = torch.ones(len(points), dtype=torch.bool)
            left_out[parts[component]] = False
            assert (distances[left_out] ** 2 >= limits[component][left_out]).all()
            looked.append(left_out.sum().item())
        return parts

    monkeypatch.setattr(mixture._Screen, "survivors", check)
    fit_mixture(points, start, components)
    assert sum(looked) > 0


def test_a_collapsed_component_is_named(monkeypatch):
    monkeypatch.setattr(mixture, "REGULARISATION", 0.0)
    points = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points[30:] = 7.0
    with pytest.raises(CollapsedComponent, match="component 1 collapsed"):
        fit_mixture(points, torch.arange(40) // 30, 2)


def test_the_callers_randomness_is_left_alone():
    state = torch.get_rng_state()
    fit_mixture(torch.arange(40.0).view(20, 2), torch.arange(20) % 2, 2)
    assert torch.equal(torch.get_rng_state(), state)
