"""The seven scripts as a user runs them, on a small miniature benchmark and on files swapped in."""

import json
import os
import pickle
import shutil
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
from datasets.miniature import UNSEEN
from models import testing
from models.eval.metrics import average_precision, class_means, precision_at, rank
from models.networks import Student, create_backbone
from models.weights import published_state

MODEL = "--model convnextv2_atto --input_size 32 --workers 0 --device cpu".split()
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


def test_train_then_retrieve(trained, miniature, capsys):
    results = test_sketchy_ext_zeroshot.main(
        [*MODEL, *GRID, "--data_root", str(miniature), "--resume_dir", str(trained)]
    )
    assert json.loads((trained / "results.json").read_text()) == results
    assert list(results) == ["protocol", "queries", "gallery", "classes", "options", "versions", "rows", "features"]
    assert (results["queries"], results["gallery"], results["classes"]) == (32, 48, 8)
    assert [(row["matching"], row.get("M"), row.get("K")) for row in results["rows"]] == [
        ("one-to-one", None, None),
        ("one-to-many", 2, 3),
        ("one-to-many", 2, 8),
    ]
    for row in results["rows"]:
        assert sorted(row["per_class"]) == sorted(UNSEEN)
        assert row["mAP"] == pytest.approx(np.mean([one["mAP"] for one in row["per_class"].values()]))
    assert (trained / "retrievals.png").stat().st_size > 10_000
    assert "  8*" in capsys.readouterr().out
    # The features it wrote are up to date for the same test and stale for another one.
    again = test_sketchy_ext_zeroshot.main([*MODEL, *GRID, "--data_root", str(miniature), "--resume_dir", str(trained)])
    assert again["rows"] == results["rows"]
    assert "computing them anew" not in capsys.readouterr().err
    larger = [*MODEL, "--input_size", "48", "--mode", "1", "--data_root", str(miniature), "--resume_dir", str(trained)]
    assert len(test_sketchy_ext_zeroshot.main(larger)["rows"]) == 1
    said = capsys.readouterr().err
    assert "computed with another input_size, computing them anew" in said
    assert "was trained with --input_size 32, not 48" in said


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
    results = script.main(["--resume_dir", str(tmp_path), "--mode", "1", "--device", "cpu"])
    distances = np.linalg.norm(query[:, None].astype(float) - gallery[None], axis=2)
    relevant = rank(*map(torch.from_numpy, (distances, query_labels, gallery_labels)))
    labels = torch.from_numpy(query_labels)
    expected = [class_means(values, labels)[1].mean().item() for values in
                (average_precision(relevant, map_at), precision_at(relevant, prec_at))]  # fmt: skip
    assert [results["rows"][0][name] for name in ("mAP", "Prec")] == pytest.approx(expected, abs=1e-12)
    assert expected[0] < 0.99


def test_chunks_change_nothing(tmp_path, monkeypatch):
    features_of_three_classes(tmp_path / "features_zero.pickle", width=64)
    arguments = ["--resume_dir", str(tmp_path), "--clusters", "3", "--subspaces", "2", "4", "--device", "cpu"]
    whole = test_tuberlin_ext_zeroshot.main(arguments)["rows"]
    monkeypatch.setattr(testing, "CHUNK_BYTES", 5 * 8 * 60)
    assert test_tuberlin_ext_zeroshot.main(arguments)["rows"] == whole


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
    said = capsys.readouterr().err
    assert "features_zero.pickle is older than model_best.pth.tar beside it, computing them anew" in said
    assert "that was there is now features_zero.pickle.old" in said
    assert (tmp_path / "features_zero.pickle.old").read_bytes() == downloaded


