"""Saves and reads checkpoints of training, and loads the student of one (load_student).

    checkpoint/.../{model_best,checkpoint}.pth.tar  {'epoch', 'state_dict', 'best_acc1', 'optimizer', 'optimizer_1'},
                                                    the student with `linear`, each name prefixed `module.`

This project adds keys to the authors' (teacher, options, history, ...), so the authors' code can read its checkpoints
and the other way round. models.resume restores the state of a training run from one.
"""

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from models.export import EXPORT_FORMAT, parse_metadata
from models.networks import Student
from models.torch_files import first_sentence, is_plain_tensor, read_torch, safetensors_metadata
from models.train_step import LOGGED
from models.weights import (
    check_size,
    find_state_dict,
    fit_input_size,
    load_published,
    match_published,
    other_split,
    published_state,
    resize,
    student_of,
    without_prefixes,
)
from utils.cli import InputError, printable
from utils.distributed import log_rank0
from utils.files import atomic_write, sha256_of, write_json

LAST, BEST, BEST_AFTER_WARMUP = "checkpoint.pth.tar", "model_best.pth.tar", "best_after_warmup.pth.tar"
AUTHORS_MODEL = "convnextv2_tiny", 224, 1000  # model, input size and ImageNet classes of the authors' checkpoints
PREVIOUS = "checkpoint.previous.pth.tar"  # the LAST before, in case LAST is torn
NAMES = (LAST, PREVIOUS, BEST, BEST_AFTER_WARMUP)
OPTIMIZERS = "optimizer", "optimizer_1"  # keys of the student's and the teacher's, if there is a teacher
_PLAIN = (str, int, float, bool, type(None))


class SaveSchedule:
    """When to save: "10m", "30s" or "2h" within epochs and after each epoch, or "3e" after every third epoch.

    Raises ValueError for any other text.
    """

    def __init__(self, every="1e"):
        if not (match := re.fullmatch(r"(0*[1-9]\d{0,5})([smhe])", every)):
            raise ValueError(f"{every!r} is not an interval like 10m, 30s, 2h, or 1e for epochs")
        number, unit = int(match[1]), match[2]
        self.every = every
        self.epochs = number if unit == "e" else 1
        self.seconds = None if unit == "e" else number * {"s": 1, "m": 60, "h": 3600}[unit]
        self.saved = time.monotonic()

    def __str__(self):
        return self.every

    def is_due(self):
        """Whether it is time to save within an epoch; if so, the interval starts again."""
        due = self.seconds is not None and time.monotonic() - self.saved >= self.seconds
        if due:
            self.saved = time.monotonic()
        return due


@dataclass
class CheckpointSaver:
    """Saves checkpoints and train.json in a folder."""

    folder: Path
    record: dict  # more content of a checkpoint: "protocol", "classes", "data", "processes", "options", "versions"
    schedule: SaveSchedule = field(default_factory=SaveSchedule)
    overwrite: bool = False  # whether results of an earlier run are deleted

    def save(self, state, names=(LAST,)):
        """Write a TrainState under `names`. Each earlier file is replaced when the new one is complete.

        Raises InputError if weights are not finite; nothing is written then.
        """
        if not torch.stack([value.isfinite().all() for value in state.trainable_parameters()]).all():
            raise InputError("weights are not finite; start anew with a lower --lr")
        sums = state.metric_sums
        content = {
            "epoch": len(state.history),
            "step": state.step,
            "sums": None if sums is None else dict(zip(LOGGED, sums.tolist(), strict=True)),
            "best_acc1": max((entry.get("accuracy", 0.0) for entry in state.history), default=0.0),
            **{name: each.state_dict() for name, each in zip(OPTIMIZERS, state.optimizers, strict=False)},
            "history": state.history,
            **self.record,
        }
        # LAST, which --resume reads, is written at the end: if a run dies in between, the epoch is trained again.
        for name in sorted(names, key=LAST.__eq__):
            if name == LAST and os.path.isfile(self.folder / LAST):
                _link_previous(self.folder)
            save_checkpoint(self.folder / name, state.student, state.teacher, **content)
        if BEST in names:
            (self.folder / BEST_AFTER_WARMUP).unlink(missing_ok=True)
        write_json(self.folder / "train.json", {**self.record, "epochs": state.history})

    def save_epoch(self, state, epochs):
        """Save after an epoch of `epochs`: as LAST if the schedule says so, and as the names in the epoch's entry."""
        done = len(state.history)
        is_due = done == epochs or done % self.schedule.epochs == 0
        self.save(state, [*([LAST] if is_due else []), *state.history[-1]["kept"]])


