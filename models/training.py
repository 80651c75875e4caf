"""Two-phase training of SBKA (arXiv:2312.10320): the student learns from the teacher, then both from each other.

`train` is the whole of it; models.train_step.train_step is one update. What is random depends on the seed and the place
in the run alone, so a run that was interrupted ends with the weights of one that was not.
"""

from contextlib import closing, nullcontext

import numpy as np
import torch
from tqdm import tqdm

from datasets.lists import open_benchmark
from datasets.loaders import LoaderOptions, open_training_data
from datasets.protocols import PROTOCOLS, protocol_of
from models import interrupts
from models.checkpoints import (
    BEST,
    BEST_AFTER_WARMUP,
    LAST,
    Keeper,
    check_savedir,
    check_space,
    data_record,
    restore,
    tidy,
)
from models.logger import EpochBar, Log, show_epoch
from models.losses import Batch, LossWeights
from models.measured import Measured
from models.networks import matmul_rules, normalise, place
from models.options import defaults_of, resolve, run_record, train_parser
from models.testing import zero_shot_callback
from models.train_step import MEASURES, Recipe, Run, create_optimizers, parts_that_fit, set_learning_rates, train_step
from models.weights import check_size, create_pair
from utils import distributed
from utils.cli import InputError, is_dead_worker, one_line_errors
from utils.distributed import bar_disabled, log_rank0
from utils.files import check_writable
from utils.memory import keep_freed_memory


@one_line_errors(should_print=distributed.should_print)
def main(protocol_name, argv=None):
    """Command line of a train script. Returns the path of the checkpoint that the zero-shot test will read."""
    parser = train_parser(PROTOCOLS[protocol_name])
    options = resolve(parser.parse_args(argv), PROTOCOLS[protocol_name], "savedir")
    protocol_name = protocol_of(protocol_name, options.zero_version)
    benchmark = open_benchmark(protocol_name, options.data_root, options.zero_version)
    benchmark.check_seen_classes(options.nb_classes)
    loading = LoaderOptions(options.input_size, options.batch_size, options.workers, options.device)
    data = open_training_data(
        benchmark, loading, options.seed,
        imagenet_classes=None if options.no_mask else options.imagenet_classes,
        validate=not options.no_validation, max_steps=options.max_steps,
    )  # fmt: skip
    watch = zero_shot_callback(benchmark, loading, options.precision, options.eval_every)
    check_writable(options.savedir)
    with distributed.folder_lock_and_group(options.savedir, "training"):
        check_savedir(options.savedir, options.resume, options.overwrite)
        record = {
            "protocol": benchmark.protocol.title,
            "classes": list(benchmark.seen_names),
            "data": data_record(data.file_lists, benchmark, not options.no_mask),
            **run_record(options),
        }
        torch.manual_seed(options.seed)
        finetune = "none" if options.resume else options.finetune
        seen_classes = len(benchmark.seen_names)
        pair = create_pair(options.model, seen_classes, finetune, options.imagenet_classes, options.drop_path)
        check_size(pair[0], options.model, options.input_size)
        try:
            place(*pair, options.device, options.grad_checkpointing, options.compile)
        except ValueError as error:
            raise InputError(f"--grad_checkpointing: {error}; leave it out") from None
        run = Run(*pair, create_optimizers(*pair, options.lr, options.teacher_lr, options.weight_decay))
        if options.resume:
            restore(run, options.savedir, record, run_record(defaults_of(parser))["options"])
        check_space(run, options.savedir)
        recipe = Recipe(
            options.epochs, options.warmup_epochs, options.lr, options.teacher_lr,
            options.seed, options.accum_steps, options.precision,
            LossWeights(tuple(options.losses), options.mask_weight, options.modality_weight),
        )  # fmt: skip
        keeper = Keeper(options.savedir, record, options.save_every, options.overwrite)
        distributed.init_process_group(options.device)
        # Who recomputes to save memory would need half as much again.
        with nullcontext() if options.grad_checkpointing else keep_freed_memory():
            return train(run, data, recipe, keeper, watch, options.print_freq)


def train(run, data, recipe, keeper, watch=None, print_freq=10):
    """Train from where `run` stands to the last epoch. Process 0 saves, logs and prints.

    run: a Run; data: TrainingData; recipe: a Recipe; keeper: a Keeper; watch: a function of (student, epoch from 0)
    that measures more after an epoch, and gives a dict; print_freq: steps between two lines of the log.
    Returns the path of the checkpoint to test: the epoch after warm-up whose validation accuracy beats every epoch
    before it, warm-up included; where none does, the best one after warm-up; without validation, the last.
    """
    is_first = distributed.get_rank() == 0
    with interrupts.caught() as signals:
        log = _begin(run, data, recipe, keeper) if is_first else None
        run.synchronise()
        while len(run.history) < recipe.epochs:
            try:
                with closing(train_epoch(run, data, recipe, log, print_freq)) as steps:
                    for _ in steps:
                        _end_if_asked(run, signals, keeper)
                        if is_first and keeper.schedule.is_due():
                            keeper.save(run)
                close_epoch(run, data, recipe, watch)
            except (RuntimeError, EOFError, ConnectionResetError) as error:
                # A signal to the whole process group may have ended the processes that decode images. No step is half
                # done then, so the run can be saved.
                if is_dead_worker(error) and distributed.get_world_size() == 1:
                    _end_if_asked(run, signals, keeper)
                raise
            if is_first:
                keeper.save_epoch(run, recipe.epochs)
                show_epoch(run.history, recipe.epochs, log)
            if len(run.history) < recipe.epochs:
                _end_if_asked(run, signals, keeper)
    return checkpoint_to_test(run.history, keeper.folder, data.val_loader is not None) if is_first else None


