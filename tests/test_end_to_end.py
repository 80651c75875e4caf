"""The seven scripts as a user runs them, on a small miniature benchmark and on files from elsewhere."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import test_quickdraw_ext_zeroshot
import test_sketchy_ext_split_zeroshot
import test_sketchy_ext_zeroshot
import test_tuberlin_ext_zeroshot
import train_quickdraw_ext
import train_sketchy_ext
import train_tuberlin_ext
from datasets.prepare.miniature import UNSEEN_CATEGORIES
from models.eval.features import PartialFeatures
from models.eval.metrics import SameClass, average_precision, class_means, precision_at, rank
from models.networks import Student, create_backbone
from models.weights import published_state

MODEL = "--model test_convnext --input_size 32 --workers 0 --device cpu".split()
TRAIN = [*MODEL, *"--finetune none --epochs 2 --warmup_epochs 0 --batch_size 30 --max_steps 2 --no_validation".split()]
GRID = "--clusters 3 8 --subspaces 2".split()


@pytest.fixture(scope="module")
def trained(miniature, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train_sketchy_ext.main([*TRAIN, "--data_root", str(miniature), "-s", str(folder)])
    return folder


def features_of_three_classes(path, width=768, photos=60):
    """Features in the authors' form: noisy copies of three directions."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, width))
    labels = np.arange(photos) % 3, np.arange(12) % 3
    parts = [centres[which] + 6 * rng.normal(size=(len(which), width)) for which in labels]
    gallery, query = ((part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32) for part in parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps([gallery, labels[0], query, labels[1], None]))
    return gallery, labels[0], query, labels[1]


@pytest.mark.draws
def test_train_then_retrieve(trained, miniature, capsys):
    results = test_sketchy_ext_zeroshot.main(
        [*MODEL, *GRID, "--data_root", str(miniature), "--resume_dir", str(trained)]
    )
    assert json.loads((trained / "results.json").read_text()) == results
    order = "benchmark protocol metrics queries gallery classes options versions rows features"
    assert list(results) == order.split()
    assert (results["queries"], results["gallery"], results["classes"]) == (32, 48, 8)
    assert [(row["matching"], row.get("M"), row.get("K")) for row in results["rows"]] == [
        ("one-to-one", None, None),
        ("one-to-many", 2, 3),
        ("one-to-many", 2, 8),
    ]
    for row in results["rows"]:
        assert sorted(row["per_class"]) == sorted(UNSEEN_CATEGORIES)
        for metric in ("mAP@all", "mAP@200", "Prec@100", "Prec@200"):
            assert row[metric] == pytest.approx(np.mean([one[metric] for one in row["per_class"].values()]))
        assert len(row["precision_at_recall"]) == 11
    assert (trained / "retrievals.png").stat().st_size > 10_000
    assert (trained / "precision_recall.png").stat().st_size > 5_000
    assert not list(trained.glob(".*"))  # nothing unfinished is left
    assert "  8*" in capsys.readouterr().out
    # The features it wrote are up to date for the same test and stale for another one.
    again = test_sketchy_ext_zeroshot.main([*MODEL, *GRID, "--data_root", str(miniature), "--resume_dir", str(trained)])
    assert again["rows"] == results["rows"]
    assert "computing them anew" not in capsys.readouterr().err
    larger = [*MODEL, "--input_size", "48", "--mode", "1", "--data_root", str(miniature), "--resume_dir", str(trained)]
    assert len(test_sketchy_ext_zeroshot.main(larger)["rows"]) == 1
    output = capsys.readouterr().err
    assert "computed with another input_size, computing them anew" in output
    assert "was trained with --input_size 32, not 48" in output


