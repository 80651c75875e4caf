import pytest
import torch

from models.eval.matching import (
    cluster_distances,
    code_distances,
    distinct_codes,
    euclidean_distances,
    fused_scores,
    nearest_codes,
)
from models.eval.metrics import SameClass, average_precision, class_means, precision_at, rank

GRID = [(m, k) for m in (2, 4) for k in (5, 6, 7)]


@pytest.fixture
def z(golden):
    return golden("matching")


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def test_one_to_one_equals_golden(z):
    distances = euclidean_distances(z["query"].double(), z["gallery"].double())
    close(distances[z["row_queries"]], z["euclid_rows"], 1e-12)
    close(distances.sum(dim=1), z["euclid_rowsum"], 1e-9)
    relevant = rank(distances, SameClass(z["query_labels"], z["gallery_labels"]))
    for name, values in (
        ("ap_all", average_precision(relevant)),
        ("ap_200", average_precision(relevant, 200)),
        ("prec_100", precision_at(relevant, 100)),
    ):
        close(values, z[f"one_{name}"], 1e-10)
        close(class_means(values, z["query_labels"])[1].mean(), z[f"one_m{name}"], 1e-10)


@pytest.mark.parametrize(("subspaces", "clusters"), GRID)
def test_one_to_many_given_the_codebooks_equals_golden(z, subspaces, clusters):
    row = {name.removeprefix(f"M{subspaces}K{clusters}_"): value for name, value in z.items()}
    query, gallery, codebook = z["query"].double(), z["gallery"].double(), row["codebook"].double()
    codes = nearest_codes(gallery, codebook)
    assert torch.equal(codes, row["codes"].long())
    close(code_distances(query, codebook), row["dtable"], 2e-6)
    cluster = cluster_distances(query, codebook, codes)
    close(cluster[z["row_queries"]], row["cluster_rows"], 2e-6)
    close(cluster.sum(dim=1), row["cluster_rowsum"], 1e-3)
    scores = fused_scores(cluster, euclidean_distances(query, gallery))
    close(scores[z["row_queries"]], row["fused_rows"], 2e-6)
    close(scores.sum(dim=1), row["fused_rowsum"], 1e-3)
    relevant = rank(scores, SameClass(z["query_labels"], z["gallery_labels"]))
    for name, values, each, mean in (
        ("ap_all", average_precision(relevant), 2e-3, 1e-5),
        ("ap_200", average_precision(relevant, 200), 2e-3, 1e-5),
        ("prec_100", precision_at(relevant, 100), 0.01, 1e-4),
    ):
        close(values, row[name], each)
        close(class_means(values, z["query_labels"])[1].mean(), row[f"m{name}"], mean)


def test_distances_equal_plain_loops():
    generator = torch.Generator().manual_seed(1)
    query, gallery = (torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in (4, 9))
    codebook = torch.randn(3, 5, 2, dtype=torch.float64, generator=generator)
    expected = torch.zeros(4, 9, dtype=torch.float64)
    for q in range(4):
        for g in range(9):
            for m in range(3):
                subspace = slice(2 * m, 2 * m + 2)
                code = min(range(5), key=lambda k: (gallery[g, subspace] - codebook[m, k]).norm())
                expected[q, g] += ((query[q, subspace] - codebook[m, code]) ** 2).sum()
    close(cluster_distances(query, codebook, nearest_codes(gallery, codebook)), expected, 1e-12)
    close(euclidean_distances(query, gallery), torch.cdist(query, gallery), 1e-12)


def test_the_nearest_photo_of_a_photo_is_itself():
    gallery = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(euclidean_distances(gallery, gallery).argmin(dim=1), torch.arange(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_distances_of_whole_numbers_are_equal_to_the_bit(dtype):
    gallery = torch.randint(-5, 6, (300, 3), generator=torch.Generator().manual_seed(3))
    query, needs_gradient = gallery[:20] + 1, gallery.to(dtype).requires_grad_()
    expected = ((query[:, None] - gallery) ** 2).sum(dim=2).to(dtype).sqrt()
    assert torch.equal(euclidean_distances(query.to(dtype), gallery.to(dtype)), expected)
    assert torch.equal(euclidean_distances(query.to(dtype), needs_gradient), expected)


def test_distances_are_written_to_out(z):
    query, gallery = z["query"], z["gallery"]
    out = torch.empty(len(query), len(gallery))
    assert euclidean_distances(query, gallery, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, euclidean_distances(query, gallery))


def test_scores_from_cells_equal_scores_from_photos(z):
    query, gallery, codebook = z["query"], z["gallery"], z["M2K5_codebook"]
    codes, euclidean = nearest_codes(gallery, codebook), euclidean_distances(query, gallery)
    expected = fused_scores(cluster_distances(query, codebook, codes), euclidean)
    cells = distinct_codes(codes)
    assert len(cells[0]) < len(gallery)
    cluster = cluster_distances(query, codebook, cells[0])
    assert torch.equal(fused_scores(cluster, euclidean, cells=cells[1]), expected)


def test_distances_have_a_gradient():
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (4, 7))
    gradients = []
    for distances in (euclidean_distances, torch.cdist):
        own = query.clone().requires_grad_()
        distances(own, gallery).square().sin().sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
