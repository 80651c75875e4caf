import math

import pytest
import torch

from models.losses import LOSS_NAMES, Batch, LossWeights, alignment_loss, alignment_losses, modality_loss
from models.networks import StudentOutput

LOSSES = {
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
    losses = alignment_losses(student, inputs["teacher_logits"], batch, bidirectional)
    losses["total"].backward()
    prefix = ("" if masked else "nomask_") + ("bidirectional_" if bidirectional else "warmup_")
    for name, golden_name in LOSSES.items():
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
    """(StudentOutput, teacher's logits, Batch) of six images, leaves that take gradients."""
    shapes = {"seen_logits": (6, 3), "imagenet_logits": (6, 8), "features": (6, 5)}
    draw = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }
    teacher = torch.randn(6, 8, generator=generator, dtype=torch.float64).requires_grad_()
    labels, is_photo = torch.arange(6) % 3, torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)
    mask, noise = (torch.randn(6, width, generator=generator, dtype=torch.float64) for width in (8, 5))
    return StudentOutput(**draw), teacher, Batch(None, labels, is_photo, mask, noise)


@pytest.mark.parametrize("left_out", [(), ("ma",), ("ka_teacher",), ("ka_student", "ka_teacher"), ("ka_student", "ma")])
def test_a_term_that_is_left_out_is_measured_and_has_no_gradient(left_out):
    student, teacher, batch = random_step(torch.Generator().manual_seed(0))
    kept = tuple(term for term in LOSS_NAMES if term not in left_out)
    losses = alignment_losses(student, teacher, batch, True, objective=LossWeights(kept))
    whole = alignment_losses(student, teacher, batch, True)
    assert all(losses[term] == whole[term] for term in LOSS_NAMES)
    weight = {"cls": 1, "ka_student": 1, "ma": 0.1, "ka_teacher": 1}
    total = sum(weight[term] * whole[term] for term in kept)
    assert losses["total"].item() == pytest.approx(total.item(), abs=1e-12)
    leaves = (*student, teacher)
    expected = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(losses["total"], leaves, allow_unused=True)
    for one, two in zip(found, expected, strict=True):
        zero = torch.zeros(1, dtype=torch.float64)
        torch.testing.assert_close(
            zero if one is None else one, (zero if two is None else two).expand_as(zero if one is None else one)
        )


def test_weights_of_mask_and_modality():
    student, teacher, batch = random_step(torch.Generator().manual_seed(0))
    doubled = alignment_losses(student, teacher, batch._replace(mask=2 * batch.mask), True)
    heavy = alignment_losses(student, teacher, batch, True, objective=LossWeights(mask_weight=0.6, modality_weight=3.0))
    assert heavy["ka_student"].item() == pytest.approx(doubled["ka_student"].item(), abs=1e-12)
    assert heavy["ka_teacher"].item() == pytest.approx(doubled["ka_teacher"].item(), abs=1e-12)
    expected = heavy["cls"] + heavy["ka_student"] + 3.0 * heavy["ma"]
    assert heavy["student"].item() == pytest.approx(expected.item(), abs=1e-12)
