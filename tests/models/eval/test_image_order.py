"""File names only for features that say which lists they come from, or where the user does."""

import numpy as np
import pytest

import test_sketchy_ext_zeroshot
from datasets.lists import open_benchmark
from models.eval.features import Features, write_features
from utils.files import sha256_of


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """run(*arguments) tests features of the benchmark `tiny`; gives (sketches of per_query.npz, messages)."""

    def test(*arguments):
        command = ["--data_root", tiny, "-s", tmp_path, "--mode", "1", "--device", "cpu", *arguments]
        test_sketchy_ext_zeroshot.main([str(argument) for argument in command])
        with np.load(tmp_path / "per_query.npz", allow_pickle=False) as kept:
            return kept["sketch"].tolist(), capsys.readouterr().err

    return test


def test_only_recorded_lists_give_file_names(tiny, tmp_path, run):
    features = Features(np.eye(4, dtype=np.float32), np.arange(4) // 2, np.eye(4, dtype=np.float32), np.arange(4) // 2)
    benchmark = open_benchmark("sketchy", tiny)
    source = {f"{kind} list": sha256_of(benchmark.path(kind, "zero")) for kind in ("photo", "sketch")}
    files = [f"sketch of zero/{number}.png" for number in range(4)]
    write_features(tmp_path / "features_zero.pickle", features, source)
    assert run() == (files, f"features: {tmp_path / 'features_zero.pickle'}\n")

    numbers, note = (
        ["0", "1", "2", "3"],
        "note: the features do not record which lists they follow, so there are numbers",
    )
    sketches = benchmark.path("sketch", "zero")
    lines = sketches.read_text().splitlines()
    sketches.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")  # another order within a class
    shown, messages = run()
    assert shown == numbers and messages.count(note) == 1
    (tmp_path / "features_zero.json").unlink()  # as if downloaded
    shown, messages = run()
    assert shown == numbers and messages.count(note) == 1
    shown, messages = run("--order", tiny / "zeroshot1")
    assert shown == [files[1], files[0], *files[2:]] and "note" not in messages


def test_an_order_of_other_lists_is_refused(tiny, tmp_path, fails):
    features = Features(np.eye(4, dtype=np.float32), np.arange(4) // 2, np.eye(4, dtype=np.float32), np.arange(4) % 2)
    write_features(tmp_path / "features_zero.pickle", features, {})
    command = [test_sketchy_ext_zeroshot.main, "-s", tmp_path, "--mode", "1", "--device", "cpu", "--order"]
    assert "its images have other classes than the features" in fails(*command, tiny / "zeroshot1")
    assert "no lists of unseen sketches" in fails(*command, tiny / "nowhere")
