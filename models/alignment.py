"""The losses of SBKA (arXiv:2312.10320, symmetrical bidirectional knowledge alignment) as functions of tensors.

B images of a batch, C seen classes, J ImageNet classes, D features. Follows the authors' release, except that a batch
without photos costs 0 instead of NaN. Stands alone: no network, no data.
"""

from torch.nn import functional as F

MASK_WEIGHT = 0.3  # of the semantic mask, added to the logits of the side that is learnt from
MODALITY_WEIGHT = 0.1  # of L_ma in the student's loss


def classification_loss(seen_logits, labels, images=None):
    """L_cls: cross entropy of seen_logits (B, C) with labels (B,) int64, over `images` (default B)."""
    return F.cross_entropy(seen_logits, labels, reduction="sum") / (len(labels) if images is None else images)


def knowledge_loss(learner_logits, source_logits, mask, is_photo, photos=None):
    """L_ka: cross entropy of the learner (B, J) with the source's (B, J) softened view of each photo, over `photos`.

    mask: (B, J) rows of the semantic mask, or 0 for none; is_photo: (B,) 1 for a photo, 0 for a sketch (no part in it);
    photos: a number or scalar tensor (default: those of the batch).
    The source is not detached here: in L_ka^T the student, as source, keeps its gradient.
    """
    target = F.softmax(source_logits + MASK_WEIGHT * mask, dim=1)
    cross_entropy = -(target * F.log_softmax(learner_logits, dim=1)).sum(dim=1)
    photos = is_photo.sum() if photos is None else photos
    return (cross_entropy * is_photo).sum() / photos.clamp(min=1)


def modality_loss(features, noise, images=None):
    """L_ma: KL(softmax(noise) ‖ softmax(features)), both (B, D), summed over D and B, over `images` (default B)."""
    divergence = F.kl_div(F.log_softmax(features, dim=1), F.softmax(noise, dim=1), reduction="sum")
    return divergence / (len(features) if images is None else images)


def alignment_losses(student, teacher_logits, labels, is_photo, mask, noise, bidirectional, whole=(None, None)):
    """All losses of a batch: {"cls", "ka_student", "ma", "ka_teacher" (0 in warm-up), "student", "total"}.

    student: its seen_logits, imagenet_logits and features; teacher_logits (B, J).
    whole: (images, photos as a scalar tensor) of the batch that this is a part of; losses and gradients of its parts
    then add up to those of the whole.
    One backward pass of "total" leaves the gradients that the release gets from two: there the backward of
    "student" = L_cls + L_ka^S + 0.1 L_ma comes first, then the teacher's gradient is cleared, then comes that of
    L_ka^T, from which the student learns too. Clearing it equals detaching the teacher in L_ka^S.
    """
    images, photos = whole
    cls = classification_loss(student.seen_logits, labels, images)
    ka_student = knowledge_loss(student.imagenet_logits, teacher_logits.detach(), mask, is_photo, photos)
    ma = modality_loss(student.features, noise, images)
    student_loss = cls + ka_student + MODALITY_WEIGHT * ma
    if bidirectional:
        ka_teacher = knowledge_loss(teacher_logits, student.imagenet_logits, mask, is_photo, photos)
        total = student_loss + ka_teacher
    else:
        ka_teacher, total = student_loss.new_zeros(()), student_loss
    return {
        "cls": cls,
        "ka_student": ka_student,
        "ma": ma,
        "ka_teacher": ka_teacher,
        "student": student_loss,
        "total": total,
    }
