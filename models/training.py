"""Two-phase training of SBKA (arXiv:2312.10320): the student learns from the teacher, then both from each other.

`train` is the whole of it; `train_step` is one update. A run is a function of its options: what is random depends on
(seed, epoch, step), so a resumed run ends with the weights of an uninterrupted one.
"""

import math
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from datasets.errors import InputError, ends_in_one_line
from datasets.filelists import check_images, open_benchmark
from datasets.files import check_writable, digest, write_json
from datasets.images import normalise
from datasets.protocols import PROTOCOLS, protocol_of
from datasets.zeroshot import evaluation_loader, training_loader
from models.alignment import alignment_losses
from models.networks import Student, Teacher
from models.options import note, resolve, run_record, train_parser
from models.weights import create_pair, load_published, read_checkpoint, save_checkpoint

LAST, BEST, BEST_AFTER_WARMUP = "checkpoint.pth.tar", "model_best.pth.tar", "best_after_warmup.pth.tar"

# Options that leave the result of a run as it is, so that a resumed run may change them.
HARMLESS = {"data_root", "savedir", "resume", "overwrite", "workers", "device"}


@dataclass
class Run:
    """What an epoch changes, and a checkpoint holds."""

    student: Student
    teacher: Teacher
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]  # student's, teacher's
    history: list[dict] = field(default_factory=list)  # one entry an epoch, see `train`
    data: dict = field(default_factory=dict)  # SHA-256 of the lists and mask of a resumed run


@ends_in_one_line
def main(protocol_name, argv=None):
    """Command line of a train script. Returns the path of the checkpoint that the zero-shot test will read."""
    protocol = PROTOCOLS[protocol_name]
    options = resolve(train_parser(protocol).parse_args(argv), protocol, "savedir")
    benchmark = open_benchmark(
        protocol_of(protocol_name, options.zero_version), options.data_root, options.zero_version
    )
    loaders, mask = load_data(benchmark, options)
    _check_savedir(options)
    run = start(options, len(benchmark.seen_names))
    return train(run, loaders, mask, options, benchmark)


def load_data(benchmark, options):
    """((training loader, validation loader or None), semantic mask (C, J) or 0). Raises InputError for bad data."""
    protocol = benchmark.protocol
    split = protocol.split_batch(options.batch_size)
    if not all(split):
        least = protocol.sketch_share + protocol.photo_share
        raise InputError(
            f"--batch_size {options.batch_size}: too small for {protocol.sketch_share} sketch and "
            f"{protocol.photo_share} photos; use {least} or more"
        )
    sketches, photos = benchmark.read("sketch", "train"), benchmark.read("photo", "train")
    try:
        held_back = None if options.no_validation else benchmark.read("sketch", "test")
    except InputError as error:
        raise InputError(f"{error}; --no_validation trains without held-back sketches") from None
    for files in filter(None, (sketches, photos, held_back)):
        check_images(files)
    machine = options.workers, options.device
    training = training_loader(sketches, photos, split, options.input_size, options.seed, *machine)
    validation = held_back and evaluation_loader(held_back, options.input_size, options.batch_size, *machine)
    mask = 0.0 if options.no_mask else torch.from_numpy(benchmark.read_mask(options.nb_classes)).to(options.device)
    return (training, validation), mask


def start(options, classes):
    """A Run at its beginning, or where --resume finds it. Raises InputError for weights that do not fit."""
    torch.manual_seed(options.seed)
    finetune = "none" if options.resume else options.finetune
    student, teacher = create_pair(options.model, classes, finetune, options.nb_classes, options.drop_path)
    student, teacher = student.to(options.device), teacher.to(options.device)
    optimizers = create_optimizers(student, teacher, options.lr, options.teacher_lr, options.weight_decay)
    run = Run(student, teacher, optimizers)
    if options.resume:
        _restore(run, options.savedir / LAST, options)
    return run


def create_optimizers(student, teacher, lr, teacher_lr, weight_decay):
    """Adam for the student and Adam for the teacher's head, with L2 decay in the gradient (not decoupled)."""
    return (
        torch.optim.Adam(student.parameters(), lr=lr, weight_decay=weight_decay),
        torch.optim.Adam(teacher.head.parameters(), lr=teacher_lr, weight_decay=weight_decay),
    )


