import math

import pytest
import torch

from models.losses import (
    LOSSES,
    PAPER_WEIGHTS,
    Batch,
    Loss,
    LossWeights,
    alignment_loss,
    alignment_losses,
    modality_loss,
)
from models.networks import StudentOutput, TeacherOutput

GOLDEN_NAMES = {
    "cls": "loss_cls",
    "ka_student": "loss_kd_1",
    "ma": "loss_kld",
    "student": "loss_total",
    "ka_teacher": "loss_kd_2",
}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_gradients_equal_golden(golden, bidirectional, masked):
    z = golden("alignment")
    inputs = {
        name: z[name].requires_grad_() for name in ("seen_logits", "student_logits", "features", "teacher_logits")
    }
    student = StudentOutput(inputs["seen_logits"], inputs["student_logits"], inputs["features"])
    mask = z["cid_mask"] if masked else torch.zeros(len(z["target"]), 1)
    batch = Batch(None, z["target"], z["tag"][:, 0], mask, z["noise"])
    teacher = TeacherOutput(inputs["teacher_logits"], torch.zeros(len(z["target"]), 1))
    losses = alignment_losses(student, teacher, batch, bidirectional)
    losses["total"].backward()
    prefix = ("" if masked else "nomask_") + ("bidirectional_" if bidirectional else "warmup_")
    for name, golden_name in GOLDEN_NAMES.items():
        if prefix + golden_name in z:
            torch.testing.assert_close(losses[name].detach(), z[prefix + golden_name], rtol=0, atol=1e-10)
    assert bidirectional == (prefix + "loss_kd_2" in z)
    for name, tensor in inputs.items():
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.testing.assert_close(gradient, z[f"{prefix}grad_{name}"], rtol=0, atol=1e-12)


def test_losses_equal_plain_loops():
    generator = torch.Generator().manual_seed(0)
    learner, source, mask = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    is_photo = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    total = 0.0
    for i in (0, 2):
        weights = [math.exp(source[i, j] + 0.3 * mask[i, j]) for j in range(4)]
        log_sum = math.log(sum(math.exp(learner[i, j]) for j in range(4)))
        total -= sum(weights[j] / sum(weights) * (learner[i, j].item() - log_sum) for j in range(4))
    assert alignment_loss(learner, source, 0.3 * mask, is_photo).item() == pytest.approx(total / 2, abs=1e-12)


def test_a_batch_without_photos_costs_nothing():
    logits = torch.randn(3, 4)
    assert alignment_loss(logits, logits, 0.0, torch.zeros(3)).item() == 0


def test_features_spread_like_the_noise_cost_nothing():
    noise = torch.randn(5, 8, dtype=torch.float64)
    assert modality_loss(noise + 3.0, noise).item() == pytest.approx(0, abs=1e-12)


def random_step(generator):
    """(StudentOutput, TeacherOutput, Batch) of six images, leaves that take gradients."""

    def draw(width):
        return torch.randn(6, width, generator=generator, dtype=torch.float64).requires_grad_()

    student = StudentOutput(seen_logits=draw(3), imagenet_logits=draw(8), features=draw(5))
    teacher = TeacherOutput(imagenet_logits=draw(8), features=draw(5))
    labels, is_photo = torch.arange(6) % 3, torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)
    return student, teacher, Batch(None, labels, is_photo, draw(8).detach(), draw(5).detach())


def without(*names):
    return LossWeights({name: weight for name, weight in PAPER_WEIGHTS.losses.items() if name not in names})


