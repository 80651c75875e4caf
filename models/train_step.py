"""One training step: TrainConfig, TrainState, the optimizers, gradients, and reading the losses without a GPU sync."""

import itertools
import math
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from models.losses import LOSSES, PAPER_WEIGHTS, Counts, LossWeights, alignment_losses
from models.networks import Student, StudentOutput, Teacher, TeacherOutput, arithmetic, matmul_rules
from utils import distributed
from utils.cli import InputError, exit_quietly, is_out_of_memory
from utils.distributed import log_rank0

# The values that a step returns: the losses, and the top-1 accuracy on the batch in percent.
LOGGED = (*LOSSES, "student", "total", "train_accuracy")

# Factor of the learning rates when a share, from 0 to 1, of the epochs is done.
SCHEDULES = {
    "exponential": lambda done: 0.001**done,  # as in the release
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of training, apart from those of the networks, the optimizers and the data."""

    epochs: int
    last_warmup_epoch: int  # E_w: epochs 0..E_w train the student alone, later ones both networks
    lr: float  # of the student in epoch 0
    teacher_lr: float  # of the teacher's head in epoch 0
    seed: int = 0  # of noise and stochastic depth; the loader has its own
    accum_steps: int = 1  # micro-batches of a batch, whose gradients are accumulated
    precision: str = "fp32"  # see models.networks.arithmetic
    loss_weights: LossWeights = PAPER_WEIGHTS
    schedule: str = "exponential"  # of the learning rates, a name in SCHEDULES

    def is_bidirectional(self, epoch):
        """Whether an epoch (from 0) is after warm-up, so that both networks are trained."""
        return epoch > self.last_warmup_epoch

    def learning_rates(self, epoch):
        """(student's, teacher's) learning rate in an epoch: lr · SCHEDULES[schedule](epoch / epochs)."""
        factor = SCHEDULES[self.schedule](epoch / self.epochs)
        return tuple(rate * factor for rate in (self.lr, self.teacher_lr))

    def logged(self):
        """The names of LOGGED, without losses of weight 0, which are not computed."""
        active = self.loss_weights.active()
        return [name for name in LOGGED if name not in LOSSES or name in active]


@dataclass
class TrainState:
    """Everything that training changes, and that a checkpoint stores."""

    student: Student
    teacher: Teacher | None  # None where no loss can read it, see models.weights.create_pair
    optimizers: tuple[torch.optim.Optimizer, ...]  # student's, and teacher's if there is one
    history: list[dict] = field(default_factory=list)  # an entry for each complete epoch, see training.close_epoch
    step: int = 0  # steps done in the present epoch
    metric_sums: torch.Tensor | None = None  # (LOGGED,) sums over these steps; None before the first
    resumed_from: Path | None = None  # path of the checkpoint

    def __post_init__(self):
        self.ddp_modules = self.student, self.teacher  # the modules to call; in DistributedDataParallel if needed
        self.accum_steps = None  # gradient accumulation steps; None until the first step has found what fits

    def wrap_ddp(self):
        """Wrap the networks in DistributedDataParallel if there is a process group."""
        self.ddp_modules = tuple(each and distributed.wrap_ddp(each) for each in (self.student, self.teacher))

    @property
    def device(self):
        """The device of the networks."""
        return self.student.linear.weight.device

    @property
    def lr(self):
        """The student's present learning rate."""
        return self.optimizers[0].param_groups[0]["lr"]

    def trainable_parameters(self):
        """The parameters of all optimizers."""
        return [value for optimizer in self.optimizers for group in optimizer.param_groups for value in group["params"]]


def create_optimizers(student, teacher, lr, teacher_lr, weight_decay):
    """Adam for the student and, if there is a teacher, for its head, with L2 decay in the gradient (not decoupled).

    Frozen parameters of the student have no optimizer.
    """
    trainable = [value for value in student.parameters() if value.requires_grad]
    rates = [(trainable, lr)] + ([(teacher.head.parameters(), teacher_lr)] if teacher else [])
    return tuple(torch.optim.Adam(each, lr=rate, weight_decay=weight_decay, fused=True) for each, rate in rates)


def set_learning_rates(optimizers, rates):
    """Set the learning rate of each optimizer."""
    for optimizer, rate in zip(optimizers, rates, strict=False):  # without a teacher there is one optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate


def train_step(state, batch, bidirectional, accum_steps=1, precision="fp32", loss_weights=PAPER_WEIGHTS):
    """One update of the networks in `state`. In warm-up (not bidirectional) only the student is updated.

    batch: this rank's Batch; accum_steps: micro-batches that it is divided into, whose gradients are accumulated.
    Losses and gradients are those of the whole batch of all ranks.
    Returns ({name of LOGGED: this rank's summand of the value before the update, detached}, is_finite (B,) bool: images
    for which all outputs of the networks are finite).
    """
    with matmul_rules(precision):
        values, is_finite, uses_head = _gradients(state, batch, bidirectional, accum_steps, precision, loss_weights)
        if not uses_head and state.student.head is not None:
            state.student.head.zero_grad()  # to None: Adam skips it; with a zero gradient it would apply weight decay
        train_teacher = loss_weights.train_teacher(bidirectional)
        for optimizer in state.optimizers if train_teacher else state.optimizers[:1]:
            optimizer.step()
    return values, is_finite


def _gradients(state, batch, bidirectional, accum_steps, precision, loss_weights, all_reduce=True):
    """Forward and backward of a Batch; see train_step. all_reduce: whether gradients are summed over the ranks.

    Returns (values, is_finite, whether the student's ImageNet head has a gradient).
    """
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    counts = Counts.of(batch)
    if all_reduce:
        counts = Counts(*distributed.all_reduce_sum(torch.stack(counts)))
    channels_last = batch.images.contiguous(memory_format=torch.channels_last)
    micro_batches = batch._replace(images=channels_last).micro_batches(accum_steps)
    results = []
    for number, micro_batch in enumerate(micro_batches):
        with ExitStack() as stack:
            if number + 1 < len(micro_batches) or not all_reduce:  # one all-reduce, after the last micro-batch
                for network in state.ddp_modules:
                    stack.enter_context(distributed.no_sync(network))
            results.append(
                _add_gradients(*state.ddp_modules, micro_batch, counts, bidirectional, precision, loss_weights)
            )
    values, is_finite, uses_head = zip(*results, strict=True)
    return {name: sum(each[name] for each in values) for name in values[0]}, torch.cat(is_finite), all(uses_head)


def _add_gradients(student, teacher, batch, counts, bidirectional, precision, loss_weights):
    """Forward and backward of a micro-batch; see _gradients."""
    train_teacher = loss_weights.train_teacher(bidirectional)
    with arithmetic(precision, batch.images.device):
        teacher_output = None
        if loss_weights.reads_teacher(bidirectional):
            with torch.set_grad_enabled(train_teacher):
                teacher_output = TeacherOutput(*map(_to_float32, teacher(batch.images)))
        student_output = StudentOutput(*map(_to_float32, student(batch.images)))
    losses = alignment_losses(student_output, teacher_output, batch, bidirectional, counts, loss_weights)
    objective, uses_head = losses["total"], True
    if len(loss_weights.active()) < len(LOSSES):
        # A loss that is left out may be the only one with an output. DistributedDataParallel needs a gradient for every
        # parameter all the same.
        logits = student_output.imagenet_logits
        uses_head = torch.autograd.grad(objective, logits, retain_graph=True, allow_unused=True)[0] is not None
        outputs = (*student_output, *(teacher_output if train_teacher else ()))
        objective = objective + 0 * sum(output.sum() for output in outputs)
    distributed.backward_sum(objective)
    values = {name: value.detach() for name, value in losses.items()}
    correct = (student_output.seen_logits.detach().argmax(dim=1) == batch.labels).sum()
    values["train_accuracy"] = 100 * correct / counts.images
    outputs = torch.cat([*student_output, *(teacher_output or ())], dim=1).detach()
    return values, outputs.isfinite().all(dim=1), uses_head


def _to_float32(values):
    """bfloat16 to float32, in which losses are computed; other types unchanged."""
    return values.float() if values.dtype == torch.bfloat16 else values


def find_accum_steps(state, batch, accum_steps, precision, loss_weights=PAPER_WEIGHTS):
    """The accumulation steps with which a Batch fits into every rank's GPU memory: `accum_steps` times a power of 2.

    Tries forward and backward with Adam's moments allocated, doubling accum_steps when out of memory. Raises torch's
    out-of-memory error if single images do not fit.
    """
    given = accum_steps
    while state.device.type != "cpu":
        failure = _probe_oom(state, batch, accum_steps, precision, loss_weights)
        if not distributed.any_rank(failure is not None):
            break
        if not distributed.any_rank(accum_steps < len(batch.images)):
            raise failure or torch.OutOfMemoryError("out of memory in another process")
        torch.cuda.empty_cache()
        accum_steps *= 2
    if accum_steps != given:
        log_rank0(
            f"note: a batch does not fit into the GPU's memory; gradients are accumulated over micro-batches, as with "
            f"--accum_steps {accum_steps}"
        )
    return accum_steps


def _probe_oom(state, batch, accum_steps, precision, loss_weights):
    """The out-of-memory error of a step without an update, or None."""
    failure = None
    try:
        moments = [torch.empty_like(value) for value in state.trainable_parameters() for _ in range(2)]
        with matmul_rules(precision):
            _gradients(state, batch, True, accum_steps, precision, loss_weights, all_reduce=False)
        del moments
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failure = error.with_traceback(None)  # whose frames would keep the activations
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    return failure


class _PendingStep(NamedTuple):
    number: int
    values: torch.Tensor  # (LOGGED,) on the CPU, or being copied to it
    copied: torch.cuda.Event | None  # the end of the copy; None if it is complete
    is_finite: torch.Tensor  # (B,) bool: for which of this rank's images all outputs are finite


class AsyncLossReader:
    """Copies losses to the CPU one step late (no GPU sync), and stops training on NaN or Inf, naming the images."""

    def __init__(self, loader, epoch):
        self.loader, self.epoch, self.pending = loader, epoch, deque()

    def add(self, number, values, is_finite):
        """Queue the `values` (LOGGED,) of a step, and is_finite (B,) as train_step returns it.

        Returns (number, values on the CPU) of the steps whose copy is complete. Raises InputError if values of these
        are not finite.
        """
        self.pending.append(_PendingStep(number, *_start_copy(values), is_finite))
        return [self._read() for _ in range(len(self.pending) - (values.device.type != "cpu"))]

    def flush(self):
        """Wait for all queued steps. Returns and raises as `add` does."""
        return [self._read() for _ in range(len(self.pending))]

    def _read(self):
        step = self.pending.popleft()
        if step.copied is not None:
            step.copied.synchronize()
        if not step.values.isfinite().all():
            self._raise_not_finite(step)
        return step.number, step.values

    def _raise_not_finite(self, step):
        finite = dict(zip(LOGGED, step.values.isfinite().tolist(), strict=True))
        names = ", ".join(name for name in LOSSES if not finite[name]) or "total"
        bad = (~step.is_finite).nonzero()[:, 0].tolist()
        # All ranks get here. The lowest rank with bad images prints them; if no rank has any, rank 0.
        counts = distributed.all_gather_dict({distributed.get_rank(): len(bad)})
        if distributed.get_rank() != min((rank for rank, count in counts.items() if count), default=0):
            exit_quietly()
        if len(bad) in (0, len(step.is_finite)):
            where = "for the whole batch"
        else:
            where = f"in {len(bad)} images: {self._image_paths(step.number, bad[:3])}"
        raise InputError(
            f"epoch {self.epoch + 1}, step {step.number + 1}: {names} not finite, {where}; the last checkpoint is "
            "unchanged: repair the images and --resume, or start anew without them or with a lower --lr"
        )

    def _image_paths(self, number, rows):
        """Paths of some images of a step; rows: their indices in this rank's share of the batch."""
        batch = next(itertools.islice(self.loader.batch_sampler.batches(), number, None))
        own = batch[distributed.rank_slice(len(batch))]
        files = [self.loader.dataset.file(own[row]) for row in rows]
        return ", ".join(str(file_list.root / file_list.paths[index]) for file_list, index in files)


def _start_copy(values):
    """(values on the CPU, None), or (pinned memory that they are being copied to, the event of the copy's end)."""
    if values.device.type == "cpu":
        return values, None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)  # a copy to other memory is synchronous
    copy.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))
    return copy, copied
