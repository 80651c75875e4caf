"""A training run: how it trains (Recipe), and what it changes (Run)."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models.losses import LOSS_NAMES, PAPER_WEIGHTS, Counts, LossWeights, alignment_losses
from models.networks import Student, StudentOutput, Teacher, arithmetic, matmul_rules
from utils import distributed
from utils.cli import is_out_of_memory
from utils.distributed import log_rank0

# What a step is measured by: the losses, and the percentage of the batch that is classified right.
MEASURES = (*LOSS_NAMES, "student", "total", "train_accuracy")


@dataclass(frozen=True)
class Recipe:
    """What the result of a run depends on, beside its networks, its optimizers and its data."""

    epochs: int
    last_warmup_epoch: int  # E_w: in epochs 0..E_w the student learns alone, later both networks do
    lr: float  # of the student in epoch 0
    teacher_lr: float  # of the teacher's head in epoch 0
    seed: int = 0  # of noise and stochastic depth; the loader has its own
    parts: int = 1  # in which a batch is taken
    precision: str = "fp32"  # see models.networks.arithmetic
    objective: LossWeights = PAPER_WEIGHTS

    def is_bidirectional(self, epoch):
        """Whether the teacher learns, too, in an epoch (from 0)."""
        return epoch > self.last_warmup_epoch

    def rates(self, epoch):
        """(student's, teacher's) learning rate in an epoch: lr · 0.001^(epoch / epochs)."""
        return tuple(rate * 0.001 ** (epoch / self.epochs) for rate in (self.lr, self.teacher_lr))


@dataclass
class Run:
    """What training changes, and a checkpoint holds."""

    student: Student
    teacher: Teacher
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]  # student's, teacher's
    history: list[dict] = field(default_factory=list)  # one entry an epoch, see models.training.close_epoch
    step: int = 0  # steps done in the epoch after those
    sums: torch.Tensor | None = None  # (MEASURES,) of these steps; None before the first
    source: Path | None = None  # checkpoint that it was resumed from

    def __post_init__(self):
        self.called = self.student, self.teacher  # to call in a step; wrapped where several processes train
        self.parts = None  # in how many a batch is taken, once it is known how many fit into memory

    def synchronise(self):
        """Share gradients with the other processes from now on."""
        self.called = tuple(distributed.wrap_ddp(network) for network in (self.student, self.teacher))

    @property
    def device(self):
        """The device that it trains on."""
        return self.student.linear.weight.device

    @property
    def rate(self):
        """The student's present learning rate."""
        return self.optimizers[0].param_groups[0]["lr"]

    def learnt(self):
        """The parameters that training changes."""
        return [value for optimizer in self.optimizers for group in optimizer.param_groups for value in group["params"]]


def create_optimizers(student, teacher, lr, teacher_lr, weight_decay):
    """Adam for the student and Adam for the teacher's head, with L2 decay in the gradient (not decoupled)."""
    return (
        torch.optim.Adam(student.parameters(), lr=lr, weight_decay=weight_decay, fused=True),
        torch.optim.Adam(teacher.head.parameters(), lr=teacher_lr, weight_decay=weight_decay, fused=True),
    )


def set_learning_rates(optimizers, rates):
    """Give each optimizer its rate of `rates`."""
    for optimizer, rate in zip(optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate


def train_step(run, batch, bidirectional, parts=1, precision="fp32", objective=PAPER_WEIGHTS):
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
        counts = Counts(*distributed.all_reduce_sum(torch.stack(counts)))
    pieces = batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last)).parts(parts)
    found = []
    for number, piece in enumerate(pieces):
        with ExitStack() as stack:
            if number + 1 < len(pieces) or not shared:  # processes add their gradients once, after the last piece
                for network in run.called:
                    stack.enter_context(distributed.no_sync(network))
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
        if not distributed.any_rank(failure is not None):
            break
        if not distributed.any_rank(parts < len(batch.images)):
            raise failure or torch.OutOfMemoryError("out of memory in another process")
        torch.cuda.empty_cache()
        parts *= 2
    if parts != asked:
        log_rank0(
            f"note: a batch does not fit into the GPU's memory and is taken in parts, as with --accum_steps {parts}"
        )
    return parts


def _lack_of_memory(run, batch, parts, precision):
    """The error of a step without an update that does not fit into memory, or None."""
    failure = None
    try:
        moments = [torch.empty_like(value) for value in run.learnt() for _ in range(2)]
        with matmul_rules(precision):
            _gradients(run, batch, PAPER_WEIGHTS, parts, precision, shared=False)
        del moments
    except RuntimeError as error:
        if not is_out_of_memory(error):
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
    distributed.backward_sum(losses["total"])
    measures = {name: value.detach() for name, value in losses.items()}
    right = (output.seen_logits.detach().argmax(dim=1) == batch.labels).sum()
    measures["train_accuracy"] = 100 * right / counts.images
    outputs = torch.cat([teacher_logits, *output], dim=1).detach()
    return measures, outputs.isfinite().all(dim=1)


def _wide(values):
    """bfloat16 as float32, in which losses are computed."""
    return values.float() if values.dtype == torch.bfloat16 else values
