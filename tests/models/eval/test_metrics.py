import pytest
import torch

from models.eval import metrics
from models.eval.metrics import (
    DEFINED,
    STANDARD,
    ListedPhotos,
    Metric,
    Ranking,
    SameClass,
    _rank_by_order,
    average_precision,
    by_definition,
    capped_precision_at,
    class_means,
    get_metric,
    over_queries,
    plain_average_precision,
    precision_at,
    precision_at_recall,
    rank,
    recall_at,
)


def ranking_of(hits, gallery_size):
    """The Ranking of one query whose relevant photos have these ranks."""
    return Ranking(torch.tensor([hits], dtype=torch.float64), torch.tensor([len(hits)]), gallery_size, None)


def plain(scores, query_labels, gallery_labels, top=None):
    """(AP, order) of each query by the definition, one rank at a time."""
    results = []
    for row, label in zip(scores.tolist(), query_labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda photo: (row[photo], photo))
        relevant = [gallery_labels[photo].item() == label for photo in order]
        n = len(row) if top is None else min(top, len(row))
        precision = [sum(relevant[: r + 1]) / (r + 1) for r in range(n)]
        total = min(sum(relevant), n)
        ap = sum(max(precision[r:]) for r in range(n) if relevant[r]) / total if total else float("nan")
        results.append((ap, order))
    return torch.tensor([ap for ap, _ in results], dtype=torch.float64), [order for _, order in results]


@pytest.mark.parametrize("case", range(3))
def test_metrics_equal_golden(golden, case):
    z = {name.removeprefix(f"case{case}_"): value for name, value in golden("metrics").items()}
    ranking = rank(z["dist"], SameClass(z["query_labels"], z["gallery_labels"]))
    measured = {"ap_all": average_precision(ranking), "ap_200": average_precision(ranking, 200)}
    measured |= {"ap_50": average_precision(ranking, 50)}
    measured |= {f"prec_{k}": precision_at(ranking, k) for k in (100, 200)}
    for name, values in measured.items():
        torch.testing.assert_close(values, z[name], rtol=0, atol=1e-12, equal_nan=True)
        _, means = class_means(values, z["query_labels"])
        torch.testing.assert_close(means.mean(), z[f"m{name}"], rtol=0, atol=1e-12)


def test_definitions_of_other_papers_equal_golden(golden):
    z = golden("definitions")
    ranking = rank(z["distances"], SameClass(z["query_labels"], z["gallery_labels"]))
    table = by_definition({name: get_metric(name).function(ranking) for name in DEFINED}, z["query_labels"])
    prefixes = {"SBKA, SAKE": "sbka", "ZSE-SBIR": "zse", "SEM-PCYC": "sem_pcyc", "torchmetrics": "torchmetrics"}
    assert list(table)[: len(prefixes)] == list(prefixes)
    for definition in prefixes:
        for name, value in table[definition].items():
            expected = z[f"{prefixes[definition]}_{name.lower().replace('@', '_')}"].item()
            # torchmetrics computes in float32
            assert value == pytest.approx(expected, abs=1e-5 if definition == "torchmetrics" else 1e-12)
    assert list(table["torchmetrics"]) == ["mAP@all", "mAP@200"]
    assert all(list(table[name]) == list(STANDARD) for name in list(prefixes)[:3])


