"""Checkpoints of training: a run that is killed at any moment goes on from the last one as if nothing had happened.

    checkpoint/.../{model_best,checkpoint}.pth.tar  {'epoch', 'state_dict', 'best_acc1', 'optimizer', 'optimizer_1'},
                                                    the student with `linear`, each name prefixed `module.`

What this project adds (teacher, options, history, ...) stands beside the authors' keys, so checkpoints move both ways.
"""

import json
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from datasets.lists import MASK_FILE
from models.export import EXPORT_FORMAT, parse_metadata
from models.losses import LOSS_NAMES
from models.networks import Student
from models.saved import check_saved, plain_options
from models.train_step import MEASURES
from models.weights import (
    UnreadableFile,
    fit_input_size,
    gist,
    is_plain_tensor,
    is_whole,
    load_published,
    other_split,
    published_state,
    read_torch,
    safetensors_metadata,
    student_of,
)
from utils.cli import InputError
from utils.distributed import log_rank0
from utils.files import atomic_write, sha256_of, write_json

LAST, BEST, BEST_AFTER_WARMUP = "checkpoint.pth.tar", "model_best.pth.tar", "best_after_warmup.pth.tar"
AUTHORS_MODEL = "convnextv2_tiny", 224, 1000  # model, input size and ImageNet classes of the authors' checkpoints
PREVIOUS = "checkpoint.previous.pth.tar"  # what LAST was before, for a disk that tears it
NAMES = (LAST, PREVIOUS, BEST, BEST_AFTER_WARMUP)

# Options that do not change the result of a run, so that a resumed run may have others.
HARMLESS = {
    *("data_root", "savedir", "resume", "overwrite", "workers", "device"),
    *("save_every", "print_freq", "eval_every"),
    "nb_classes",  # is compared with the class names, and a run with others has another data record
}


class SaveSchedule:
    """When to save: "10m", "30s" or "2h" within epochs and after each epoch, or "3e" after every third epoch.

    Raises ValueError for any other text.
    """

    def __init__(self, every="1e"):
        if not (parts := re.fullmatch(r"(0*[1-9]\d{0,5})([smhe])", every)):
            raise ValueError(f"{every!r} is not an interval like 10m, 30s, 2h, or 1e for epochs")
        number, unit = int(parts[1]), parts[2]
        self.every = every
        self.epochs = number if unit == "e" else 1
        self.seconds = None if unit == "e" else number * {"s": 1, "m": 60, "h": 3600}[unit]
        self.saved = time.monotonic()

    def __str__(self):
        return self.every

    def is_due(self):
        """Whether it is time within an epoch; then the clock starts again."""
        due = self.seconds is not None and time.monotonic() - self.saved >= self.seconds
        if due:
            self.saved = time.monotonic()
        return due


@dataclass
class Keeper:
    """Keeps a run in its folder."""

    folder: Path
    record: dict  # what a checkpoint holds beside the run: "protocol", "classes", "data", "options", "versions"
    schedule: SaveSchedule = field(default_factory=SaveSchedule)
    overwrite: bool = False  # whether the results of an earlier run go

    def save(self, run, names=(LAST,)):
        """Write the state of `run` under `names`. What was there stays whole until the new file is.

        Raises InputError where the weights are not finite; nothing is written then.
        """
        if not torch.stack([value.isfinite().all() for value in run.learnt()]).all():
            raise InputError("weights are not finite; start anew with a lower --lr")
        content = {
            "epoch": len(run.history),
            "step": run.step,
            "sums": None if run.sums is None else dict(zip(MEASURES, run.sums.tolist(), strict=True)),
            "best_acc1": max((entry.get("accuracy", 0.0) for entry in run.history), default=0.0),
            "optimizer": run.optimizers[0].state_dict(),
            "optimizer_1": run.optimizers[1].state_dict(),
            "history": run.history,
            **self.record,
        }
        # The checkpoint that a resumed run reads comes last: where a run dies in between, it does this epoch again.
        for name in sorted(names, key=LAST.__eq__):
            if name == LAST and os.path.isfile(self.folder / LAST):
                _keep_as_previous(self.folder)
            save_checkpoint(self.folder / name, run.student, run.teacher, **content)
        if BEST in names:
            (self.folder / BEST_AFTER_WARMUP).unlink(missing_ok=True)
        write_json(self.folder / "train.json", {**self.record, "epochs": run.history})

    def save_epoch(self, run, epochs):
        """Save after an epoch of `epochs`: as LAST, if it is time, and under the names that the epoch is kept by."""
        done = len(run.history)
        is_due = done == epochs or done % self.schedule.epochs == 0
        self.save(run, [*([LAST] if is_due else []), *run.history[-1]["kept"]])


