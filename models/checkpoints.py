"""Checkpoints of training: a run that is killed at any moment goes on from the last one as if nothing had happened."""

import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from datasets.errors import InputError
from datasets.files import check_writable, digest, write_json
from models.networks import Student, Teacher
from models.options import note, run_record
from models.weights import load_published, read_checkpoint, save_checkpoint

LAST, BEST, BEST_AFTER_WARMUP = "checkpoint.pth.tar", "model_best.pth.tar", "best_after_warmup.pth.tar"
PREVIOUS = "checkpoint.previous.pth.tar"  # what LAST was before, for a disk that tears it
NAMES = (LAST, PREVIOUS, BEST, BEST_AFTER_WARMUP)

# Options that leave the result of a run as it is, so that a resumed run may change them.
HARMLESS = {
    *("data_root", "savedir", "resume", "overwrite", "workers", "device"),
    *("save_every", "print_freq", "eval_every"),
}


@dataclass
class Run:
    """What training changes, and a checkpoint holds."""

    student: Student
    teacher: Teacher
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]  # student's, teacher's
    history: list[dict] = field(default_factory=list)  # one entry an epoch, see models.training.train
    step: int = 0  # steps done in the epoch after those
    sums: torch.Tensor | None = None  # of what was measured in these steps, see models.training.MEASURES
    data: dict = field(default_factory=dict)  # SHA-256 of the lists and mask of a resumed run
    source: Path | None = None  # checkpoint that it was resumed from

    def learnt(self):
        """The parameters that training changes."""
        return [value for optimizer in self.optimizers for group in optimizer.param_groups for value in group["params"]]


class SaveSchedule:
    """When to save: `every` is "10m", "30s", "2h" (and at the end of each epoch), or "3e" for every third epoch."""

    def __init__(self, every):
        number, unit = re.fullmatch(r"(\d+)([smhe])", every).groups()
        self.epochs = int(number) if unit == "e" else 1
        self.seconds = None if unit == "e" else int(number) * {"s": 1, "m": 60, "h": 3600}[unit]
        self.saved = time.monotonic()

    def is_due(self):
        """Whether it is time within an epoch; then the clock starts again."""
        due = self.seconds is not None and time.monotonic() - self.saved >= self.seconds
        if due:
            self.saved = time.monotonic()
        return due


def save(run, savedir, record, names=(LAST,)):
    """Write the state of `run` under `names`. What was there stays whole until the new file is, and LAST beyond it.

    Raises InputError where the weights are not finite, and nothing is written then.
    """
    if not torch.stack([value.isfinite().all() for value in run.learnt()]).all():
        raise InputError("weights are not finite; start anew with a lower --lr")
    content = {
        "epoch": len(run.history),
        "step": run.step,
        "sums": None if run.sums is None else run.sums.tolist(),
        "best_acc1": max((entry.get("accuracy", 0.0) for entry in run.history), default=0.0),
        "optimizer": run.optimizers[0].state_dict(),
        "optimizer_1": run.optimizers[1].state_dict(),
        "history": run.history,
        **record,
    }
    # The checkpoint that a resumed run reads comes last: where a run dies in between, it does this epoch again.
    for name in sorted(names, key=LAST.__eq__):
        if name == LAST and os.path.isfile(savedir / LAST):
            _keep_as_previous(savedir)
        save_checkpoint(savedir / name, run.student, run.teacher, **content)
    if BEST in names:
        (savedir / BEST_AFTER_WARMUP).unlink(missing_ok=True)
    write_json(savedir / "train.json", {**record, "epochs": run.history})


def _keep_as_previous(savedir):
    """Let PREVIOUS name what LAST names, at no cost; both are whole at any moment."""
    (savedir / PREVIOUS).unlink(missing_ok=True)
    try:
        os.link(savedir / LAST, savedir / PREVIOUS)
    except OSError:  # a disk without hard links
        (savedir / LAST).replace(savedir / PREVIOUS)


