"""Interrupted training: kills, signals, torn files, full disks, damaged images, losses that are not finite."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from helpers import kill_resume
from helpers.forked import Forked

import train_quickdraw_ext
import train_sketchy_ext
from datasets.protocols import PROTOCOLS
from models import checkpoints, losses, resume, training
from models.checkpoints import LAST, PREVIOUS, SaveSchedule, _link_previous, read_checkpoint
from models.logger import Log
from models.networks import normalise
from models.options import train_parser
from models.run_record import RESULT_OPTIONS

TRAIN = """--model test_convnext --imagenet_classes 1000 --finetune none --input_size 32 --batch_size 3 --workers 0
    --device cpu --epochs 3 --warmup_epochs 0 --drop_path 0.2 --print_freq 1""".split()


def run(root, savedir, *more):
    return train_sketchy_ext.main([*TRAIN, "--data_root", str(root), "--savedir", str(savedir), *map(str, more)])


def steps_of(savedir):
    """(epoch, step) of the lines of log.jsonl that are of steps."""
    lines = [json.loads(line) for line in (savedir / "log.jsonl").read_text().splitlines()]
    return [(line["epoch"], line["step"]) for line in lines if "step" in line]


def assert_same(one, two):
    one, two = (read_checkpoint(folder / LAST) for folder in (one, two))
    assert one["history"] == two["history"]
    for part in ("state_dict", "teacher"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, act) has act() called in the n-th step from now on."""

    def plan(number, act):
        step, count = training.train_step, []

        def counted(*arguments):
            count.append(1)
            if len(count) == number:
                act()
            return step(*arguments)

        monkeypatch.setattr(training, "train_step", counted)

    return plan


def test_killed_at_any_moment_it_ends_with_the_same_weights(miniature, tmp_path, monkeypatch):
    monkeypatch.setattr(kill_resume, "start_script", Forked)
    monkeypatch.setattr(kill_resume, "TRAIN", [*kill_resume.TRAIN, "--max_steps", "12"])
    counts = kill_resume.torture(miniature, tmp_path, kills=2, epochs=2)
    assert counts["write"] == 1 and counts["step"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_a_resumed_run_ends_the_same(tiny, tmp_path, at_step, capsys, number):
    run(tiny, tmp_path / "whole")
    steps = len(steps_of(tmp_path / "whole"))
    assert steps == 6  # two an epoch
    at_step(3, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as end:
        run(tiny, tmp_path / "halves")
    assert end.value.code == 128 + number
    assert "saved after 1 epochs and 1 steps" in capsys.readouterr().err
    checkpoint = read_checkpoint(tmp_path / "halves" / LAST)
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 1)
    run(tiny, tmp_path / "halves", "--resume", "--workers", 2, "--save_every", "1s", "--print_freq", 1)
    assert "resuming after 1 of 3 epochs and 1 steps" in capsys.readouterr().err
    assert_same(tmp_path / "whole", tmp_path / "halves")
    assert steps_of(tmp_path / "halves") == steps_of(tmp_path / "whole") == [(e, s) for e in range(3) for s in (1, 2)]


def test_a_second_interrupt_ends_at_once(tiny, tmp_path, at_step, capsys):
    def twice():
        first = signal.getsignal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) == first:  # two that come before the first is taken are one
            pass
        signal.raise_signal(signal.SIGINT)

    at_step(1, twice)
    with pytest.raises(SystemExit) as end:
        run(tiny, tmp_path)
    assert end.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert not (tmp_path / LAST).exists()


