"""Two-phase training of SBKA (arXiv:2312.10320): main, train, one epoch, validation, which checkpoint is kept, signals.

In warm-up only the student is trained, then both networks (models.train_step.train_step is one update). All random
numbers depend on the seed, the epoch and the step alone, so an interrupted and resumed run ends with the weights of an
uninterrupted one.
"""

import signal
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from tqdm import tqdm

from datasets.lists import open_benchmark
from datasets.loaders import LoaderOptions, open_training_data
from datasets.protocols import PROTOCOLS, protocol_of
from models.checkpoints import BEST, BEST_AFTER_WARMUP, LAST, CheckpointSaver
from models.logger import EpochBar, Log, show_epoch
from models.losses import Batch
from models.memory_needs import least_memory
from models.networks import matmul_rules, normalise, prepare_models, pretrained_tag
from models.options import resolve, train_parser
from models.resume import check_savedir, check_space, data_record, remove_stale_files, restore
from models.run_record import defaults_of, loss_weights_of, run_record
from models.teacher_head import read_head
from models.testing import zero_shot_callback
from models.train_step import (
    LOGGED,
    AsyncLossReader,
    TrainConfig,
    TrainState,
    create_optimizers,
    find_accum_steps,
    set_learning_rates,
    train_step,
)
from models.tuning import freeze_layers, freeze_unused, tune_layers
from models.weights import check_size, create_pair
from utils import distributed
from utils.cli import InputError, is_dead_worker, one_line_errors
from utils.distributed import bar_disabled, log_rank0
from utils.files import check_writable
from utils.memory import check_memory, keep_freed_memory


@one_line_errors(should_print=distributed.should_print)
def main(protocol_name, argv=None):
    """Command line of a train script. Returns the path of the checkpoint that the zero-shot test will read."""
    parser = train_parser(PROTOCOLS[protocol_name])
    options = resolve(parser.parse_args(argv), PROTOCOLS[protocol_name], "savedir")
    benchmark = open_benchmark(
        protocol_of(protocol_name, options.zero_version), options.data_root, options.zero_version
    )
    benchmark.check_seen_classes(options.nb_classes)
    uses_mask = not options.no_mask and options.imagenet_classes > 0
    loading = LoaderOptions(options.input_size, options.batch_size, options.workers, options.device)
    data = open_training_data(
        benchmark, loading, options.seed,
        imagenet_classes=options.imagenet_classes if uses_mask else None,
        validate=not options.no_validation, max_steps=options.max_steps,
        sketches=options.sketches, augment=options.augment,
    )  # fmt: skip
    evaluate_unseen = zero_shot_callback(benchmark, loading, options.precision, options.eval_every)
    check_writable(options.savedir)
    with distributed.folder_lock_and_group(options.savedir, "training"):
        check_savedir(options.savedir, options.resume, options.overwrite)
        record = {
            "protocol": benchmark.protocol.title,
            "classes": list(benchmark.seen_names),
            "data": data_record(data.file_lists, benchmark, uses_mask),
            "processes": distributed.get_world_size(),
            **run_record(options),
        }
        state = create_state(options, len(benchmark.seen_names))
        if options.finetune == "timm":
            record["pretrained_tag"] = pretrained_tag(options.model)
        if options.resume:
            restore(state, options.savedir, record, run_record(defaults_of(parser))["options"])
        check_space(state, options.savedir)
        config = TrainConfig(
            epochs=options.epochs, last_warmup_epoch=options.warmup_epochs,
            lr=options.lr, teacher_lr=options.teacher_lr, seed=options.seed,
            accum_steps=options.accum_steps, precision=options.precision, loss_weights=loss_weights_of(vars(options)),
            schedule=options.schedule,
        )  # fmt: skip
        saver = CheckpointSaver(options.savedir, record, options.save_every, options.overwrite)
        distributed.init_process_group(options.device)
        # With gradient checkpointing, keeping freed memory raises the peak by half.
        with nullcontext() if options.grad_checkpointing else keep_freed_memory():
            return train(state, data, config, saver, evaluate_unseen, options.print_freq)


def create_state(options, seen_classes):
    """The TrainState that training starts from. Raises InputError if models or weights are not available."""
    torch.manual_seed(options.seed)
    student, teacher = create_pair(
        options.model, seen_classes, finetune="none" if options.resume else options.finetune,
        imagenet_classes=options.imagenet_classes, drop_path=options.drop_path,
        added_head=read_head(options.teacher_head) if options.teacher_head else None, size=options.input_size,
    )  # fmt: skip
    check_size(student, options.model, options.input_size)
    _check_memory(student, options)
    student.cosine_scale = options.cosine_scale
    freeze_unused(student.backbone, options.input_size)
    for name, freeze in (("tune", tune_layers), ("freeze", freeze_layers)):
        try:
            freeze(student.backbone, getattr(options, name))
        except ValueError as error:
            raise InputError(f"--{name} {getattr(options, name)}: {error}") from None
    try:
        prepare_models(student, teacher, options.device, options.grad_checkpointing, options.compile, options.precision)
    except ValueError as error:
        raise InputError(f"--grad_checkpointing: {error}; leave it out") from None
    optimizers = create_optimizers(
        student, teacher, lr=options.lr, teacher_lr=options.teacher_lr, weight_decay=options.weight_decay
    )
    return TrainState(student, teacher, optimizers)


