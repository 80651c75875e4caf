"""Two-phase training of SBKA (arXiv:2312.10320): the student learns from the teacher, then both from each other.

`train` is the whole of it; `train_step` is one update. A run is a function of its options: what is random depends on
(seed, epoch, step), so a run that was interrupted ends with the weights of one that was not.
"""

import itertools
import signal
import time
from collections import deque
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from datasets.benchmark import check_images, open_benchmark
from datasets.errors import InputError, ends_in_one_line, lost_worker
from datasets.images import normalise
from datasets.protocols import PROTOCOLS, protocol_of
from datasets.zeroshot import evaluation_loader, training_loader
from models import parallel
from models.alignment import alignment_losses
from models.checkpoints import (
    BEST,
    BEST_AFTER_WARMUP,
    LAST,
    Run,
    SaveSchedule,
    check_same_data,
    check_savedir,
    check_space,
    data_record,
    restore,
    save,
    tidy,
)
from models.networks import StudentOutput, arithmetic
from models.options import note, resolve, run_record, train_parser
from models.progress import LOSSES, Log, draw_curves, tell
from models.testing import UnseenImages, zero_shot
from models.weights import create_pair

# What a step is measured by: the losses, and the percentage of the batch that is classified right.
MEASURES = ("cls", "ka_student", "ma", "ka_teacher", "student", "total", "train_accuracy")


@ends_in_one_line
def main(protocol_name, argv=None):
    """Command line of a train script. Returns the path of the checkpoint that the zero-shot test will read."""
    protocol = PROTOCOLS[protocol_name]
    options = resolve(train_parser(protocol).parse_args(argv), protocol, "savedir")
    benchmark = open_benchmark(
        protocol_of(protocol_name, options.zero_version), options.data_root, options.zero_version
    )
    data = load_data(benchmark, options)
    check_savedir(options)
    run = start(options, benchmark)
    parallel.connect(options.device)
    try:
        return train(run, data, options, benchmark)
    finally:
        parallel.disconnect()


def load_data(benchmark, options):
    """What a run learns from and is measured on. Raises InputError for bad data.

    training, validation: loaders (the second, of `held_back` sketches in all, may be None); mask: (C, J), or 0;
    files: their FileLists; unseen: UnseenImages for --eval_every, or None.
    """
    protocol = benchmark.protocol
    split = protocol.split_batch(options.batch_size)
    if not all(split):
        least = protocol.sketch_share + protocol.photo_share
        raise InputError(
            f"--batch_size {options.batch_size}: too small for {protocol.sketch_share} sketch and "
            f"{protocol.photo_share} photos; use {least} or more"
        )
    if split[1] < parallel.processes():
        raise InputError(
            f"--batch_size {options.batch_size}: its {split[1]} photos cannot be shared by "
            f"{parallel.processes()} processes; use a larger batch, or fewer processes"
        )
    sketches, photos = benchmark.read("sketch", "train"), benchmark.read("photo", "train")
    try:
        held_back = None if options.no_validation else benchmark.read("sketch", "test")
    except InputError as error:
        raise InputError(f"{error}; --no_validation trains without held-back sketches") from None
    files, unseen = [sketches, photos, *filter(None, [held_back])], None
    if options.eval_every:
        unseen = UnseenImages(benchmark, benchmark.read("photo", "zero"), benchmark.read("sketch", "zero"))
    for each in (*files, *((unseen.photos, unseen.sketches) if unseen else ())):
        check_images(each)
    machine = options.workers, options.device
    training = training_loader(
        sketches, photos, split, options.input_size, options.seed, *machine, share=parallel.share
    )
    batches = training.batch_sampler
    batches.stop = min(batches.stop, options.max_steps or batches.stop)
    if (least := min(batches.size(step) for step in range(batches.stop))) < parallel.processes():
        raise InputError(
            f"--batch_size {options.batch_size}: the last batch of an epoch holds {least} images, fewer than the "
            f"{parallel.processes()} processes; use another size, or fewer processes"
        )
    validation = None
    if held_back:
        part = parallel.share(len(held_back))
        validation = evaluation_loader(
            held_back, options.input_size, options.batch_size, *machine, part.start, part.stop
        )
    mask = 0.0 if options.no_mask else torch.from_numpy(benchmark.read_mask(options.nb_classes)).to(options.device)
    count = held_back and len(held_back)
    return SimpleNamespace(
        training=training, validation=validation, held_back=count, mask=mask, files=files, unseen=unseen
    )


