"""One training step of SBKA (arXiv:2312.10320): forward passes of both networks, their losses, backward, update."""

from contextlib import ExitStack

import torch

from datasets.errors import lacks_memory
from models import parallel
from models.alignment import METHOD, Counts, alignment_losses
from models.networks import StudentOutput, arithmetic, matmul_rules
from models.speaker import note


def train_step(run, batch, bidirectional, parts=1, precision="fp32", objective=METHOD):
    """One update of `run` with a Batch, this process's share of a batch. Warm-up updates the student alone.

    objective: an Objective; where it lacks ka_teacher, the teacher never learns. With `parts` > 1 gradients are summed
    over that many parts of the batch; with several processes, over the shares of all. Losses, and so gradients, are
    those of the whole batch.
    Returns ({name of MEASURES: this process's part of it before the update, detached}, (B,) bool: images of which all
    outputs are finite).
    """
    if not bidirectional:
        objective = objective._replace(terms=tuple(term for term in objective.terms if term != "ka_teacher"))
    with matmul_rules(precision):
        measures, sound = _gradients(run, batch, objective, parts, precision)
        if not {"ka_student", "ka_teacher"} & set(objective.terms):
            run.student.head.zero_grad()  # nothing is learnt there; weight decay alone would wear it away
        for optimizer in run.optimizers if "ka_teacher" in objective.terms else run.optimizers[:1]:
            optimizer.step()
    return measures, sound


def _gradients(run, batch, objective, parts, precision, shared=True):
    """Forward and backward of a Batch in parts; see train_step. shared: whether processes add their gradients."""
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    counts = Counts.of(batch)
    if shared:
        counts = Counts(*parallel.total(torch.stack(counts)))
    pieces = batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last)).parts(parts)
    found = []
    for number, piece in enumerate(pieces):
        with ExitStack() as stack:
            if number + 1 < len(pieces) or not shared:  # processes add their gradients once, after the last piece
                for network in run.called:
                    stack.enter_context(parallel.apart(network))
            found.append(_add_gradients(*run.called, piece, counts, objective, precision))
    measures, sound = zip(*found, strict=True)
    return {name: sum(each[name] for each in measures) for name in measures[0]}, torch.cat(sound)


def parts_that_fit(run, batch, parts, precision):
    """In how many parts a step with a Batch fits into the memory of every process's GPU: `parts`, or twice as many, ...

    Found out by trying forward and backward passes without an update, beside what Adam will keep. Raises what torch
    raises where single images do not fit.
    """
    asked = parts
    while run.device.type != "cpu":
        failure = _lack_of_memory(run, batch, parts, precision)
        if not parallel.anyone(failure is not None):
            break
        if not parallel.anyone(parts < len(batch.images)):
            raise failure or torch.OutOfMemoryError("out of memory in another process")
        torch.cuda.empty_cache()
        parts *= 2
    if parts != asked:
        note(f"note: a batch does not fit into the GPU's memory and is taken in parts, as with --accum_steps {parts}")
    return parts


def _lack_of_memory(run, batch, parts, precision):
    """The error of a step without an update that does not fit into memory, or None."""
    failure = None
    try:
        moments = [torch.empty_like(value) for value in run.learnt() for _ in range(2)]
        with matmul_rules(precision):
            _gradients(run, batch, METHOD, parts, precision, shared=False)
        del moments
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        failure = error.with_traceback(None)  # which would keep the activations
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    return failure


def _add_gradients(student, teacher, batch, counts, objective, precision):
    """Forward and backward of a part of a batch; see train_step."""
    bidirectional = "ka_teacher" in objective.terms
    with arithmetic(precision, batch.images.device):
        with torch.set_grad_enabled(bidirectional):
            teacher_logits = _wide(teacher(batch.images))
        output = StudentOutput(*map(_wide, student(batch.images)))
    losses = alignment_losses(output, teacher_logits, batch, bidirectional, counts, objective)
    parallel.backward(losses["total"])
    measures = {name: value.detach() for name, value in losses.items()}
    right = (output.seen_logits.detach().argmax(dim=1) == batch.labels).sum()
    measures["train_accuracy"] = 100 * right / counts.images
    outputs = torch.cat([teacher_logits, *output], dim=1).detach()
    return measures, outputs.isfinite().all(dim=1)


def _wide(values):
    """bfloat16 as float32, in which losses are computed."""
    return values.float() if values.dtype == torch.bfloat16 else values
