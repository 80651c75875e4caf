import json
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import train_quickdraw_ext
import train_sketchy_ext
from datasets.lists import write_list, write_mask
from datasets.protocols import PROTOCOLS
from models import training
from models.checkpoints import BEST, BEST_AFTER_WARMUP, LAST, CheckpointSaver, read_checkpoint
from models.losses import Batch
from models.networks import Student, Teacher, prepare_models
from models.options import train_parser
from models.run_record import effective_options, run_record
from models.train_step import TrainConfig, TrainState, create_optimizers, set_learning_rates
from models.training import train_step
from models.weights import create_pair, load_published, published_state

GOLDEN_NAMES = {"cls": "loss_cls", "ka_student": "loss_kd_1", "ma": "loss_kld", "student": "loss_total"}
SMALL = (
    "--model test_convnext --imagenet_classes 1000 --finetune none --input_size 32 --batch_size 3 --workers 0".split()
)
RELEASE = ("--model", "convnextv2_atto")  # whose parameters have the names of the release in checkpoints
SHORT = [*SMALL, "--device", "cpu", "--epochs", "3", "--warmup_epochs", "0"]


def run(root, savedir, *more, script=train_sketchy_ext):
    return script.main([*SHORT, "--data_root", str(root), "--savedir", str(savedir), *map(str, more)])


@pytest.mark.parametrize(
    "way", ["plain", "2 micro-batches", "5 micro-batches", "checkpointing", "channels last", "compiled"]
)
def test_four_steps_in_both_phases_equal_golden(golden, small_backbone, way):
    z = golden("train_step")
    networks = {"student": Student(small_backbone(z), int(z["linear_num"])), "teacher": Teacher(small_backbone(z))}

    def stored(name):
        return {key.removeprefix(f"{name}/"): value for key, value in z.items() if key.startswith(f"{name}/")}

    def check(name, key):
        for parameter, value in published_state(networks[name]).items():
            torch.testing.assert_close(value, stored(key)[parameter], rtol=0, atol=1e-9)

    for name, network in networks.items():
        load_published(network.double(), stored(f"{name}_initial"), name)
        if way == "channels last":
            network.to(memory_format=torch.channels_last)
        if way == "compiled":  # into graphs of forward and backward passes; see the next test for their machine code
            network.compile(backend="aot_eager_decomp_partition")
    if way == "checkpointing":
        networks["student"].backbone.set_grad_checkpointing()
    accum_steps = {"2 micro-batches": 2, "5 micro-batches": 5}.get(way, 1)
    lr = float(z["lr"])
    state = TrainState(*networks.values(), create_optimizers(*networks.values(), lr, lr, float(z["weight_decay"])))
    for step, (batch, bidirectional) in enumerate(zip(z["step_batch"], z["step_bidirectional"], strict=True)):
        step_batch = Batch(
            z["images"][batch].double(),
            z["target"][batch],
            z["tag"][batch, :, 0],
            z["cid_mask"][batch],
            z["noise"][step],
        )
        losses, is_finite = train_step(state, step_batch, bool(bidirectional), accum_steps)
        assert is_finite.all()
        for ours, theirs in (*GOLDEN_NAMES.items(), *([("ka_teacher", "loss_kd_2")] if bidirectional else [])):
            torch.testing.assert_close(losses[ours], z[theirs][step], rtol=0, atol=1e-9)
        if step == 1:
            check("student", "student_after_warmup")
            check("teacher", "teacher_initial")
    check("student", "student_final")
    check("teacher", "teacher_final")


