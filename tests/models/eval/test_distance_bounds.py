import numpy as np
import pytest
import torch

from models.eval import gmm
from models.eval.distance_bounds import DistanceBounds, coordinate_chunks, pca_rotation
from models.eval.gmm import fit_mixture


@pytest.mark.parametrize("spread", [0, 3])
def test_a_bound_is_never_on_the_wrong_side_of_the_distance(spread, monkeypatch):
    rng = np.random.default_rng(2)
    points = spread * rng.normal(size=(6, 48))[rng.integers(6, size=900)] + rng.normal(size=(900, 48))
    maximise, tighten, fitted, looked = gmm._Components.maximise, DistanceBounds.tighten, [], []

    def remember(components, responsibilities):
        fitted.append(components)
        maximise(components, responsibilities)

    def check(bounds, means, inverses, norms, thresholds):
        before, candidates = bounds.below(thresholds), tighten(bounds, means, inverses, norms, thresholds)
        for component, (mean, inverse) in enumerate(zip(means, inverses, strict=True)):
            distances = ((fitted[0].points - mean) @ inverse.T).norm(dim=1)
            assert (bounds.lower[component] <= distances).all()
            assert (bounds.own >= distances * (1 - 1e-12))[bounds.likeliest == component].all()
            left_out = ~candidates[component]
            assert (distances[left_out] ** 2 >= thresholds[component][left_out]).all()
            looked.append((left_out & before[component]).sum().item())
        return candidates

    monkeypatch.setattr(gmm._Components, "maximise", remember)
    monkeypatch.setattr(DistanceBounds, "tighten", check)
    fit_mixture(torch.from_numpy(points), torch.arange(900) % 6, 6)
    assert sum(looked) > 0


def distances(points, means, inverses):
    """(K, N) by the definition."""
    return ((points - means[:, None]) @ inverses.mT).norm(dim=2)


def moved(bounds, points, means, inverses, new_means, new_inverses):
    """Loosen bounds after components moved: (distances, own distances) by the definition."""
    scale_change = (new_inverses @ inverses.inverse() - torch.eye(3)).norm(dim=(1, 2))
    bounds.loosen(scale_change, (new_inverses @ (new_means - means)[:, :, None])[:, :, 0].norm(dim=1))
    exact = distances(points, new_means, new_inverses)
    return exact, exact.gather(0, bounds.likeliest[None])[0]