@pytest.mark.parametrize("linked", [True, False])
def test_a_torn_checkpoint_gives_way_to_the_one_before(tiny, tmp_path, at_step, capsys, monkeypatch, linked):
    run(tiny, tmp_path / "whole")
    if not linked:  # some disks know no hard links

        def refuse(*_):
            raise OSError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    at_step(5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(tiny, tmp_path / "torn")
    assert read_checkpoint(tmp_path / "torn" / PREVIOUS)["epoch"] == 2
    last = tmp_path / "torn" / LAST
    last.write_bytes(last.read_bytes()[:5000])
    run(tiny, tmp_path / "torn", "--resume")
    assert f"resuming from {PREVIOUS} instead" in capsys.readouterr().err
    assert_same(tmp_path / "whole", tmp_path / "torn")


def test_a_torn_checkpoint_never_takes_the_place_of_a_whole_one(tiny, tmp_path, at_step, fails, monkeypatch):
    at_step(5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(tiny, tmp_path)
    (tmp_path / LAST).write_bytes(b"torn")
    arguments = [train_sketchy_ext.main, *TRAIN, "--data_root", tiny, "--savedir", tmp_path, "--resume"]

    def refuse(*_):
        raise RuntimeError("unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr("models.checkpoints.torch.save", refuse)
        assert "is the disk full?" in fails(*arguments)
    assert read_checkpoint(tmp_path / LAST)["epoch"] == read_checkpoint(tmp_path / PREVIOUS)["epoch"] == 2
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"torn")
    assert "it cannot be resumed, start anew with --overwrite" in fails(*arguments)


@pytest.mark.parametrize("error", [
    EOFError(), ConnectionResetError(104, "Connection reset by peer"),
    RuntimeError("DataLoader worker (pid 7) exited unexpectedly"),
])  # fmt: skip
def test_a_signal_that_ends_workers_first_also_saves(tiny, tmp_path, monkeypatch, capsys, error):
    run(tiny, tmp_path / "whole")

    def dies(*_):
        signal.raise_signal(signal.SIGTERM)
        raise error

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(training, "validate", dies)
        run(tiny, tmp_path / "halves")
    assert end.value.code == 143 and "saved after 0 epochs and 2 steps" in capsys.readouterr().err
    run(tiny, tmp_path / "halves", "--resume")
    assert_same(tmp_path / "whole", tmp_path / "halves")


def test_the_last_checkpoint_is_there_at_any_moment_of_a_save(tmp_path):
    (tmp_path / LAST).write_bytes(b"new")
    (tmp_path / PREVIOUS).write_bytes(b"old")
    _link_previous(tmp_path)
    _link_previous(tmp_path)  # killed before the write, and again
    assert (tmp_path / LAST).read_bytes() == (tmp_path / PREVIOUS).read_bytes() == b"new"


def test_incomplete_files_of_a_killed_process_are_deleted(tiny, tmp_path):
    leftover = tmp_path / f".{LAST}.ab12"
    leftover.write_bytes(b"half")
    run(tiny, tmp_path, "--epochs", 1)
    assert not leftover.exists()


def test_a_run_is_not_resumed_with_another_protocol(tiny, tmp_path, fails):
    run(tiny, tmp_path, "--epochs", 1)
    lists = tiny / "zeroshot1"
    for kind, name in (("sketch_tx_000000000000_ready", "sketch"), ("all_photo", "all_photo")):
        shutil.copy(lists / f"{kind}_filelist_train.txt", lists / f"{name}_train.txt")
    arguments = [*TRAIN, "--data_root", tiny, "--savedir", tmp_path, "--resume", "--zero_version", "zeroshot1"]
    message = fails(train_quickdraw_ext.main, *arguments, "--batch_size", 10)
    assert "was trained for Sketchy Ext, not QuickDraw Ext" in message


@pytest.mark.parametrize("option", [
    ["--precision", "bf16"], ["--lr", "1"], ["--losses", "cls", "ka_student"], ["--modality_weight", "0.2"],
])  # fmt: skip
def test_options_that_change_the_result_cannot_change_when_resuming(tiny, tmp_path, fails, option):
    run(tiny, tmp_path, "--epochs", 1)
    arguments = [*TRAIN, "--epochs", 1, "--data_root", tiny, "--savedir", tmp_path, "--resume", *option]
    assert f"was trained with {option[0]} " in fails(train_sketchy_ext.main, *arguments)


def test_a_flag_that_changed_is_named_with_the_way_out(tiny, tmp_path, fails):
    run(tiny, tmp_path, "--epochs", 1, "--no_mask")
    arguments = [*TRAIN, "--epochs", 1, "--data_root", tiny, "--savedir", tmp_path, "--resume"]
    assert "was trained with --no_mask; add it" in fails(train_sketchy_ext.main, *arguments)
    arguments += ["--no_mask", "--max_steps", 1]
    assert "was trained without --max_steps; leave it out" in fails(train_sketchy_ext.main, *arguments)


def test_options_of_the_same_step_may_change_when_resuming_with_a_note(tiny, tmp_path, at_step, capsys):
    run(tiny, tmp_path / "whole")
    at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(tiny, tmp_path / "halves")
    last = tmp_path / "halves" / LAST
    content = torch.load(last, weights_only=True)
    assert content["processes"] == 1
    torch.save(content | {"processes": 2}, last)
    run(tiny, tmp_path / "halves", "--resume", "--grad_checkpointing")  # exact on a CPU
    said = capsys.readouterr().err
    assert said.count("note: --grad_checkpointing was False and is True: the same step, up to rounding") == 1
    assert said.count("note: the number of processes was 2 and is 1") == 1 and "--accum_steps was" not in said
    assert_same(tmp_path / "whole", tmp_path / "halves")


def test_a_new_loss_of_weight_0_leaves_runs_resumable(tiny, tmp_path, monkeypatch, at_step, fails):
    run(tiny, tmp_path / "whole")
    at_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(tiny, tmp_path / "halves", "--print_freq", 1)
    monkeypatch.setitem(losses.LOSSES, "feat", losses.Loss("L_feat", no_function, weight=0.0))
    names = (*losses.LOSSES, "student", "total", "train_accuracy")
    for module in ("models.train_step", "models.training", "models.logger", "models.checkpoints", "models.resume"):
        monkeypatch.setattr(f"{module}.LOGGED", names)
    arguments = [*TRAIN, "--data_root", tiny, "--savedir", tmp_path / "halves", "--resume", "--feat_weight", 1]
    assert "was trained with --losses cls ka_student ma ka_teacher, not" in fails(train_sketchy_ext.main, *arguments)
    run(tiny, tmp_path / "halves", "--resume")
    assert_same(tmp_path / "whole", tmp_path / "halves")
    assert "feat" not in (tmp_path / "halves/log.jsonl").read_text()


def no_function(*_):
    raise AssertionError("a loss of weight 0 was computed")


def test_losses_that_are_not_computed_are_not_shown(tiny, tmp_path, capsys):
    run(tiny, tmp_path, "--epochs", 1, "--losses", "cls", "ka_student")
    assert " ka_student " in (line := capsys.readouterr().out) and " ma " not in line
    assert '"ma"' not in (tmp_path / "log.jsonl").read_text()


def test_every_option_of_training_changes_the_result_or_is_known_not_to():
    parser = train_parser(PROTOCOLS["sketchy"])
    options = vars(parser.parse_args([])).keys()
    no_effect = {
        *("data_root", "savedir", "nb_classes", "workers", "device", "resume", "overwrite", "save_every"),
        *("print_freq", "eval_every", *resume.SAME_STEP),
    }  # nb_classes is compared with the lists, and those by their digests
    of_losses = {"losses", *map(losses.weight_option, losses.LOSSES)}
    assert options == {*RESULT_OPTIONS, *no_effect, *of_losses}
    assert not no_effect & {*RESULT_OPTIONS}


def test_a_disk_too_small_for_checkpoints_is_named_before_training(tiny, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8))
    message = fails(
        train_sketchy_ext.main, *TRAIN, "--model", "convnextv2_atto", "--data_root", tiny, "--savedir", tmp_path
    )
    assert f"{tmp_path}: 100 MB are free" in message and "make room" in message


def test_a_loss_that_is_not_finite_names_step_term_and_image(tiny, tmp_path, fails, monkeypatch):
    def sick(images, *statistics):
        values = normalise(images, *statistics)
        plain = images.flatten(2).float().mean(dim=2)
        values[(plain == torch.tensor([60.0, 90.0, 120.0])).all(dim=1)] = torch.nan  # the second of each list
        return values

    run(tiny, tmp_path, "--epochs", 1)
    before = (tmp_path / LAST).read_bytes()
    arguments = [*TRAIN, "--data_root", tiny, "--savedir", tmp_path]
    monkeypatch.setattr(training, "normalise", sick)
    message = fails(train_sketchy_ext.main, *arguments, "--epochs", 1, "--overwrite", "--no_validation")
    assert "epoch 1, step " in message and ": cls, ka_student, ma not finite, in " in message
    assert "1.png" in message and not any(f"{other}.png" in message for other in (0, 2, 3))
    assert not (tmp_path / LAST).exists()
    (tmp_path / LAST).write_bytes(before)


def test_a_failing_compiler_is_named(tiny, tmp_path, fails, at_step):
    def fail():
        raise torch._dynamo.exc.TorchDynamoException("no working C++ compiler\nand much more")

    at_step(1, fail)
    message = fails(train_sketchy_ext.main, *TRAIN, "--data_root", tiny, "--savedir", tmp_path)
    assert message == "error: torch.compile failed (no working C++ compiler); train without --compile"


def test_an_image_that_vanishes_on_the_way_is_named_and_nothing_is_lost(tiny, tmp_path, at_step, fails):
    at_step(3, lambda: [path.unlink() for path in (tiny / "photo of train").iterdir()])
    message = fails(train_sketchy_ext.main, *TRAIN, "--data_root", tiny, "--savedir", tmp_path)
    assert "photo of train" in message and "no such image" in message
    assert read_checkpoint(tmp_path / LAST)["epoch"] == 1


def test_when_to_save(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])
    schedule = SaveSchedule("2m")
    due = []
    for clock[0] in (60.0, 120.0, 180.0, 241.0):
        due.append(schedule.is_due())
    assert due == [False, True, False, True] and schedule.epochs == 1
    schedule = SaveSchedule("3e")
    clock[0] = 1e9
    assert not schedule.is_due() and schedule.epochs == 3