def start(options, benchmark):
    """A Run at its beginning, or where --resume finds it. Raises InputError for weights that do not fit."""
    torch.manual_seed(options.seed)
    finetune = "none" if options.resume else options.finetune
    classes = len(benchmark.seen_names)
    student, teacher = create_pair(options.model, classes, finetune, options.nb_classes, options.drop_path)
    for network in (student, teacher):
        network.to(options.device, memory_format=torch.channels_last)
    if options.grad_checkpointing:
        student.backbone.set_grad_checkpointing()
    if options.compile:
        student.compile()
        teacher.compile()
    optimizers = create_optimizers(student, teacher, options.lr, options.teacher_lr, options.weight_decay)
    run = Run(student, teacher, optimizers)
    if options.resume:
        restore(run, options, benchmark.protocol)
    check_space(run, options.savedir)
    return run


def create_optimizers(student, teacher, lr, teacher_lr, weight_decay):
    """Adam for the student and Adam for the teacher's head, with L2 decay in the gradient (not decoupled)."""
    return (
        torch.optim.Adam(student.parameters(), lr=lr, weight_decay=weight_decay, fused=True),
        torch.optim.Adam(teacher.head.parameters(), lr=teacher_lr, weight_decay=weight_decay, fused=True),
    )


def train(run, data, options, benchmark):
    """Train from where `run` stands to the last epoch. Process 0 saves, logs and prints.

    Returns the path of the checkpoint to test: the epoch after warm-up whose validation accuracy beats every epoch
    before it, warm-up included; where none does, the best one after warm-up; without validation, the last.
    """
    writes, steps = parallel.rank() == 0, data.training.batch_sampler.stop
    record = {"protocol": benchmark.protocol.title, "data": data_record(data.files, benchmark), **run_record(options)}
    check_same_data(run.data, record["data"])
    schedule = SaveSchedule(options.save_every)
    # Convolutions of backward passes, too, are TF32 unless that is ruled out.
    with ends_in_order() as signals, arithmetic("fp32" if options.precision == "fp32" else "tf32", options.device):
        log = _begin(run, steps, options) if writes else None
        networks = [parallel.synchronised(network) for network in (run.student, run.teacher)]
        while len(run.history) < options.epochs:
            bidirectional = len(run.history) > options.warmup_epochs
            try:
                for _ in train_epoch(run, networks, data, bidirectional, options, log):
                    _end_if_asked(run, signals, options, record)
                    if writes and schedule.is_due():
                        save(run, options.savedir, record)
                close_epoch(run, data, bidirectional, options)
            except (RuntimeError, EOFError) as error:
                # A signal to all can end the processes that decode images first; no step is half done then.
                if lost_worker(error) and parallel.processes() == 1:
                    _end_if_asked(run, signals, options, record)
                raise
            if writes:
                last = len(run.history) == options.epochs or len(run.history) % schedule.epochs == 0
                save(run, options.savedir, record, [*([LAST] if last else []), *run.history[-1]["kept"]])
                _show(run.history, options, log)
            if len(run.history) < options.epochs:
                _end_if_asked(run, signals, options, record)
    return _checkpoint_to_test(run.history, options) if writes else None


def train_epoch(run, networks, data, bidirectional, options, log):
    """One epoch from run.step on; yields after each step, when `run` may be saved.

    networks: student and teacher to call, which may be wrapped for several processes. Raises InputError naming step,
    terms and images once a loss is not finite: on a GPU one step later, so that it need not be waited for.
    """
    loader, epoch = data.training, len(run.history)
    batches = loader.batch_sampler
    batches.epoch, batches.start = epoch, run.step
    set_learning_rates(run.optimizers, (options.lr, options.teacher_lr), epoch, options.epochs)
    sizes = [batches.size(step) for step in range(batches.stop)]
    unread, lag = deque(), int(torch.device(options.device).type != "cpu")
    title = f"epoch {epoch + 1}/{options.epochs}"
    with tqdm(total=sum(sizes), initial=sum(sizes[: run.step]), desc=title, unit="image", leave=False,
              disable=parallel.bar()) as bar:  # fmt: skip
        begun, shown = time.perf_counter(), run.step
        for step, (images, *others) in enumerate(loader, run.step):
            if hasattr(signal, "SIGCHLD"):  # where torch would raise the death of a worker in the middle of a step
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            noise = _draw_noise(run.student, sizes[step], options.seed, epoch, step)
            images, labels, is_photo, noise = (
                tensor.to(options.device, non_blocking=True) for tensor in (images, *others, noise)
            )
            measures, sound = train_step(
                *networks, run.optimizers, normalise(images), labels, is_photo,
                data.mask[labels] if isinstance(data.mask, torch.Tensor) else data.mask,
                noise, bidirectional, options.accum_steps, options.precision,
            )  # fmt: skip
            values = parallel.total(torch.stack(list(measures.values())))
            unread.append((step, values, sound))
            if len(unread) > lag:
                _check_finite(*unread.popleft(), epoch, loader)
            run.sums = values if run.sums is None else run.sums + values
            run.step = step + 1
            if log and (run.step % options.print_freq == 0 or run.step == batches.stop):
                line = dict(zip(measures, values.tolist(), strict=True))
                bar.set_postfix(
                    {name: f"{line[name]:.3f}" for name in LOSSES} | {"acc": f"{line['train_accuracy']:.0f}"}
                )
                rate = sum(sizes[shown : run.step]) / (time.perf_counter() - begun)
                place = {"epoch": epoch, "step": run.step}
                log.write({**place, **line, "lr": _rate(run), "images_per_second": rate})
                begun, shown = time.perf_counter(), run.step
            bar.update(sizes[step])
            yield
    for late in unread:
        _check_finite(*late, epoch, loader)