def train(run, loaders, mask, options, benchmark):
    """Train from where `run` stands to the last epoch, with a checkpoint after each.

    Returns the path of the checkpoint to test: the epoch after warm-up whose validation accuracy beats every epoch
    before it, warm-up included; where none does, the best one after warm-up; without validation, the last.
    """
    training, validation = loaders
    record = {"protocol": benchmark.protocol.title, "data": _data_record(loaders, benchmark), **run_record(options)}
    _check_same_data(run.data, record["data"])
    if run.history:
        note(f"note: going on after {len(run.history)} of {options.epochs} epochs")
    if options.overwrite:
        for name in (LAST, BEST, BEST_AFTER_WARMUP, "results.json", "retrievals.png"):
            (options.savedir / name).unlink(missing_ok=True)
    board = _open_board(options.savedir, first_epoch=len(run.history))
    for epoch in range(len(run.history), options.epochs):
        set_learning_rates(run.optimizers, (options.lr, options.teacher_lr), epoch, options.epochs)
        bidirectional = epoch > options.warmup_epochs
        entry = {"epoch": epoch, "phase": "bidirectional" if bidirectional else "warm-up"}
        entry |= train_epoch(run, training, mask, epoch, bidirectional, options)
        if not math.isfinite(entry["total"]) or not all(value.isfinite().all() for value in run.student.parameters()):
            raise InputError(f"epoch {epoch + 1}: loss or weights are not finite; start anew with a lower --lr")
        if validation is not None:
            entry["accuracy"] = validate(run.student, validation, options.device)
        names = _rank(run.history, entry)
        run.history.append(entry)
        _save(run, names, options.savedir, record)
        _tell(entry, options.epochs, board)
    return _kept(run.history, options)


def train_epoch(run, loader, mask, epoch, bidirectional, options):
    """One epoch. Returns the mean of each loss over its steps, by name."""
    loader.batch_sampler.epoch = epoch
    steps = min(len(loader), options.max_steps or len(loader))
    sums = {}
    progress = tqdm(loader, f"epoch {epoch + 1}/{options.epochs}", total=steps, unit="step", leave=False, disable=None)
    for step, (images, labels, is_photo) in enumerate(progress):
        # Seeded step by step, noise and stochastic depth do not depend on where a run was interrupted.
        torch.manual_seed(_step_seed(options.seed, epoch, step))
        noise = torch.randn(len(images), run.student.linear.in_features)
        images, labels, is_photo, noise = (
            tensor.to(options.device, non_blocking=True) for tensor in (images, labels, is_photo, noise)
        )
        rows = mask[labels] if isinstance(mask, torch.Tensor) else mask
        losses = train_step(
            run.student, run.teacher, run.optimizers, normalise(images), labels, is_photo, rows, noise, bidirectional
        )
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value
        if step % 10 == 0:
            progress.set_postfix(loss=f"{losses['total'].item():.3f}")
        if step + 1 == steps:
            break
    progress.close()
    return {name: float(value) / steps for name, value in sums.items()}


def train_step(student, teacher, optimizers, images, labels, is_photo, mask, noise, bidirectional):
    """One update on normalised images (B, 3, H, W), labels and is_photo (B,), mask rows (B, J) or 0, noise (B, D).

    Warm-up updates the student alone. Returns the losses before the update (see alignment_losses), detached.
    """
    student_optimizer, teacher_optimizer = optimizers
    with torch.set_grad_enabled(bidirectional):
        teacher_logits = teacher(images)
    losses = alignment_losses(student(images), teacher_logits, labels, is_photo, mask, noise, bidirectional)
    student_optimizer.zero_grad()
    teacher_optimizer.zero_grad()
    losses["total"].backward()
    student_optimizer.step()
    if bidirectional:
        teacher_optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


