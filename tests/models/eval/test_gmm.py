import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from models.eval import gmm
from models.eval.gmm import CollapsedComponent, fit_dense, fit_mixture

both = pytest.mark.parametrize("fit", [fit_mixture, fit_dense])


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


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_em_equals_scikit_learn_from_the_same_start(kind, seed, fit):
    points, components = cloud(kind, np.random.default_rng(seed))
    start = KMeans(components, n_init=1, random_state=np.random.RandomState(seed)).fit(points).labels_
    theirs = GaussianMixture(components, random_state=np.random.RandomState(seed)).fit(points)
    ours = fit(torch.from_numpy(points), torch.from_numpy(start), components)
    assert (ours.iterations, ours.converged) == (theirs.n_iter_, theirs.converged_)
    np.testing.assert_allclose(ours.means, theirs.means_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.weights, theirs.weights_, rtol=0, atol=1e-8)
    assert ours.lower_bound == pytest.approx(theirs.lower_bound_, abs=1e-7)


@both
def test_em_equals_the_golden_fit(golden, fit):
    z = golden("matching")
    for row in ("M2K5", "M2K7", "M4K6"):
        parts = z["gallery"].split(z["gallery"].shape[1] // int(row[1]), dim=1)
        for index, part in enumerate(parts):
            fitted = fit(part, z[f"{row}_gmm_start"][index], int(row[3]))
            assert fitted.iterations == z[f"{row}_gmm_n_iter"][index]
            for ours, theirs in (
                (fitted.means, z[f"{row}_codebook"][index]),
                (fitted.weights, z[f"{row}_gmm_weights"][index]),
                (torch.tensor(fitted.lower_bound), z[f"{row}_gmm_lower_bound"][index]),
            ):
                torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=1e-4)


@both
@pytest.mark.parametrize("start", ["one empty", "empty, with points where it begins", "one point each"])
def test_components_of_almost_no_weight_are_computed_in_full(start, fit, monkeypatch):
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
    ours = fit(torch.from_numpy(points), torch.from_numpy(labels), 5)
    assert ours.iterations == theirs.n_iter_
    np.testing.assert_allclose(ours.means, theirs.means_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.weights, theirs.weights_, rtol=0, atol=1e-8)


