import numpy as np
import pytest
import torch

from models.eval import evaluate as evaluation
from models.eval.evaluate import Grid, WeightedCodebook, class_relevance, evaluate_grid, evaluate_rows
from models.eval.features import Features
from models.eval.matching import cluster_distances, euclidean_distances, nearest_codes
from models.eval.metrics import STANDARD, ListedPhotos, average_precision, precision_at, precision_at_recall, rank
from utils.process_pool import thread_pool


@pytest.fixture
def features(golden):
    z = golden("matching")
    return Features(*(z[name].numpy() for name in ("gallery", "gallery_labels", "query", "query_labels")))


@pytest.fixture
def codebooks(golden):
    z = golden("matching")
    return {None: None} | {(m, k): z[f"M{m}K{k}_codebook"].numpy() for m in (2, 4) for k in (5, 7)}


def same(one, two, tolerance=0.0):
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].keys() == two[key].keys()
        for name in one[key]:
            torch.testing.assert_close(one[key][name], two[key][name], rtol=0, atol=tolerance)


def test_all_rows_of_one_pass_equal_golden_rows(features, codebooks, golden):
    z = golden("matching")
    measured = evaluate_rows(features, codebooks, dtype=torch.float64)
    assert list(measured) == list(codebooks)
    for golden_name, name, each in (
        ("ap_all", "mAP@all", 2e-3),
        ("ap_200", "mAP@200", 2e-3),
        ("prec_100", "Prec@100", 0.01),
    ):
        torch.testing.assert_close(measured[None][name], z[f"one_{golden_name}"], rtol=0, atol=1e-10)
        for m, k in list(codebooks)[1:]:
            torch.testing.assert_close(measured[m, k][name], z[f"M{m}K{k}_{golden_name}"], rtol=0, atol=each)


def test_rows_of_several_weights_share_distances_and_equal_their_formula(features, codebooks, golden):
    book = codebooks[2, 5]
    rows = {weight: WeightedCodebook(book, weight) for weight in (0.0, 0.3, 0.8, 1.0)}
    measured = evaluate_rows(features, {None: None} | rows | {"other": codebooks[4, 7]}, dtype=torch.float64)
    query, gallery, means = (torch.from_numpy(each).double() for each in (features.query, features.gallery, book))
    cluster = cluster_distances(query, means, nearest_codes(gallery, means))
    for weight in rows:
        scores = weight * cluster + (1 - weight) * euclidean_distances(query, gallery)
        expected = average_precision(rank(scores, class_relevance(features)))
        torch.testing.assert_close(measured[weight]["mAP@all"], expected, rtol=0, atol=1e-9)
    plain = evaluate_rows(features, {0.8: book, "other": codebooks[4, 7]}, dtype=torch.float64)
    same({key: measured[key] for key in plain}, plain)  # 0.8 by default, to the bit
    assert not torch.equal(measured[0.3]["mAP@all"], measured[1.0]["mAP@all"])


@pytest.mark.filterwarnings("error")
def test_a_codebook_of_an_index_is_read_only(features, codebooks):
    book = codebooks[4, 7].copy()
    book.flags.writeable = False
    same(evaluate_rows(features, {None: book}), evaluate_rows(features, {None: codebooks[4, 7]}), 0)


def test_float32_moves_no_metric_by_a_ten_thousandth(features, codebooks):
    single, double = (evaluate_rows(features, codebooks, dtype=dtype) for dtype in (torch.float32, torch.float64))
    for key in single:
        for name in STANDARD:
            assert abs(single[key][name].mean() - double[key][name].mean()) < 1e-4


def test_queries_in_any_order_and_chunks_of_any_size(features, codebooks, monkeypatch):
    """Each query's values are its own, whatever shares its chunk."""
    whole = evaluate_rows(features, codebooks, dtype=torch.float64, nearest={(2, 5): 7})
    monkeypatch.setattr(evaluation, "CPU_CHUNK", 8 * len(features.gallery) * 11)
    same(evaluate_rows(features, codebooks, dtype=torch.float64, nearest={(2, 5): 7}), whole, 1e-12)
    order = np.random.default_rng(0).permutation(len(features.query))
    shuffled = Features(features.gallery, features.gallery_labels, features.query[order], features.query_labels[order])
    back = {
        key: {name: values[np.argsort(order)] for name, values in row.items()}
        for key, row in evaluate_rows(shuffled, codebooks, dtype=torch.float64, nearest={(2, 5): 7}).items()
    }
    same(back, whole, 1e-12)


