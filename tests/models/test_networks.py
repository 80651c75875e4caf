import numpy as np
import pytest
import torch
from timm.models.convnext import ConvNeXt

from models.eval import evaluate
from models.eval.features import Features
from models.eval.matching import euclidean_distances
from models.losses import Batch
from models.networks import Student, Teacher, create_backbone
from models.train_step import TrainState, create_optimizers, train_step
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
        close |= {"student_features": output.features, "teacher_logits": teacher(images).imagenet_logits}
        for name, value in close.items():
            torch.testing.assert_close(value, z[name + suffix], rtol=0, atol=tolerance)
        torch.testing.assert_close(student.features(images), output.features)


def test_only_the_head_of_the_teacher_is_trained():
    teacher = Teacher(create_backbone("convnextv2_atto", 10))
    assert [name for name, p in teacher.named_parameters() if p.requires_grad] == [
        "backbone.head.fc.weight",
        "backbone.head.fc.bias",
    ]
    teacher(torch.randn(2, 3, 32, 32)).imagenet_logits.sum().backward()
    assert teacher.head.weight.grad is not None


def test_a_cosine_scale_makes_seen_logits_of_directions_alone():
    student = Student(create_backbone("convnextv2_atto", 10), 5)
    images = torch.randn(3, 3, 32, 32)
    plain = student(images)
    student.cosine_scale = 16.0
    output = student(images)
    cosines = torch.nn.functional.cosine_similarity(output.features[:, None], student.linear.weight[None], dim=2)
    torch.testing.assert_close(output.seen_logits, 16 * cosines + student.linear.bias)
    assert torch.equal(output.features, plain.features) and torch.equal(output.imagenet_logits, plain.imagenet_logits)


def test_the_seen_class_layer_starts_small():
    linear = Student(create_backbone("convnextv2_atto", 10), 30).linear
    assert 1e-5 < linear.weight.std() < 3e-5
    assert linear.bias.abs().max() == 0


@pytest.mark.parametrize(
    "model, words",
    [
        ("resnet5", "timm knows no 'resnet5'; there is resnet50, "),
        ("resnet50.b9_in1k", "Invalid pretrained tag"),
        ("deit_tiny_distilled_patch16_224", "head of .* is not a linear layer"),
        ("volo_d1_224", "head does not come last"),
    ],
)
def test_a_model_that_is_none_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        Student(create_backbone(model, 3), 2)


def test_a_model_without_stochastic_depth_is_named():
    with pytest.raises(ValueError, match="vgg11 takes no --drop_path"):
        create_backbone("vgg11", 3, drop_path=0.1)


def rules():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture
def environment_allows_tf32():
    before = rules()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("precision", "wanted"), [
    ("fp32", (False, False)), ("tf32", (True, False)), ("tf32_all", (True, True)), ("bf16", (True, False)),
])  # fmt: skip
def test_arithmetic_is_what_it_says_in_forward_and_backward(precision, wanted, environment_allows_tf32, monkeypatch):
    sizes = dict(num_classes=20, depths=[1, 1, 1, 1], dims=[4, 8, 12, 16], use_grn=True, ls_init_value=None)
    student, teacher = Student(ConvNeXt(**sizes), 5), Teacher(ConvNeXt(**sizes))
    seen = set()
    student.linear.register_forward_hook(lambda *_: seen.add(("forward", rules())))
    student.backbone.stem[0].weight.register_hook(lambda _: seen.add(("backward", rules())))
    labels = torch.arange(4)
    batch = Batch(torch.randn(4, 3, 32, 32), labels, torch.ones(4), torch.zeros(4, 1), torch.randn(4, 16))
    state = TrainState(student, teacher, create_optimizers(student, teacher, 1e-3, 1e-3, 0.0))
    train_step(state, batch, True, precision=precision)
    assert seen == {("forward", wanted), ("backward", wanted)}
    assert rules() == (True, True)  # the caller's own are as they were


def test_distances_are_float32_whatever_the_environment_says(environment_allows_tf32, monkeypatch):
    seen = []

    def distances(*arguments, **named):
        seen.append(rules())
        return euclidean_distances(*arguments, **named)

    monkeypatch.setattr(evaluate, "euclidean_distances", distances)
    rows = np.eye(6, 4, dtype=np.float32)
    evaluate.evaluate_rows(Features(rows, np.arange(6) % 2, rows, np.arange(6) % 2), {None: None})
    assert set(seen) == {(False, False)} and rules() == (True, True)