@pytest.fixture
def some():
    """(DistanceBounds of which all distances are known, points (400, 3), means (4, 3), inverses (4, 3, 3))."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    points -= points.mean(dim=0)
    means = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    inverses = (torch.eye(3) + torch.randn(4, 3, 3, generator=generator, dtype=torch.float64) / 4).tril()
    bounds = DistanceBounds(points, torch.arange(400) % 4, 4)
    bounds.tighten(means, inverses, inverses.norm(dim=(1, 2)), torch.full((4, 400), torch.inf))
    bounds.update_own(bounds.likeliest, distances(points, means, inverses).square())
    return bounds, points, means, inverses


@pytest.mark.parametrize("what", ["means", "inverses", "both"])
@pytest.mark.parametrize("size", [0.01, 1])
def test_bounds_hold_when_components_move_and_are_close_when_they_move_little(what, size, some):
    bounds, points, means, inverses = some
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        new_means, new_inverses = means, inverses
        if what != "inverses":
            new_means = means + size * torch.randn(4, 3, generator=generator)
        if what != "means":
            new_inverses = inverses + size * torch.randn(4, 3, 3, generator=generator).tril()
        exact, own = moved(bounds, points, means, inverses, new_means, new_inverses)
        means, inverses = new_means, new_inverses
        assert (bounds.lower <= exact).all() and (bounds.own >= own * (1 - 1e-12)).all()
        if size < 1:
            assert (bounds.lower > 0.5 * exact - 0.2).all() and (bounds.own < 1.5 * own + 0.2).all()


def test_bounds_hold_after_many_changes_too_small_for_float32(some):
    bounds, points, means, inverses = some
    for _ in range(1000):
        exact, own = moved(bounds, points, means, inverses, means, inverses * (1 - 1.5e-8))
        inverses = inverses * (1 - 1.5e-8)
    assert (bounds.lower <= exact).all() and (bounds.own >= own * (1 - 1e-12)).all()


def test_bounds_hold_where_float32_has_few_digits():
    # Two narrow clusters so far apart that rounding in float32 is as large as they are.
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[300.0] * 3, [-300.0] * 3]).double()
    start = torch.arange(400) % 2
    points = means[start] + torch.randn(400, 3, generator=generator, dtype=torch.float64) / 1000
    points -= points.mean(dim=0)
    inverses = 1000 * (torch.eye(3) + torch.randn(2, 3, 3, generator=generator, dtype=torch.float64) / 4).tril()
    exact, norms = distances(points, means, inverses), inverses.norm(dim=(1, 2))
    bounds = DistanceBounds(points, start, 2)
    assert bounds.tighten(means, inverses, norms, exact.square().float() * (1 + 1e-6)).all()
    bounds = DistanceBounds(points, start, 2)
    bounds.tighten(means, inverses, norms, torch.full_like(exact, torch.inf).float())
    assert (bounds.lower <= exact).all()
    assert (bounds.lower[1 - start, torch.arange(400)] > 1e5).all()


def test_projections_bound_distances_from_below_and_are_exact_at_the_likeliest_mean():
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(4, 24, generator=generator, dtype=torch.float64)
    inverses = (torch.eye(24) + torch.randn(4, 24, 24, generator=generator, dtype=torch.float64) / 4).tril()
    points = torch.cat([means, torch.randn(1500, 24, generator=generator, dtype=torch.float64)])
    likeliest = torch.cat([torch.arange(4), torch.randint(4, (1500,), generator=generator)])
    exact = distances(points, means, inverses).square()
    projected = DistanceBounds(points, likeliest, 4).project(means, inverses)
    torch.testing.assert_close(projected[:, :4].double(), exact[:, :4], rtol=1e-4, atol=1e-4)
    assert (projected[:, 4:] < exact[:, 4:]).all() and (projected > exact / 10).float().mean() > 0.3
    assert (projected.gather(0, likeliest[None]) < 1e-10).all()  # of its own component nothing is known


def test_thresholds_are_where_a_log_probability_is_far_below_the_likeliest():
    points = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    means, inverses = torch.tensor([[-1.0], [2.0]]).double(), torch.tensor([[[1.0]], [[3.0]]]).double()
    squares, constants = distances(points, means, inverses).square(), torch.tensor([-0.5, 0.7]).double()
    likeliest = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    bounds = DistanceBounds(points, likeliest[0], 2)
    bounds.update_own(likeliest[0], squares)
    thresholds, joint = bounds.thresholds(constants, torch.full((2,), 5.0).double()), constants[:, None] - squares / 2
    below = joint.gather(0, likeliest) - joint.gather(0, 1 - likeliest) >= 5
    assert torch.equal(squares.gather(0, 1 - likeliest) >= thresholds.gather(0, 1 - likeliest), below)
    assert 0 < below.sum() < 7
    assert (thresholds.gather(0, likeliest) == 0).all()
    assert (bounds.thresholds(constants, torch.full((2,), 0.1).double()) >= 0).all()


def test_the_rotation_is_orthogonal_and_orders_coordinates_by_variance():
    points = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points *= torch.tensor([1, 5, 2, 9, 3, 0.1])
    rotation = pca_rotation(points, 1e-6)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (points @ rotation).var(dim=0).diff().lt(0).all()
    assert pca_rotation(points[:, :1], 1e-6).abs().item() == 1
    assert torch.equal(pca_rotation(points * 1e6, 1e-6), torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 3, 4, 10])
def test_chunks_cover_every_coordinate_once(width):
    assert [column for start, stop in coordinate_chunks(width) for column in range(start, stop)] == list(range(width))