def test_the_shown_row_names_its_nearest_photos(features, codebooks):
    measured = evaluate_rows(features, codebooks, dtype=torch.float64, nearest={None: 9})
    assert [key for key, row in measured.items() if "nearest" in row] == [None]
    distances = euclidean_distances(*(torch.from_numpy(part).double() for part in (features.query, features.gallery)))
    assert torch.equal(measured[None]["nearest"], distances.sort(dim=1, stable=True).indices[:, :9])
    ranking = rank(distances, class_relevance(features))
    torch.testing.assert_close(measured[None]["curve"], precision_at_recall(ranking), rtol=0, atol=1e-12)
    torch.testing.assert_close(measured[None]["Prec@200"], precision_at(ranking, 200), rtol=0, atol=1e-12)
    torch.testing.assert_close(measured[None]["mAP@all"], average_precision(ranking), rtol=0, atol=1e-12)


def test_a_chunk_that_does_not_fit_is_halved_with_one_note(features, codebooks, monkeypatch, capsys):
    expected, tried = evaluate_rows(features, codebooks, dtype=torch.float64), []

    def short_of_memory(part, gallery, out=None):
        tried.append(len(part))
        if len(part) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return euclidean_distances(part, gallery, out=out)

    monkeypatch.setattr(evaluation, "euclidean_distances", short_of_memory)
    monkeypatch.setattr(evaluation, "thread_pool", lambda: thread_pool(1))
    same(evaluate_rows(features, codebooks, dtype=torch.float64), expected, 1e-12)
    note = f"note: {tried[0]} sketches at a time do not fit into the device's memory, trying fewer\n"
    assert capsys.readouterr().err == note
    failed = [count for count in tried if count > 20]
    assert failed == sorted(failed, reverse=True) and len(set(failed)) == len(failed)  # no size is tried twice

    def never(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(evaluation, "euclidean_distances", never)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate_rows(features, codebooks)


def test_small_classes_small_galleries_and_equal_features():
    """A class of one photo, a gallery shorter than every cut, and all features equal, where gallery order decides."""
    gallery = np.full((6, 4), 0.5, np.float32)
    features = Features(gallery, np.array([0, 1, 0, 0, 0, 2]), gallery[:3], np.array([1, 0, 2]))
    codebooks = {None: None, (2, 2): gallery[:2].reshape(2, 2, 2)}
    for row in evaluate_rows(features, codebooks).values():
        assert row["mAP@all"].tolist() == pytest.approx([1 / 2, (1 + 4 / 5 + 4 / 5 + 4 / 5) / 4, 1 / 6])
        assert row["mAP@200"].tolist() == row["mAP@all"].tolist()
        assert row["Prec@100"].tolist() == pytest.approx([1 / 6, 4 / 6, 1 / 6])


def test_memory_is_freed_before_a_chunk_is_halved():
    done = []

    def measure(chosen):
        done.append(len(chosen))
        if len(chosen) > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return len(chosen)

    assert evaluation._halving(measure, lambda: done.append("free"))(torch.arange(6)) == 6
    assert done == [6, "free", 3, "free", 2, 1, 2, 1]
    with pytest.raises(RuntimeError, match="illegal memory access"):  # which is no lack of memory
        evaluation._halving(_illegal, done.clear)(torch.arange(6))


def _illegal(_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_relevance_is_an_argument(features, codebooks, monkeypatch):
    """Of each query only the first photo of its class is relevant here."""
    monkeypatch.setattr(evaluation, "CPU_CHUNK", 8 * len(features.gallery) * 11)
    first = [np.flatnonzero(features.gallery_labels == label)[:1] for label in features.query_labels]
    relevance = ListedPhotos(first, len(features.gallery))
    rows = {None: None, (2, 5): codebooks[2, 5]}
    measured = evaluate_rows(features, rows, ("mAP@all", "Recall@9"), relevance, {None: 9}, dtype=torch.float64)
    distances = euclidean_distances(*(torch.from_numpy(part).double() for part in (features.query, features.gallery)))
    ranks = (distances <= distances.gather(1, torch.from_numpy(np.stack(first)))).sum(dim=1)
    torch.testing.assert_close(measured[None]["mAP@all"], 1 / ranks.double(), rtol=0, atol=1e-12)
    assert torch.equal(measured[None]["Recall@9"], (ranks <= 9).double())
    assert torch.equal(measured[None]["nearest_relevant"].any(dim=1), ranks <= 9)
    assert not torch.equal(measured[2, 5]["mAP@all"], measured[None]["mAP@all"])
    result = evaluate_grid(features, Grid(rows=[(2, 5)], nearest=9), ("Recall@9",), relevance)
    assert result.averages[None][None].metrics["Recall@9"].mean() == (ranks <= 9).double().mean()
    assert result.shown == (2, 5, 0.8) and result.nearest_relevant.shape == (len(features.query), 9)