def _check_memory(student, options):
    """Raise InputError if a training step on the CPU needs more memory than is available. On a GPU, steps are tried."""
    if torch.device(options.device).type == "cpu":
        images = -(-options.batch_size // (options.accum_steps * distributed.get_world_size()))
        needed = least_memory(
            student, options.input_size, images, training=not options.grad_checkpointing,
            bytes_a_value=2 if options.precision == "bf16" else 4,
        )  # fmt: skip
        check_memory(options.input_size, options.batch_size, needed)


def train(state, data, config, saver, evaluate_unseen=None, print_freq=10):
    """Train from the present epoch and step of `state` to the last epoch. Rank 0 saves, logs and prints.

    state: a TrainState; data: TrainingData; config: a TrainConfig; saver: a CheckpointSaver; evaluate_unseen: a
    function of (student, epoch from 0) that returns {metric: value} for the epoch's entry; print_freq: steps between
    log lines.
    Returns the path of the checkpoint to test: the epoch after warm-up whose validation accuracy is higher than that of
    every epoch before it, warm-up included; if there is none, the best one after warm-up; without validation, the last.
    """
    is_rank0 = distributed.get_rank() == 0
    with catch_signals() as signals:
        log = _open_log(state, data, config, saver) if is_rank0 else None
        state.wrap_ddp()

        def after_step(_):
            stop = distributed.any_rank(bool(signals))  # all ranks stop after the same step
            if not stop and is_rank0 and saver.schedule.is_due():
                saver.save(state)
            return stop

        while len(state.history) < config.epochs:
            try:
                stop = train_epoch(state, data, config, log, print_freq, after_step)
                if not stop:
                    close_epoch(state, data, config, evaluate_unseen)
            except (RuntimeError, EOFError, ConnectionResetError) as error:
                # A signal to the process group also ends DataLoader workers. The state is that after a complete step.
                if not (signals and is_dead_worker(error) and distributed.get_world_size() == 1):
                    raise
                stop = True
            if not stop:
                if is_rank0:
                    saver.save_epoch(state, config.epochs)
                    show_epoch(state.history, config.epochs, log)
                stop = len(state.history) < config.epochs and distributed.any_rank(bool(signals))
            if stop:
                if is_rank0:
                    saver.save(state)
                    done = f"{len(state.history)} epochs and {state.step} steps"
                    log_rank0(f"saved after {done}; continue with --resume")
                raise SystemExit(exit_status(signals))
    data.end_workers()
    return checkpoint_to_test(state.history, saver.folder, data.val_loader is not None) if is_rank0 else None


def train_epoch(state, data, config, log=None, print_freq=10, after_step=lambda values: False):
    """Train from step `state.step` to the end of an epoch. Returns whether it was stopped before.

    after_step: a function called after each step, when `state` may be saved, with the values of the step, (LOGGED,)
    summed over the ranks. If it returns True, training stops.
    Raises InputError naming the step, the losses and the images if a loss is not finite; on a GPU one step later.
    """
    epoch, batches = len(state.history), data.train_loader.batch_sampler
    batches.epoch, batches.start = epoch, state.step
    set_learning_rates(state.optimizers, config.learning_rates(epoch))
    sizes = [batches.size(step) for step in range(batches.stop)]
    bidirectional, stop = config.is_bidirectional(epoch), False
    reader = AsyncLossReader(data.train_loader, epoch)
    title = f"epoch {epoch + 1}/{config.epochs}"
    with EpochBar(title, sizes, state.step, log, print_freq, config.logged()) as bar:
        for step, loaded in enumerate(data.train_loader, state.step):
            reset_sigchld()
            noise = draw_noise(state.student, sizes[step], seed=(config.seed, epoch, step))
            batch = _to_device(loaded, noise, data.semantic_mask, state)
            if state.accum_steps is None:
                state.accum_steps = find_accum_steps(
                    state, batch, config.accum_steps, config.precision, config.loss_weights
                )
                draw_noise(
                    state.student, sizes[step], seed=(config.seed, epoch, step)
                )  # the probe drew numbers: reseed
            measures, is_finite = train_step(
                state, batch, bidirectional, state.accum_steps, config.precision, config.loss_weights
            )
            zero = measures["total"].new_zeros(())  # for losses that are not computed
            values = distributed.all_reduce_sum(torch.stack([measures.get(name, zero) for name in LOGGED]))
            state.metric_sums = values if state.metric_sums is None else state.metric_sums + values
            state.step = step + 1
            bar.show(state, reader.add(step, values, is_finite))
            if stop := bool(after_step(values)):
                break
        bar.show(state, reader.flush())
    return stop


def close_epoch(state, data, config, evaluate_unseen=None):
    """Append an epoch's entry to state.history: means over its steps, validation accuracy, zero-shot metrics."""
    epoch = len(state.history)
    entry = {"epoch": epoch, "phase": "bidirectional" if config.is_bidirectional(epoch) else "warm-up"}
    means = dict(zip(LOGGED, (state.metric_sums / state.step).tolist(), strict=True))
    entry |= {name: means[name] for name in config.logged()} | {"lr": state.lr}
    if data.val_loader is not None:
        with matmul_rules(config.precision):
            entry["accuracy"] = validate(state.student, data.val_loader, data.val_size)
    if evaluate_unseen is not None:
        entry |= evaluate_unseen(state.student, epoch)
        state.student.train()
    entry["kept"] = kept_names(state.history, entry)
    state.history.append(entry)
    state.step, state.metric_sums = 0, None


@torch.inference_mode()
def validate(student, loader, count):
    """Top-1 accuracy (percent) of the seen-class logits on `count` held-back sketches; loader: this rank's share."""
    student.eval()
    device = student.linear.weight.device
    correct = torch.zeros((), dtype=torch.long)
    for images, labels in tqdm(loader, "validation", unit="batch", leave=False, disable=bar_disabled()):
        predicted = student(normalise(images.to(device), *student.statistics)).seen_logits.argmax(dim=1)
        correct += (predicted.cpu() == labels).sum()
    student.train()
    return 100 * distributed.all_reduce_sum(correct).item() / count


def kept_names(history, entry):
    """Names besides LAST that an epoch's checkpoint is saved under, by the release's rule."""
    if "accuracy" not in entry or entry["phase"] != "bidirectional":
        return []
    bidirectional = [earlier for earlier in history if earlier["phase"] == "bidirectional"]
    if all(entry["accuracy"] > earlier["accuracy"] for earlier in history):
        return [BEST]
    if any(BEST in earlier["kept"] or entry["accuracy"] <= earlier["accuracy"] for earlier in bidirectional):
        return []
    return [BEST_AFTER_WARMUP]


def checkpoint_to_test(history, folder, validated):
    """Path of the checkpoint to test; prints a note if the release's rule kept none."""
    kept = [name for entry in history for name in entry["kept"]]
    if not validated:
        name = LAST
    elif BEST in kept:
        name = BEST
    else:
        name = BEST_AFTER_WARMUP if kept else LAST
        why = (
            "no epoch after warm-up beat every epoch before it" if any(
                entry["phase"] == "bidirectional" for entry in history
            ) else "all epochs were warm-up (--warmup_epochs E_w: epochs 0 to E_w, which are E_w + 1)"
        )  # fmt: skip
        log_rank0(f"note: {why}, so there is no {BEST}; use {name} instead")
    print(f"trained {len(history)} epoch{'s' if len(history) > 1 else ''}; test reads {folder / name}")
    return folder / name


def draw_noise(student, size, seed):
    """This rank's rows of the noise (size, D) of a step; also seeds stochastic depth.

    seed: (seed, epoch, step). Seeding every step makes the numbers independent of where a run was interrupted.
    """
    torch.manual_seed(_combine(*seed))
    # From pinned memory the copy to a GPU is asynchronous.
    noise = torch.empty(size, student.width, pin_memory=student.linear.weight.is_cuda).normal_()
    noise = noise[distributed.rank_slice(size)]
    if distributed.get_rank():  # stochastic depth differs between ranks
        torch.manual_seed(_combine(*seed, distributed.get_rank()))
    return noise


def _combine(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _to_device(loaded, noise, mask, state):
    """The Batch for (images, labels, is_photo) from a training loader, on the device of `state`."""
    images, labels, is_photo, noise = (tensor.to(state.device, non_blocking=True) for tensor in (*loaded, noise))
    return Batch(normalise(images, *state.student.statistics), labels, is_photo, mask[labels], noise)


def _open_log(state, data, config, saver):
    """Remove stale files from the folder, print where a resumed run continues, and open the Log."""
    remove_stale_files(saver.folder, state.resumed_from, everything=saver.overwrite)
    if state.history or state.step:
        done = f"{len(state.history)} of {config.epochs} epochs and {state.step} steps"
        log_rank0(f"note: resuming after {done}")
    return Log(saver.folder, len(state.history), state.step, data.train_loader.batch_sampler.stop)


@contextmanager
def catch_signals():
    """Within this block the first SIGINT or SIGTERM is only appended to the list that is yielded.

    A second one has its usual effect.
    """
    signals, usual = [], {}

    def handle(number, _):
        signals.append(number)
        signal.signal(number, usual[number])
        log_rank0("note: stopping after this step, with a checkpoint; the same signal again stops at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        usual[number] = signal.signal(number, handle)
    try:
        yield signals
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def exit_status(signals):
    """Exit status after the first of `signals`; of SIGTERM if only another rank received one."""
    return 128 + (signals[0] if signals else signal.SIGTERM)


def reset_sigchld():
    """Restore SIGCHLD's default action, so that a dead DataLoader worker raises when the next batch is fetched.

    torch sets a handler when a loader starts its workers, which may raise in the middle of a step. Call this after
    that.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
