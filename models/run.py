"""A training run: how it trains (Recipe), and what it changes (Run)."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from models import parallel
from models.alignment import METHOD, TERMS, Objective
from models.networks import Student, Teacher

# What a step is measured by: the losses, and the percentage of the batch that is classified right.
MEASURES = (*TERMS, "student", "total", "train_accuracy")


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
    objective: Objective = METHOD

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
        self.called = tuple(parallel.synchronised(network) for network in (self.student, self.teacher))

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