def test_definitions_without_golden_numbers_equal_a_plain_loop():
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(30, 260, generator=generator, dtype=torch.float64)
    query_labels = torch.arange(30) % 4
    gallery_labels = torch.randint(60, (260,), generator=generator).clamp(max=3)  # class 3 has nearly all photos
    gallery_labels[:4] = torch.arange(4)
    sums = {}
    for row, label in zip(scores.tolist(), query_labels.tolist(), strict=True):
        relevant = [gallery_labels[photo].item() == label for photo in sorted(range(260), key=row.__getitem__)]
        precision = [sum(relevant[: rank + 1]) / (rank + 1) for rank in range(260)]
        for name, top in (("all", 260), ("200", 200), ("100", 100)):
            hits = [rank for rank in range(top) if relevant[rank]]
            plain_sum = sum(precision[rank] for rank in hits)
            values = {
                "ACNet": sum(max(precision[rank:top]) for rank in hits) / min(top, sum(relevant)),
                "doodle2search": plain_sum / max(1, len(hits)),
                "CVAE": plain_sum / top,
            }
            for definition, value in values.items():
                sums[definition, f"mAP@{name}"] = sums.get((definition, f"mAP@{name}"), 0) + value
                sums[definition, f"Prec@{name}"] = sums.get((definition, f"Prec@{name}"), 0) + len(hits) / top
    ranking = rank(scores, SameClass(query_labels, gallery_labels))
    table = by_definition({name: get_metric(name).function(ranking) for name in DEFINED}, query_labels)
    for definition in ("ACNet", "doodle2search", "CVAE"):
        assert list(table[definition]) == list(STANDARD)[definition == "CVAE" :]
        for name, value in table[definition].items():
            assert value == pytest.approx(float(sums[definition, name]) / 30, abs=1e-12)


def test_other_definitions_by_hand():
    ranking = ranking_of([2, 3, 5], 5)
    assert plain_average_precision(ranking).item() == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)
    assert plain_average_precision(ranking, 4).item() == pytest.approx(
        (1 / 2 + 2 / 3) / 2
    )  # over 2 hits in the first 4
    assert plain_average_precision(ranking, 1).item() == 0
    assert plain_average_precision(ranking_of([], 4)).item() == 0
    assert capped_precision_at(ranking, 2).item() == 1 / 2
    assert capped_precision_at(ranking, 4).item() == pytest.approx(2 / 3)  # 3 are relevant: the first 3 ranks count
    assert capped_precision_at(ranking_of([], 4), 2).item() == 0


def test_average_precision_by_hand():
    ranking = ranking_of([2, 3, 5], 5)  # precisions at the hits: 1/2, 2/3, 3/5
    assert average_precision(ranking).item() == pytest.approx((2 / 3 + 2 / 3 + 3 / 5) / 3)
    assert average_precision(ranking, top=2).item() == pytest.approx((1 / 2) / 2)  # R = min(cut, 3 in the gallery)
    assert average_precision(ranking, top=1).item() == 0
    assert average_precision(ranking_of([], 4)).isnan().all()


def test_precision_at_recall_by_hand():
    ranking = ranking_of([2, 3, 5], 5)  # one hit reaches recalls up to 1/3, two up to 2/3
    assert precision_at_recall(ranking)[0].tolist() == pytest.approx([2 / 3] * 7 + [3 / 5] * 4)
    exact = ranking_of([1, 2, 3, *range(5, 12)], 20)  # recall 0.3 needs three hits, not four
    assert precision_at_recall(exact)[0, 3] == 1 and precision_at_recall(exact)[0, 4] == pytest.approx(10 / 11)
    assert precision_at_recall(ranking_of([], 4)).tolist() == [[0] * 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 7, 1000])
@pytest.mark.parametrize("shift", [0, -3])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_ranks_with_ties_equal_the_definition(dtype, levels, shift, rows, monkeypatch):
    monkeypatch.setattr(metrics, "SORT_BYTES", rows * 90 * 4)
    generator = torch.Generator().manual_seed(levels)
    scores = (torch.randint(levels, (13, 90), generator=generator) / levels + shift).to(dtype)
    gallery_labels = torch.randint(4, (90,), generator=generator)
    query_labels = torch.randint(5, (13,), generator=generator)  # class 4 has no photo
    relevance = SameClass(query_labels, gallery_labels)
    ranking = rank(scores, relevance, nearest=6)
    for top in (None, 20):
        expected, order = plain(scores, query_labels, gallery_labels, top)
        torch.testing.assert_close(average_precision(ranking, top), expected, rtol=0, atol=1e-14, equal_nan=True)
    assert ranking.nearest.tolist() == [row[:6] for row in order]
    hits, nearest = _rank_by_order(scores, relevance.mask(), relevance.counts(), 6)  # a GPU's way
    assert torch.equal(hits, ranking.hits) and torch.equal(nearest, ranking.nearest)