def read_checkpoint(path):
    """Read a training checkpoint, ours or the authors', or a bare state dict, which becomes its 'state_dict'.

    What models.export wrote as .safetensors tells its model, input size and classes, as a checkpoint of ours does.
    Raises InputError if the file holds neither, and UnreadableFile if it is torn.
    """
    checkpoint = read_torch(path)
    if isinstance(checkpoint, dict) and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return {"state_dict": checkpoint, **_exported_with(path)}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(f"{path}: not a training checkpoint, it has no 'state_dict'")
    return checkpoint


def _exported_with(path):
    """What models.export wrote beside weights, under the names of a training checkpoint; {} for files of others."""
    metadata = safetensors_metadata(path) if str(path).endswith(".safetensors") else {}
    if metadata.get("format") != EXPORT_FORMAT:
        return {}
    try:
        told = parse_metadata(metadata)
        options = {name: told[name] for name in ("model", "input_size", "imagenet_classes")}
        return {"options": options, "classes": json.loads(metadata.get("classes", "null"))}
    except (KeyError, ValueError, RecursionError):
        return {}


def save_checkpoint(path, student, teacher=None, **rest):
    """Write a checkpoint, whole or not at all: the student as the authors name it, the teacher and `rest`."""
    content = {"state_dict": {f"module.{name}": value for name, value in published_state(student).items()}, **rest}
    if teacher is not None:
        content["teacher"] = published_state(teacher)
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch reports a write that failed
            raise OSError(f"{gist(error)}; is the disk full?") from error


class LoadedStudent(NamedTuple):
    """A student network from a checkpoint, and what the checkpoint records about it."""

    student: Student  # on the CPU, in evaluation mode
    metadata: dict  # see student_metadata
    class_names: list[str] | None  # of the seen classes by label; None where the checkpoint does not record them


def load_student(path, model=None, input_size=None, imagenet_classes=None):
    """Build the student of a checkpoint and load its weights: LoadedStudent.

    path: a training checkpoint, ours or the authors', or a state dict (.pt, .safetensors) with its classifier `linear`.
    The other arguments: see student_metadata. Raises InputError.
    """
    checkpoint = read_checkpoint(path)
    metadata = student_metadata(path, checkpoint, model, input_size, imagenet_classes)
    seen_classes, source = metadata["seen_classes"], _source_of_model(checkpoint, path)
    student = student_of(metadata["model"], seen_classes, metadata["imagenet_classes"], source=source)
    load_published(student, checkpoint["state_dict"], path)
    names = checkpoint.get("classes")
    fits = isinstance(names, list) and len(names) == seen_classes and all(isinstance(name, str) for name in names)
    return LoadedStudent(student.eval(), metadata | {"width": student.width}, names if fits else None)