@pytest.mark.parametrize(
    ("script", "map_at", "prec_at"),
    [
        (test_sketchy_ext_zeroshot, None, 100),
        (test_sketchy_ext_split_zeroshot, 200, 200),
        (test_tuberlin_ext_zeroshot, None, 100),
        (test_quickdraw_ext_zeroshot, None, 200),
    ],
)
def test_features_alone_are_enough(tmp_path, monkeypatch, script, map_at, prec_at):
    monkeypatch.chdir(tmp_path)
    gallery, gallery_labels, query, query_labels = features_of_three_classes(
        tmp_path / "features_zero.pickle", photos=330
    )
    results = script.main(["--resume_dir", str(tmp_path), "--mode", "1", "--device", "cpu", "--distances", "float64"])
    distances = np.linalg.norm(query[:, None].astype(float) - gallery[None], axis=2)
    ranking = rank(torch.from_numpy(distances), SameClass(*map(torch.from_numpy, (query_labels, gallery_labels))))
    assert results["metrics"] == [f"mAP@{map_at or 'all'}", f"Prec@{prec_at}"]
    labels = torch.from_numpy(query_labels)
    expected = [class_means(values, labels)[1].mean().item() for values in
                (average_precision(ranking, map_at), precision_at(ranking, prec_at))]  # fmt: skip
    assert [results["rows"][0][name] for name in results["metrics"]] == pytest.approx(expected, abs=1e-12)
    assert expected[0] < 0.99