def read_checkpoint(path):
    """Content of a training checkpoint, ours or the authors', or {"state_dict"} of a file with a state dict alone.

    Other programs' checkpoints have it under another of models.weights.STATE_KEYS.
    For a .safetensors file of models.export also "options" (model, input size, ImageNet classes) and "classes".
    Raises InputError if the file is neither, and UnreadableFile if it is torn.
    """
    checkpoint = read_torch(path)
    if isinstance(checkpoint, dict) and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return {"state_dict": checkpoint, **_exported_with(path)}
    state = find_state_dict(checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or state is checkpoint:
        raise InputError(f"{path}: not a training checkpoint, it has no 'state_dict'")
    return checkpoint | {"state_dict": state}


def _exported_with(path):
    """Metadata that models.export wrote, under the keys of a training checkpoint; {} for other files."""
    metadata = safetensors_metadata(path) if str(path).endswith(".safetensors") else {}
    if metadata.get("format") != EXPORT_FORMAT:
        return {}
    try:
        values = parse_metadata(metadata)
        options = {name: values[name] for name in ("model", "input_size", "imagenet_classes")}
        return {"options": options, "classes": json.loads(metadata.get("classes", "null"))}
    except (KeyError, ValueError, RecursionError):
        return {}


def save_checkpoint(path, student, teacher=None, **rest):
    """Write a checkpoint atomically: the student under the authors' names, the teacher and `rest`."""
    content = {"state_dict": {f"module.{name}": value for name, value in published_state(student).items()}, **rest}
    if teacher is not None:
        content["teacher"] = published_state(teacher)
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's report of a failed write
            raise OSError(f"{first_sentence(error)}; is the disk full?") from error


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
    trained_size = _recorded(trained_with(checkpoint), "input_size", int)

    def build():
        student = student_of(metadata["model"], seen_classes, metadata["imagenet_classes"], source=source)
        resize(student, metadata["model"], trained_size)
        return student

    state = without_prefixes(checkpoint["state_dict"])
    state = {name: value for name, value in state.items() if not str(name).startswith("added_head.")}
    with torch.device("meta"):  # an option in a small file can name a network of any size
        match_published(build(), state, path)
    student = build()
    load_published(student, state, path)
    resize(student, metadata["model"], metadata["input_size"])
    source = "--input_size" if input_size else f"{path}: trained with --input_size"
    check_size(student, metadata["model"], metadata["input_size"], source)
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
        "imagenet_classes": _recorded(recorded, "imagenet_classes", int, lowest=0),
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
    if known["input_size"] is None and (odd := recorded.get("input_size")) is not None:
        log_rank0(f"note: {path} records an input size of {printable(odd)[:40]}, which is none; {size or 224} is used")
    return {
        "checkpoint": str(path),
        "sha256": sha256_of(path),
        "model": model,
        "imagenet_classes": next(
            each for each in (imagenet_classes, known["imagenet_classes"], default_classes) if each is not None
        ),
        "input_size": size,
        "seen_classes": _count_seen_classes(checkpoint["state_dict"], path),
    }


def check_seen_classes(path, found, expected):
    """Raise InputError if a checkpoint was trained on another number of seen classes than the benchmark has."""
    if found != expected:
        raise InputError(f"{path}: {other_split(found, expected)}")


def _recorded(options, name, kind, lowest=1):
    """The value of an option of a checkpoint; None where there is none, not of its kind, or a number out of bounds."""
    value = options.get(name)
    bounds = (0, 200) if kind is str else (lowest, 4096 if name == "input_size" else 10**6)
    fits = type(value) is kind and bounds[0] <= (len(value) if kind is str else value) <= bounds[1]
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
    for name, value in without_prefixes(state).items():
        if name == "linear.weight" and isinstance(value, torch.Tensor) and value.ndim == 2:
            if not is_plain_tensor(value):
                raise InputError(f"{path}: linear.weight is no ordinary tensor; fetch the file again")
            return max(1, len(value))
    raise InputError(f"{path}: holds no classifier of seen classes; take a checkpoint that a train script wrote")


def trained_with(checkpoint):
    """The training options in a checkpoint's content, under their present names; {} for the authors' checkpoints."""
    try:
        return _renamed(plain_options(checkpoint.get("options")))
    except ValueError:
        return {}


def plain_options(options):
    """The options of a checkpoint by name. Raises ValueError unless all are plain values or lists of them."""
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError("options are not a dict by name")
    for name, value in options.items():
        if not all(isinstance(each, _PLAIN) for each in (value if isinstance(value, list) else [value])):
            raise ValueError(f"option {name} is not a plain value")
    return dict(options)


def find_checkpoint(folder, kept):
    """Path of the checkpoint in `folder` to test: `kept`, or with a note the next best one; None if there is none."""
    for name in (kept, BEST_AFTER_WARMUP, LAST):
        if os.path.isfile(folder / name):
            if name != kept:
                log_rank0(f"note: {folder} has no {kept}, testing {name}")
            return folder / name
    return None


def _renamed(options):
    """Options of a checkpoint under their present names."""
    options = {**options}
    if "imagenet_classes" not in options and "nb_classes" in options:  # nb_classes were the ImageNet classes before
        options["imagenet_classes"] = options.pop("nb_classes")
    return options


def _link_previous(savedir):
    """Make PREVIOUS a hard link to LAST. LAST exists and is complete at any moment."""
    (savedir / PREVIOUS).unlink(missing_ok=True)
    try:
        os.link(savedir / LAST, savedir / PREVIOUS)
    except OSError:  # a file system without hard links
        (savedir / LAST).replace(savedir / PREVIOUS)