class Computed:
    """Scores that are computed when they are asked for: `asked` has the number of queries of each time."""

    def __init__(self, scores):
        self.scores, self.shape, self.device, self.asked = scores, scores.shape, scores.device, []

    def __getitem__(self, queries):
        self.asked.append(len(self.scores[queries]))
        return self.scores[queries].clone()


def test_scores_are_computed_once_in_blocks_that_fit_a_cache(monkeypatch):
    monkeypatch.setattr(metrics, "SORT_BYTES", 3 * 90 * 4)
    generator = torch.Generator().manual_seed(0)
    scores = Computed(torch.rand(13, 90, generator=generator))
    relevance = SameClass(torch.randint(4, (13,), generator=generator), torch.arange(90) % 3)  # class 3 has no photo
    ranking, expected = rank(scores, relevance, nearest=5), rank(scores.scores, relevance, nearest=5)
    assert torch.equal(ranking.hits, expected.hits) and torch.equal(ranking.nearest, expected.nearest)
    assert sum(scores.asked) == 13 and max(scores.asked) == 3
    scores.scores[12, 50] = float("nan")
    with pytest.raises(ValueError, match="a score is NaN"):
        rank(scores, relevance)


def test_a_tie_at_the_very_end_and_across_queries():
    scores = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    ranking = rank(scores, SameClass(torch.tensor([1, 1]), torch.tensor([0, 0, 1])))
    assert ranking.hits.tolist() == [[3], [3]]
    ranking = rank(scores, SameClass(torch.tensor([1, 1]), torch.tensor([0, 1, 0])))
    assert ranking.hits.tolist() == [[2], [2]]


def test_five_photos_of_which_three_tie():
    # In order: photo 1, then the tie of 0, 2 and 4 in gallery order, then photo 3.
    scores = torch.tensor([[0.5, 0.25, 0.5, 2.0, 0.5]])
    for label, ranks in ((0, [1, 3]), (1, [2, 4]), (2, [5])):
        ranking = rank(scores, SameClass(torch.tensor([label]), torch.tensor([1, 0, 0, 2, 1])), nearest=4)
        assert ranking.hits.tolist() == [ranks]
        assert ranking.nearest.tolist() == [[1, 0, 2, 4]]


def test_minus_zero_ties_with_zero():
    ranking = rank(
        torch.tensor([[0.0, -0.0, 0.0, -0.0]]), SameClass(torch.tensor([1]), torch.tensor([0, 1, 0, 1])), nearest=4
    )
    assert ranking.hits.tolist() == [[2, 4]]
    assert ranking.nearest.tolist() == [[0, 1, 2, 3]]


def test_shuffling_the_gallery_changes_nothing_without_ties():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(9, 60, generator=generator, dtype=torch.float64)
    query_labels, gallery_labels = torch.arange(9) % 3, torch.arange(60) % 3
    order = torch.randperm(60, generator=generator)
    before = average_precision(rank(scores, SameClass(query_labels, gallery_labels)), 20)
    after = average_precision(rank(scores[:, order], SameClass(query_labels, gallery_labels[order])), 20)
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_classes_count_alike_whatever_their_number_of_queries():
    classes, means = class_means(torch.tensor([1.0, 0.0, 0.5, 0.0]), torch.tensor([4, 2, 4, 4]))
    assert classes.tolist() == [2, 4]
    assert means.tolist() == pytest.approx([0, 0.5])
    _, curves = class_means(torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0]]), torch.tensor([0, 0, 1]))
    assert curves.tolist() == [[2, 4], [5, 5]]


def test_metrics_by_name():
    ranking = ranking_of([2, 3, 5], 5)
    for name, value in (
        ("mAP@all", average_precision(ranking)),
        ("mAP@2", average_precision(ranking, 2)),
        ("mAP@200", average_precision(ranking, 200)),
        ("Prec@3", precision_at(ranking, 3)),
    ):
        assert torch.equal(get_metric(name).function(ranking), value), name
    assert get_metric("mAP@2").function(ranking) != get_metric("mAP@all").function(ranking)
    assert [get_metric(name).function(ranking).shape for name in STANDARD] == [(1,)] * 4