def test_any_test_takes_any_metrics(tmp_path, capsys):
    gallery, gallery_labels, query, query_labels = features_of_three_classes(tmp_path / "features_zero.pickle")
    arguments = ["--resume_dir", str(tmp_path), "--mode", "1", "--device", "cpu", "--distances", "float64"]
    results = test_quickdraw_ext_zeroshot.main([*arguments, "--metrics", "Recall@5", "mAP@all", "plain mAP@9"])
    assert results["metrics"] == results["options"]["metrics"] == ["Recall@5", "mAP@all", "plain mAP@9"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["matching", "M", "K", "Recall@5", "mAP@all", "plain", "mAP@9"]
    distances = np.linalg.norm(query[:, None].astype(float) - gallery[None], axis=2)
    relevant = gallery_labels[distances.argsort(axis=1)[:, :5]] == query_labels[:, None]
    recall = relevant.sum(axis=1) / 20  # 60 photos of 3 classes
    row = results["rows"][0]
    assert row["Recall@5"] == pytest.approx(recall.mean(), abs=1e-12) and 0 < row["Recall@5"] < 0.25
    assert row["per_class"]["0"]["Recall@5"] == pytest.approx(recall[query_labels == 0].mean(), abs=1e-12)
    with np.load(tmp_path / "per_query.npz", allow_pickle=False) as kept:
        np.testing.assert_allclose(kept["values"][0, list(kept["metrics"]).index("Recall@5")], recall, atol=1e-12)
    default = test_quickdraw_ext_zeroshot.main(arguments)
    assert default["metrics"] == ["mAP@all", "Prec@200"] and default["rows"][0]["mAP@all"] == row["mAP@all"]


def test_a_terminated_test_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    features_of_three_classes(tmp_path / "features_zero.pickle", width=16)
    monkeypatch.setattr("models.testing.evaluate_grid", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        test_tuberlin_ext_zeroshot.main(["--resume_dir", str(tmp_path), "--mode", "1", "--device", "cpu"])
    assert end.value.code == 143 and capsys.readouterr().err.splitlines()[-1] == "terminated"
    assert [path.name for path in tmp_path.iterdir()] == ["features_zero.pickle"]


def test_each_weight_adds_rows_and_per_query_values_are_written(tmp_path, capsys):
    _, _, _, labels = features_of_three_classes(tmp_path / "features_zero.pickle", width=16, photos=200)
    arguments = ["--resume_dir", str(tmp_path), "--clusters", "3", "6", "--subspaces", "2", "--device", "cpu"]
    more = ["--cluster_weight", "0.5", "0.8", "--mixture_seeds", "1", "2", "--definitions"]
    results = test_tuberlin_ext_zeroshot.main([*arguments, *more])
    printed = capsys.readouterr().out
    rows = [(row.get("M"), row.get("K"), row.get("cluster_weight")) for row in results["rows"]]
    assert rows == [(None, None, None), *((2, k, weight) for k in (3, 6) for weight in (0.5, 0.8))]
    assert "weight" in printed.splitlines()[1] and "ZSE-SBIR" in printed and "SEM-PCYC" in printed
    with np.load(tmp_path / "per_query.npz", allow_pickle=False) as kept:
        assert kept["rows"].tolist() == [[0, 0, 0], *([2, k, weight] for k in (3, 6) for weight in (0.5, 0.8))]
        assert kept["class"].tolist() == [str(label) for label in labels]
        for row, values in zip(results["rows"], kept["values"], strict=True):
            for metric, value in zip(kept["metrics"], values, strict=True):
                means = [value[labels == label].mean() for label in np.unique(labels)]
                assert np.mean(means) == pytest.approx(row[str(metric)], abs=1e-12)
            assert row["definitions"]["SBKA, SAKE"]["mAP@200"] == pytest.approx(row["mAP@200"], abs=1e-12)
            assert row["definitions"]["ZSE-SBIR"]["mAP@all"] == pytest.approx(values[0].mean(), abs=1e-12)
    default = test_tuberlin_ext_zeroshot.main([*arguments, "--mixture_seeds", "1", "2"])["rows"]
    assert [row["mAP@all"] for row in default] == [
        row["mAP@all"] for row in results["rows"] if row.get("cluster_weight") != 0.5
    ]


@pytest.mark.draws
def test_tsne_is_drawn(tmp_path):
    features_of_three_classes(tmp_path / "features_zero.pickle", width=16, photos=200)
    test_tuberlin_ext_zeroshot.main(["--resume_dir", str(tmp_path), "--mode", "1", "--device", "cpu", "--tsne"])
    assert (tmp_path / "tsne.png").stat().st_size > 10_000


def test_mixtures_of_several_seeds_are_averaged(tmp_path, capsys):
    features_of_three_classes(tmp_path / "features_zero.pickle", width=16, photos=200)
    arguments = ["--resume_dir", str(tmp_path), "--clusters", "3", "6", "--subspaces", "2", "--device", "cpu"]
    single = {
        seed: test_tuberlin_ext_zeroshot.main([*arguments, "--mixture_seeds", str(seed)])["rows"] for seed in (1, 2, 3)
    }
    assert "seeds" not in single[1][1]
    results = test_tuberlin_ext_zeroshot.main([*arguments, "--mixture_seeds", "1", "2", "3", "--per_class"])
    assert results["rows"][0] == single[1][0]  # one-to-one has no mixture
    for index, row in enumerate(results["rows"][1:], 1):
        values = [single[seed][index]["mAP@all"] for seed in (1, 2, 3)]
        assert [row["seeds"][seed]["mAP@all"] for seed in "123"] == values
        assert row["mAP@all"] == pytest.approx(np.mean(values))
        assert row["spread"]["mAP@all"] == {
            "deviation": pytest.approx(np.std(values, ddof=1)),
            "range": [min(values), max(values)],
        }
    assert len(set(values)) > 1
    output = capsys.readouterr().out
    assert "mAP@all over seeds" in output and "class  one-to-one mAP@all" in output
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == results["rows"]


def test_both_mixtures_and_distances_agree(tmp_path):
    features_of_three_classes(tmp_path / "features_zero.pickle", width=32, photos=300)
    arguments = ["--resume_dir", str(tmp_path), "--clusters", "3", "--subspaces", "2", "4", "--device", "cpu"]
    rows = test_tuberlin_ext_zeroshot.main(arguments)["rows"]
    for more in (["--mixture", "sklearn"], ["--distances", "float64"]):
        for one, two in zip(rows, test_tuberlin_ext_zeroshot.main([*arguments, *more])["rows"], strict=True):
            assert one["mAP@all"] == pytest.approx(two["mAP@all"], abs=1e-4)


def test_a_collapsed_mixture_leaves_the_other_rows(tmp_path, capsys, monkeypatch):
    features_of_three_classes(tmp_path / "features_zero.pickle", 8)
    monkeypatch.setattr("models.eval.gmm.REGULARISATION", 0.0)  # 40 components of 60 photos have no covariance
    arguments = ["--resume_dir", str(tmp_path), "--subspaces", "2", "--device", "cpu", "--clusters"]
    results = test_tuberlin_ext_zeroshot.main([*arguments, "2", "40"])
    captured = capsys.readouterr()
    assert "note: M 2, K 40, seed 123: sub-space 0: component" in captured.err
    assert "the row is left out, others are not affected" in captured.err
    assert "left out, a mixture collapsed" in captured.out
    one_to_one, fine, failed = results["rows"]
    assert fine["mAP@all"] > 0 and one_to_one["mAP@all"] > 0
    assert (
        list(failed) == ["matching", "M", "K", "cluster_weight", "failed"] and "sub-space 0" in failed["failed"]["123"]
    )
    everything = test_tuberlin_ext_zeroshot.main([*arguments, "40"])["rows"]
    assert everything[0]["mAP@all"] == one_to_one["mAP@all"] and "failed" in everything[1]


def test_labels_that_do_not_start_at_0_are_renumbered_with_a_note(tmp_path, miniature, capsys):
    gallery, gallery_labels, query, query_labels = features_of_three_classes(tmp_path / "features_zero.pickle")
    none = ["--mode", "1", "--device", "cpu", "--resume_dir", str(tmp_path), "--data_root", str(tmp_path / "none")]
    expected = test_sketchy_ext_zeroshot.main(none)["rows"][0]
    content = [gallery, 100 + 7 * gallery_labels, query, 100 + 7 * query_labels, None]
    (tmp_path / "features_zero.pickle").write_bytes(pickle.dumps(content))
    row = test_sketchy_ext_zeroshot.main(none)["rows"][0]
    assert "labels, 100 to 114, are not 0 to 2: taken as classes in ascending order" in capsys.readouterr().err
    assert row["mAP@all"] == expected["mAP@all"] and list(row["per_class"]) == ["100", "107", "114"]
    # With as many classes as the benchmark has unseen ones, they are those.
    labels = np.arange(60) % 8
    content = [gallery, 50 + labels, gallery[:16], 50 + labels[:16], None]
    (tmp_path / "features_zero.pickle").write_bytes(pickle.dumps(content))
    row = test_sketchy_ext_zeroshot.main([*none, "--data_root", str(miniature)])["rows"][0]
    assert "taken as the unseen classes in ascending order" in capsys.readouterr().err
    assert sorted(row["per_class"]) == sorted(UNSEEN_CATEGORIES)


def test_photos_with_equal_features_give_a_note(tmp_path, capsys):
    gallery, gallery_labels, query, query_labels = features_of_three_classes(tmp_path / "features_zero.pickle")
    gallery[:] = gallery[0]
    (tmp_path / "features_zero.pickle").write_bytes(pickle.dumps([gallery, gallery_labels, query, query_labels]))
    arguments = ["--resume_dir", str(tmp_path), "--clusters", "3", "--subspaces", "2", "--device", "cpu"]
    rows = test_tuberlin_ext_zeroshot.main(arguments)["rows"]
    assert "all photos have the same features, so every ranking is the gallery's order" in capsys.readouterr().err
    assert rows[0]["mAP@all"] == rows[1]["mAP@all"]


def test_a_killed_extraction_is_resumed(trained, miniature, tmp_path, monkeypatch, capsys):
    shutil.copy(trained / "checkpoint.pth.tar", tmp_path)
    arguments = [
        *MODEL,
        "--mode",
        "1",
        "--batch_size",
        "5",
        "--data_root",
        str(miniature),
        "--resume_dir",
        str(tmp_path),
    ]
    expected = test_sketchy_ext_zeroshot.main(arguments)["rows"]
    (tmp_path / "features_zero.pickle").unlink()
    add, batches = PartialFeatures.add, []

    def killed(part, rows):
        add(part, rows)
        batches.append(len(rows))
        if len(batches) == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(PartialFeatures, "add", killed)
    with pytest.raises(SystemExit):
        test_sketchy_ext_zeroshot.main(arguments)
    assert not (tmp_path / "features_zero.pickle").exists()
    batches.clear()
    assert test_sketchy_ext_zeroshot.main(arguments)["rows"] == expected
    output = capsys.readouterr().err
    assert "features: resuming, 45 of 48 photos are already extracted" in output  # whole batches of 5
    assert "features: resuming, 15 of 32 sketches are already extracted" in output
    assert sum(batches) == 80 - 45 - 15


def test_features_older_than_the_checkpoint_are_named_and_recomputed(trained, miniature, tmp_path, capsys, fails):
    shutil.copy(trained / "checkpoint.pth.tar", tmp_path / "model_best.pth.tar")
    features_of_three_classes(tmp_path / "features_zero.pickle")
    os.utime(tmp_path / "features_zero.pickle", (1000, 1000))
    downloaded = (tmp_path / "features_zero.pickle").read_bytes()
    arguments = [*MODEL, "--mode", "1", "--data_root", str(tmp_path / "no"), "--resume_dir", str(tmp_path)]
    assert "no such data folder; " in (message := fails(test_sketchy_ext_zeroshot.main, *arguments))
    assert "move model_best.pth.tar away to test features_zero.pickle as it is" in message
    arguments = [*MODEL, "--mode", "1", "--data_root", str(miniature), "--resume_dir", str(tmp_path)]
    assert test_sketchy_ext_zeroshot.main(arguments)["gallery"] == 48
    output = capsys.readouterr().err
    assert "features_zero.pickle is older than model_best.pth.tar beside it, computing them anew" in output
    assert "the former features_zero.pickle is now features_zero.pickle.old" in output
    assert (tmp_path / "features_zero.pickle.old").read_bytes() == downloaded


def test_downloaded_weights_and_checkpoints_swap_in(miniature, tmp_path):
    torch.manual_seed(0)
    backbone = create_backbone("convnextv2_atto")
    torch.save({"model": published_state(backbone)}, tmp_path / "convnextv2_atto_1k_224_ema.pt")
    atto = ["--model", "convnextv2_atto"]  # whose published names are not timm's
    arguments = [*TRAIN, *atto, "--finetune", str(tmp_path / "convnextv2_atto_1k_224_ema.pt"), "--lr", "0"]
    arguments += ["--epochs", "1"]
    train_sketchy_ext.main([*arguments, "--data_root", str(miniature), "-s", str(tmp_path / "ours")])
    student = Student(backbone, 29)
    authors = {f"module.{name}": value for name, value in published_state(student).items()}
    (tmp_path / "theirs").mkdir()
    torch.save(
        {"epoch": 20, "state_dict": authors, "best_acc1": torch.tensor(90.0)}, tmp_path / "theirs/model_best.pth.tar"
    )
    rows = [
        test_sketchy_ext_zeroshot.main(
            [*MODEL, *atto, "--mode", "1", "--data_root", str(miniature), "--resume_dir", str(tmp_path / folder)]
        )["rows"]
        for folder in ("ours", "theirs")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("train", "test", "sketch", "photo"),
    [
        (
            train_tuberlin_ext,
            test_tuberlin_ext_zeroshot,
            "png_ready_filelist_{}.txt",
            "ImageResized_ready_filelist_{}.txt",
        ),
        (train_quickdraw_ext, test_quickdraw_ext_zeroshot, "sketch_{}.txt", "all_photo_{}.txt"),
    ],
)
def test_the_other_data_sets_train_and_test(miniature, tmp_path, train, test, sketch, photo):
    (tmp_path / "256x256").symlink_to(miniature / "256x256")
    (tmp_path / "zeroshot").mkdir()
    for path in (miniature / "zeroshot1").iterdir():
        split = path.stem.rpartition("_")[2]
        kind = {"sketch": sketch, "all": photo}.get(path.name.split("_")[0], path.name)
        (tmp_path / "zeroshot" / kind.format(split)).write_bytes(path.read_bytes())
    train.main([*TRAIN, "--data_root", str(tmp_path), "-s", str(tmp_path / "out")])
    results = test.main([*MODEL, *GRID, "--data_root", str(tmp_path), "--resume_dir", str(tmp_path / "out")])
    assert [row.get("K") for row in results["rows"]] == [None, 3, 8]


def test_bad_input_to_a_test_ends_in_one_line(trained, miniature, tiny, tmp_path, fails):
    def error(*more, folder=trained):
        arguments = [*MODEL, "--data_root", miniature, "--resume_dir", folder, "--recompute", *more]
        return fails(test_sketchy_ext_zeroshot.main, *arguments)

    assert "neither model_best.pth.tar nor features_zero.pickle" in error(folder=tmp_path / "empty")
    assert "was trained with test_convnext; leave --model out" in error("--model", "convnextv2_femto")
    assert "was trained with 1000; leave --imagenet_classes out" in error("--imagenet_classes", 12)
    assert "--metrics: there is no metric 'mAP@ten'; there are mAP@all" in error("--metrics", "Recall@5", "mAP@ten")
    assert "trained on 29 seen classes, but cname_cid.txt lists 2" in error("--data_root", tiny)
    assert "no such data folder" in error("--data_root", tmp_path / "nowhere")
    assert "--clusters 50: the gallery has only 48 photos" in error("--clusters", 50)
    assert "--subspaces 7" in error("--subspaces", 7)
    assert "--mode" in error("--mode", 3)
    sick = torch.load(trained / "checkpoint.pth.tar")
    sick["state_dict"]["module.head.norm.weight"][:] = float("nan")
    torch.save(sick, tmp_path / "sick")
    assert f"{tmp_path / 'sick'}: its head.norm.weight is not finite" in error(folder=tmp_path / "sick")
    torn = tmp_path / "torn"
    torn.write_bytes((trained / "checkpoint.pth.tar").read_bytes()[:10_000])
    assert f"{torn}: " in error(folder=torn)


@pytest.mark.draws
def test_a_missing_extra_gives_a_note(miniature, tmp_path, monkeypatch, capsys):
    for module in ("torch.utils.tensorboard", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    train_sketchy_ext.main([*TRAIN, "--data_root", str(miniature), "-s", str(tmp_path)])
    assert "note: tensorboard is not installed, no training curves are written\n" in capsys.readouterr().err
    test_sketchy_ext_zeroshot.main(
        [*MODEL, "--mode", "1", "--data_root", str(miniature), "--resume_dir", str(tmp_path)]
    )
    assert "note: no precision_recall.png, matplotlib is not installed\n" in capsys.readouterr().err
    assert not (tmp_path / "retrievals.png").exists() and not (tmp_path / "curves").exists()


def test_features_without_a_checkpoint_or_with_one_photo(tmp_path, fails):
    gallery, gallery_labels, query, _ = features_of_three_classes(tmp_path / "features_zero.pickle")
    assert "holds no checkpoint" in fails(test_tuberlin_ext_zeroshot.main, "--resume_dir", tmp_path, "--recompute")
    one = [gallery[:1], gallery_labels[:1], query[:1], gallery_labels[:1], None]
    (tmp_path / "features_zero.pickle").write_bytes(pickle.dumps(one))
    assert "use --mode 1" in fails(test_tuberlin_ext_zeroshot.main, "--resume_dir", tmp_path, "--clusters", 1)


def test_a_query_class_without_photos_is_named(tmp_path, fails):
    gallery, _, query, query_labels = features_of_three_classes(tmp_path / "f")
    content = [gallery, np.arange(60) % 2, query, query_labels, None]
    (tmp_path / "features_zero.pickle").write_bytes(pickle.dumps(content))
    message = fails(test_tuberlin_ext_zeroshot.main, "--resume_dir", tmp_path, "--data_root", tmp_path / "none")
    assert "1 query classes have no photo in the gallery, first '2'" in message
    assert not (tmp_path / "results.json").exists()


def test_a_results_folder_that_cannot_be_written_is_named_first(tmp_path, fails, monkeypatch):
    features_of_three_classes(tmp_path / "features_zero.pickle")
    monkeypatch.setattr("utils.files.tempfile.TemporaryFile", _denied)
    assert "cannot be written (Permission denied)" in fails(test_tuberlin_ext_zeroshot.main, "--resume_dir", tmp_path)


def _denied(**_):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("script", [
    "train_sketchy_ext", "train_tuberlin_ext", "train_quickdraw_ext", "test_sketchy_ext_zeroshot",
    "test_sketchy_ext_split_zeroshot", "test_tuberlin_ext_zeroshot", "test_quickdraw_ext_zeroshot",
])  # fmt: skip
def test_help_has_every_option_and_default(script, capsys):
    with pytest.raises(SystemExit) as end:
        sys.modules[script].main(["--help"])
    help_text = capsys.readouterr().out
    assert end.value.code == 0
    seeds = "--seed" if script.startswith("train") else "--mixture_seeds"
    for option in ("--data_root", "--zero_version", "--model", "--device", "--workers", seeds):
        assert f"\n  {option}" in help_text
    assert "(default: None)" not in help_text


def test_an_error_on_a_real_command_line_has_no_traceback(tmp_path):
    command = [sys.executable, "test_sketchy_ext_zeroshot.py", "--resume_dir", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
