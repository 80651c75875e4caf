"""--resume: checks options, data, history and Adam state of a checkpoint, and restores a TrainState from it."""

import math
import os
import shutil

import torch

from datasets.lists import CLASS_NAME_FILES, MASK_FILE
from models.checkpoints import LAST, NAMES, OPTIMIZERS, PREVIOUS, plain_options, read_checkpoint, trained_with
from models.losses import LOSSES
from models.run_record import effective_options
from models.torch_files import UnreadableFile, is_plain_tensor, zip_crc_ok
from models.train_step import LOGGED
from models.weights import load_published
from utils.cli import InputError
from utils.distributed import log_rank0
from utils.files import sha256_of

# Options that compute the same training step, apart from rounding, and from the draws of stochastic depth.
SAME_STEP = ("accum_steps", "grad_checkpointing", "compile")
_RECORDS = ("train.json", "curves.png")  # of a run that has finished an epoch
_FILES = (*NAMES, *_RECORDS, "log.jsonl")  # of a run
# Earlier versions of this project wrote the sums as a list in this order.
_OLD_SUMS = ("cls", "ka_student", "ma", "ka_teacher", "student", "total", "train_accuracy")


def restore(state, savedir, record, defaults):
    """Load the last checkpoint in `savedir` into a TrainState, or the previous one if the last cannot be read.

    record: of the present run, see CheckpointSaver; its "pretrained_tag" becomes the checkpoint's; defaults: values of
    options that the checkpoint does not have.
    Raises InputError if the checkpoint is damaged, or of another protocol, other data, or options with another result.
    """
    path, checkpoint = _read_last(savedir)
    state.resumed_from = path
    if "history" not in checkpoint or (state.teacher is not None and "teacher" not in checkpoint):
        raise InputError(f"{path}: holds no teacher, so it cannot be resumed, only tested; start anew without --resume")
    load_published(state.student, checkpoint["state_dict"], path)
    if state.teacher is not None:
        load_published(state.teacher, checkpoint["teacher"], path)
    head = state.student.head
    try:
        saved = validate_training_state(checkpoint, state.optimizers, tuple(head.parameters()) if head else ())
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: damaged, it cannot be resumed ({error}); start anew") from error
    if saved["protocol"] != record["protocol"]:
        raise InputError(f"--resume: {path} was trained for {saved['protocol']}, not {record['protocol']}")
    before = defaults | trained_with(checkpoint)
    _check_same_options(before, record["options"], path)
    _check_same_data(saved["data"], record["data"])
    _note_other_rounding(before | {"processes": checkpoint.get("processes")}, record)
    if isinstance(checkpoint.get("pretrained_tag"), str):  # another version of timm may publish others
        record["pretrained_tag"] = checkpoint["pretrained_tag"]
    for optimizer, adam in zip(state.optimizers, saved["adam"], strict=True):
        optimizer.load_state_dict(adam)
    state.history, state.step = saved["history"], saved["step"]
    state.metric_sums = None if saved["sums"] is None else torch.tensor(saved["sums"], device=state.device)


def _read_last(savedir):
    """(path, content) of LAST, or of PREVIOUS if LAST cannot be read."""
    torn = None
    for path in (savedir / LAST, savedir / PREVIOUS):
        if not os.path.isfile(path):
            continue
        try:
            content = read_checkpoint(path)
        except UnreadableFile as error:
            torn = torn or error.what
            continue
        if "history" in content and not zip_crc_ok(path):  # only our own checkpoints have one
            torn = torn or f"{path}: damaged (CRC)"
            continue
        if torn:
            log_rank0(f"note: {torn}; resuming from {PREVIOUS} instead")
        return path, content
    raise InputError(f"{torn}; it cannot be resumed, start anew with --overwrite")


def _check_same_options(before, now, path):
    """Raise InputError for the first option with an effect on the result that differs. Both: options by name."""
    before, now = effective_options(before), effective_options(now)
    for name in [*now, *(name for name in before if name not in now)]:
        one, two = before.get(name), now.get(name)
        if one == two:
            continue
        if one is None or one is False:
            how, way_out = f"without --{name}", "leave it out"
        elif two is None or two is False:
            how, way_out = f"with --{name}" + ("" if one is True else f" {one}"), "add it"
        else:
            one, two = (" ".join(map(str, value)) if isinstance(value, list) else value for value in (one, two))
            how, way_out = f"with --{name} {one}, not {two}", "use the same"
        raise InputError(f"--resume: {path} was trained {how}; {way_out}")