def train_epoch(run, data, recipe, log=None, print_freq=10):
    """One epoch from run.step on; after each step, when `run` may be saved, yields its measures, (MEASURES,).

    Raises InputError naming step, terms and images once a loss is not finite; on a GPU one step later.
    """
    epoch, batches = len(run.history), data.train_loader.batch_sampler
    batches.epoch, batches.start = epoch, run.step
    set_learning_rates(run.optimizers, recipe.rates(epoch))
    sizes = [batches.size(step) for step in range(batches.stop)]
    measured = Measured(data.train_loader, epoch)
    with EpochBar(f"epoch {epoch + 1}/{recipe.epochs}", sizes, run.step, log, print_freq) as bar:
        try:
            for step, loaded in enumerate(data.train_loader, run.step):
                interrupts.leave_workers_alone()
                noise = draw_noise(run.student, sizes[step], (recipe.seed, epoch, step))
                batch = _on_device(loaded, noise, data.semantic_mask, run)
                if run.parts is None:
                    run.parts = parts_that_fit(run, batch, recipe.parts, recipe.precision)
                    draw_noise(run.student, sizes[step], (recipe.seed, epoch, step))  # seeds again what the trial drew
                bidirectional = recipe.is_bidirectional(epoch)
                measures, sound = train_step(run, batch, bidirectional, run.parts, recipe.precision, recipe.objective)
                values = distributed.all_reduce_sum(torch.stack([measures[name] for name in MEASURES]))
                run.sums = values if run.sums is None else run.sums + values
                run.step = step + 1
                bar.show(run, measured.add(step, values, sound))
                yield values
        except GeneratorExit:  # the run ends after this step
            bar.show(run, measured.rest())
            raise
        bar.show(run, measured.rest())


def close_epoch(run, data, recipe, watch=None):
    """Add an epoch's entry to run.history: what was measured in its steps, on held-back and on unseen images."""
    epoch = len(run.history)
    entry = {"epoch": epoch, "phase": "bidirectional" if recipe.is_bidirectional(epoch) else "warm-up"}
    entry |= dict(zip(MEASURES, (run.sums / run.step).tolist(), strict=True)) | {"lr": run.rate}
    if data.val_loader is not None:
        with matmul_rules(recipe.precision):
            entry["accuracy"] = validate(run.student, data.val_loader, data.val_size)
    if watch is not None:
        entry |= watch(run.student, epoch)
        run.student.train()
    entry["kept"] = kept_names(run.history, entry)
    run.history.append(entry)
    run.step, run.sums = 0, None


@torch.inference_mode()
def validate(student, loader, count):
    """Top-1 accuracy (percent) of the seen-class logits on `count` held-back sketches, this process's in `loader`."""
    student.eval()
    device = student.linear.weight.device
    right = torch.zeros((), dtype=torch.long)
    for images, labels in tqdm(loader, "validation", unit="batch", leave=False, disable=bar_disabled()):
        predicted = student(normalise(images.to(device), *student.statistics)).seen_logits.argmax(dim=1)
        right += (predicted.cpu() == labels).sum()
    student.train()
    return 100 * distributed.all_reduce_sum(right).item() / count


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


def checkpoint_to_test(history, folder, validated):
    """Path of the checkpoint to test, said aloud where the release's rule kept none."""
    kept = [name for entry in history for name in entry["kept"]]
    if not validated:
        name = LAST
    elif BEST in kept:
        name = BEST
    else:
        name = BEST_AFTER_WARMUP if kept else LAST
        why = "no epoch after warm-up beat every epoch before it" if kept else "all epochs were warm-up"
        log_rank0(f"note: {why}, so there is no {BEST}; {name} stands in")
    print(f"trained {len(history)} epoch{'s' if len(history) > 1 else ''}; test reads {folder / name}")
    return folder / name


def draw_noise(student, size, place):
    """This process's rows of the noise (size, D) of a step. What else is random in the step is seeded, too.

    place: (seed, epoch, step). Seeded step by step, noise and stochastic depth do not depend on where a run was
    interrupted.
    """
    torch.manual_seed(_seed_of(*place))
    # Pinned memory is copied to a GPU without waiting.
    noise = torch.empty(size, student.width, pin_memory=student.linear.weight.is_cuda).normal_()[
        distributed.rank_slice(size)
    ]
    if distributed.get_rank():  # stochastic depth differs between processes
        torch.manual_seed(_seed_of(*place, distributed.get_rank()))
    return noise


def _seed_of(*place):
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


def _on_device(loaded, noise, mask, run):
    """The Batch of what a training loader gives, on the device of `run`."""
    images, labels, is_photo, noise = (tensor.to(run.device, non_blocking=True) for tensor in (*loaded, noise))
    return Batch(normalise(images, *run.student.statistics), labels, is_photo, mask[labels], noise)


def _begin(run, data, recipe, keeper):
    """Tidy up the run's folder, tell where the run stands, and open its Log."""
    tidy(keeper.folder, run.source, everything=keeper.overwrite)
    if run.history or run.step:
        log_rank0(f"note: going on after {len(run.history)} of {recipe.epochs} epochs and {run.step} steps")
    return Log(keeper.folder, len(run.history), run.step, data.train_loader.batch_sampler.stop)


def _end_if_asked(run, signals, keeper):
    """Save and end, all processes after the same step, once one of them was sent a signal."""
    if distributed.any_rank(bool(signals)):
        if distributed.get_rank() == 0:
            keeper.save(run)
            log_rank0(f"saved after {len(run.history)} epochs and {run.step} steps; --resume goes on from there")
        raise SystemExit(interrupts.status(signals))
