import numpy as np
import pytest
import torch

from models.eval.codebooks import fit_codebook
from models.eval.matching import cluster_distances, euclidean_distances, fused_scores, nearest_codes
from models.eval.metrics import average_precision, class_means, precision_at, rank


@pytest.mark.parametrize(("subspaces", "clusters"), [(2, 5), (2, 6), (2, 7), (4, 5), (4, 6), (4, 7)])
def test_own_codebooks_retrieve_as_well_as_golden_ones(golden, subspaces, clusters):
    z = golden("matching")
    codebook, unconverged = fit_codebook(z["gallery"].numpy(), subspaces, clusters, seed=int(z["seed"]))
    assert not unconverged
    assert codebook.dtype == np.float32
    np.testing.assert_allclose(codebook, z[f"M{subspaces}K{clusters}_codebook"], rtol=0, atol=1e-4)
    query, gallery, means = z["query"].double(), z["gallery"].double(), torch.from_numpy(codebook).double()
    scores = fused_scores(
        cluster_distances(query, means, nearest_codes(gallery, means)), euclidean_distances(query, gallery)
    )
    relevant = rank(scores, z["query_labels"], z["gallery_labels"])
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