def _note_other_rounding(before, record):
    now = record["options"] | {"processes": record.get("processes")}
    for name in (*SAME_STEP, "processes"):
        if before.get(name) is not None and name in now and before[name] != now[name]:
            option = f"--{name}" if name in SAME_STEP else "the number of processes"
            draws = ", and stochastic depth draws other numbers" if now.get("drop_path") else ""
            log_rank0(f"note: {option} was {before[name]} and is {now[name]}: the same step, up to rounding{draws}")


def data_record(files, benchmark, has_mask):
    """{file name: SHA-256} of the lists (FileLists), seen classes and mask, if there is one, of a training run."""
    paths = [*(file_list.source for file_list in files), benchmark.lists / CLASS_NAME_FILES[0]]
    paths += [benchmark.lists / MASK_FILE] if has_mask else []
    return {path.name: sha256_of(path) for path in paths}


def _check_same_data(before, now):
    for name, value in before.items():
        if name == MASK_FILE and name not in now:
            continue  # earlier versions recorded the mask even if it was not used
        if now.get(name) != value:
            raise InputError(f"--resume: {name} is not the one that the run began with; restore it, or start anew")


def check_savedir(savedir, resume=False, overwrite=False):
    """Raise InputError if `savedir` has files of a run that would be lost, or lacks the checkpoint to resume."""
    for name in _FILES:
        if os.path.isdir(savedir / name):
            raise InputError(f"{savedir / name}: a folder where a file of this program belongs; move it away")
    present = [name for name in (*NAMES, *_RECORDS) if os.path.exists(savedir / name)]
    can_resume = LAST in present or PREVIOUS in present
    if resume and not can_resume:
        raise InputError(f"{savedir}: holds no {LAST} to resume; see --savedir, or start without --resume")
    if present and not resume and not overwrite:
        continues = "--resume continues it, " if can_resume else ""
        raise InputError(
            f"{savedir}: already holds {present[0]}; {continues}--overwrite replaces it, --savedir starts elsewhere"
        )


def check_space(state, savedir):
    """Raise InputError if the disk has no space for the checkpoints of a run: the last two, the best and a new one."""
    networks = [value for each in (state.student, state.teacher) if each for value in each.parameters()]
    # Adam has two moments for each trainable parameter.
    size = sum(value.nbytes for value in networks) + 2 * sum(value.nbytes for value in state.trainable_parameters())
    held = sum((savedir / name).stat().st_size for name in NAMES if os.path.isfile(savedir / name))
    free = shutil.disk_usage(savedir).free + held
    if free < 4 * size:
        raise InputError(
            f"{savedir}: {free / 1e6:,.0f} MB are free, and 4 checkpoints of {size / 1e6:,.0f} MB need "
            f"{4 * size / 1e6:,.0f}; make room, or choose another --savedir"
        )


def remove_stale_files(savedir, resumed_from, everything):
    """Delete incomplete files of a killed process in `savedir` and, with `everything`, the results of an earlier run.

    resumed_from: the path of the checkpoint. If it is PREVIOUS, LAST could not be read, and PREVIOUS replaces it;
    otherwise the next save would make the damaged file the previous one.
    """
    for name in _FILES:
        for path in savedir.glob(f".{name}.*"):
            path.unlink(missing_ok=True)
    if everything:
        for name in (*_FILES, "results.json", "per_query.npz", "retrievals.png", "precision_recall.png", "tsne.png"):
            (savedir / name).unlink(missing_ok=True)
    if resumed_from and resumed_from.name == PREVIOUS:
        resumed_from.replace(savedir / LAST)


def validate_training_state(content, optimizers, optional=()):
    """Validate all of a checkpoint's content but its weights, which models.weights.load_published checks.

    content: as CheckpointSaver writes it; optimizers: those that its Adam states must fit; optional: parameters that
    may have no Adam state if a loss is left out.
    Returns {"protocol", "data", "history", "step", "sums" (list in the order of LOGGED, or None), "adam" (a state for
    each optimizer)}. Raises ValueError with the reason.
    """
    options = plain_options(content.get("options"))
    active = _active_losses(options)
    history, step = _history(content.get("history")), content.get("step", 0)
    _require(_is_count(step), "step is not a whole number, 0 or more")
    sums = _sums(content.get("sums"), active)
    _require(step == 0 or sums is not None, f"no sums of its {step} steps")
    has_steps = bool(history) or step > 0
    trains_teacher = any(LOSSES[name].trains_teacher for name in active if name in LOSSES)
    teacher_has_steps = trains_teacher and any(entry["phase"] == "bidirectional" for entry in history)
    optional = () if set(LOSSES) <= set(active) else optional
    adam = [
        _adam(content.get(name), name, optimizer, needed, optional)
        for name, optimizer, needed in zip(OPTIMIZERS, optimizers, (has_steps, teacher_has_steps), strict=False)
    ]
    return {
        "protocol": _text(content, "protocol"), "data": _texts(content, "data"),
        "history": history, "step": step, "sums": sums, "adam": adam,
    }  # fmt: skip


