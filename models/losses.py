"""The losses of SBKA (arXiv:2312.10320, symmetrical bidirectional knowledge alignment), and LOSSES, the table of them.

Shapes: B images of a batch, C seen classes, J ImageNet classes, D features. Follows the authors' release, except that a
batch without photos costs 0 instead of NaN. Uses no network, no data and no options.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional as F


class Batch(NamedTuple):
    """The input of a training step: tensors with one row an image, on one device."""

    images: torch.Tensor  # (B, 3, H, W), normalised
    labels: torch.Tensor  # (B,) int64, seen classes from 0
    is_photo: torch.Tensor  # (B,) 1 for a photo, 0 for a sketch
    mask: torch.Tensor  # (B, J) rows of the semantic mask, or (B, 1) zeros for none
    noise: torch.Tensor  # (B, D) standard normal, drawn anew for each step

    def micro_batches(self, count):
        """At most `count` Batches of about the same size, in order."""
        return [Batch(*chunks) for chunks in zip(*(values.chunk(count) for values in self), strict=True)]


class Counts(NamedTuple):
    """Loss denominators: images and photos of the whole batch."""

    images: torch.Tensor  # scalar
    photos: torch.Tensor  # scalar

    @classmethod
    def of(cls, batch):
        """Counts of a Batch."""
        return cls(batch.is_photo.new_full((), len(batch.labels)), batch.is_photo.sum())


def classification_loss(seen_logits, labels, images=None):
    """L_cls: cross entropy of seen_logits (B, C) with labels (B,) int64, divided by `images` (default B)."""
    return F.cross_entropy(seen_logits, labels, reduction="sum") / (len(labels) if images is None else images)


def alignment_loss(learner_logits, source_logits, mask, is_photo, photos=None):
    """L_ka: cross entropy of the learner's logits (B, J) with softmax(source_logits + mask), summed over the photos.

    source_logits: (B, J), the other network's; mask: (B, J) or (B, 1), rows of the semantic mask times their weight;
    is_photo: (B,) 1 for a photo, 0 for a sketch, which is left out; photos: scalar tensor, the divisor (default: the
    photos of this batch). The source is not detached: in L_ka^T the student is the source and keeps its gradient.
    """
    target = F.softmax(source_logits + mask, dim=1)
    cross_entropy = -(target * F.log_softmax(learner_logits, dim=1)).sum(dim=1)
    photos = is_photo.sum() if photos is None else photos
    return (cross_entropy * is_photo).sum() / photos.clamp(min=1)


def modality_loss(features, noise, images=None):
    """L_ma: KL(softmax(noise) ‖ softmax(features)), both (B, D), summed, divided by `images` (default B)."""
    divergence = F.kl_div(F.log_softmax(features, dim=1), F.softmax(noise, dim=1), reduction="sum")
    return divergence / (len(features) if images is None else images)


class Loss(NamedTuple):
    """A row of LOSSES."""

    symbol: str  # in the paper, for help texts
    # Of (StudentOutput, TeacherOutput, Batch, Counts): the scalar loss of these images, divided by Counts, so that the
    # losses of micro-batches and of several processes add up to that of the whole batch. The Batch has a weighted mask.
    function: Callable
    weight: float = 1.0  # by default; 0: the loss is not computed
    only_bidirectional: bool = False  # computed after warm-up only
    reads_teacher: bool = False  # whether the function gets the TeacherOutput; otherwise None
    trains_teacher: bool = False  # the teacher's head, too; otherwise the teacher's output is detached
    option: str | None = None  # name of the option of its weight, without dashes; None: NAME_weight


LOSSES = {
    "cls": Loss(
        "L_cls (classification of the seen classes)",
        lambda student, _, batch, counts: classification_loss(student.seen_logits, batch.labels, counts.images),
    ),
    "ka_student": Loss(
        "L_ka^S (knowledge alignment of the student with the teacher)",
        lambda student, teacher, batch, counts: alignment_loss(
            student.imagenet_logits, teacher.imagenet_logits, batch.mask, batch.is_photo, counts.photos
        ),
        reads_teacher=True,
    ),
    "ma": Loss(
        "L_ma (modality alignment)",
        lambda student, _, batch, counts: modality_loss(student.features, batch.noise, counts.images),
        weight=0.1,
        option="modality_weight",
    ),
    "ka_teacher": Loss(
        "L_ka^T (knowledge alignment of the teacher with the student)",
        lambda student, teacher, batch, counts: alignment_loss(
            teacher.imagenet_logits, student.imagenet_logits, batch.mask, batch.is_photo, counts.photos
        ),
        only_bidirectional=True,
        reads_teacher=True,
        trains_teacher=True,
    ),
}


def weight_option(name):
    """Name of the option of a loss's weight, as argparse stores it."""
    return LOSSES[name].option or f"{name}_weight"


@dataclass(frozen=True)
class LossWeights:
    """The weights of the objective: by default those of the paper."""

    losses: dict[str, float] = field(default_factory=lambda: {name: loss.weight for name, loss in LOSSES.items()})
    mask_weight: float = 0.3  # of the semantic mask, added to the logits of the source of L_ka

    def active(self, bidirectional=True):
        """Names of the losses that are computed in a phase: those with a weight above 0."""
        return [
            name for name, loss in LOSSES.items()
            if self.losses.get(name, 0) > 0 and (bidirectional or not loss.only_bidirectional)
        ]  # fmt: skip

    def reads_teacher(self, bidirectional):
        """Whether a loss that is computed in a phase reads the teacher's output."""
        return any(LOSSES[name].reads_teacher for name in self.active(bidirectional))

    def train_teacher(self, bidirectional):
        """Whether the teacher's head is trained in a phase."""
        return any(LOSSES[name].trains_teacher for name in self.active(bidirectional))


PAPER_WEIGHTS = LossWeights()


def alignment_losses(student_output, teacher_output, batch, bidirectional, counts=None, loss_weights=PAPER_WEIGHTS):
    """The losses of a Batch: {name in LOSSES: scalar}, "student" (what the student alone minimises) and "total".

    student_output: a StudentOutput; teacher_output: a TeacherOutput, or None if no loss of this phase reads it;
    bidirectional: whether warm-up is over; counts: Counts of the whole batch if this Batch is a micro-batch (default:
    its own).
    Losses of weight 0 are left out. A loss of the other phase is 0.
    One backward pass of "total" leaves the gradients that the release gets from two. The release first takes the
    gradient of "student" = L_cls + L_ka^S + 0.1 L_ma, then clears the teacher's gradient, and then adds the gradient of
    L_ka^T, which the student receives, too. Detaching the teacher in L_ka^S has the same effect as clearing its
    gradient.
    """
    counts = counts or Counts.of(batch)
    batch = batch._replace(mask=loss_weights.mask_weight * batch.mask)
    detached = teacher_output and type(teacher_output)(*(values.detach() for values in teacher_output))
    active = loss_weights.active(bidirectional)
    losses = {name: student_output.features.new_zeros(()) for name in loss_weights.active()}
    for name in active:
        loss = LOSSES[name]
        teacher = (teacher_output if loss.trains_teacher else detached) if loss.reads_teacher else None
        losses[name] = loss.function(student_output, teacher, batch, counts)
    student_loss = sum(loss_weights.losses[name] * losses[name] for name in active if not LOSSES[name].trains_teacher)
    teacher_loss = sum(loss_weights.losses[name] * losses[name] for name in active if LOSSES[name].trains_teacher)
    return losses | {"student": student_loss, "total": student_loss + teacher_loss}
