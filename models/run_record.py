"""What traces a result to its run: options and versions; which options of training and test change a result."""

import platform
from importlib.metadata import version
from pathlib import Path

from models.checkpoints import SaveSchedule
from models.losses import LOSSES, PAPER_WEIGHTS, LossWeights, weight_option


def run_record(options):
    """What traces a result to its run: {"options", "versions"}, ready for JSON."""
    values = {name: _plain(value) for name, value in vars(options).items()}
    versions = {name: version(name) for name in ("torch", "timm", "numpy", "scikit-learn")}
    return {"options": values, "versions": {"python": platform.python_version(), **versions}}


# Options that earlier versions lack, with the value that computes the same: their runs and ours are then alike.
ADDED_OPTIONS = {
    "cosine_scale": 0.0, "freeze": 0, "sketches": None, "augment": "release", "schedule": "exponential",
    "tune": "all", "teacher_head": None,
}  # fmt: skip

# Options of training that change its result. The others are where files are, what is printed, and how a step that
# computes the same is carried out. The losses come from `effective_options`.
RESULT_OPTIONS = (
    *("zero_version", "model", "imagenet_classes", "input_size", "finetune", "drop_path", "epochs", "warmup_epochs"),
    *("batch_size", "max_steps", "lr", "teacher_lr", "weight_decay", "no_mask", "mask_weight", "no_validation"),
    *("precision", "seed", *ADDED_OPTIONS),
)


# Options of a test that change the values of a row of its results.
TEST_RESULT_OPTIONS = (
    "model", "imagenet_classes", "input_size", "precision", "mixture", "mixture_seeds", "distances",
)  # fmt: skip


def loss_weights_of(options):
    """LossWeights of the options of a training run, a dict by name."""
    names = options.get("losses", list(LOSSES))
    defaults = {name: loss.weight for name, loss in LOSSES.items()}
    weights = {
        name: options.get(weight_option(name) if name in LOSSES else f"{name}_weight", defaults.get(name, 1.0))
        for name in names
    }
    return LossWeights(weights, options.get("mask_weight", PAPER_WEIGHTS.mask_weight))


def effective_options(options):
    """The options of a training run that change its result, by name: equal for two runs that compute the same.

    "losses" lists the losses with a weight above 0, and only these have an entry with their weight. options: a dict by
    name, also of an earlier version with other losses.
    """
    weights = {name: weight for name, weight in loss_weights_of(options).losses.items() if weight > 0}
    order = [name for name in LOSSES if name in weights] + sorted(weights.keys() - LOSSES.keys())
    effective = {name: value for name, value in (ADDED_OPTIONS | options).items() if name in RESULT_OPTIONS}
    effective["losses"] = order
    return effective | {weight_option(name) if name in LOSSES else f"{name}_weight": weights[name] for name in order}


def defaults_of(parser):
    """The default values of a parser's options."""
    return parser.parse_args([])


def _plain(value):
    return str(value) if isinstance(value, Path | SaveSchedule) else value
