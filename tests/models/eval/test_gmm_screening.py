import numpy as np
import pytest
import torch

from models.eval import gmm
from models.eval.gmm import fit_mixture
from models.eval.screen import Screen, directions, steps_of


@pytest.mark.parametrize("spread", [0, 3])
def test_a_bound_is_never_on_the_wrong_side_of_the_distance(spread, monkeypatch):
    rng = np.random.default_rng(2)
    points = spread * rng.normal(size=(6, 48))[rng.integers(6, size=900)] + rng.normal(size=(900, 48))
    maximise, survivors, fitted, looked = gmm._Components.maximise, Screen.survivors, [], []

    def remember(components, shares):
        fitted.append(components)
        maximise(components, shares)

    def check(screen, means, roots, norms, limits):
        before, survived = screen.near(limits), survivors(screen, means, roots, norms, limits)
        for component, (mean, root) in enumerate(zip(means, roots, strict=True)):
            distances = ((fitted[0].points - mean) @ root.T).norm(dim=1)
            assert (screen.bounds[component] <= distances).all()
            assert (screen.own >= distances * (1 - 1e-12))[screen.likeliest == component].all()
            left_out = ~survived[component]
            assert (distances[left_out] ** 2 >= limits[component][left_out]).all()
            looked.append((left_out & before[component]).sum().item())
        return survived

    monkeypatch.setattr(gmm._Components, "maximise", remember)
    monkeypatch.setattr(Screen, "survivors", check)
    fit_mixture(torch.from_numpy(points), torch.arange(900) % 6, 6)
    assert sum(looked) > 0


def distances(points, means, roots):
    """(K, N) by the definition."""
    return ((points - means[:, None]) @ roots.mT).norm(dim=2)


def moved(screen, points, means, roots, new_means, new_roots):
    """Tell the screen that components moved: (distances, own distances) by the definition."""
    drifts = (new_roots @ roots.inverse() - torch.eye(3)).norm(dim=(1, 2))
    screen.age(drifts, (new_roots @ (new_means - means)[:, :, None])[:, :, 0].norm(dim=1))
    exact = distances(points, new_means, new_roots)
    return exact, exact.gather(0, screen.likeliest[None])[0]


@pytest.fixture
def some():
    """(Screen that knows all distances, points (400, 3), means (4, 3), roots (4, 3, 3))."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    points -= points.mean(dim=0)
    means = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    roots = (torch.eye(3) + torch.randn(4, 3, 3, generator=generator, dtype=torch.float64) / 4).tril()
    screen = Screen(points, torch.arange(400) % 4, 4)
    screen.survivors(means, roots, roots.norm(dim=(1, 2)), torch.full((4, 400), torch.inf))
    screen.settle(screen.likeliest, distances(points, means, roots).square())
    return screen, points, means, roots


@pytest.mark.parametrize("what", ["means", "roots", "both"])
@pytest.mark.parametrize("size", [0.01, 1])
def test_bounds_hold_when_components_move_and_are_close_when_they_move_little(what, size, some):
    screen, points, means, roots = some
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        new_means, new_roots = means, roots
        if what != "roots":
            new_means = means + size * torch.randn(4, 3, generator=generator)
        if what != "means":
            new_roots = roots + size * torch.randn(4, 3, 3, generator=generator).tril()
        exact, own = moved(screen, points, means, roots, new_means, new_roots)
        means, roots = new_means, new_roots
        assert (screen.bounds <= exact).all() and (screen.own >= own * (1 - 1e-12)).all()
        if size < 1:
            assert (screen.bounds > 0.5 * exact - 0.2).all() and (screen.own < 1.5 * own + 0.2).all()


def test_bounds_hold_after_many_changes_too_small_for_float32(some):
    screen, points, means, roots = some
    for _ in range(1000):
        exact, own = moved(screen, points, means, roots, means, roots * (1 - 1.5e-8))
        roots = roots * (1 - 1.5e-8)
    assert (screen.bounds <= exact).all() and (screen.own >= own * (1 - 1e-12)).all()


def test_bounds_hold_where_float32_tells_little():
    # Two narrow clusters so far apart that rounding in float32 is as large as they are.
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[300.0] * 3, [-300.0] * 3]).double()
    start = torch.arange(400) % 2
    points = means[start] + torch.randn(400, 3, generator=generator, dtype=torch.float64) / 1000
    points -= points.mean(dim=0)
    roots = 1000 * (torch.eye(3) + torch.randn(2, 3, 3, generator=generator, dtype=torch.float64) / 4).tril()
    exact, norms = distances(points, means, roots), roots.norm(dim=(1, 2))
    screen = Screen(points, start, 2)
    assert screen.survivors(means, roots, norms, exact.square().float() * (1 + 1e-6)).all()
    screen = Screen(points, start, 2)
    screen.survivors(means, roots, norms, torch.full_like(exact, torch.inf).float())
    assert (screen.bounds <= exact).all()
    assert (screen.bounds[1 - start, torch.arange(400)] > 1e5).all()


def test_limits_are_where_a_log_probability_is_far_below_the_likeliest():
    points = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    means, roots = torch.tensor([[-1.0], [2.0]]).double(), torch.tensor([[[1.0]], [[3.0]]]).double()
    squares, constants = distances(points, means, roots).square(), torch.tensor([-0.5, 0.7]).double()
    likeliest = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    screen = Screen(points, likeliest[0], 2)
    screen.settle(likeliest[0], squares)
    limits, joint = screen.limits(constants, 5), constants[:, None] - squares / 2
    below = joint.gather(0, likeliest) - joint.gather(0, 1 - likeliest) >= 5
    assert torch.equal(squares.gather(0, 1 - likeliest) >= limits.gather(0, 1 - likeliest), below)
    assert 0 < below.sum() < 7
    assert (limits.gather(0, likeliest) == 0).all()
    assert (screen.limits(constants, 0.1) >= 0).all()


def test_directions_are_orthogonal_and_begin_with_the_widest():
    points = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points *= torch.tensor([1, 5, 2, 9, 3, 0.1])
    turn = directions(points, 1e-6)
    torch.testing.assert_close(turn @ turn.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (points @ turn).var(dim=0).diff().lt(0).all()
    assert directions(points[:, :1], 1e-6).abs().item() == 1
    assert torch.equal(directions(points * 1e6, 1e-6), torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 3, 4, 10])
def test_steps_take_every_coordinate_once(width):
    assert [column for start, stop in steps_of(width) for column in range(start, stop)] == list(range(width))