def restore(run, options, protocol):
    """Bring `run` to where the last checkpoint in --savedir left it; the one before, if that cannot be read.

    Raises InputError if the checkpoint is of another protocol or other options, or damaged.
    """
    path, checkpoint = _read_last(options.savedir)
    run.source = path
    if "teacher" not in checkpoint or "history" not in checkpoint:
        raise InputError(f"{path}: holds no teacher, so it cannot be resumed, only tested; start anew without --resume")
    load_published(run.student, checkpoint["state_dict"], path)
    load_published(run.teacher, checkpoint["teacher"], path)
    try:
        if checkpoint["protocol"] != protocol.title:
            raise InputError(f"--resume: {path} was trained for {checkpoint['protocol']}, not {protocol.title}")
        _check_same_options(checkpoint["options"], options, path)
        for optimizer, key in zip(run.optimizers, ("optimizer", "optimizer_1"), strict=True):
            optimizer.load_state_dict(checkpoint[key])
        run.data = dict(checkpoint["data"])
        # An entry without these would only be missed at the end of the next epoch.
        run.history = [{"phase": entry["phase"], "kept": entry["kept"], **entry} for entry in checkpoint["history"]]
        run.step = int(checkpoint.get("step", 0))
        sums = checkpoint.get("sums")
        run.sums = None if sums is None else torch.tensor(sums, device=options.device)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}: damaged, it cannot be resumed ({type(error).__name__}: {error}); start anew"
        ) from error


def _read_last(savedir):
    """(path, content) of LAST, or of PREVIOUS where LAST cannot be read."""
    reasons = []
    for path in (savedir / LAST, savedir / PREVIOUS):
        if not os.path.isfile(path):
            continue
        try:
            content = read_checkpoint(path)
        except InputError as error:
            reasons.append(str(error).removesuffix("; fetch it again"))
            continue
        if reasons:
            note(f"note: {reasons[0]}; going on from {PREVIOUS}, the one before")
        return path, content
    raise InputError(f"{reasons[0]}; it cannot be resumed, start anew with --overwrite")


def _check_same_options(before, options, path):
    for name, value in run_record(options)["options"].items():
        if name not in HARMLESS and before.get(name, value) != value:
            raise InputError(f"--resume: {path} was trained with --{name} {before[name]}, not {value}; use the same")


def data_record(files, benchmark):
    """SHA-256 by name of the lists (FileLists) and the mask that a run learns from."""
    mask = benchmark.lists / "cid_mask.pickle"
    paths = [*(each.source for each in files), *([mask] if mask.is_file() else [])]
    return {path.name: digest(path) for path in paths}


def check_same_data(before, now):
    """Raise InputError if a resumed run would learn from other lists or another mask than `before`."""
    for name, value in before.items():
        if now.get(name) != value:
            raise InputError(f"--resume: {name} is not the one that the run began with; restore it, or start anew")


def check_savedir(options):
    """Raise InputError if --savedir holds what would be lost, lacks what is to be resumed, or cannot be written."""
    found = [name for name in NAMES if os.path.exists(options.savedir / name)]
    if options.resume and LAST not in found and PREVIOUS not in found:
        raise InputError(f"{options.savedir}: holds no {LAST} to resume; see --savedir, or start without --resume")
    if found and not options.resume and not options.overwrite:
        raise InputError(
            f"{options.savedir}: already holds {found[0]}; --resume goes on with it, --overwrite replaces it, "
            "--savedir starts elsewhere"
        )
    check_writable(options.savedir)


def check_space(run, savedir):
    """Raise InputError if the disk cannot hold the checkpoints that a run keeps: the last two, the best, a new one."""
    networks = [*run.student.parameters(), *run.teacher.parameters()]
    # Adam keeps two numbers for each weight that it changes.
    size = sum(value.nbytes for value in networks) + 2 * sum(value.nbytes for value in run.learnt())
    held = sum((savedir / name).stat().st_size for name in NAMES if os.path.isfile(savedir / name))
    free = shutil.disk_usage(savedir).free + held
    if free < 4 * size:
        raise InputError(
            f"{savedir}: {free / 1e9:.1f} GB are free, and 4 checkpoints of {size / 1e9:.1f} GB need "
            f"{4 * size / 1e9:.1f}; make room, or choose another --savedir"
        )


def tidy(savedir, source, everything):
    """Delete what a killed process left half-written in `savedir`, and with `everything` an earlier run's results.

    source: the checkpoint that is resumed. It takes the place of a LAST that could not be read, which would otherwise
    become the one before.
    """
    ours = (*NAMES, "train.json", "log.jsonl", "curves.png")
    for path in (path for name in ours for path in savedir.glob(f".{name}.*")):
        path.unlink(missing_ok=True)
    for name in (*ours, "results.json", "retrievals.png", "precision_recall.png") if everything else ():
        (savedir / name).unlink(missing_ok=True)
    if source and source.name == PREVIOUS:
        source.replace(savedir / LAST)