def _active_losses(options):
    try:
        return effective_options(options)["losses"]
    except TypeError:
        raise ValueError("losses or their weights are malformed") from None


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _has_names(value):
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(content, name):
    _require(isinstance(content.get(name), str), f"{name} is not a text")
    return content[name]


def _texts(content, name):
    value = content.get(name)
    valid = _has_names(value) and all(isinstance(each, str) for each in value.values())
    _require(valid, f"{name} is not a dict of texts")
    return value


def _history(history):
    _require(isinstance(history, list), "history is not a list")
    for number, entry in enumerate(history):
        _require(_has_names(entry), f"the entry of epoch {number} is malformed")
        _require(_is_count(entry.get("epoch")) and entry["epoch"] == number, f"epoch {number} has another number")
        _require(entry.get("phase") in ("warm-up", "bidirectional"), f"epoch {number} has no phase")
        kept = entry.get("kept")
        valid = isinstance(kept, list) and all(isinstance(name, str) for name in kept)
        _require(valid, f"epoch {number}: kept is not a list of names")
        _require("lr" in entry, f"epoch {number} has no lr")
        for name in entry.keys() - {"epoch", "phase", "kept"}:
            _require(_is_number(entry[name]), f"epoch {number}: {name} is not a number")
    return history


def _sums(sums, active):
    """Sums over the steps of an epoch in the order of LOGGED; 0 for losses that are not active."""
    if isinstance(sums, list) and len(sums) == len(_OLD_SUMS):
        sums = dict(zip(_OLD_SUMS, sums, strict=True))
    if sums is None:
        return None
    _require(_has_names(sums), "sums are not a dict by name")
    for name in LOGGED:
        value = sums.get(name, 0.0 if name in LOSSES and name not in active else None)
        _require(value is not None, f"sums lack {name}")
        _require(_is_number(value), f"the sum of {name} is not a number")
    return [float(sums.get(name, 0.0)) for name in LOGGED]


def _adam(saved, name, optimizer, has_steps, optional):
    """A state_dict for `optimizer` with the saved moments, in new memory, and the optimizer's own settings.

    Adam's kernel would read beyond a moment of another shape. has_steps: whether the optimizer has made steps;
    optional: see validate_training_state.
    """
    _require(isinstance(saved, dict) and isinstance(saved.get("state"), dict), f"{name} has no state")
    _require(isinstance(saved.get("param_groups"), list), f"{name} has no param_groups")
    own = optimizer.state_dict()
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    groups = saved["param_groups"]
    _require(all(isinstance(group, dict) for group in groups), f"{name} is malformed (param_groups)")
    numbers = [[group.get("params") for group in each] for each in (groups, own["param_groups"])]
    _require(numbers[0] == numbers[1], f"{name} has other parameters")
    if not saved["state"] and not has_steps:
        return {"state": {}, "param_groups": own["param_groups"]}  # the teacher's in warm-up
    required = {number for number, value in enumerate(parameters) if not any(value is each for each in optional)}
    complete = required <= saved["state"].keys() <= set(range(len(parameters)))
    _require(complete, f"{name} lacks the moments of a parameter")
    state = {}
    for number in sorted(saved["state"]):
        value, entry = parameters[number], saved["state"][number]
        state[number] = {"step": _adam_step(entry, name)}
        for moment in ("exp_avg", "exp_avg_sq"):
            fits = is_plain_tensor(entry.get(moment)) and entry[moment].shape == value.shape
            _require(fits, f"{name}: {moment} of parameter {number} has another shape or type")
            state[number][moment] = torch.empty_like(value).copy_(entry[moment])
            _require(state[number][moment].isfinite().all(), f"{name}: {moment} of parameter {number} is not finite")
    return {"state": state, "param_groups": own["param_groups"]}


def _adam_step(entry, name):
    _require(isinstance(entry, dict), f"{name} is malformed (state)")
    step = entry.get("step")
    _require(is_plain_tensor(step) and step.ndim == 0, f"{name} has no step")
    valid = math.isfinite(step.item()) and 0 <= step.item() < 1e9
    _require(valid, f"{name}: step {step.item():g} is not a number of steps")
    return step.clone()