@pytest.mark.parametrize(
    "name",
    [
        "Prec@all",
        "mAP@0",
        "Prec@99999999999999999999",
        "mAP@-5",
        "Prec@ten",
        "mAP@",
        "mAP",
        "",
        "Recall@all",
        "map@all",
        "mAP@2.5",
        "mAP@ 5",
    ],
)
def test_an_unknown_metric_is_named_with_those_there_are(name):
    with pytest.raises(ValueError) as error:
        get_metric(name)
    assert str(error.value) == (
        f"there is no metric {name!r}; there are mAP@all, plain mAP@all, mAP@k, Prec@k, Recall@k, plain mAP@k, "
        "mAP over k@k, capped Prec@k with a whole number k from 1 on"
    )


def test_a_metric_is_added_in_one_line(monkeypatch):
    def hit_at(ranking, k):
        return (ranking.hits[:, :1] <= k).any(dim=1).double()

    monkeypatch.setitem(metrics.METRICS, "Hit", Metric(hit_at, over_queries))
    assert [get_metric(name).function(ranking_of([2], 5)).item() for name in ("Hit@1", "Hit@2")] == [0, 1]


def test_recall_by_hand():
    ranking = ranking_of([2, 3, 5], 5)
    assert [recall_at(ranking, k).item() for k in (1, 2, 4, 5, 9)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert recall_at(ranking_of([], 4), 2).isnan().all()


def test_averages_are_over_classes_or_over_queries():
    values, labels = torch.tensor([1.0, 0.0, 0.5, 0.0]), torch.tensor([4, 2, 4, 4])
    assert get_metric("mAP@all").average(values, labels).tolist() == pytest.approx([0, 0.5])  # the mean is 1/4
    assert get_metric("Recall@5").average(values, labels).mean().item() == pytest.approx(1.5 / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relevance_by_list_equals_relevance_by_class(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randint(9, (13, 90), generator=generator) / 9).to(dtype)
    query_labels, gallery_labels = (torch.randint(4, (count,), generator=generator) for count in (13, 90))
    by_class = SameClass(query_labels, gallery_labels)
    by_list = ListedPhotos([(gallery_labels == label).nonzero()[:, 0] for label in query_labels], 90)
    one, two = rank(scores, by_class, nearest=7), rank(scores, by_list, nearest=7)
    assert torch.equal(one.hits, two.hits) and torch.equal(one.in_gallery, two.in_gallery)
    assert torch.equal(one.nearest, two.nearest)
    relevant = gallery_labels[one.nearest] == query_labels[:, None]
    assert torch.equal(one.nearest_relevant(), relevant) and torch.equal(two.nearest_relevant(), relevant)
    chosen = torch.tensor([5, 0, 5])
    assert torch.equal(by_class[chosen].mask(), by_class.mask()[chosen])
    assert torch.equal(by_list[chosen].mask(), by_class.mask()[chosen])


def test_each_sketch_can_have_a_photo_of_its_own_and_galleries_other_classes():
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    ranking = rank(scores, ListedPhotos([[2], [0]], 3))
    assert ranking.hits.tolist() == [[3], [1]] and recall_at(ranking, 2).tolist() == [0, 1]
    assert average_precision(ranking).tolist() == pytest.approx([1 / 3, 1])
    assert rank(scores, SameClass(torch.tensor([0, 1]), torch.tensor([7, 0, 1]))).hits.tolist() == [[2], [3]]
    none = rank(scores, ListedPhotos([[], [1, 1]], 3))
    assert none.in_gallery.tolist() == [0, 1] and average_precision(none)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_is_never_ranked(dtype):
    scores = torch.rand(3, 5, dtype=dtype)
    scores[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        rank(scores, SameClass(torch.arange(3), torch.arange(5)))