def starts(points, components, rng):
    """Starts that leave much to do: points and components are not where they belong."""
    count = len(points)
    yield KMeans(components, n_init=1, random_state=0).fit(points).labels_
    yield rng.integers(components, size=count)
    yield np.arange(count) * components // count  # sliced
    yield points[:, 0].argsort().argsort() * components // count  # sliced by the first coordinate
    yield rng.integers(components // 2, size=count)  # half of the components empty
    yield np.minimum(np.arange(count) * components // count, components - 2)  # sliced, one empty


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_screened_em_equals_dense_em_from_any_start(kind, seed, monkeypatch):
    monkeypatch.setattr(gmm, "ITERATIONS", 20)
    rng = np.random.default_rng(seed)
    points, components = cloud(kind, rng)
    points = points[::3]
    # Where components have too few points for a covariance, rounding is multiplied by variance / regularisation.
    tolerance = 1e-7 if kind in ("few points a component", "K too large") else 1e-9
    for start in starts(points, components, rng):
        single, labels = torch.from_numpy(points), torch.from_numpy(start)
        screened, dense = fit_mixture(single, labels, components), fit_dense(single, labels, components)
        assert (screened.iterations, screened.converged) == (dense.iterations, dense.converged)
        torch.testing.assert_close(screened.means, dense.means, rtol=0, atol=tolerance)
        torch.testing.assert_close(screened.weights, dense.weights, rtol=0, atol=tolerance)
        assert screened.lower_bound == pytest.approx(dense.lower_bound, abs=tolerance)


@pytest.mark.parametrize("width", [1, 2, 97, 260])
def test_screened_em_equals_dense_em_in_any_width(width):
    rng = np.random.default_rng(0)
    centres = 6 * np.arange(3)[:, None] / np.sqrt(width)
    points = torch.from_numpy(centres[rng.integers(3, size=700)] + rng.normal(size=(700, width)))
    start = torch.arange(700) * 3 // 700
    screened, dense = fit_mixture(points, start, 3), fit_dense(points, start, 3)
    assert screened.iterations == dense.iterations
    torch.testing.assert_close(screened.means, dense.means, rtol=0, atol=1e-9)
    assert screened.lower_bound == pytest.approx(dense.lower_bound, abs=1e-9)


def test_narrow_clusters_far_from_each_other_keep_their_digits():
    rng = np.random.default_rng(0)
    start = rng.integers(4, size=300)
    points = 1000 * rng.normal(size=(4, 6))[start] + rng.normal(size=(300, 6)) / 100
    points, start = torch.from_numpy(points), torch.from_numpy(start)
    screened, dense = fit_mixture(points, start, 4), fit_dense(points, start, 4)
    assert screened.lower_bound == pytest.approx(dense.lower_bound, abs=1e-9)


def test_many_negligible_responsibilities_move_an_empty_component():
    # Component 2 begins empty at the origin. The points of component 0 lie so that its responsibility for each is just
    # below what is left out elsewhere; together they move it.
    rng = np.random.default_rng(0)
    points = np.concatenate([1e-5 * rng.normal(size=(4000, 2)), 5 + rng.normal(size=(100, 2))])
    points[:4000, 0] += 0.0041
    points, start = torch.from_numpy(points), torch.arange(4100) // 4000
    screened, dense = fit_mixture(points, start, 3), fit_dense(points, start, 3)
    assert dense.means[2].norm() > 1e-7
    torch.testing.assert_close(screened.means, dense.means, rtol=0, atol=1e-11)


def test_dense_em_in_small_blocks_equals_dense_em_at_once(monkeypatch):
    points, components = cloud("overlapping", np.random.default_rng(0))
    points, start = torch.from_numpy(points), torch.arange(len(points)) % components
    whole = fit_dense(points, start, components)
    monkeypatch.setattr(gmm, "DENSE_BYTES", 8 * components * points.shape[1] * 7)  # 7 points at a time
    parts = fit_dense(points, start, components)
    assert parts.iterations == whole.iterations
    torch.testing.assert_close(parts.means, whole.means, rtol=0, atol=1e-11)


def test_iterations_of_dense_em_never_synchronise_with_a_gpu():
    # Tensors without data: whatever asks for a value, or has a shape that depends on one, fails.
    shapes = (50, 4), (3, 50), 4
    points, responsibilities, centre = (torch.empty(shape, dtype=torch.float64, device="meta") for shape in shapes)
    totals, means, inverses, failed = gmm._maximise(points, centre, responsibilities)
    responsibilities, log_likelihood = gmm._expect(points, totals, means, inverses)
    assert (responsibilities.shape, log_likelihood.shape, failed.shape) == ((3, 50), (), (3,))


def test_devices_other_than_the_cpu_use_dense_em(monkeypatch):
    monkeypatch.setattr(gmm, "fit_dense", lambda points, start, count: (points.device.type, start, count))
    assert fit_mixture(torch.empty(8, 2, device="meta"), "start", 3) == ("meta", "start", 3)


@both
def test_float32_points_are_fitted_in_float64(fit):
    points, components = cloud("overlapping", np.random.default_rng(0))
    start = torch.arange(len(points)) % components
    single = torch.from_numpy(points.astype(np.float32))
    assert torch.equal(fit(single, start, components).means, fit(single.double(), start, components).means)


@both
def test_the_callers_points_are_left_alone(fit):
    points = torch.arange(40.0, dtype=torch.float64).view(20, 2) ** 2
    before = points.clone()
    fit(points, torch.arange(20) % 2, 2)
    assert torch.equal(points, before)


def computed_in(monkeypatch):
    """A list that grows by one with each step of EM: the number of distances that it computes."""
    counts, compute, expect = [], gmm._Components.compute, gmm._expect_screened

    def count(components, squares, wanted):
        assert squares[wanted].isinf().all()  # none is computed twice
        counts[-1] += wanted.sum().item()
        compute(components, squares, wanted)

    monkeypatch.setattr(gmm._Components, "compute", count)
    monkeypatch.setattr(gmm, "_expect_screened", lambda *arguments: [counts.append(0), expect(*arguments)][1])
    return counts


def test_distances_that_are_skipped_change_nothing_above_the_last_bit(monkeypatch):
    points, components = cloud("far apart", np.random.default_rng(1))
    points, start = torch.from_numpy(points), torch.arange(len(points)) % components
    screened = fit_mixture(points, start, components)
    counts = computed_in(monkeypatch)
    monkeypatch.setattr(gmm, "NEGLIGIBLE", 0.0)
    full = fit_mixture(points, start, components)
    assert counts == [components * len(points)] * full.iterations  # nothing was left out this time
    assert full.iterations == screened.iterations
    torch.testing.assert_close(screened.means, full.means, rtol=0, atol=1e-12)
    assert screened.lower_bound == pytest.approx(full.lower_bound, abs=1e-12)


def test_hard_assigned_points_cost_nothing(monkeypatch):
    points, components = cloud("far apart", np.random.default_rng(1))
    start = KMeans(components, n_init=1, random_state=0).fit(points).labels_
    monkeypatch.setattr(gmm, "TOLERANCE", 0)
    counts, factorised, factorise = computed_in(monkeypatch), [], gmm._Components._factorise
    monkeypatch.setattr(
        gmm._Components, "_factorise", lambda *arguments: (factorised.append(arguments[1]), factorise(*arguments))
    )
    bounded, bound_own = [], gmm.DistanceBounds.bound_own
    monkeypatch.setattr(
        gmm.DistanceBounds, "bound_own", lambda *given: (bounded.append(given[-1].sum().item()), bound_own(*given))
    )
    fit_mixture(torch.from_numpy(points), torch.from_numpy(start), components)
    assert sum(counts) == 0 and len(counts) > 1
    assert bounded == [len(points)] + [0] * (len(counts) - 1)
    assert sorted(factorised) == list(range(components))


def test_fewer_distances_are_computed_as_points_become_hard_assigned(monkeypatch):
    points, components = cloud("far from the origin", np.random.default_rng(1))
    monkeypatch.setattr(gmm, "TOLERANCE", 0)
    counts = computed_in(monkeypatch)
    fit_mixture(torch.from_numpy(points), torch.arange(len(points)) % components, components)
    assert counts[0] == components * len(points)
    assert counts[-1] < counts[0] / 3


def test_small_changes_are_added_and_large_ones_summed_anew():
    points, generator = torch.from_numpy(cloud("one cloud", np.random.default_rng(0))[0]), torch.Generator()
    responsibilities = torch.zeros(2, 700, dtype=torch.float64)
    responsibilities[0, :300] = responsibilities[1, 300:] = 1
    fitted = gmm._Components(points, points.mean(dim=0), 2)
    fitted.maximise(responsibilities)
    assert torch.equal(fitted.origins, points[[0, 300]])
    some = responsibilities.clone()
    some[:, 300:310] = 0.5
    fitted.maximise(some)
    assert torch.equal(fitted.origins, points[[0, 300]])
    much = torch.rand(2, 700, generator=generator.manual_seed(0), dtype=torch.float64)
    for changed in (some, much):
        fitted.maximise(changed)
        fresh = gmm._Components(points, points.mean(dim=0), 2)
        fresh.maximise(changed)
        torch.testing.assert_close(fitted.means, fresh.means, rtol=0, atol=1e-13)
        torch.testing.assert_close(fitted.factors, fresh.factors, rtol=0, atol=1e-13)
    assert torch.equal(fitted.origins, points[much.argmax(dim=1)])


def test_changes_of_responsibilities_that_no_sum_shows_are_left_out(monkeypatch):
    points = torch.from_numpy(cloud("one cloud", np.random.default_rng(0))[0])
    responsibilities = torch.zeros(2, 700, dtype=torch.float64)
    responsibilities[0, :300] = responsibilities[1, 300:] = 1
    fitted = gmm._Components(points, points.mean(dim=0), 2)
    fitted.maximise(responsibilities)
    negligible = fitted.negligible()
    assert negligible.tolist() == pytest.approx([300 * 2.2e-17 / 700, 400 * 2.2e-17 / 700], rel=0.02)
    factorise, changed = gmm._Components._factorise, []
    monkeypatch.setattr(gmm._Components, "_factorise", lambda *given: (changed.append(given[1]), factorise(*given)))
    for size, components in ((0.5, []), (-0.5, []), (2, [1])):
        some = responsibilities.clone()
        some[1, 0] = size * negligible[1]
        fitted.maximise(some)
        assert changed == components
        assert torch.equal(fitted.responsibilities, some if components else responsibilities)


def test_scale_change_and_mean_shift_are_those_of_the_m_step(monkeypatch):
    points, components = cloud("one cloud", np.random.default_rng(0))
    maximise, measured = gmm._Components.maximise, []

    def check(fitted, responsibilities):
        means, inverses = fitted.means.clone(), fitted.precisions_cholesky.clone()
        maximise(fitted, responsibilities)
        if inverses.any():
            step = fitted.precisions_cholesky @ inverses.inverse() - torch.eye(points.shape[1])
            shifts = (fitted.precisions_cholesky @ (fitted.means - means)[:, :, None]).norm(dim=(1, 2))
            torch.testing.assert_close(fitted.scale_change, step.norm(dim=(1, 2)), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(fitted.mean_shift, shifts, rtol=1e-9, atol=1e-9)
            measured.append(fitted.scale_change.min().item())

    monkeypatch.setattr(gmm._Components, "maximise", check)
    fit_mixture(torch.from_numpy(points), torch.arange(len(points)) % components, components)
    assert len(measured) > 5 and min(measured) > 1e-6


@both
def test_a_collapsed_component_is_named(fit, monkeypatch):
    monkeypatch.setattr(gmm, "REGULARISATION", 0.0)
    points = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points[30:] = 7.0
    with pytest.raises(CollapsedComponent, match="component 1 collapsed"):
        fit(points, torch.arange(40) // 30, 2)


@both
def test_points_so_flat_that_the_regularisation_is_lost_in_rounding_collapse(fit):
    points = 1e6 * torch.randn(30, 1, generator=torch.Generator().manual_seed(0)).expand(30, 4)
    with pytest.raises(CollapsedComponent, match="component 0 collapsed"):
        fit(points, torch.arange(30) % 2, 2)


@both
def test_a_component_that_collapses_later_is_named(fit, monkeypatch):
    monkeypatch.setattr(gmm, "REGULARISATION", 0.0)
    points = torch.cat([torch.linspace(4, 6, 30), torch.zeros(10)]).double()[:, None]
    start = torch.arange(40) // 29  # component 1 begins with a point of component 0, which it loses
    with pytest.raises(CollapsedComponent, match="component 1 collapsed"):
        fit(points, start, 2)


@both
def test_the_callers_randomness_is_left_alone(fit):
    state = torch.get_rng_state()
    fit(torch.arange(40.0).view(20, 2), torch.arange(20) % 2, 2)
    assert torch.equal(torch.get_rng_state(), state)