def train_step(
    student, teacher, optimizers, images, labels, is_photo, mask, noise, bidirectional, parts=1, precision="fp32"
):
    """One update on normalised images (B, 3, H, W), labels and is_photo (B,), mask rows (B, J) or 0, noise (B, D).

    Warm-up updates the student alone. With `parts` > 1 gradients are summed over that many parts of the batch; with
    several processes, over the shares of all. Losses, and so gradients, are those of the whole batch.
    Returns ({name of MEASURES: this process's part of it before the update, detached}, (B,) bool: images of which all
    outputs are finite).
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
    whole = parallel.total(torch.stack([is_photo.new_full((), len(images)), is_photo.sum()]))
    images = images.contiguous(memory_format=torch.channels_last)
    masks = mask.chunk(parts) if isinstance(mask, torch.Tensor) else [mask] * parts
    pieces = [*zip(*(tensor.chunk(parts) for tensor in (images, labels, is_photo, noise)), masks, strict=False)]
    sums, sound = None, []
    for number, piece in enumerate(pieces):
        with ExitStack() as stack:
            if number + 1 < len(pieces):  # gradients meet those of other processes once, at the end
                for network in (student, teacher):
                    stack.enter_context(network.no_sync() if hasattr(network, "no_sync") else nullcontext())
            values, finite = _add_gradients(student, teacher, *piece, whole, bidirectional, precision)
        sums = values if sums is None else {name: sums[name] + value for name, value in values.items()}
        sound.append(finite)
    for optimizer in optimizers if bidirectional else optimizers[:1]:
        optimizer.step()
    return sums, torch.cat(sound)


def _add_gradients(student, teacher, images, labels, is_photo, noise, mask, whole, bidirectional, precision):
    """Forward and backward of a part of a batch; see train_step."""
    with arithmetic(precision, images.device.type):
        with torch.set_grad_enabled(bidirectional):
            teacher_logits = _wide(teacher(images))
        output = StudentOutput(*map(_wide, student(images)))
    losses = alignment_losses(output, teacher_logits, labels, is_photo, mask, noise, bidirectional, whole)
    # Other processes' gradients are averaged with ours, and wanted is their sum.
    (losses["total"] * parallel.processes()).backward()
    measures = {name: value.detach() for name, value in losses.items()}
    right = (output.seen_logits.detach().argmax(dim=1) == labels).sum()
    measures["train_accuracy"] = 100 * right / whole[0]
    outputs = torch.cat([teacher_logits, *output], dim=1).detach()
    return measures, outputs.isfinite().all(dim=1)


def close_epoch(run, data, bidirectional, options):
    """Add an epoch's entry to run.history: what was measured in its steps, on held-back and on unseen images."""
    epoch = len(run.history)
    entry = {"epoch": epoch, "phase": "bidirectional" if bidirectional else "warm-up"}
    means = (run.sums / run.step).tolist()
    entry |= dict(zip(MEASURES, means, strict=True)) | {"lr": _rate(run)}
    if data.validation is not None:
        entry["accuracy"] = validate(run.student, data.validation, data.held_back, options.device)
    if data.unseen and (epoch + 1) % options.eval_every == 0:
        entry |= zero_shot(run.student, data.unseen, options)
        run.student.train()
    entry["kept"] = kept_names(run.history, entry)
    run.history.append(entry)
    run.step, run.sums = 0, None


