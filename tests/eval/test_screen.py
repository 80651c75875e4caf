import numpy as np
import pytest
import torch

from models.eval import mixture
from models.eval.mixture import fit_mixture
from models.eval.screen import Screen, directions, steps_of


@pytest.mark.parametrize("spread", [0, 3])
def test_a_bound_is_never_on_the_wrong_side_of_the_distance(spread, monkeypatch):
    rng = np.random.default_rng(2)
    points = spread * rng.normal(size=(6, 48))[rng.integers(6, size=900)] + rng.normal(size=(900, 48))
    maximise, survivors, fitted, looked = mixture._Components.maximise, Screen.survivors, [], []

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

    monkeypatch.setattr(mixture._Components, "maximise", remember)
    monkeypatch.setattr(Screen, "survivors", check)
    fit_mixture(torch.from_numpy(points), torch.arange(900) % 6, 6)
    assert sum(looked) > 0


def test_directions_are_orthogonal_and_begin_with_the_widest():
    points = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points *= torch.tensor([1, 5, 2, 9, 3, 0.1])
    turn = directions(points)
    torch.testing.assert_close(turn @ turn.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (points @ turn).var(dim=0).diff().lt(0).all()
    assert directions(points[:, :1]).abs().item() == 1


@pytest.mark.parametrize("width", [1, 3, 4, 10])
def test_steps_take_every_coordinate_once(width):
    assert [column for start, stop in steps_of(width) for column in range(start, stop)] == list(range(width))
