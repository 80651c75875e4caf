"""Progress of training: progress bar, epoch lines, log.jsonl, TensorBoard, curves.png."""

import json
import os
import time

from tqdm import tqdm

from models.losses import LOSSES
from models.train_step import LOGGED
from utils.cli import InputError
from utils.distributed import bar_disabled, log_rank0
from utils.files import atomic_write, open_own
from utils.pictures import draw_or_note, save_png


class Log:
    """Writes losses and metrics to log.jsonl and TensorBoard; a resumed run appends, without duplicate lines.

    A line of log.jsonl is {"epoch", "step" (of the epoch, from 1), losses, "lr", "images_per_second"}, every
    --print_freq steps, or {"epoch", "phase", means of the losses, "accuracy", "lr", ...} without a step, every epoch.
    """

    def __init__(self, savedir, epochs_done, step_done, steps):
        self.path, self.steps = savedir / "log.jsonl", steps
        kept = [line for line in _lines(self.path) if _is_before(line, epochs_done, step_done)]
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in kept)
        self.board, self.has_curves = _open_board(savedir, epochs_done * steps + step_done), True

    def write(self, line):
        """Append a line, a dict as above."""
        with open_own(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        global_step = line["epoch"] * self.steps + line.get("step", self.steps)
        kind = "step" if "step" in line else "epoch"
        for name, value in line.items() if self.board else ():
            if isinstance(value, float):
                self.board.add_scalar(f"{kind}/{name}", value, global_step)
        if self.board and kind == "epoch":
            self.board.flush()


class EpochBar:
    """Progress bar of an epoch; every `every` steps it shows the losses and writes a line of the Log, if there is one.

    sizes: images in each step of the epoch, of which `done` steps are done; names: those of LOGGED that are shown.
    """

    def __init__(self, title, sizes, done, log=None, every=10, names=LOGGED):
        self.sizes, self.log, self.every, self.names = sizes, log, every, names
        self.bar = tqdm(total=sum(sizes), initial=sum(sizes[:done]), desc=title, unit="image", leave=False,
                        disable=bar_disabled())  # fmt: skip
        self.shown_at, self.shown = time.perf_counter(), done

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def show(self, state, steps):
        """Show steps of the present epoch of a TrainState: (number from 0, values (LOGGED,) on the CPU) of each."""
        for number, values in steps:
            done = number + 1
            if self.log and (done % self.every == 0 or done == len(self.sizes)):
                line = dict(zip(LOGGED, values.tolist(), strict=True))
                line = {name: line[name] for name in self.names}
                losses = {name: f"{line[name]:.3f}" for name in ("total", *LOSSES) if name in line}
                self.bar.set_postfix(losses | {"acc": f"{line['train_accuracy']:.0f}"})
                rate = sum(self.sizes[self.shown : done]) / (time.perf_counter() - self.shown_at)
                position = {"epoch": len(state.history), "step": done}
                self.log.write({**position, **line, "lr": state.lr, "images_per_second": rate})
                self.shown_at, self.shown = time.perf_counter(), done
            self.bar.update(self.sizes[number])


def print_epoch(entry, epochs):
    """Print the line of an epoch."""
    print(f"epoch {entry['epoch'] + 1}/{epochs} {entry['phase']:13}", end=" ")
    hidden = ("student", "lr", "train_accuracy")
    numbers = {name: value for name, value in entry.items() if isinstance(value, float) and name not in hidden}
    print("  ".join(f"{name} {value:.4f}" for name, value in numbers.items()), flush=True)


def show_epoch(history, epochs, log):
    """Print and log the last entry of `history`, and redraw curves.png."""
    log.write({name: value for name, value in history[-1].items() if name != "kept"})
    if log.has_curves:  # after a failure it is not tried again
        log.has_curves = draw_or_note(draw_curves, log.path.with_name("curves.png"), history)
    print_epoch(history[-1], epochs)


def draw_curves(path, history):
    """Draw losses, accuracies (percent), and learning rate of the epochs in `history` as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    losses, accuracies, rate = figure.subplots(1, 3)
    for name in ("total", *LOSSES):
        _line(losses, history, name)
    losses.set_title("losses, mean of an epoch")
    retrieval = sorted({name for entry in history for name in entry if "@" in name})
    for name in ("train_accuracy", "accuracy", *retrieval):
        _line(accuracies, history, name, 100 if "@" in name else 1)
    accuracies.set_title("seen-class accuracy; zero-shot, one-to-one (%)" if retrieval else "seen-class accuracy (%)")
    _line(rate, history, "lr")
    if all(entry["lr"] for entry in history):
        rate.set_yscale("log")
    rate.set_title("learning rate of the student")
    first = next((entry["epoch"] for entry in history if entry["phase"] == "bidirectional"), None)
    for axes in (losses, accuracies, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if first is not None and first > 0:
            axes.axvline(first + 0.5, color="grey", linestyle=":", label="bidirectional from here")
        axes.legend(fontsize="small")
    save_png(figure, path, dpi=110)


def _line(axes, history, name, scale=1):
    points = [(entry["epoch"] + 1, scale * entry[name]) for entry in history if name in entry]
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", label=name)


def _lines(path):
    """Lines of an earlier log.jsonl, without torn ones, as the last line of a killed run can be."""
    try:
        with open_own(path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and type(content.get("epoch")) is type(content.get("step", 0)) is int:
            yield content


def _is_before(line, epochs_done, step_done):
    return line["epoch"] < epochs_done or (
        line["epoch"] == epochs_done and line.get("step", step_done + 1) <= step_done
    )


def _open_board(savedir, first_step):
    if os.path.islink(savedir / "curves"):
        raise InputError(f"{savedir / 'curves'}: a link where a folder of this program belongs; delete it")
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(savedir / "curves", purge_step=first_step)  # hides later points of an earlier run
    except ImportError:
        log_rank0("note: tensorboard is not installed, no training curves are written")
    except Exception as error:  # an extra must not end a run
        log_rank0(f"note: tensorboard failed ({type(error).__name__}), no training curves are written")
    return None
