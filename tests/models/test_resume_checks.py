"""--resume: every malformed entry of a checkpoint ends in one line."""

import copy
import math

import pytest
import torch
from timm.models.convnext import ConvNeXt

from models.checkpoints import LAST, CheckpointSaver, student_metadata
from models.losses import Batch
from models.networks import Student, Teacher
from models.resume import check_savedir, restore
from models.train_step import LOGGED, TrainState, create_optimizers, train_step
from utils.cli import InputError

RECORD = {"protocol": "Sketchy Ext", "data": {"list": "ab12"}, "options": {"lr": 1e-3, "seed": 0}}


def new_run():
    torch.manual_seed(0)
    sizes = dict(depths=[1, 1, 2, 1], dims=[4, 8, 12, 16], use_grn=True, ls_init_value=None)
    student, teacher = Student(ConvNeXt(num_classes=20, **sizes), 5), Teacher(ConvNeXt(num_classes=20, **sizes))
    return TrainState(student, teacher, create_optimizers(student, teacher, 1e-3, 1e-3, 5e-4))


def step(run):
    images, labels = torch.randn(6, 3, 48, 48), torch.arange(6) % 5
    batch = Batch(images, labels, (labels > 1).float(), torch.zeros(6, 1), torch.randn(6, 16))
    train_step(run, batch, bidirectional=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the checkpoint of a run after two epochs, and its content, of which the tests change copies."""
    run, folder = new_run(), tmp_path_factory.mktemp("run")
    for epoch, phase in enumerate(("warm-up", "bidirectional")):
        step(run)
        entry = {"epoch": epoch, "phase": phase, "lr": 1e-3, "kept": [], "accuracy": 50.0}
        run.history.append(entry | dict.fromkeys(LOGGED, 1.0))
    CheckpointSaver(folder, RECORD).save(run)
    return folder, torch.load(folder / LAST, weights_only=True)


def change(key, value):
    """A change of one entry; `key` is its path, and `value` may be a function of the old value."""

    def apply(content):
        *path, last = key
        for each in path:
            content = content[each]
        content[last] = value(content[last]) if callable(value) else value

    return apply


def remove(*key):
    def apply(content):
        *path, last = key
        for each in path:
            content = content[each]
        del content[last]

    return apply


MOMENT = ("optimizer", "state", 0, "exp_avg")
DAMAGES = {
    "step below 0": change(["step"], -5),
    "step without end": change(["step"], math.inf),
    "step of truth": change(["step"], True),
    "step of text": change(["step"], "1"),
    "steps without sums": change(["step"], 1),
    "sums too short": change(["sums"], [1.0, 2.0]),
    "sums without a name": change(["sums"], {"cls": 1.0}),
    "sums of text": change(["sums"], ["a"] * 7),
    "sums not finite": change(["sums"], [math.nan] * 7),
    "history a number": change(["history"], 3),
    "history of lists": change(["history"], [[]]),
    "history of empty entries": change(["history"], [{}]),
    "an entry without epoch": remove("history", 0, "epoch"),
    "an entry without lr": remove("history", 0, "lr"),
    "an entry without kept": remove("history", 1, "kept"),
    "an entry without phase": remove("history", 1, "phase"),
    "an entry of another phase": change(["history", 0, "phase"], "cooling"),
    "kept a text": change(["history", 0, "kept"], "all"),
    "a loss of text": change(["history", 0, "cls"], "low"),
    "a loss not finite": change(["history", 0, "cls"], math.nan),
    "epochs in disorder": change(["history"], lambda history: history[::-1]),
    "options a list": change(["options"], []),
    "an option a tensor": change(["options", "lr"], torch.ones(2)),
    "an option a dict": change(["options", "seed"], {"a": 1}),
    "an option without a name": change(["options"], lambda options: options | {3: 4}),
    "data a list": change(["data"], []),
    "data of numbers": change(["data"], {"list": 3}),
    "no data": remove("data"),
    "no protocol": remove("protocol"),
    "protocol a number": change(["protocol"], 7),
    "optimizer a number": change(["optimizer"], 7),
    "optimizer empty": change(["optimizer"], {}),
    "no optimizer": remove("optimizer_1"),
    "the other's optimizer": lambda content: content.update(optimizer_1=content["optimizer"]),
    "groups a number": change(["optimizer", "param_groups"], 3),
    "a group a number": change(["optimizer", "param_groups"], [3]),
    "no groups": change(["optimizer", "param_groups"], []),
    "state a list": change(["optimizer", "state"], []),
    "a state that is empty after steps": change(["optimizer", "state"], {}),
    "a teacher's state that is empty after steps": change(["optimizer_1", "state"], {}),
    "a parameter without moments": remove("optimizer", "state", 0),
    "a state that is none": change(["optimizer", "state", 0], 5),
    "a moment missing": remove(*MOMENT),
    "a moment of another shape": change(MOMENT, lambda value: value.flatten()[:1].clone()),
    "a moment with strides of 0": change(MOMENT, lambda value: torch.zeros(1).expand(value.shape)),
    "a moment of one element": change(MOMENT, lambda value: torch.zeros(1)),
    "a sparse moment": change(MOMENT, lambda value: value.to_sparse()),
    "a moment of whole numbers": change(MOMENT, lambda value: value.long()),
    "a moment without values": change(MOMENT, lambda value: value.to("meta")),
    "a moment not finite": change(MOMENT, lambda value: value * math.nan),
    "a moment a list": change(MOMENT, lambda value: value.tolist()),
    "step of Adam missing": remove("optimizer", "state", 0, "step"),
    "step of Adam below 0": change(["optimizer", "state", 0, "step"], torch.tensor(-5.0)),
    "step of Adam without end": change(["optimizer", "state", 0, "step"], torch.tensor(math.inf)),
    "step of Adam a vector": change(["optimizer", "state", 0, "step"], torch.ones(3)),
}
OF_WEIGHTS = {
    "a sparse weight": change(["teacher", "norm.weight"], lambda value: value.to_sparse()),
    "a quantised weight": change(
        ["teacher", "norm.weight"], lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
    ),
    "a weight without values": change(["state_dict", "module.norm.weight"], lambda value: value.to("meta")),
    "a weight of whole numbers": change(["state_dict", "module.norm.weight"], lambda value: value.long()),
    "a weight of text": change(["state_dict", "module.norm.weight"], "1"),
    "a complex weight": change(["state_dict", "module.norm.weight"], lambda value: value.to(torch.complex64)),
}


@pytest.mark.parametrize("name", [*DAMAGES, *OF_WEIGHTS])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_state_is_refused_in_one_line(whole, name):
    folder, content = whole
    content = copy.deepcopy(content)
    (DAMAGES | OF_WEIGHTS)[name](content)
    torch.save(content, folder / LAST)
    with pytest.raises(InputError) as refused:
        restore(new_run(), folder, RECORD, {})
    message = str(refused.value)
    assert str(folder / LAST) in message and "\n" not in message
    assert ("damaged, it cannot be resumed (" if name in DAMAGES else "is no ordinary tensor") in message


def test_a_valid_state_is_restored_from_any_memory_layout(whole):
    folder, content = whole
    ends = []
    for form in ("as it is", "other strides", "settings of another version"):
        content = copy.deepcopy(whole[1])
        if form == "other strides":
            for each in content["optimizer"]["state"].values():
                each["exp_avg"] = each["exp_avg"].T.contiguous().T if each["exp_avg"].ndim == 2 else each["exp_avg"]
        if form == "settings of another version":
            del content["optimizer"]["param_groups"][0]["eps"]
        torch.save(content, folder / LAST)
        run = new_run()
        restore(run, folder, RECORD, {})
        assert len(run.history) == 2 and run.step == 0
        torch.manual_seed(1)
        step(run)
        assert all(state["step"] == 3 for state in run.optimizers[0].state.values())
        ends.append(run.trainable_parameters())
    for other in ends[1:]:
        assert all(torch.equal(one, two) for one, two in zip(ends[0], other, strict=True))


def test_records_of_a_run_are_not_replaced_without_a_question(tmp_path):
    (tmp_path / "log.jsonl").touch()
    check_savedir(tmp_path)
    (tmp_path / "curves.png").touch()
    with pytest.raises(InputError, match=r"already holds curves\.png; --overwrite replaces it"):
        check_savedir(tmp_path)
    check_savedir(tmp_path, overwrite=True)
    (tmp_path / LAST).mkdir()
    with pytest.raises(InputError, match="a folder where a file of this program belongs"):
        check_savedir(tmp_path, overwrite=True)


def test_an_input_size_that_is_none_has_a_note(tmp_path, capsys):
    for size in (-1, 10**9, "big"):
        content = {"state_dict": {"linear.weight": torch.ones(3, 2)}, "options": {"input_size": size}}
        torch.save(content, tmp_path / LAST)
        assert student_metadata(tmp_path / LAST)["input_size"] == 224
        assert f"records an input size of {size}, which is none; 224 is used" in capsys.readouterr().err