@pytest.mark.parametrize("left_out", [(), ("ma",), ("ka_teacher",), ("ka_student", "ka_teacher"), ("ka_student", "ma")])
def test_a_loss_of_weight_0_is_not_computed_and_has_no_gradient(left_out, monkeypatch):
    student, teacher, batch = random_step(torch.Generator().manual_seed(0))
    whole = alignment_losses(student, teacher, batch, True)
    for name in left_out:
        monkeypatch.setitem(LOSSES, name, LOSSES[name]._replace(function=None))  # fails if it is called
    losses = alignment_losses(student, teacher, batch, True, loss_weights=without(*left_out))
    zeros = LossWeights(PAPER_WEIGHTS.losses | dict.fromkeys(left_out, 0.0))
    assert alignment_losses(student, teacher, batch, True, loss_weights=zeros).keys() == losses.keys()
    used = [name for name in LOSSES if name not in left_out]
    assert losses.keys() == {*used, "student", "total"}
    assert all(losses[name] == whole[name] for name in used)
    total = sum(LOSSES[name].weight * whole[name] for name in used)
    assert losses["total"].item() == pytest.approx(total.item(), abs=1e-12)
    leaves = (*student, teacher.imagenet_logits)
    expected_total = sum(
        LOSSES[name].weight * alignment_losses(student, teacher, batch, True, loss_weights=only(name))["total"]
        for name in used
    )
    expected = torch.autograd.grad(expected_total, leaves, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(losses["total"], leaves, allow_unused=True)
    for leaf, one, two in zip(leaves, found, expected, strict=True):
        one, two = (torch.zeros_like(leaf) if each is None else each for each in (one, two))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def only(name):
    return LossWeights({name: 1.0})


def test_weights_of_mask_and_modality():
    student, teacher, batch = random_step(torch.Generator().manual_seed(0))
    doubled = alignment_losses(student, teacher, batch._replace(mask=2 * batch.mask), True)
    weights = LossWeights(PAPER_WEIGHTS.losses | {"ma": 3.0}, mask_weight=0.6)
    heavy = alignment_losses(student, teacher, batch, True, loss_weights=weights)
    assert heavy["ka_student"].item() == pytest.approx(doubled["ka_student"].item(), abs=1e-12)
    assert heavy["ka_teacher"].item() == pytest.approx(doubled["ka_teacher"].item(), abs=1e-12)
    expected = heavy["cls"] + heavy["ka_student"] + 3.0 * heavy["ma"]
    assert heavy["student"].item() == pytest.approx(expected.item(), abs=1e-12)


def test_a_row_of_the_table_is_a_loss_of_both_outputs(monkeypatch):
    """A loss on the teacher's features, for the student alone, needs a row of LOSSES and nothing else."""

    def distance(student, teacher, batch, counts):
        return (student.features - teacher.features).square().sum() / counts.images

    monkeypatch.setitem(LOSSES, "feat", Loss("L_feat", distance, weight=0.0, reads_teacher=True))
    student, teacher, batch = random_step(torch.Generator().manual_seed(0))
    assert "feat" not in alignment_losses(student, teacher, batch, False)
    plain = alignment_losses(student, teacher, batch, False)["student"]
    losses = alignment_losses(student, teacher, batch, False, loss_weights=with_feat())
    assert losses["feat"].item() == pytest.approx((student.features - teacher.features).square().sum().item() / 6)
    assert losses["student"].item() == pytest.approx((plain + 0.5 * losses["feat"]).item())
    losses["total"].backward()
    assert student.features.grad is not None and teacher.features.grad is None


@pytest.mark.parametrize("bidirectional", [False, True])
def test_losses_that_do_not_read_the_teacher_need_none(bidirectional):
    student, teacher, batch = random_step(torch.Generator().manual_seed(0))
    weights = without("ka_student", "ka_teacher")
    assert not weights.reads_teacher(bidirectional) and PAPER_WEIGHTS.reads_teacher(bidirectional)
    assert without("ka_student").reads_teacher(bidirectional) == bidirectional
    losses = [alignment_losses(student, each, batch, bidirectional, loss_weights=weights) for each in (teacher, None)]
    assert losses[0] == losses[1] and losses[0]["total"] > 0
    gradients = [torch.autograd.grad(each["total"], student.features)[0] for each in losses]
    assert torch.equal(*gradients)


def with_feat():
    return LossWeights(PAPER_WEIGHTS.losses | {"feat": 0.5})