def set_learning_rates(optimizers, rates, epoch, epochs):
    """lr · 0.001^(epoch / epochs), once an epoch."""
    for optimizer, rate in zip(optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.001 ** (epoch / epochs)


@torch.inference_mode()
def validate(student, loader, device):
    """Top-1 accuracy (percent) of the seen-class logits on held-back sketches."""
    student.eval()
    right = 0
    for images, labels in tqdm(loader, "validation", unit="batch", leave=False, disable=None):
        predicted = student(normalise(images.to(device))).seen_logits.argmax(dim=1)
        right += (predicted.cpu() == labels).sum().item()
    student.train()
    return 100 * right / len(loader.dataset)


def _rank(history, entry):
    """Names under which this epoch's checkpoint is kept, by the release's rule; marks them in `entry`."""
    entry["kept"] = []
    if "accuracy" in entry and entry["phase"] == "bidirectional":
        later = [old for old in history if old["phase"] == "bidirectional"]
        if all(entry["accuracy"] > old["accuracy"] for old in history):
            entry["kept"] = [BEST]
        elif not any(BEST in old["kept"] for old in later) and all(
            entry["accuracy"] > old["accuracy"] for old in later
        ):
            entry["kept"] = [BEST_AFTER_WARMUP]
    return [LAST, *entry["kept"]]


def _save(run, names, savedir, record):
    content = {
        "epoch": len(run.history),
        "best_acc1": max((entry.get("accuracy", 0.0) for entry in run.history), default=0.0),
        "optimizer": run.optimizers[0].state_dict(),
        "optimizer_1": run.optimizers[1].state_dict(),
        "history": run.history,
        **record,
    }
    # The checkpoint that a resumed run reads comes last: where a run dies in between, it does this epoch again.
    for name in reversed(names):
        save_checkpoint(savedir / name, run.student, run.teacher, **content)
    if BEST in names:
        (savedir / BEST_AFTER_WARMUP).unlink(missing_ok=True)
    write_json(savedir / "train.json", {**record, "epochs": run.history})


def _restore(run, path, options):
    checkpoint = read_checkpoint(path)
    if "teacher" not in checkpoint or "history" not in checkpoint:
        raise InputError(f"{path}: holds no teacher, so it cannot be resumed, only tested; start anew without --resume")
    load_published(run.student, checkpoint["state_dict"], path)
    load_published(run.teacher, checkpoint["teacher"], path)
    try:
        _check_same_options(checkpoint["options"], options, path)
        for optimizer, key in zip(run.optimizers, ("optimizer", "optimizer_1"), strict=True):
            optimizer.load_state_dict(checkpoint[key])
        run.data = dict(checkpoint["data"])
        # An entry without these would only be missed at the end of the next epoch.
        run.history = [{"phase": entry["phase"], "kept": entry["kept"], **entry} for entry in checkpoint["history"]]
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}: damaged, it cannot be resumed ({type(error).__name__}: {error}); start anew"
        ) from error


def _data_record(loaders, benchmark):
    """SHA-256 of the lists and the mask that a run learns from."""
    training, validation = loaders
    files = [training.dataset.sketches.source, training.dataset.photos.source]
    files += [validation.dataset.files.source] if validation else []
    mask = benchmark.lists / "cid_mask.pickle"
    return {path.name: digest(path) for path in [*files, *([mask] if mask.is_file() else [])]}


def _check_same_data(before, now):
    """Raise InputError if a resumed run would learn from other lists or another mask than `before`."""
    for name, value in before.items():
        if now.get(name) != value:
            raise InputError(f"--resume: {name} is not the one that the run began with; restore it, or start anew")


def _check_same_options(before, options, path):
    for name, value in run_record(options)["options"].items():
        if name not in HARMLESS and before.get(name) != value:
            raise InputError(
                f"--resume: {path} was trained with --{name} {before.get(name)}, not {value}; use the same"
            )


def _check_savedir(options):
    found = [name for name in (LAST, BEST, BEST_AFTER_WARMUP) if os.path.exists(options.savedir / name)]
    if options.resume and LAST not in found:
        raise InputError(f"{options.savedir}: holds no {LAST} to resume; see --savedir, or start without --resume")
    if found and not options.resume and not options.overwrite:
        raise InputError(
            f"{options.savedir}: already holds {found[0]}; --resume goes on with it, --overwrite replaces it, "
            "--savedir starts elsewhere"
        )
    check_writable(options.savedir)


def _kept(history, options):
    """Path of the checkpoint to test, said aloud where the release's rule kept none."""
    kept = [name for entry in history for name in entry["kept"]]
    if options.no_validation:
        name = LAST
    elif BEST in kept:
        name = BEST
    else:
        name = BEST_AFTER_WARMUP if kept else LAST
        why = "no epoch after warm-up beat every epoch before it" if kept else "all epochs were warm-up"
        note(f"note: {why}, so there is no {BEST}; {name} stands in")
    print(f"trained {len(history)} epochs; test reads {options.savedir / name}")
    return options.savedir / name


def _step_seed(*place):
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


def _open_board(savedir, first_epoch):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        note("note: tensorboard is not installed, no training curves are written")
        return None
    return SummaryWriter(savedir / "curves", purge_step=first_epoch)  # hides what an earlier run wrote after it


def _tell(entry, epochs, board):
    numbers = {name: value for name, value in entry.items() if isinstance(value, float)}
    print(f"epoch {entry['epoch'] + 1}/{epochs} {entry['phase']:13}", end=" ")
    print("  ".join(f"{name} {value:.4f}" for name, value in numbers.items() if name != "student"), flush=True)
    for name, value in numbers.items() if board else ():
        board.add_scalar(name, value, entry["epoch"])
    if board:
        board.flush()