def set_learning_rates(optimizers, rates, epoch, epochs):
    """lr · 0.001^(epoch / epochs), once an epoch."""
    for optimizer, rate in zip(optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.001 ** (epoch / epochs)


@torch.inference_mode()
def validate(student, loader, count, device):
    """Top-1 accuracy (percent) of the seen-class logits on `count` held-back sketches, this process's in `loader`."""
    student.eval()
    right = torch.zeros((), dtype=torch.long)
    for images, labels in tqdm(loader, "validation", unit="batch", leave=False, disable=parallel.bar()):
        predicted = student(normalise(images.to(device))).seen_logits.argmax(dim=1)
        right += (predicted.cpu() == labels).sum()
    student.train()
    return 100 * parallel.total(right).item() / count


def kept_names(history, entry):
    """Names besides LAST under which an epoch's checkpoint is kept, by the release's rule."""
    if "accuracy" not in entry or entry["phase"] != "bidirectional":
        return []
    later = [old for old in history if old["phase"] == "bidirectional"]
    if all(entry["accuracy"] > old["accuracy"] for old in history):
        return [BEST]
    if any(BEST in old["kept"] for old in later) or any(entry["accuracy"] <= old["accuracy"] for old in later):
        return []
    return [BEST_AFTER_WARMUP]


@contextmanager
def ends_in_order():
    """Within, a SIGTERM or Ctrl-C only adds its number to the list this gives; a second one has its usual way."""
    signals, usual = [], {}

    def take(number, _):
        signals.append(number)
        signal.signal(number, usual[number])
        note("note: ending after this step, with a checkpoint; once more ends at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        usual[number] = signal.signal(number, take)
    try:
        yield signals
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _end_if_asked(run, signals, options, record):
    """Save and end, all processes after the same step, once one of them was sent a signal."""
    if parallel.anyone(bool(signals)):
        if parallel.rank() == 0:
            save(run, options.savedir, record)
            note(f"saved after {len(run.history)} epochs and {run.step} steps; --resume goes on from there")
        raise SystemExit(128 + (signals[0] if signals else signal.SIGTERM))


def _begin(run, steps, options):
    """Tidy up --savedir, tell where the run stands, and open its Log."""
    tidy(options.savedir, run.source, everything=options.overwrite)
    if run.history or run.step:
        note(f"note: going on after {len(run.history)} of {options.epochs} epochs and {run.step} steps")
    return Log(options.savedir, len(run.history), run.step, steps)


def _show(history, options, log):
    log.write({name: value for name, value in history[-1].items() if name != "kept"})
    try:
        draw_curves(options.savedir / "curves.png", history)
    except ImportError:
        if len(history) == 1:
            note("note: no curves.png, matplotlib is not installed")
    tell(history[-1], options.epochs)


def _check_finite(step, values, sound, epoch, loader):
    """Raise InputError if a measure of a step (`values` of MEASURES) is not finite, naming the images at fault."""
    if values.isfinite().all():
        return
    terms = [name for name, value in zip(MEASURES[:4], values.isfinite().tolist(), strict=False) if not value]
    place, bad = f"epoch {epoch + 1}, step {step + 1}: {', '.join(terms)}", (~sound).nonzero()[:, 0].tolist()
    if not bad and parallel.processes() > 1:
        raise SystemExit(2)  # the process that has the images tells of them
    if len(bad) in (0, len(sound)):
        images = "not of single images"
    else:
        whole = next(itertools.islice(loader.batch_sampler.batches(), step, None))
        own = whole[parallel.share(len(whole))]
        files = [loader.dataset.file(own[number]) for number in bad[:3]]
        images = f"in {len(bad)} images: " + ", ".join(str(files.root / files.paths[at]) for files, at in files)
    raise InputError(
        f"{place} not finite, {images}; the last checkpoint is as it was: --resume without these images, or start "
        "anew with a lower --lr"
    )


def _checkpoint_to_test(history, options):
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


def _draw_noise(student, size, seed, epoch, step):
    """This process's rows of the noise of a step. What else is random in the step is seeded, too."""
    # Seeded step by step, noise and stochastic depth do not depend on where a run was interrupted.
    torch.manual_seed(_step_seed(seed, epoch, step))
    noise = torch.randn(size, student.linear.in_features)[parallel.share(size)]
    if parallel.rank():  # stochastic depth differs between processes
        torch.manual_seed(_step_seed(seed, epoch, step, parallel.rank()))
    return noise


def _step_seed(*place):
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


def _rate(run):
    return run.optimizers[0].param_groups[0]["lr"]


def _wide(values):
    """bfloat16 as float32, in which losses are computed."""
    return values.float() if values.dtype == torch.bfloat16 else values