def student_metadata(path, checkpoint=None, model=None, input_size=None, imagenet_classes=None):
    """What a checkpoint records about its student: a dict that is ready for JSON, read without building a network.

    "checkpoint" (its path), "sha256", "model", "imagenet_classes", "input_size" (side of the images, pixels) and
    "seen_classes" (how many).
    checkpoint: the content of the file, as read_checkpoint gives it (default: it is read); model, input_size,
    imagenet_classes: values for what the file does not record, by default convnextv2_tiny, 224 (or the model's own
    size) and 1000, as the authors' files have them. Another input_size than the recorded one is used, with a note.
    Raises InputError if model or imagenet_classes contradict the record, or there is no classifier of seen classes.
    """
    checkpoint = read_checkpoint(path) if checkpoint is None else checkpoint
    recorded = trained_with(checkpoint)
    known = {
        "model": _recorded(recorded, "model", str),
        "imagenet_classes": _recorded(recorded, "imagenet_classes", int),
        "input_size": _recorded(recorded, "input_size", int),
    }
    for name, given in (("model", model), ("imagenet_classes", imagenet_classes)):
        if None not in (given, known[name]) and given != known[name]:
            raise InputError(f"--{name} {given}: {path} was trained with {known[name]}; leave --{name} out")
    if None not in (input_size, known["input_size"]) and input_size != known["input_size"]:
        log_rank0(f"note: {path} was trained with --input_size {known['input_size']}, not {input_size}")
    default_model, _, default_classes = AUTHORS_MODEL
    model = model or known["model"] or default_model
    size = fit_input_size(model, input_size or known["input_size"], _source_of_model(checkpoint, path))
    return {
        "checkpoint": str(path),
        "sha256": sha256_of(path),
        "model": model,
        "imagenet_classes": imagenet_classes or known["imagenet_classes"] or default_classes,
        "input_size": size,
        "seen_classes": _count_seen_classes(checkpoint["state_dict"], path),
    }


def check_seen_classes(path, found, expected):
    """Raise InputError if a checkpoint was trained on another number of seen classes than the benchmark has."""
    if found != expected:
        raise InputError(f"{path}: {other_split(found, expected)}")


def _recorded(options, name, kind):
    """The value of an option of a checkpoint; None where there is none, or not of its kind."""
    value = options.get(name)
    fits = type(value) is kind and (kind is str or 1 <= value <= 10**6)
    return value if fits else None


def _source_of_model(checkpoint, path):
    """How messages begin that name the model: the option, or the checkpoint that records it and its version of timm."""
    if "model" not in trained_with(checkpoint):
        return "--model"
    versions = checkpoint.get("versions")
    version = versions.get("timm", "") if isinstance(versions, dict) else ""
    return f"{path}: needs timm {version} as in its training, for --model".replace("  ", " ")


def _count_seen_classes(state, path):
    """Number of rows of `linear`, the classifier of the seen classes, in a state dict."""
    for name, value in state.items():
        if re.fullmatch(r"(module\.)*linear\.weight", str(name)) and is_plain_tensor(value) and value.ndim == 2:
            return max(1, len(value))
    raise InputError(f"{path}: holds no classifier of seen classes; take a checkpoint that a train script wrote")


def trained_with(checkpoint):
    """The options that a checkpoint's content was trained with, by their present names; {} for the authors'."""
    try:
        return _renamed(plain_options(checkpoint.get("options")))
    except ValueError:
        return {}


def find_checkpoint(folder, kept):
    """The checkpoint in `folder` to test: `kept`, or one that stands in for it, which is said; None without any."""
    for name in (kept, BEST_AFTER_WARMUP, LAST):
        if os.path.isfile(folder / name):
            if name != kept:
                log_rank0(f"note: {folder} has no {kept}, testing {name}")
            return folder / name
    return None


def restore(run, savedir, record, defaults):
    """Bring `run` to where the last checkpoint in `savedir` left it, or the previous one if the last cannot be read.

    record: what the run is now, as in Keeper; defaults: values of options that the checkpoint may not know yet.
    Raises InputError if the checkpoint is of another protocol, other data or other options, or damaged.
    """
    path, checkpoint = _read_last(savedir)
    run.source = path
    if "teacher" not in checkpoint or "history" not in checkpoint:
        raise InputError(f"{path}: holds no teacher, so it cannot be resumed, only tested; start anew without --resume")
    load_published(run.student, checkpoint["state_dict"], path)
    load_published(run.teacher, checkpoint["teacher"], path)
    # Without ka_student the student's ImageNet head learns late, or never.
    idle = () if "ka_student" in record["options"].get("losses", LOSS_NAMES) else tuple(run.student.head.parameters())
    try:
        saved = check_saved(checkpoint, run.optimizers, idle)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: damaged, it cannot be resumed ({error}); start anew") from error
    if saved["protocol"] != record["protocol"]:
        raise InputError(f"--resume: {path} was trained for {saved['protocol']}, not {record['protocol']}")
    _check_same_options(defaults | _renamed(saved["options"]), record["options"], path)
    _check_same_data(saved["data"], record["data"])
    for optimizer, state in zip(run.optimizers, saved["adam"], strict=True):
        optimizer.load_state_dict(state)
    run.history, run.step = saved["history"], saved["step"]
    run.sums = None if saved["sums"] is None else torch.tensor(saved["sums"], device=run.device)


