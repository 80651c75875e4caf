"""The losses of SBKA (arXiv:2312.10320, symmetrical bidirectional knowledge alignment) as functions of tensors.

B images of a batch, C seen classes, J ImageNet classes, D features. Follows the authors' release, except that a batch
without photos costs 0 instead of NaN. Stands alone: no network, no data.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

LOSS_NAMES = ("cls", "ka_student", "ma", "ka_teacher")  # L_cls, L_ka^S, L_ma, L_ka^T


class LossWeights(NamedTuple):
    """What is learnt: by default the whole method, with the paper's weights."""

    terms: tuple[str, ...] = (
        LOSS_NAMES  # those of TERMS that are learnt; the others are computed, and left out of the sum
    )
    mask_weight: float = 0.3  # of the semantic mask, added to the logits of the side that is learnt from
    modality_weight: float = 0.1  # of L_ma in the student's loss


PAPER_WEIGHTS = LossWeights()


class Batch(NamedTuple):
    """What a training step learns from: tensors with one row an image, on one device."""

    images: torch.Tensor  # (B, 3, H, W), normalised
    labels: torch.Tensor  # (B,) int64, seen classes from 0
    is_photo: torch.Tensor  # (B,) 1 for a photo, 0 for a sketch
    mask: torch.Tensor  # (B, J) rows of the semantic mask, or (B, 1) zeros for none
    noise: torch.Tensor  # (B, D) standard normal, drawn anew for each step

    def parts(self, count):
        """At most `count` Batches of about the same size, in order."""
        return [Batch(*part) for part in zip(*(values.chunk(count) for values in self), strict=True)]


class Counts(NamedTuple):
    """By what the losses of a batch are divided."""

    images: torch.Tensor  # scalar
    photos: torch.Tensor  # scalar

    @classmethod
    def of(cls, batch):
        """Counts of a Batch."""
        return cls(batch.is_photo.new_full((), len(batch.labels)), batch.is_photo.sum())


def classification_loss(seen_logits, labels, images=None):
    """L_cls: cross entropy of seen_logits (B, C) with labels (B,) int64, over `images` (default B)."""
    return F.cross_entropy(seen_logits, labels, reduction="sum") / (len(labels) if images is None else images)


def alignment_loss(learner_logits, source_logits, mask, is_photo, photos=None):
    """L_ka: cross entropy of the learner (B, J) with the source's (B, J) softened view of each photo, over `photos`.

    mask: (B, J), or (B, 1), what is added to the source's logits: rows of the semantic mask, weighted; is_photo: (B,)
    1 for a photo, 0 for a sketch, which has no part in it; photos: a scalar tensor (default: those of the batch).
    The source is not detached: in L_ka^T the student, which is the source there, keeps its gradient.
    """
    target = F.softmax(source_logits + mask, dim=1)
    cross_entropy = -(target * F.log_softmax(learner_logits, dim=1)).sum(dim=1)
    photos = is_photo.sum() if photos is None else photos
    return (cross_entropy * is_photo).sum() / photos.clamp(min=1)


def modality_loss(features, noise, images=None):
    """L_ma: KL(softmax(noise) ‖ softmax(features)), both (B, D), summed over D and B, over `images` (default B)."""
    divergence = F.kl_div(F.log_softmax(features, dim=1), F.softmax(noise, dim=1), reduction="sum")
    return divergence / (len(features) if images is None else images)


def alignment_losses(student, teacher_logits, batch, bidirectional, counts=None, objective=PAPER_WEIGHTS):
    """All losses of a Batch: a dict of TERMS (ka_teacher is 0 in warm-up), "student" and "total", what is learnt.

    student: a StudentOutput, its seen_logits, imagenet_logits and features; teacher_logits: (B, J).
    counts: Counts of the batch that this one is a part of (default: its own). Losses and gradients of all parts then
    add up to those of the whole batch. objective: an Objective.
    One backward pass of "total" leaves the gradients that the release gets from two. It first takes the gradient of
    "student" = L_cls + L_ka^S + 0.1 L_ma, then clears that of the teacher, and then adds the gradient of L_ka^T, from
    which the student learns, too. Detaching the teacher in L_ka^S has the same effect as clearing its gradient.
    """
    images, photos = counts or Counts.of(batch)
    mask = objective.mask_weight * batch.mask
    terms = {
        "cls": classification_loss(student.seen_logits, batch.labels, images),
        "ka_student": alignment_loss(student.imagenet_logits, teacher_logits.detach(), mask, batch.is_photo, photos),
        "ma": modality_loss(student.features, batch.noise, images),
        "ka_teacher": student.features.new_zeros(()),
    }
    if bidirectional:
        terms["ka_teacher"] = alignment_loss(teacher_logits, student.imagenet_logits, mask, batch.is_photo, photos)
    # Terms that are left out have the weight 0: every parameter has a gradient then, as processes that share gradients
    # want it.
    weight = {name: float(name in objective.terms) for name in LOSS_NAMES}
    weight["ma"] *= objective.modality_weight
    student_loss = sum(weight[name] * terms[name] for name in ("cls", "ka_student", "ma"))
    total = student_loss + weight["ka_teacher"] * terms["ka_teacher"] if bidirectional else student_loss
    return terms | {"student": student_loss, "total": total}
