import pytest
import torch

from models.eval.metrics import average_precision, class_means, precision_at, rank


@pytest.mark.parametrize("case", range(3))
def test_metrics_equal_golden(golden, case):
    z = {name.removeprefix(f"case{case}_"): value for name, value in golden("metrics").items()}
    relevant = rank(z["dist"], z["query_labels"], z["gallery_labels"])
    measured = {"ap_all": average_precision(relevant), "ap_200": average_precision(relevant, 200)}
    measured |= {"ap_50": average_precision(relevant, 50)}
    measured |= {f"prec_{k}": precision_at(relevant, k) for k in (100, 200)}
    for name, values in measured.items():
        torch.testing.assert_close(values, z[name], rtol=0, atol=1e-12, equal_nan=True)
        _, means = class_means(values, z["query_labels"])
        torch.testing.assert_close(means.mean(), z[f"m{name}"], rtol=0, atol=1e-12)


def test_average_precision_by_hand():
    relevant = torch.tensor([[False, True, True, False, True]])  # precisions at the hits: 1/2, 2/3, 3/5
    assert average_precision(relevant).item() == pytest.approx((2 / 3 + 2 / 3 + 3 / 5) / 3)
    assert average_precision(relevant, top=2).item() == pytest.approx((1 / 2) / 2)  # R = min(cut, 3 in the gallery)
    assert average_precision(relevant, top=1).item() == 0
    assert average_precision(torch.zeros(1, 4, dtype=torch.bool)).isnan().all()


def test_ties_go_by_gallery_order():
    scores = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]])
    relevant = rank(scores, torch.tensor([7]), torch.tensor([0, 7, 7, 0, 0]))  # order 1, 4, 0, 2, 3
    assert relevant.tolist() == [[True, False, False, True, False]]
    many = rank(torch.zeros(1, 5000), torch.tensor([1]), torch.arange(5000) % 3)
    assert torch.equal(many[0], torch.arange(5000) % 3 == 1)


def test_shuffling_the_gallery_changes_nothing_without_ties():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(9, 60, generator=generator, dtype=torch.float64)
    query_labels, gallery_labels = torch.arange(9) % 3, torch.arange(60) % 3
    order = torch.randperm(60, generator=generator)
    before = average_precision(rank(scores, query_labels, gallery_labels), 20)
    after = average_precision(rank(scores[:, order], query_labels, gallery_labels[order]), 20)
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_classes_count_alike_whatever_their_number_of_queries():
    classes, means = class_means(torch.tensor([1.0, 0.0, 0.5, 0.0]), torch.tensor([4, 2, 4, 4]))
    assert classes.tolist() == [2, 4]
    assert means.tolist() == pytest.approx([0, 0.5])