def _read_last(savedir):
    """(path, content) of LAST, or of PREVIOUS where LAST cannot be read."""
    torn = None
    for path in (savedir / LAST, savedir / PREVIOUS):
        if not os.path.isfile(path):
            continue
        try:
            content = read_checkpoint(path)
        except UnreadableFile as error:
            torn = torn or error.what
            continue
        if "teacher" in content and not is_whole(path):  # one of ours
            torn = torn or f"{path}: damaged, its sums do not agree"
            continue
        if torn:
            log_rank0(f"note: {torn}; going on from {PREVIOUS}, the one before")
        return path, content
    raise InputError(f"{torn}; it cannot be resumed, start anew with --overwrite")


def _renamed(options):
    """Options of a checkpoint by their present names."""
    options = {**options}
    if "imagenet_classes" not in options and "nb_classes" in options:  # which were the ImageNet classes before
        options["imagenet_classes"] = options.pop("nb_classes")
    return options


def _check_same_options(before, now, path):
    for name, value in now.items():
        if name not in HARMLESS and before[name] != value:
            before, now = (
                " ".join(map(str, each)) if isinstance(each, list) else each for each in (before[name], value)
            )
            raise InputError(f"--resume: {path} was trained with --{name} {before}, not {now}; use the same")


def data_record(files, benchmark, has_mask):
    """SHA-256 by name of the lists (FileLists) and, if it has one, the mask that a run learns from."""
    paths = [*(each.source for each in files), *([benchmark.lists / MASK_FILE] if has_mask else [])]
    return {path.name: sha256_of(path) for path in paths}


def _check_same_data(before, now):
    for name, value in before.items():
        if name == MASK_FILE and name not in now:
            continue  # earlier versions recorded a mask that was not used, too
        if now.get(name) != value:
            raise InputError(f"--resume: {name} is not the one that the run began with; restore it, or start anew")


def check_savedir(savedir, resume=False, overwrite=False):
    """Raise InputError if `savedir` holds what would be lost, or lacks what is to be resumed."""
    found = [name for name in NAMES if os.path.exists(savedir / name)]
    if resume and LAST not in found and PREVIOUS not in found:
        raise InputError(f"{savedir}: holds no {LAST} to resume; see --savedir, or start without --resume")
    if found and not resume and not overwrite:
        raise InputError(
            f"{savedir}: already holds {found[0]}; --resume goes on with it, --overwrite replaces it, "
            "--savedir starts elsewhere"
        )


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

    source: the checkpoint that is resumed. If it is PREVIOUS, LAST could not be read, and PREVIOUS replaces it; else
    the next save would keep the damaged file as the previous one.
    """
    ours = (*NAMES, "train.json", "log.jsonl", "curves.png")
    for path in (path for name in ours for path in savedir.glob(f".{name}.*")):
        path.unlink(missing_ok=True)
    for name in (
        (*ours, "results.json", "per_query.npz", "retrievals.png", "precision_recall.png", "tsne.png")
        if everything
        else ()
    ):
        (savedir / name).unlink(missing_ok=True)
    if source and source.name == PREVIOUS:
        source.replace(savedir / LAST)


def _keep_as_previous(savedir):
    """Make PREVIOUS a second name of the file LAST, without a copy. At any moment LAST is there, and whole."""
    (savedir / PREVIOUS).unlink(missing_ok=True)
    try:
        os.link(savedir / LAST, savedir / PREVIOUS)
    except OSError:  # a disk without hard links
        (savedir / LAST).replace(savedir / PREVIOUS)
