"""Several real processes (gloo) do what one does; torchrun starts those of two tests."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import golden_steps
from helpers.forked import run_ranks
from helpers.golden_steps import ONLY_CLS

import search_photos
import test_sketchy_ext_zeroshot
import train_sketchy_ext
from models.checkpoints import LAST, read_checkpoint
from utils import distributed
from utils.cli import InputError, RankError

ROOT = Path(__file__).resolve().parents[2]
MODEL = "--model test_convnext --input_size 32 --device cpu --workers 1".split()
TRAIN = [*MODEL, *"--finetune none --batch_size 12 --epochs 2 --warmup_epochs 0 --eval_every 1".split()]
TRAIN += "--max_steps 6 --print_freq 3".split()


def torchrun(processes, *command):
    """Run a script in several processes: (exit status, stdout, stderr)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    result = subprocess.run(
        [str(part) for part in (*launcher, *command)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


def test_two_processes_take_the_golden_steps(golden, tmp_path):
    z, script = golden("train_step"), ROOT / "tests/helpers/golden_steps.py"
    status, _, complaints = run_ranks(2, script, ROOT / "tests/golden/train_step.npz", tmp_path)
    assert status == 0, complaints
    for accum_steps in (1, 2):
        for name, state in torch.load(tmp_path / f"{accum_steps}.pt", weights_only=True).items():
            for parameter, value in state.items():
                torch.testing.assert_close(value, z[f"{name}_final/{parameter}"], rtol=0, atol=1e-9)
    # Losses that are left out: as one process, and the heads without a gradient stay.
    found, expected = torch.load(tmp_path / "cls.pt", weights_only=True), golden_steps.four_steps(z, 1, ONLY_CLS)
    for name, state in expected.items():
        for parameter, value in state.items():
            torch.testing.assert_close(found[name][parameter], value, rtol=0, atol=1e-9)
        assert torch.equal(found[name]["head.weight"], z[f"{name}_initial/head.weight"].double())
    # Parameters without a gradient, and frozen ones.
    for tune, state in torch.load(tmp_path / "tuned.pt", weights_only=True).items():
        start = golden_steps.tuned_steps(tune, 0)
        for parameter, value in golden_steps.tuned_steps(tune).items():
            torch.testing.assert_close(state[parameter], value, rtol=0, atol=1e-9)
        changed = {parameter for parameter, value in state.items() if not torch.equal(value, start[parameter])}
        assert {"linear.weight", "norm.weight"} <= changed and "mask_token" not in changed
        assert ("pos_embed" in changed) == (tune == "all")
        assert ("blocks.1.mlp.fc1.weight" in changed) == (tune != "norm")


def test_two_processes_train_and_test_as_one(miniature, tmp_path):
    arguments = ["--data_root", miniature, *TRAIN]
    status, printed, complaints = run_ranks(2, "train_sketchy_ext.py", *arguments, "--savedir", tmp_path / "two")
    assert status == 0, complaints
    assert len(printed.splitlines()) == 3 and complaints.count("no epoch after warm-up") <= 1
    train_sketchy_ext.main([str(part) for part in (*arguments, "--savedir", tmp_path / "one")])
    one, two = (read_checkpoint(tmp_path / name / LAST) for name in ("one", "two"))
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("cls", "ka_student", "ma", "ka_teacher", "total", "mAP@all"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
        # A sketch between two classes, at most.
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=100 / 29 + 1e-9)
    first = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("one", "two")]
    for name in ("cls", "ka_student", "ma", "ka_teacher"):
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-5)

    test = [*MODEL, "--data_root", miniature, *"--subspaces 2 --clusters 3 4 5 --batch_size 7 --resume_dir".split()]
    test.append(tmp_path / "one")
    path, results = tmp_path / "one/features_zero.pickle", tmp_path / "one/results.json"
    test_sketchy_ext_zeroshot.main([str(part) for part in test])
    alone = pickle.loads(path.read_bytes())
    status, printed, complaints = run_ranks(2, "test_sketchy_ext_zeroshot.py", *test, "--recompute")
    assert status == 0, complaints
    assert printed.count("one-to-one") == 1 and printed.count("one-to-many") == 3
    rows = [json.loads(results.read_text())["rows"]]
    test_sketchy_ext_zeroshot.main([str(part) for part in test])
    rows.append(json.loads(results.read_text())["rows"])
    assert rows[0] == rows[1]  # by two processes and by one, from the same features
    assert not list((tmp_path / "one").glob(".*"))
    for one, two in zip(alone[:4], pickle.loads(path.read_bytes())[:4], strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


LEAVES = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from utils import distributed
distributed.init_process_group("cpu")
import timm
import torch
network = distributed.wrap_ddp(torch.nn.Linear(2, 2))
network(torch.ones(1, 2)).sum().backward()
network.__dict__["itself"] = network  # only garbage collection frees it
del network
distributed.destroy_process_group()
print(*(path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are named in Linux's /proc")
def test_no_thread_outlives_the_connection(tmp_path):
    """Threads that do can abort the process as it ends."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    status, printed, complaints = torchrun(2, tmp_path / "leaves.py", ROOT)
    assert status == 0 and printed.count("python") >= 2, complaints
    assert "gloo" not in printed


def test_bad_input_is_told_once(tmp_path):
    status, _, complaints = run_ranks(2, "train_sketchy_ext.py", *TRAIN, "--data_root", tmp_path / "nowhere")
    assert status != 0 and complaints.count("error: ") == 1 and "no such data folder" in complaints


@pytest.fixture
def of_several(monkeypatch):
    """of_several(rank, processes) makes this process one of several, as far as it can tell."""

    def pretend(rank, processes):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))

    return pretend


def test_shares_are_even_and_complete(of_several):
    for processes in (1, 2, 3, 7):
        for count in (0, 1, 6, 20):
            shares = []
            for rank in range(processes):
                of_several(rank, processes)
                shares.append(list(range(count))[distributed.rank_slice(count)])
            assert list(itertools.chain(*shares)) == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_photos_are_refused(tiny, tmp_path, fails, of_several):
    arguments = [train_sketchy_ext.main, *TRAIN, "--data_root", tiny, "--savedir", tmp_path]
    of_several(0, 3)
    assert "its 2 photos cannot be shared by 3 processes" in fails(*arguments, "--batch_size", 3)
    photos = tiny / "zeroshot1/all_photo_filelist_train.txt"
    photos.write_text(photos.read_text() + 3 * "photo of train/0.png 0\n")  # 7, of which 6 are in the first batch
    assert "last batch of an epoch holds 2 images, fewer than the 3" in fails(*arguments, "--batch_size", 9)


def test_processes_that_cannot_meet_say_so(tiny, tmp_path, fails, of_several):
    of_several(0, 2)
    arguments = [train_sketchy_ext.main, *TRAIN, "--data_root", tiny, "--savedir", tmp_path, "--batch_size", 6]
    assert "start them with torchrun" in fails(*arguments)


def test_only_the_first_process_is_heard_and_others_give_it_time(tiny, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("utils.cli.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for options in (["--epochs", "0"], ["--data_root", str(tiny / "nowhere")]):
        with pytest.raises(SystemExit) as end:
            train_sketchy_ext.main(options)
        assert end.value.code == 2 and capsys.readouterr().err == ""
    with pytest.raises(SystemExit), distributed.same_error_on_all_ranks():
        raise InputError("what all find")
    assert waited == [30, 30, 30]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, True)),
        ({"RANK": "1"}, (0, 1, True)),  # a lone RANK, as some schedulers set it
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, False)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1, True)),
    ],
)
def test_ranks_are_those_of_torchrun(monkeypatch, variables, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.should_print()) == expected


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "abc"},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "-1"},
        {"RANK": "5", "WORLD_SIZE": "2"},
    ],
)
def test_variables_that_torchrun_does_not_set_end_in_one_line(monkeypatch, capsys, variables, tmp_path):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for command, arguments in ((search_photos.main, ["index", str(tmp_path)]), (train_sketchy_ext.main, ["--none"])):
        with pytest.raises(SystemExit) as end:
            command(arguments)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1
    with pytest.raises(RankError, match="torchrun"):
        distributed.get_rank()


def test_a_process_that_waits_for_others_says_so(monkeypatch, capsys):
    import torch.distributed

    for name, value in dict(RANK=1, WORLD_SIZE=3, MASTER_ADDR="elsewhere", MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))
    said = threading.Event()
    note = distributed._note_waiting
    monkeypatch.setattr(distributed, "_note_waiting", lambda: (note(), said.set()))
    monkeypatch.setattr(distributed, "WAITING_NOTE_S", 0)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: said.wait(60))
    distributed.init_process_group("cpu")
    line = capsys.readouterr().err
    assert line.startswith("note: rank 1 waits for the other 2 of WORLD_SIZE at elsewhere:29500; unset these variables")
