"""What features need at least is found without computing them, and a run that cannot fit ends before it begins."""

import pytest

import test_sketchy_ext_zeroshot
import train_sketchy_ext
from models.checkpoints import save_checkpoint
from models.memory_needs import inference_memory, least_memory
from models.networks import Student, create_backbone
from utils import memory

MODEL = "test_efficientnet"


@pytest.fixture
def student():
    return Student(create_backbone(MODEL), 2)


def test_needs_grow_with_pixels_and_images_and_are_larger_in_training(student):
    one = least_memory(student, 64, 1)
    assert one > 64 * 64 * 3 * 4 and least_memory(student, 128, 5) == 20 * one
    assert least_memory(student, 64, 1, bytes_a_value=2) == one / 2
    assert least_memory(student, 64, 1, training=True) > one
    student.requires_grad_(False)
    assert least_memory(student, 64, 1, training=True) == one
    assert inference_memory(student, 64, 7) == one + 7 * 3 * 64 * 64


def test_a_backbone_that_needs_values_is_not_estimated(student):
    student.backbone.forward_features = lambda images: 1 / 0
    assert least_memory(student, 64, 1) == 0


def test_training_and_testing_that_cannot_fit_end_in_one_line(student, tiny, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000_000)
    own = f"--data_root {tiny} --model {MODEL} --input_size 4096 --batch_size 30 --workers 0 --device cpu".split()
    line = "--input_size 4096 with --batch_size 30: needs at least "
    told = fails(train_sketchy_ext.main, *own, "--finetune", "none", "--savedir", tmp_path / "run")
    assert line in told and "and 1.0 GB are free; lower --batch_size or --input_size" in told
    save_checkpoint(tmp_path / "model_best.pth.tar", student, options={"model": MODEL}, classes=["a", "b"])
    assert line in fails(test_sketchy_ext_zeroshot.main, *own, "--resume_dir", tmp_path)