def test_a_step_in_compiled_code_gives_the_same_weights(monkeypatch):
    """Of a network without blocks, since a C++ compiler takes a second for each kernel."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # starting more takes longer
    sizes = dict(patch_size=112, depth=0, embed_dim=8, num_heads=1, num_classes=10)
    labels, weights = torch.arange(4) % 3, []
    for compiled in (False, True):
        torch.manual_seed(0)
        student, teacher = (
            Student(VisionTransformer(**sizes), 3).double(),
            Teacher(VisionTransformer(**sizes)).double(),
        )
        prepare_models(student, None, "cpu", compiled=compiled)
        state = TrainState(student, teacher, create_optimizers(student, teacher, 1e-3, 1e-3, 5e-4))
        values = torch.randn(4, 3, 224, 224), (labels > 1).float(), torch.rand(4, 10), torch.randn(4, 8)
        images, is_photo, mask, noise = (each.double() for each in values)
        train_step(state, Batch(images, labels, is_photo, mask, noise), bidirectional=True)
        weights.append(torch.cat([value.detach().flatten() for value in state.trainable_parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)
    assert torch._dynamo.utils.counters["inductor"]


def test_the_learning_rate_falls_a_thousandfold():
    optimizers = [torch.optim.Adam([torch.zeros(1, requires_grad=True)]) for _ in range(2)]
    for epoch, share in ((0, 1), (10, 0.001**0.5), (20, 0.001)):
        set_learning_rates(
            optimizers, TrainConfig(epochs=20, last_warmup_epoch=9, lr=1e-4, teacher_lr=5e-5).learning_rates(epoch)
        )
        assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([1e-4 * share, 5e-5 * share])


def test_the_cosine_schedule_falls_as_half_a_cosine():
    config = TrainConfig(epochs=20, last_warmup_epoch=9, lr=1e-4, teacher_lr=5e-5, schedule="cosine")
    for epoch, share in ((0, 1), (5, (1 + 0.5**0.5) / 2), (10, 0.5), (20, 0)):
        assert config.learning_rates(epoch) == pytest.approx([1e-4 * share, 5e-5 * share])


def run_in_halves(root, savedir, monkeypatch, *more):
    """A run that is stopped after its first epoch, and resumed."""
    save = CheckpointSaver.save

    def save_then_stop(saver, state, *args):
        save(saver, state, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(CheckpointSaver, "save", save_then_stop)
        run(root, savedir, *more)
    run(root, savedir, *more, "--resume")


def test_no_process_outlives_a_training(tiny, tmp_path, monkeypatch):
    kept = []

    def keep_frames(*_):
        """As matplotlib does: an exception that is kept holds its frame, and that the frames of all callers."""
        try:
            raise ValueError
        except ValueError as error:
            kept.append(error)

    monkeypatch.setattr(training, "show_epoch", keep_frames)
    before = set(multiprocessing.active_children())
    run(tiny, tmp_path / "run", "--epochs", 1, "--workers", 1)
    assert kept and set(multiprocessing.active_children()) <= before


STEM = ("downsample_layers.0.",)
FIRST_STAGES = (*STEM, "stages.0.", "downsample_layers.1.", "stages.1.")


@pytest.mark.parametrize(("count", "frozen"), [(1, STEM), (3, FIRST_STAGES)])
def test_frozen_layers_keep_their_weights_also_in_a_resumed_run(tiny, tmp_path, monkeypatch, count, frozen):
    more = (*RELEASE, "--freeze", count, "--schedule", "cosine")
    run(tiny, tmp_path / "whole", *more)
    run_in_halves(tiny, tmp_path / "halves", monkeypatch, *more)
    one, two = (read_checkpoint(tmp_path / name / LAST)["state_dict"] for name in ("whole", "halves"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    torch.manual_seed(0)
    start = published_state(create_pair("convnextv2_atto", 2, "none")[0])
    for name in (name for name in start if name.endswith("weight") and start[name].ndim > 1):
        assert torch.equal(one[f"module.{name}"], start[name]) == name.startswith(frozen), name


def test_without_losses_that_read_the_teacher_it_is_not_computed(tiny, tmp_path, monkeypatch):
    """Also: the options of the starter network, and bfloat16 on a CPU, in a run that is stopped and resumed."""
    more = "--losses cls ma --cosine_scale 16 --augment strong --batch_size 4 --sketches 2 --precision bf16".split()
    run(tiny, tmp_path / "whole", *more)
    monkeypatch.setattr(Teacher, "forward", None)  # fails if it is called
    run_in_halves(tiny, tmp_path / "halves", monkeypatch, *more)
    one, two = (read_checkpoint(tmp_path / name / LAST) for name in ("whole", "halves"))
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    assert one["history"] == two["history"]


def test_a_batch_needs_photos_beside_its_sketches(tiny, tmp_path, fails):
    arguments = [*SHORT, "--data_root", tiny, "--savedir", tmp_path, "--sketches", 3]
    assert "--sketches 3: leaves no photos in a batch of 3; use fewer" in fails(train_sketchy_ext.main, *arguments)


def test_more_layers_than_a_model_has_cannot_be_frozen(tiny, tmp_path, fails):
    arguments = [*SHORT, "--data_root", tiny, "--savedir", tmp_path, "--freeze", 6]
    assert "--freeze 6: this model has 5 groups of layers before its head" in fails(train_sketchy_ext.main, *arguments)


@pytest.mark.parametrize(("option", "value", "default"), [
    ("--augment", "strong", "release"), ("--schedule", "cosine", "exponential"), ("--sketches", "2", "None"),
    ("--freeze", "1", "0"), ("--cosine_scale", "16", "0.0"),
])  # fmt: skip
def test_options_that_earlier_versions_lack_count_as_their_default(option, value, default, fails):
    parser = train_parser(PROTOCOLS["sketchy"])
    now = run_record(parser.parse_args([]))["options"]
    earlier = {name: each for name, each in now.items() if name != option[2:]}
    assert str(now[option[2:]]) == default and effective_options(earlier) == effective_options(now)
    other = run_record(parser.parse_args([option, value]))["options"]
    assert effective_options(earlier) != effective_options(other)


def selection(accuracies, warmup):
    history = []
    for epoch, accuracy in enumerate(accuracies):
        entry = {"phase": "bidirectional" if epoch > warmup else "warm-up", "accuracy": accuracy}
        history.append(entry | {"kept": training.kept_names(history, entry)})
    return [entry["kept"] for entry in history]


def test_the_kept_checkpoint_beats_every_epoch_before_it_after_warmup():
    assert selection([90, 50, 91, 91, 92, 80], warmup=1) == [[], [], [BEST], [], [BEST], []]
    # Warm-up epochs are tracked, too: here none ever beats the first, and the best one after warm-up is kept.
    assert selection([90, 50, 60, 55, 70], warmup=1) == [[], [], [BEST_AFTER_WARMUP], [], [BEST_AFTER_WARMUP]]
    # Once there is a best, no other is written beside it.
    assert selection([70, 60, 80, 75], warmup=0) == [[], [BEST_AFTER_WARMUP], [BEST], []]


@pytest.mark.parametrize("phase", ["warm-up", "bidirectional"])
def test_interrupted_and_resumed_ends_with_the_same_weights(tiny, tmp_path, monkeypatch, phase):
    whole = tmp_path / "whole"
    run(tiny, whole, "--drop_path", 0.2)
    stop_after = {"warm-up": 1, "bidirectional": 2}[phase]
    save = CheckpointSaver.save

    def save_then_stop(saver, state, *args):
        save(saver, state, *args)
        if len(state.history) == stop_after:
            raise KeyboardInterrupt

    halves = tmp_path / "halves"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(CheckpointSaver, "save", save_then_stop)
        run(tiny, halves, "--drop_path", 0.2)
    assert end.value.code == 130
    run(tiny, halves, "--drop_path", 0.2, "--resume", "--workers", 2)
    one, two = (read_checkpoint(folder / LAST) for folder in (whole, halves))
    assert one["history"] == two["history"] and len(one["history"]) == 3
    for part in ("state_dict", "teacher"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    record = json.loads((halves / "train.json").read_text())
    assert [entry["phase"] for entry in record["epochs"]] == ["warm-up", "bidirectional", "bidirectional"]
    assert record["options"]["seed"] == 0 and record["versions"]["torch"]


@pytest.mark.parametrize("losses", [["cls"], ["cls", "ka_teacher"]])
def test_a_run_with_some_losses_resumes_and_decays_no_unused_head(tiny, tmp_path, monkeypatch, losses):
    """A head without a gradient must not change by weight decay alone: in all epochs, or in warm-up."""
    more = [*RELEASE, "--losses", *losses]
    run(tiny, tmp_path / "whole", *more)
    torch.manual_seed(0)
    start, _ = create_pair("convnextv2_atto", 2, "none")
    save = CheckpointSaver.save

    def save_then_stop(saver, state, *args):
        save(saver, state, *args)
        assert torch.equal(state.student.head.weight, start.head.weight)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(CheckpointSaver, "save", save_then_stop)
        run(tiny, tmp_path / "halves", *more)
    run(tiny, tmp_path / "halves", *more, "--resume")
    one, two = (read_checkpoint(tmp_path / name / LAST) for name in ("whole", "halves"))
    for part in ("state_dict", "teacher"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    stays = torch.equal(one["teacher"]["head.weight"], start.head.weight)
    assert stays == ("ka_teacher" not in losses)
    assert one["options"]["losses"] == losses


def test_a_run_is_not_resumed_with_other_losses(tiny, tmp_path, fails):
    run(tiny, tmp_path, "--epochs", 1, "--losses", "cls", "ma")
    arguments = [*SHORT, "--data_root", tiny, "--savedir", tmp_path, "--resume", "--epochs", 1]
    message = fails(train_sketchy_ext.main, *arguments, "--losses", "cls")
    assert "was trained with --losses cls ma, not cls; use the same" in message
    message = fails(train_sketchy_ext.main, *arguments, "--losses", "ma", "cls", "--mask_weight", 0.5)
    assert "was trained with --mask_weight 0.3, not 0.5" in message


def test_only_the_head_of_the_teacher_changes_and_only_after_warmup(tiny, tmp_path):
    folders = {}
    for warmup in (0, 2):
        folders[warmup] = tmp_path / str(warmup)
        run(tiny, folders[warmup], *RELEASE, "--warmup_epochs", warmup)
    both, alone = (read_checkpoint(folders[warmup] / LAST)["teacher"] for warmup in (0, 2))
    assert {name for name in both if not torch.equal(both[name], alone[name])} == {"head.weight", "head.bias"}


def test_without_validation_the_last_epoch_is_kept(tiny, tmp_path):
    lists = tiny / "zeroshot1"
    for kind, name in (("sketch_tx_000000000000_ready", "sketch"), ("all_photo", "all_photo")):
        for split in ("train", "zero"):
            (lists / f"{kind}_filelist_{split}.txt").rename(lists / f"{name}_filelist_{split}.txt")
    arguments = ("--zero_version", "zeroshot1", "--batch_size", 10)
    assert run(tiny, tmp_path, *arguments, script=train_quickdraw_ext) == tmp_path / LAST
    assert not (tmp_path / BEST).exists()


def test_a_run_without_a_best_checkpoint_prints_a_note(tiny, tmp_path, capsys):
    kept = run(tiny, tmp_path, "--lr", 0)  # no weight changes, so no epoch beats the first
    assert kept == tmp_path / BEST_AFTER_WARMUP and kept.exists() and not (tmp_path / BEST).exists()
    assert "no model_best.pth.tar; use best_after_warmup.pth.tar instead" in capsys.readouterr().err


def test_bad_options_end_in_one_line(tiny, tmp_path, fails):
    def error(*more):
        return fails(train_sketchy_ext.main, *SHORT, "--data_root", tiny, "--savedir", tmp_path / "new", *more)

    assert "--batch_size 2: too small for 1 sketch and 2 photos; use 3 or more" in error("--batch_size", 2)
    assert "no file of pretrained weights" in error("--finetune", tmp_path / "none.pt")
    assert "no ImageNet head" in error("--model", "vit_small_patch14_dinov2", "--input_size", 518)
    assert "--epochs" in error("--epochs", 0)
    assert "--cls_weight 0: the classifier of the seen classes" in error("--cls_weight", 0)
    assert "add cls" in error("--losses", "ma")
    for device in ("abacus", "meta", "cuda:99"):
        assert f"--device {device}: there is no such device here" in error("--device", device)
    assert "--zero_version" in error("--zero_version", "a/b")
    assert "--seed" in error("--seed", 10**20)
    assert "unrecognized arguments: --epoch" in error("--epoch", 3)
    assert "cid_mask.pickle: every class needs a vector of 20" in error("--imagenet_classes", 20)
    assert not list((tmp_path / "new").glob("*.tar"))


def test_bad_data_ends_in_one_line(tiny, tmp_path, fails):
    def error(*more):
        return fails(train_sketchy_ext.main, *SHORT, "--data_root", tiny, "--savedir", tmp_path / "new", *more)

    lists = tiny / "zeroshot1"
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}" in error("--savedir", tmp_path / "file")
    broken = tiny / "photo of train/2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for workers in (0, 2):
        assert f"{broken}: not a readable image" in error("--workers", workers)
    Image.new("L", (9, 9)).save(broken)
    (lists / "cid_mask.pickle").unlink()
    assert "--no_mask" in error()
    held_back = lists / "sketch_tx_000000000000_ready_filelist_test.txt"
    held_back.unlink()
    assert f"{held_back}: no such list" in (message := error("--no_mask")) and "--no_validation" in message
    write_list(lists / "all_photo_filelist_train.txt", [("photo of train/9.png", 0)])
    assert "all_photo_filelist_train.txt:1: no image" in error("--no_mask", "--no_validation")


def test_quickdraw_has_a_mask_with_the_option_mask(tiny, tmp_path, fails):
    (tiny / "zeroshot1").rename(lists := tiny / "zeroshot")
    for path in list(lists.glob("sketch_*_train.txt")):
        path.rename(lists / "sketch_train.txt")
    mask = lists / "cid_mask.pickle"
    command = [
        *SHORT,
        "--data_root",
        str(tiny),
        "--savedir",
        str(tmp_path / "run"),
        "--batch_size",
        "10",
        "--epochs",
        "1",
    ]
    command += ["--overwrite"]
    losses = []
    for option in ([], ["--mask"]):
        write_mask(mask, np.ones((2, 1000)) * np.arange(1000))
        train_quickdraw_ext.main([*command, *option])
        losses.append(read_checkpoint(tmp_path / "run" / LAST)["history"][0]["ka_student"])
    assert losses[0] != losses[1]
    mask.unlink()
    assert f"{mask}: no semantic mask; make one with" in fails(train_quickdraw_ext.main, *command, "--mask")


def test_earlier_checkpoints_are_not_lost_by_accident(tiny, tmp_path, fails):
    run(tiny, tmp_path, "--epochs", 1)
    before = (tmp_path / LAST).read_bytes()
    arguments = [train_sketchy_ext.main, *SHORT, "--data_root", tiny, "--savedir", tmp_path]
    assert "already holds checkpoint.pth.tar; --resume continues" in fails(*arguments)
    assert "trained with --epochs 1, not 3" in fails(*arguments, "--resume")
    assert (tmp_path / LAST).read_bytes() == before
    assert "no file of pretrained weights" in fails(*arguments, "--overwrite", "--finetune", "gone.pt")
    assert (tmp_path / LAST).read_bytes() == before
    assert "not allowed with argument" in fails(*arguments, "--overwrite", "--resume")
    run(tiny, tmp_path, "--epochs", 1, "--seed", 1, "--overwrite")
    assert (tmp_path / LAST).read_bytes() != before


def test_what_an_earlier_run_left_goes_when_the_new_one_starts(tiny, tmp_path):
    for name in (LAST, BEST, BEST_AFTER_WARMUP, "results.json"):
        (tmp_path / name).write_bytes(b"old")
    assert run(tiny, tmp_path, "--epochs", 1, "--overwrite") == tmp_path / LAST
    assert not any((tmp_path / name).exists() for name in (BEST, BEST_AFTER_WARMUP, "results.json"))


def test_a_run_is_not_resumed_on_other_lists(tiny, tmp_path, monkeypatch, fails):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("models.logger.print_epoch", _interrupt)
        run(tiny, tmp_path)
    path = tiny / "zeroshot1/all_photo_filelist_train.txt"
    path.write_text(path.read_text().replace(" 1\n", " 0\n"))
    arguments = [*SHORT, "--data_root", tiny, "--savedir", tmp_path, "--resume"]
    assert "all_photo_filelist_train.txt is not the one" in fails(train_sketchy_ext.main, *arguments)


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_damaged_checkpoint_cannot_be_resumed(tiny, tmp_path, fails):
    arguments = [train_sketchy_ext.main, *SHORT, "--data_root", tiny, "--savedir", tmp_path, "--resume"]
    assert "holds no checkpoint.pth.tar to resume" in fails(*arguments)
    run(tiny, tmp_path, "--epochs", 1)
    whole = read_checkpoint(tmp_path / LAST)
    whole["options"]["epochs"] = 3
    for change in (
        {"optimizer": 7},
        {"optimizer_1": {}},
        {"optimizer_1": whole["optimizer"]},
        {"history": 3},
        {"history": [{}]},
        {"options": []},
    ):
        torch.save(whole | change, tmp_path / LAST)
        assert "damaged, it cannot be resumed" in fails(*arguments)
    torch.save(whole | {"teacher": 7}, tmp_path / LAST)
    assert "expected a state dict" in fails(*arguments)


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(tiny, tmp_path, fails, monkeypatch):
    save, kept = torch.save, []

    def fail_in_the_second_epoch(content, file):
        if content["epoch"] == 2:
            kept.append((tmp_path / LAST).read_bytes())
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0")
        save(content, file)

    monkeypatch.setattr("models.checkpoints.torch.save", fail_in_the_second_epoch)
    arguments = [*SHORT, "--data_root", tiny, "--savedir", tmp_path, "--no_validation"]
    assert "is the disk full?" in fails(train_sketchy_ext.main, *arguments)
    assert (tmp_path / LAST).read_bytes() == kept[0]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_of_the_authors_cannot_be_resumed(tiny, tmp_path, fails):
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "checkpoint.pth.tar")
    arguments = [*SHORT, "--data_root", tiny, "--savedir", tmp_path, "--resume"]
    assert "holds no teacher" in fails(train_sketchy_ext.main, *arguments)


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path, fails):
    arguments = [*SHORT, "--data_root", tiny, "--savedir", tmp_path, "--lr", "1e30"]
    assert "lower --lr" in fails(train_sketchy_ext.main, *arguments)


def test_a_device_without_float64_is_named(tiny, tmp_path, fails, monkeypatch):
    def zeros(*size, device=None, dtype=None):  # as torch does on a Mac
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr("models.options.torch.zeros", zeros)
    arguments = [*SHORT, "--device", "mps", "--data_root", tiny, "--savedir", tmp_path]
    assert "--device mps: computes no float64" in (message := fails(train_sketchy_ext.main, *arguments))
    assert message.endswith("use cpu")


def test_the_help_and_the_note_say_how_many_epochs_are_warm_up(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path, "--epochs", 2, "--warmup_epochs", 1) == tmp_path / LAST
    assert (
        "all epochs were warm-up (--warmup_epochs E_w: epochs 0 to E_w, which are E_w + 1)" in capsys.readouterr().err
    )
    help_text = " ".join(train_parser(PROTOCOLS["sketchy"]).format_help().split())
    assert "epochs 0 to E_w, which are E_w + 1 epochs as in the release, train the student alone" in help_text
