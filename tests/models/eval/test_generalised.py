"""Generalised zero-shot retrieval equals a plain loop, from stored features and from a checkpoint."""

import json

import numpy as np
import pytest

import test_sketchy_ext_zeroshot
import test_tuberlin_ext_zeroshot
import train_sketchy_ext
from datasets.prepare.commands import main as prepare
from models.eval import evaluate
from models.eval.features import Features, write_features


def unit(rng, count):
    values = rng.normal(size=(count, 8)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def features_of(seed, classes, photos=60, sketches=20):
    rng = np.random.default_rng(seed)
    return Features(unit(rng, photos), np.arange(photos) % classes, unit(rng, sketches), np.arange(sketches) % classes)


def plain_map(features, others, offset):
    """Interpolated mAP@all, averaged over classes, of the queries of `features` in a gallery of both."""
    gallery = np.concatenate([features.gallery, others.gallery]).astype(float)
    labels = np.concatenate([features.gallery_labels, others.gallery_labels + offset])
    of_class = {}
    for query, label in zip(features.query, features.query_labels, strict=True):
        relevant = labels[np.argsort(((gallery - query) ** 2).sum(axis=1), kind="stable")] == label
        precision = relevant.cumsum() / np.arange(1, len(labels) + 1)
        value = np.mean([precision[rank:].max() for rank in np.flatnonzero(relevant)])
        of_class.setdefault(label, []).append(value)
    return np.mean([np.mean(values) for values in of_class.values()])


def test_stored_features_equal_a_plain_loop(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setattr(evaluate, "CPU_CHUNK", 8 * 110 * 7)  # 7 sketches at a time
    unseen, seen = features_of(0, 3), features_of(1, 4, photos=50, sketches=13)
    command = [test_tuberlin_ext_zeroshot.main, "-s", tmp_path, "--data_root", tmp_path, "--device", "cpu"]
    command += ["--clusters", "3", "--subspaces", "2", "--distances", "float64"]
    write_features(tmp_path / "features_zero.pickle", unseen, {})
    plain = command[0]([str(each) for each in command[1:]])
    assert "--generalised: " in fails(*command, "--generalised")
    write_features(tmp_path / "features_seen.pickle", seen, {})
    results = command[0]([str(each) for each in [*command[1:], "--generalised"]])
    assert results["rows"] == plain["rows"]
    content = json.loads((tmp_path / "generalised.json").read_text())
    assert content["gallery"] == {"unseen": 60, "seen": 50} and content["queries"] == {"unseen": 20, "seen": 13}
    assert content["classes"] == {"unseen": 3, "seen": 4}
    assert [(row.get("M"), row.get("K")) for row in content["rows"]] == [(None, None), (2, 7)]
    row, expected = content["rows"][0], [plain_map(unseen, seen, 10), plain_map(seen, unseen, 10)]
    assert [row["unseen"]["mAP@all"], row["seen"]["mAP@all"]] == pytest.approx(expected, abs=1e-12)
    harmonic = 2 * expected[0] * expected[1] / sum(expected)
    assert row["harmonic_mean"]["mAP@all"] == pytest.approx(harmonic, abs=1e-12)
    assert row["definitions"]["seen"]["SBKA, SAKE"]["mAP@all"] == pytest.approx(expected[1], abs=1e-12)
    assert content["rows"][1]["seen"]["mAP@all"] != row["seen"]["mAP@all"]
    assert "generalised: 20 + 13 sketches, 60 + 50 photos, 3 unseen + 4 seen classes" in capsys.readouterr().out
    narrow = Features(seen.gallery[:, :4], seen.gallery_labels, seen.query[:, :4], seen.query_labels)
    write_features(tmp_path / "features_seen.pickle", narrow, {})
    assert "features have 4 values, those of unseen classes 8" in fails(*command, "--generalised")


def test_features_of_seen_classes_are_computed_from_held_back_images(miniature, tmp_path, fails):
    small = [*"--model convnextv2_atto --input_size 32 --workers 0 --device cpu --data_root".split(), str(miniature)]
    train = "--finetune none --epochs 1 --batch_size 30 --max_steps 1 --no_validation --overwrite".split()
    train_sketchy_ext.main([*small, *train, "-s", str(tmp_path)])
    test = [*small, "-s", str(tmp_path), "--mode", "1", "--generalised"]
    line = fails(test_sketchy_ext_zeroshot.main, *test)
    assert "--generalised: no held-back photos of seen classes" in line and "--hold_out_photos 0.1 makes lists" in line
    held_back = tmp_path / "data" / "held_back"
    prepare(["lists", str(miniature), "--protocol", "sketchy", "--hold_out_photos", "2", "--out", str(held_back)])
    other = ["--data_root", str(held_back.parent), "--zero_version", held_back.name]
    test_sketchy_ext_zeroshot.main([*test, *other])
    content = json.loads((tmp_path / "generalised.json").read_text())
    seen = content["classes"]["seen"]
    assert content["gallery"] == {"unseen": 48, "seen": 2 * seen} and content["queries"] == {"unseen": 32, "seen": seen}
    record = json.loads((tmp_path / "features_seen.json").read_text())["source"]
    assert record["photo list"] != json.loads((tmp_path / "features_zero.json").read_text())["source"]["photo list"]
