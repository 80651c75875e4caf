import pytest
import torch

from models import interpolate
from models.checkpoints import load_student, read_checkpoint, save_checkpoint
from models.networks import Student, create_backbone

OPTIONS = {"model": "test_efficientnet", "input_size": 40, "imagenet_classes": 7}


def student(seed):
    torch.manual_seed(seed)
    return Student(create_backbone(OPTIONS["model"], 7), 4)


@pytest.fixture
def files(tmp_path):
    save_checkpoint(tmp_path / "trained.pth.tar", student(1), options=OPTIONS, classes=list("abcd"))
    torch.save(student(2).backbone.state_dict(), tmp_path / "pretrained.pth")
    return tmp_path


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_weights_are_between_trained_and_pretrained_ones(files, share):
    arguments = [files / "trained.pth.tar", "--finetune", files / "pretrained.pth", "--share", share]
    path = interpolate.main([str(each) for each in [*arguments, "--to", files / "between" / "c.pth.tar"]])
    mixed, metadata, class_names = load_student(path)
    trained, pretrained = student(1).state_dict(), student(2).state_dict()
    for name, value in mixed.state_dict().items():
        own = share if name.startswith("backbone.") else 0
        torch.testing.assert_close(value, ((1 - own) * trained[name] + own * pretrained[name]).to(value.dtype))
    assert {name: metadata[name] for name in OPTIONS} == OPTIONS and class_names == list("abcd")
    assert read_checkpoint(path)["options"]["pretrained_share"] == share


def test_what_cannot_be_mixed_ends_in_one_line(files, fails):
    trained, to = files / "trained.pth.tar", ("--to", files / "c.pth.tar")
    finetune = ("--finetune", files / "pretrained.pth", "--share")
    assert "argument --share" in fails(interpolate.main, trained, *finetune, 1.5, *to)
    assert "does not end in .pth.tar" in fails(interpolate.main, trained, *finetune, 0.5, "--to", files / "c.onnx")
    assert "no pretrained weights" in fails(interpolate.main, trained, "--finetune", "gone.pth", "--share", 0, *to)
    torch.save(create_backbone(OPTIONS["model"], 9).state_dict(), files / "other.pth")
    other = ("--finetune", files / "other.pth", "--share", 0)
    assert "set --imagenet_classes 9" in fails(interpolate.main, trained, *other, *to)
    assert not (files / "c.pth.tar").exists()