def test_epochs_between_saves_are_done_again_to_the_same_end(tiny, tmp_path, at_step):
    run(tiny, tmp_path / "whole")
    at_step(4, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        run(tiny, tmp_path / "sparse", "--save_every", "2e")
    assert not (tmp_path / "sparse" / LAST).exists()  # one epoch was done
    run(tiny, tmp_path / "sparse", "--save_every", "2e", "--overwrite")
    assert read_checkpoint(tmp_path / "sparse" / LAST)["epoch"] == 3
    assert_same(tmp_path / "whole", tmp_path / "sparse")


@pytest.mark.parametrize("text", ["", "0e", "5", "1.5m", "ten", "3d"])
def test_an_interval_that_is_none_is_named(tiny, tmp_path, fails, text):
    arguments = [*TRAIN, "--data_root", tiny, "--savedir", tmp_path, "--save_every", text]
    assert "is not an interval like 10m, 30s, 2h" in fails(train_sketchy_ext.main, *arguments)


def test_the_log_of_a_resumed_run_has_no_line_twice(tmp_path):
    lines = [{"epoch": 0, "step": 1}, {"epoch": 0, "step": 2}, {"epoch": 0}, {"epoch": 1, "step": 1}]
    lines += [{"epoch": 1, "step": 2}, {"epoch": 1}, {"epoch": 2, "step": 1}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{}\n5\n{"epoch": 2, "st'
    (tmp_path / "log.jsonl").write_bytes(text.encode() + b"\xff\n")
    Log(tmp_path, epochs_done=1, step_done=1, steps=2).write({"epoch": 1, "step": 2, "total": 3.0})
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == [*lines[:4], {"epoch": 1, "step": 2, "total": 3.0}]


@pytest.mark.draws
def test_lines_log_and_curves_of_a_run(tiny, tmp_path, capsys):
    run(tiny, tmp_path, "--eval_every", 2)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and "mAP@all" in printed[1] and "mAP@all" not in printed[0] + printed[2]
    history = read_checkpoint(tmp_path / LAST)["history"]
    assert 0 < history[1]["mAP@all"] <= 1 and 0 <= history[1]["Prec@100"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "step" not in line]
    assert [line["accuracy"] for line in epochs] == [entry["accuracy"] for entry in history]
    of_first = [line["total"] for line in lines if line["epoch"] == 0 and "step" in line]
    assert epochs[0]["total"] == pytest.approx(sum(of_first) / len(of_first), rel=1e-6)
    assert all(line["images_per_second"] > 0 and line["lr"] > 0 for line in lines if "step" in line)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and list((tmp_path / "curves").iterdir())


def test_training_does_not_depend_on_evaluation_between_epochs(tiny, tmp_path):
    run(tiny, tmp_path / "plain")
    run(tiny, tmp_path / "measured", "--eval_every", 1, "--print_freq", 7)
    one, two = (read_checkpoint(tmp_path / name / LAST)["state_dict"] for name in ("plain", "measured"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_checkpoint_with_zeros_in_a_weight_gives_way_to_the_one_before(tiny, tmp_path, at_step, capsys):
    """A torn disk can leave zeros in the middle of a file, which torch.load does not notice."""
    run(tiny, tmp_path / "whole")
    at_step(5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(tiny, tmp_path / "torn")
    last = tmp_path / "torn" / LAST
    content = bytearray(last.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    last.write_bytes(content)
    torch.load(last, weights_only=True)
    run(tiny, tmp_path / "torn", "--resume")
    assert f"resuming from {PREVIOUS} instead" in capsys.readouterr().err
    assert_same(tmp_path / "whole", tmp_path / "torn")


def test_a_query_class_without_photos_is_named_before_training(tiny, tmp_path, fails):
    photos = tiny / "zeroshot1/all_photo_filelist_zero.txt"
    photos.write_text(photos.read_text().replace(" 1\n", " 0\n"))
    arguments = [*TRAIN, "--data_root", tiny, "--savedir", tmp_path / "out", "--eval_every", 1]
    assert "1 query classes have no photo in the gallery, first 'cow'" in fails(train_sketchy_ext.main, *arguments)
    assert not (tmp_path / "out").exists()
