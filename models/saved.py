"""What a checkpoint must hold beside weights so that a run can go on from it, checked as a whole before it is used."""

import math

import torch

from models.losses import LOSS_NAMES
from models.train_step import MEASURES
from models.weights import is_plain_tensor

_PLAIN = (str, int, float, bool, type(None))
# Earlier versions of this project wrote the sums without names, in this order.
_WITHOUT_NAMES = ("cls", "ka_student", "ma", "ka_teacher", "student", "total", "train_accuracy")


def check_saved(content, optimizers, idle=()):
    """Check all of a checkpoint's content but its weights, which models.weights.load_published checks.

    content: as models.checkpoints.Keeper writes it; optimizers: those that its Adam states must fit; idle: parameters
    that may have no Adam state.
    Returns {"protocol", "options", "data", "history", "step", "sums" (list in the order of MEASURES, or None),
    "adam" (a state for each optimizer)}. Raises ValueError that says what is wrong.
    """
    found = {
        "protocol": _text(content, "protocol"),
        "options": plain_options(content.get("options")),
        "data": _texts(content, "data"),
        "history": _history(content.get("history")),
        "step": content.get("step", 0),
        "sums": _sums(content.get("sums")),
    }
    _want(_is_count(found["step"]), "step is not a whole number, 0 or more")
    _want(found["step"] == 0 or found["sums"] is not None, f"no sums of its {found['step']} steps")
    begun = bool(found["history"]) or found["step"] > 0
    losses = found["options"].get("losses", LOSS_NAMES)
    taught = "ka_teacher" in losses and any(entry["phase"] == "bidirectional" for entry in found["history"])
    triples = zip(("optimizer", "optimizer_1"), optimizers, (begun, taught), strict=True)
    return found | {"adam": [_adam(content.get(name), name, *rest, idle) for name, *rest in triples]}


def plain_options(options):
    """The options of a checkpoint, by name. Raises ValueError if they are not plain values, or lists of them."""
    _want(_has_names(options), "options are not options by name")
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        _want(all(isinstance(each, _PLAIN) for each in values), f"option {name} is not a plain value")
    return dict(options)


def _want(condition, fault):
    if not condition:
        raise ValueError(fault)


def _has_names(value):
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(content, name):
    _want(isinstance(content.get(name), str), f"{name} is not a text")
    return content[name]


def _texts(content, name):
    value = content.get(name)
    _want(_has_names(value) and all(isinstance(each, str) for each in value.values()), f"{name} is not texts by name")
    return value


def _history(history):
    _want(isinstance(history, list), "history is not a list")
    for number, entry in enumerate(history):
        _want(_has_names(entry), f"epoch {number} is no entry")
        _want(_is_count(entry.get("epoch")) and entry["epoch"] == number, f"epoch {number} has another number")
        _want(entry.get("phase") in ("warm-up", "bidirectional"), f"epoch {number} has no phase")
        kept = entry.get("kept")
        _want(
            isinstance(kept, list) and all(isinstance(name, str) for name in kept), f"epoch {number}: kept is no list"
        )
        _want("lr" in entry, f"epoch {number} has no lr")
        for name in entry.keys() - {"epoch", "phase", "kept"}:
            _want(_is_number(entry[name]), f"epoch {number}: {name} is not a number")
    return history


def _sums(sums):
    if isinstance(sums, list) and len(sums) == len(_WITHOUT_NAMES):
        sums = dict(zip(_WITHOUT_NAMES, sums, strict=True))
    if sums is None:
        return None
    _want(_has_names(sums) and all(_is_number(sums.get(name)) for name in MEASURES), "sums are not numbers by name")
    return [float(sums[name]) for name in MEASURES]


def _adam(saved, name, optimizer, begun, idle):
    """A state for `optimizer` with the saved moments, in new memory, and the optimizer's own settings.

    Adam's kernel would read beyond a moment of another shape. begun: whether the optimizer has made steps; idle: see
    check_saved.
    """
    _want(isinstance(saved, dict) and isinstance(saved.get("state"), dict), f"{name} has no state")
    _want(isinstance(saved.get("param_groups"), list), f"{name} has no groups")
    own = optimizer.state_dict()
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    theirs, ours = saved["param_groups"], own["param_groups"]
    _want(all(isinstance(group, dict) for group in theirs), f"{name} has a group that is none")
    numbers = [[group.get("params") for group in groups] for groups in (theirs, ours)]
    _want(numbers[0] == numbers[1], f"{name} is of other parameters")
    if not saved["state"] and not begun:
        return {"state": {}, "param_groups": own["param_groups"]}  # the teacher's in warm-up
    needed = {number for number, value in enumerate(parameters) if not any(value is each for each in idle)}
    complete = needed <= saved["state"].keys() <= set(range(len(parameters)))
    _want(complete, f"{name} has not the moments of every parameter")
    state = {}
    for number in sorted(saved["state"]):
        value = parameters[number]
        state[number] = {"step": _step(saved["state"][number], name)}
        for moment in ("exp_avg", "exp_avg_sq"):
            found = saved["state"][number].get(moment)
            _want(is_plain_tensor(found) and found.shape == value.shape, f"{name}: {moment} {number} does not fit")
            state[number][moment] = torch.empty_like(value).copy_(found)
            _want(state[number][moment].isfinite().all(), f"{name}: {moment} {number} is not finite")
    return {"state": state, "param_groups": own["param_groups"]}


def _step(state, name):
    _want(isinstance(state, dict), f"{name} has a state that is none")
    step = state.get("step")
    _want(is_plain_tensor(step) and step.ndim == 0, f"{name} has no step")
    _want(math.isfinite(step.item()) and 0 <= step.item() < 1e9, f"{name}: {step.item():g} is no number of steps")
    return step.clone()
