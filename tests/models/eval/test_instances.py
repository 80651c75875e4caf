"""Instance-level retrieval equals a plain loop, and its pairs come from file names."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import test_sketchy_ext_zeroshot
import test_tuberlin_ext_zeroshot
from datasets.lists import FileList, QueryGallery, write_list
from datasets.protocols import PROTOCOLS
from models.eval import instances
from models.eval.features import Features, write_features
from models.eval.instances import evaluate_instances, find_photos


def images_of(photos, sketches, photo_labels, sketch_labels):
    pairs = ((photos, photo_labels), (sketches, sketch_labels))
    return QueryGallery(*(FileList(Path("list"), Path(), paths, np.array(labels), []) for paths, labels in pairs))


def test_pairs_are_those_of_sketchys_names():
    photos = ["a/n1_5.jpg", "ext/n1_5.jpg", "a/n1_6.jpg", "b/n1_5.jpg"]
    sketches = ["a/n1_5-1.png", "a/n1_5-12.png", "a/n1_6-2.png", "b/n1_6-1.png", "a/n1_6.png"]
    images = images_of(photos, sketches, [0, 0, 0, 1], [0, 0, 0, 1, 0])
    assert find_photos(PROTOCOLS["sketchy"].pair_pattern, images) == [[0, 1], [0, 1], [2], [], []]


def test_ranks_equal_a_plain_loop(monkeypatch):
    monkeypatch.setattr(instances, "CPU_CHUNK", 8 * 90 * 7)  # 7 sketches at a time
    rng = np.random.default_rng(0)
    gallery, query = (rng.normal(size=(count, 6)).astype(np.float32) for count in (90, 40))
    gallery[50] = gallery[20]  # a tie, which gallery order breaks
    features = Features(gallery, np.arange(90) % 4, query, np.arange(40) % 4)
    photos = [[int(photo) for photo in rng.permutation(90) if photo % 4 == n % 4][: n % 3] for n in range(40)]
    photos[2] = [50]
    all_ranks, class_ranks = [], []
    for number, right in enumerate(photos):
        order = sorted(range(90), key=lambda n: (np.sum((gallery[n].astype(float) - query[number]) ** 2), n))
        if right:
            all_ranks.append(1 + min(order.index(photo) for photo in right))
            order = [photo for photo in order if photo % 4 == number % 4]
            class_ranks.append(1 + min(order.index(photo) for photo in right))
    results = evaluate_instances(features, photos, dtype=torch.float64)
    assert results["sketches"] == len(all_ranks) == 40 - results["sketches without their photo"] < 40
    for scope, ranks in (("all photos", all_ranks), ("within the class", class_ranks)):
        expected = {f"acc@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
        expected |= {"mean reciprocal rank": sum(1 / rank for rank in ranks) / len(ranks)}
        expected |= {"median rank": np.median(ranks)}
        assert results[scope] == pytest.approx(expected, abs=1e-12)
    assert 0 < results["all photos"]["acc@5"] < results["within the class"]["acc@5"] < 1


def test_instances_of_a_benchmark(tiny, tmp_path, capsys, fails):
    gallery = np.eye(4, dtype=np.float32)
    write_features(
        tmp_path / "features_zero.pickle", Features(gallery, np.arange(4) // 2, gallery[::-1], np.arange(4) // 2), {}
    )
    lists = tiny / "zeroshot1"
    command = ["--data_root", tiny, "-s", tmp_path, "--mode", "1", "--device", "cpu", "--instances"]
    assert "--instances: the file names of these features are not known" in fails(
        test_sketchy_ext_zeroshot.main, *command
    )
    command += ["--order", lists]
    assert "is named after its photo" in fails(test_sketchy_ext_zeroshot.main, *command)
    assert "were not drawn from photos" in fails(test_tuberlin_ext_zeroshot.main, *command)
    write_list(lists / "all_photo_filelist_zero.txt", [(f"p/n{number}.jpg", number // 2) for number in range(4)])
    sketches = [(f"s/n{number}-1.png", number // 2) for number in range(3)] + [("s/n9-1.png", 1)]
    write_list(lists / "sketch_tx_000000000000_ready_filelist_zero.txt", sketches)
    test_sketchy_ext_zeroshot.main([str(each) for each in command])
    results = json.loads((tmp_path / "instances.json").read_text())
    assert results["sketches"] == 3 and results["sketches without their photo"] == 1
    assert results["benchmark"] and results["options"]["instances"] is True
    # Sketch n has the features of photo 3 - n; the others are equally far, and rank by gallery order.
    assert results["all photos"]["mean reciprocal rank"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 3) / 3, abs=1e-12)
    assert "1 sketches, whose photo is not in the gallery, are left out" in capsys.readouterr().out