def test_downloaded_weights_and_checkpoints_swap_in(miniature, tmp_path):
    torch.manual_seed(0)
    backbone = create_backbone("convnextv2_atto")
    torch.save({"model": published_state(backbone)}, tmp_path / "convnextv2_atto_1k_224_ema.pt")
    arguments = [*TRAIN, "--finetune", str(tmp_path / "convnextv2_atto_1k_224_ema.pt"), "--lr", "0", "--epochs", "1"]
    train_sketchy_ext.main([*arguments, "--data_root", str(miniature), "-s", str(tmp_path / "ours")])
    student = Student(backbone, 29)
    authors = {f"module.{name}": value for name, value in published_state(student).items()}
    (tmp_path / "theirs").mkdir()
    torch.save(
        {"epoch": 20, "state_dict": authors, "best_acc1": torch.tensor(90.0)}, tmp_path / "theirs/model_best.pth.tar"
    )
    rows = [
        test_sketchy_ext_zeroshot.main(
            [*MODEL, "--mode", "1", "--data_root", str(miniature), "--resume_dir", str(tmp_path / folder)]
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
    assert "holds a convnextv2_atto, see --model" in error("--model", "convnextv2_femto")
    assert "its head has 1000 classes, not 12" in error("--nb_classes", 12)
    assert "trained on 29 seen classes, but cname_cid.txt lists 2" in error("--data_root", tiny)
    assert "no such data folder" in error("--data_root", tmp_path / "nowhere")
    assert "--clusters 50: the gallery has only 48 photos" in error("--clusters", 50)
    assert "--subspaces 7" in error("--subspaces", 7)
    assert "--mode" in error("--mode", 3)
    sick = torch.load(trained / "checkpoint.pth.tar")
    sick["state_dict"]["module.norm.weight"][:] = float("nan")
    torch.save(sick, tmp_path / "sick")
    assert f"{tmp_path / 'sick'}: its features are not finite" in error(folder=tmp_path / "sick")
    torn = tmp_path / "torn"
    torn.write_bytes((trained / "checkpoint.pth.tar").read_bytes()[:10_000])
    assert f"{torn}: " in error(folder=torn)


def test_what_a_missing_extra_skips_is_said_in_a_line(miniature, tmp_path, monkeypatch, capsys):
    for module in ("torch.utils.tensorboard", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    train_sketchy_ext.main([*TRAIN, "--data_root", str(miniature), "-s", str(tmp_path)])
    assert "note: tensorboard is not installed, no training curves are written\n" in capsys.readouterr().err
    test_sketchy_ext_zeroshot.main(
        [*MODEL, "--mode", "1", "--data_root", str(miniature), "--resume_dir", str(tmp_path)]
    )
    assert "note: no picture of retrievals, matplotlib is not installed\n" in capsys.readouterr().err
    assert not (tmp_path / "retrievals.png").exists() and not (tmp_path / "curves").exists()


def test_what_features_alone_cannot_do_is_said(tmp_path, fails):
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
    monkeypatch.setattr("datasets.files.tempfile.TemporaryFile", _denied)
    assert "cannot be written (Permission denied)" in fails(test_tuberlin_ext_zeroshot.main, "--resume_dir", tmp_path)


def _denied(**_):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("script", [
    "train_sketchy_ext", "train_tuberlin_ext", "train_quickdraw_ext", "test_sketchy_ext_zeroshot",
    "test_sketchy_ext_split_zeroshot", "test_tuberlin_ext_zeroshot", "test_quickdraw_ext_zeroshot",
])  # fmt: skip
def test_help_explains_itself_and_tells_every_default(script, capsys):
    with pytest.raises(SystemExit) as end:
        sys.modules[script].main(["--help"])
    help_text = capsys.readouterr().out
    assert end.value.code == 0
    for option in ("--data_root", "--zero_version", "--model", "--device", "--seed", "--workers"):
        assert f"\n  {option}" in help_text
    assert "(default: None)" not in help_text


def test_an_error_on_a_real_command_line_has_no_traceback(tmp_path):
    command = [sys.executable, "test_sketchy_ext_zeroshot.py", "--resume_dir", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
