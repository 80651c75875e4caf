import pytest
import torch

from models.networks import Student, Teacher, create_backbone
from models.weights import load_published


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), [(torch.float32, "", 1e-5), (torch.float64, "_f64", 1e-10)])
def test_forward_equals_golden(golden, small_backbone, dtype, suffix, tolerance):
    z = golden("forward")
    student, teacher = Student(small_backbone(z), int(z["linear_num"])), Teacher(small_backbone(z))
    for network, name in ((student, "student"), (teacher, "teacher")):
        load_published(
            network, {key.removeprefix(f"{name}/"): value for key, value in z.items() if f"{name}/" in key}, name
        )
        network.to(dtype)
    images = z["images"].to(dtype)
    for train in (True, False):
        student.train(train)
        output = student(images)
        close = {"student_seen_logits": output.seen_logits, "student_logits": output.imagenet_logits}
        close |= {"student_features": output.features, "teacher_logits": teacher(images)}
        for name, value in close.items():
            torch.testing.assert_close(value, z[name + suffix], rtol=0, atol=tolerance)
        torch.testing.assert_close(student.features(images), output.features)


def test_only_the_head_of_the_teacher_learns():
    teacher = Teacher(create_backbone("convnextv2_atto", 10))
    assert [name for name, p in teacher.named_parameters() if p.requires_grad] == [
        "backbone.head.fc.weight",
        "backbone.head.fc.bias",
    ]
    teacher(torch.randn(2, 3, 32, 32)).sum().backward()
    assert teacher.head.weight.grad is not None


def test_the_seen_class_layer_starts_small():
    linear = Student(create_backbone("convnextv2_atto", 10), 30).linear
    assert 1e-5 < linear.weight.std() < 3e-5
    assert linear.bias.abs().max() == 0


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match=r"'resnet50'; choose one of convnextv2_atto, .*convnextv2_tiny"):
        create_backbone("resnet50")
