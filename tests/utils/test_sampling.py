import numpy as np
import pytest

from utils.sampling import evenly_spaced


@pytest.mark.parametrize("midpoints", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100, 1013])
@pytest.mark.parametrize("most", [1, 2, 6, 100])
def test_indices_ascend_without_repeats_at_even_distances(count, most, midpoints):
    indices = evenly_spaced(count, most, midpoints)
    assert indices.dtype == np.int64 and len(indices) == min(count, most)
    assert ((indices >= 0) & (indices < count)).all()
    steps = np.diff(indices)
    assert (steps > 0).all() and (len(steps) == 0 or steps.max() - steps.min() <= 1)
    if count <= most:
        assert indices.tolist() == list(range(count))


def test_ends_are_taken_or_middles():
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9] and evenly_spaced(10, 2, midpoints=True).tolist() == [2, 7]
