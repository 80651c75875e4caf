"""Options of the train and test scripts."""

import argparse
from pathlib import Path

import torch

from datasets.images import AUGMENTATIONS
from models.checkpoints import AUTHORS_MODEL, SaveSchedule, student_metadata
from models.eval.evaluate import Grid
from models.eval.matching import CLUSTER_WEIGHT
from models.eval.metrics import METRICS, get_metric
from models.losses import LOSSES, PAPER_WEIGHTS, weight_option
from models.networks import PRECISIONS, projections_of
from models.run_record import loss_weights_of
from models.teacher_head import read_head
from models.train_step import SCHEDULES
from models.tuning import check_tune
from models.weights import fit_input_size, has_head
from utils import distributed
from utils.cli import (
    InputError,
    OneLineParser,
    RankError,
    folder_name,
    image_side,
    is_out_of_memory,
    number_type,
    path_type,
    positive_int,
    seed_type,
)
from utils.process_pool import available_cores

PRETRAINED = "pretrained_model/convnextv2_tiny_1k_224_ema.pt"
_WEIGHTS = (
    "a downloaded file, EfficientNet-Lite0's in an installed package (lite0; also lite1, lite2), those that timm "
    "publishes for --model (timm), or random (none)"
)


def train_parser(protocol):
    """Options of the train script of `protocol`."""
    parser = OneLineParser(description=f"Train SBKA on {protocol.title} ({protocol.seen_classes} seen classes).")
    _add_data(parser, protocol)
    _add_model(parser, protocol)
    add = parser.add_argument
    add("--savedir", "-s", type=path_type, metavar="DIR", help="where checkpoints and train.json go "
        f"(default: {_checkpoint_folder(protocol)})")  # fmt: skip
    add("--finetune", type=_text, default=PRETRAINED, metavar="FILE|lite0|timm|none",
        help=f"ImageNet weights of both networks: {_WEIGHTS}")  # fmt: skip
    add("--cosine_scale", type=_rate, default=0.0, metavar="S",
        help="seen-class logits are S times the cosine of feature and class weights, plus the bias; 0: the linear "
        "layer of the release")  # fmt: skip
    add("--drop_path", type=_share, default=0.0, help="rate of stochastic depth of the student")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--tune", type=_tune, default="all", metavar="all|norm|last:N",
        help="layers of the student's backbone to train: all, its normalisation layers, or the last N groups of layers "
        "(blocks of a transformer, stages of a ConvNeXt)")  # fmt: skip
    either("--freeze", type=_count, default=0, metavar="N",
        help="do not train the first N groups of layers of the student: the stem, the first stage, ...")  # fmt: skip
    add("--teacher_head", type=path_type, metavar="FILE",
        help="ImageNet head to align, for a --model that has none (DINOv2, SigLIP, CLIP, ...): an .npz with weight "
        "(classes, values) and bias, or with class embeddings and scale")  # fmt: skip
    add("--epochs", type=positive_int, default=20, help="number of epochs")
    add("--warmup_epochs", type=_count, default=protocol.last_warmup_epoch, metavar="E_w",
        help="epochs 0 to E_w, which are E_w + 1 epochs as in the release, train the student alone; later ones both "
        "networks")  # fmt: skip
    add("--batch_size", type=positive_int, default=protocol.batch_size,
        help=f"images a step, {protocol.sketch_share} sketch to {protocol.photo_share} photos")  # fmt: skip
    add("--sketches", type=positive_int, metavar="N",
        help=f"sketches in a batch (default: {protocol.sketch_share} to {protocol.photo_share} photos)")  # fmt: skip
    add("--augment", choices=tuple(AUGMENTATIONS), default="release",
        help="augmentation of training images: the release's affine warp, or crop, flip, rotation of sketches and "
        "colour jitter of photos (strong)")  # fmt: skip
    add(
        "--max_steps",
        type=positive_int,
        metavar="N",
        help="stop each epoch after N steps, for a trial run (default: none)",
    )
    add("--lr", "--learning-rate", type=_rate, default=1e-4, help="learning rate of the student")
    add("--teacher_lr", type=_rate, default=protocol.teacher_lr, help="learning rate of the teacher's head")
    add("--schedule", choices=tuple(SCHEDULES), default="exponential",
        help="learning rates by epoch: down to a thousandth, as in the release, or half a cosine")  # fmt: skip
    add("--weight_decay", "--wd", type=_rate, default=5e-4, help="L2 weight decay inside Adam")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--no_mask", action="store_true", default=not protocol.has_mask,
        help="train without semantic mask, as on QuickDraw Ext")  # fmt: skip
    group.add_argument("--mask", dest="no_mask", action="store_false", default=argparse.SUPPRESS,
        help="train with a semantic mask on QuickDraw Ext, too; python -m datasets.prepare mask makes one")  # fmt: skip
    add("--losses", nargs="+", choices=tuple(LOSSES), default=list(LOSSES), action=_Losses, metavar="NAME",
        help=f"losses to train with, of {', '.join(LOSSES)}; the others are not computed (default: all)")  # fmt: skip
    for name, loss in LOSSES.items():
        add(f"--{weight_option(name)}", type=_weight, default=loss.weight,
            help=f"weight of {loss.symbol}; 0: not computed")  # fmt: skip
    add("--mask_weight", type=_weight, default=PAPER_WEIGHTS.mask_weight,
        help="weight of the semantic mask in L_ka^S and L_ka^T")  # fmt: skip
    add("--no_validation", action="store_true", default=not protocol.has_validation,
        help="read no validation list and keep the last epoch, as QuickDraw Ext always does")  # fmt: skip
    add("--precision", choices=PRECISIONS, default="tf32",
        help="arithmetic: float32, but TF32 for convolutions on CUDA (tf32, as the authors' runs had) or for matrix "
        "products, too (tf32_all); all float32 (fp32); bfloat16 in the networks, not in the losses (bf16)")  # fmt: skip
    _add_compile(parser)
    add("--accum_steps", type=positive_int, default=1, metavar="N",
        help="accumulate the gradients of N micro-batches: the same step in less memory")  # fmt: skip
    add("--grad_checkpointing", action="store_true",
        help="recompute activations in the backward pass: the same step in less memory, more slowly")  # fmt: skip
    add("--save_every", type=_interval, default="1e", metavar="10m|30s|2h|1e",
        help="save every 10 minutes (and after each epoch), or, with 2e, after every second epoch")  # fmt: skip
    add("--print_freq", "--print-freq", "-p", type=positive_int, default=10, metavar="N",
        help="read and log the losses every N steps")  # fmt: skip
    add("--eval_every", type=_count, default=0, metavar="N",
        help="test zero-shot (one-to-one) after every N epochs, which looks at unseen classes; 0: never")  # fmt: skip
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="continue from the last checkpoint in --savedir, with the same options")
    add("--overwrite", action="store_true", help="start anew in a --savedir that holds checkpoints, and replace them")
    add = parser.add_argument
    add("--seed", type=seed_type, default=0, help="seeds weights, order, augmentation and noise")
    _add_machine(parser)
    _refuse_idle(parser)
    return parser


def test_parser(protocol):
    """Options of the zero-shot test script of `protocol`."""
    parser = OneLineParser(
        description=f"Zero-shot test of SBKA on {protocol.title} ({protocol.unseen_classes} unseen classes): "
        f"{' and '.join(protocol.metrics)}."
    )
    _add_data(parser, protocol)
    _add_model(parser, protocol, recorded=True)
    add = parser.add_argument
    add("--resume_dir", "-s", type=path_type, metavar="DIR|FILE", help="checkpoint to test, or its folder, which also "
        f"takes the results and may hold features_zero.pickle (default: {_checkpoint_folder(protocol)})")  # fmt: skip
    add(
        "--mode",
        type=int,
        choices=(1, 2),
        default=2,
        help="1: one-to-one matching; 2: also one-to-many cluster matching",
    )
    add_grid(parser, metrics=protocol.metrics, clusters=protocol.clusters, subspaces=protocol.subspaces)
    add("--definitions", action="store_true", help="also print the results by other papers' definitions of the metrics")
    add_report(parser)
    add("--generalised", action="store_true", help="also evaluate generalised zero-shot retrieval: photos of unseen "
        "and of seen classes in one gallery; needs lists with held-back photos of seen classes")  # fmt: skip
    add("--instances", action="store_true", help="also evaluate instance-level retrieval: the photo that a sketch was "
        "drawn from is the one right answer")  # fmt: skip
    add("--features_only", action="store_true", help="test a network untrained: --model with the weights --finetune; "
        "results go to --resume_dir (default: untrained/<model> in the folder of checkpoints)")  # fmt: skip
    add("--finetune", type=_text, metavar="FILE|lite0|timm|none",
        help=f"weights of --features_only: {_WEIGHTS} (default: {PRETRAINED})")  # fmt: skip
    add("--order", type=path_type, metavar="LISTS", help="folder of lists, such as datasets/Sketchy/zeroshot1, whose "
        "order features from elsewhere have: for file names, class names and pictures")  # fmt: skip
    add("--batch_size", type=positive_int, default=64, help="batch size of feature extraction")
    add("--precision", choices=PRECISIONS, default="tf32",
        help="precision of feature extraction: float32, but TF32 for convolutions on CUDA (tf32) or for matrix "
        "products, too (tf32_all); all float32 (fp32); bfloat16 (bf16)")  # fmt: skip
    _add_compile(parser)
    add("--recompute", action="store_true", help="extract features even if features_zero.pickle is up to date")
    _add_machine(parser)
    _refuse_idle(parser)
    return parser


def add_grid(parser, metrics, clusters=None, subspaces=None, dtype="float32"):
    """Options of matching and its metrics; the arguments are defaults, None for no one-to-many matching."""
    add = parser.add_argument
    add("--metrics", type=_metric, nargs="+", default=list(metrics), metavar="NAME",
        help=f"columns of the table: {', '.join(METRICS)}, each with a cut @k, or a mAP with @all; the first one sorts "
        "classes and pictures")  # fmt: skip
    many = "" if clusters else "; one-to-many matching is evaluated with --clusters or --subspaces only"
    add("--clusters", type=positive_int, nargs="+", default=clusters and list(clusters), metavar="K",
        help="mixture components" + (many and f" (default: number of classes{many})"))  # fmt: skip
    add("--subspaces", type=positive_int, nargs="+", default=subspaces and list(subspaces), metavar="M",
        help="sub-spaces of a feature" + (many and " (default: 2 4)"))  # fmt: skip
    add("--cluster_weight", type=_part, nargs="+", default=[CLUSTER_WEIGHT], metavar="W",
        help="weight of the cluster distance in one-to-many scores, 0 to 1; each adds a row per (M, K)")  # fmt: skip
    add("--mixture", choices=("torch", "sklearn"), default="torch",
        help="EM of the clusters: ours in float64, or scikit-learn's in float32, as in the release")  # fmt: skip
    device = "cpu" if many else "a GPU that is fast in float64, else cpu"
    add("--mixture_device", type=_text, metavar="DEVICE", help=f"device of --mixture torch (default: {device})")
    add("--mixture_seeds", type=seed_type, nargs="+", default=[123], metavar="SEED",
        help="seeds of the mixtures; of several, each row is the mean, with standard deviation and range")  # fmt: skip
    add("--distances", choices=("float32", "float64"), default=dtype, help="dtype of distances and scores")


def add_report(parser):
    """Options of what a test prints and draws."""
    add = parser.add_argument
    add("--per_class", action="store_true", help="also print a table of the classes")
    add("--tsne", action="store_true", help="also draw a t-SNE of the unseen classes' sketches and photos")
    add("--nearest", type=number_type(int, 1, 50, "a whole number from 1 to 50"), default=10,
        help="photos for each sketch in retrievals.png")  # fmt: skip


def resolve(options, protocol, folder):
    """Fill in what depends on other options: the checkpoint folder (option `folder`), the input size and the device.

    Where a test has no --model, its checkpoint gives model, input size and ImageNet classes (`resolve_network`).

    Raises InputError if the model takes images of another size, the device is not there or has not the --precision, or
    the protocol names an unknown metric.
    """
    is_test_of_untrained = getattr(options, "features_only", False)
    if is_test_of_untrained:
        options.model, options.finetune = options.model or AUTHORS_MODEL[0], options.finetune or PRETRAINED
    elif folder == "resume_dir" and options.finetune:
        raise InputError("--finetune: is for --features_only; a checkpoint has its own weights")
    if getattr(options, folder) is None:
        checkpoints = _checkpoint_folder(protocol, options.zero_version)
        setattr(options, folder, checkpoints / "untrained" / options.model if is_test_of_untrained else checkpoints)
    if options.model is not None:
        options.input_size = fit_input_size(options.model, options.input_size)
    if hasattr(options, "teacher_head"):
        options.imagenet_classes = classes_to_align(options)
    options.device = distributed.local_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_device("--device", options.device)
    if getattr(options, "cls_weight", 1) == 0:
        raise InputError("--cls_weight 0: the classifier of the seen classes would not be trained; use a larger weight")
    if getattr(options, "mixture_device", None) is not None:
        check_device("--mixture_device", options.mixture_device)
    for name in protocol.metrics:
        try:
            get_metric(name)
        except ValueError as error:
            raise InputError(f"{protocol.title} in datasets/protocols.py: {error}") from None
    on_gpu = torch.device(options.device).type == "cuda"
    if options.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError("--precision bf16: this GPU does not compute in bfloat16; use tf32")
    return options


def resolve_network(options, checkpoint):
    """Fill in the model, the input size and the ImageNet classes of a test that --model and the like leave open.

    checkpoint: its path, or None where stored features are tested. Raises InputError as student_metadata does.
    """
    given = {"model": options.model, "input_size": options.input_size, "imagenet_classes": options.imagenet_classes}
    if checkpoint is not None:
        known = student_metadata(checkpoint, **given)
    else:
        known = {name: value or default for (name, value), default in zip(given.items(), AUTHORS_MODEL, strict=True)}
    options.model, options.input_size, options.imagenet_classes = (known[name] for name in given)
    return options


def classes_to_align(options):
    """The number of outputs of the ImageNet head of a training: the model's own, that of --teacher_head, or 0.

    Raises InputError if a loss needs a head and there is none, or there are two, or --imagenet_classes is no number of
    classes of this model.
    """
    model, given = options.model, options.imagenet_classes
    if has_head(model):
        if options.teacher_head:
            raise InputError(f"--teacher_head: {model} has an ImageNet head of its own, which is aligned; leave it out")
        if projections := projections_of(model, given):
            raise InputError(
                f"--imagenet_classes {given}: in weights of this architecture {given} values are a projection, no "
                f"classes; use --model {projections[0]}, which keeps it"
            )
        return given
    if options.teacher_head is None and loss_weights_of(vars(options)).reads_teacher(bidirectional=True):
        without = " ".join(name for name, loss in LOSSES.items() if not loss.reads_teacher)
        raise InputError(
            f"--model {model}: has no ImageNet head to align; train with --losses {without}, or give it one by "
            "--teacher_head FILE"
        )
    classes = read_head(options.teacher_head).out_features if options.teacher_head else 0
    if given not in (classes, AUTHORS_MODEL[2]):
        raise InputError(f"--imagenet_classes {given}: the ImageNet head has {classes} classes; leave it out")
    return classes


def check_device(option, device):
    """Raise RankError unless this process can compute on `device`, the value of `option`, also in float64."""
    try:
        torch.zeros(1, device=device, dtype=torch.float64).item()
    except TypeError:
        raise RankError(f"{option} {device}: computes no float64, which the evaluation needs; use cpu") from None
    except (RuntimeError, AssertionError, ImportError) as error:
        of = f"process {distributed.get_rank()}, " if distributed.get_world_size() > 1 else ""
        if is_out_of_memory(error):
            raise RankError(f"{of}{option} {device}: its memory is full; free it, or use another") from None
        raise RankError(f"{of}{option} {device}: there is no such device here; use cpu, or cuda with a GPU") from None


def grid_of(options, rows):
    """The Grid that the options of a test ask for; rows: its (M, K)."""
    return Grid(
        rows=rows,
        seeds=options.mixture_seeds,
        mixture=options.mixture,
        mixture_device=options.mixture_device or "cpu",
        cluster_weights=options.cluster_weight,
        nearest=options.nearest,
    )


def _checkpoint_folder(protocol, zero_version=None):
    folder = Path(protocol.checkpoint)
    if zero_version is None:
        return folder
    # A folder for each split; a data set with one split has its checkpoints in a folder of its own name.
    if folder.name == protocol.zero_version:
        return folder.with_name(zero_version)
    return folder / zero_version if protocol.is_derived(zero_version) else folder


def _add_data(parser, protocol):
    parser.add_argument(
        "--data_root", type=path_type, default=Path(protocol.data_root), metavar="DIR", help="the data set"
    )
    parser.add_argument(
        "--zero_version", type=folder_name, default=protocol.zero_version, metavar="NAME", help="its folder of lists"
    )


def _add_model(parser, protocol, recorded=False):
    """recorded: whether a checkpoint records model, input size and ImageNet classes, so that none has a default."""
    model, size, classes = AUTHORS_MODEL
    known = "what the checkpoint was trained with, else {}" if recorded else "{}"
    parser.add_argument("--model", type=_text, default=None if recorded else model,
        help="any image classifier of timm with an ImageNet head, such as tf_efficientnet_lite0"
        + (f" (default: {known.format(model)})" if recorded else ""))  # fmt: skip
    parser.add_argument("--nb_classes", type=positive_int, metavar="C", help="seen classes; refused if cname_cid.txt "
        f"lists another number ({protocol.title} has {protocol.seen_classes}; default: what it lists)")  # fmt: skip
    parser.add_argument("--imagenet_classes", type=positive_int, default=None if recorded else classes,
        help="outputs of the ImageNet head" + (f" (default: {known.format(classes)})" if recorded else ""))  # fmt: skip
    parser.add_argument("--input_size", type=image_side, help="side of an input image, in pixels (default: "
        f"{known.format(size)}, or what the model takes)")  # fmt: skip


def _add_compile(parser):
    parser.add_argument("--compile", action="store_true", help="compile the networks with torch.compile; needs a C++ "
        "compiler")  # fmt: skip


def _add_machine(parser):
    parser.add_argument(
        "--workers", type=_count, default=min(4, available_cores()), help="processes that decode images"
    )
    parser.add_argument("--device", type=_text, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def _text(text):
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty text is no value; leave the option out for its default")
    return text


def _metric(text):
    try:
        get_metric(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _tune(text):
    try:
        return check_tune(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


_count = number_type(int, 0, 10**6, "a whole number from 0 to a million")
_rate = number_type(float, 0, 1e30, "a number from 0 to 1e30")
_weight = number_type(float, 0, 1e6, "a number from 0 to a million")
_part = number_type(float, 0, 1, "a number from 0 to 1")
_share = number_type(float, 0, 0.99, "a number from 0 to 0.99")


def _interval(text):
    try:
        return SaveSchedule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _Losses(argparse.Action):
    """Names of losses, cls among them, in the order of LOSSES."""

    def __call__(self, parser, namespace, values, option_string=None):
        if "cls" not in values:
            parser.error(f"{option_string}: without cls the classifier of the seen classes is not trained; add cls")
        setattr(namespace, self.dest, [name for name in LOSSES if name in values])


class _Idle(argparse.Action):
    """An option of the release's scripts that does nothing there: refused, so that nobody relies on it."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string}: does nothing in the release, and is not taken here; leave it out")


def _refuse_idle(parser):
    flags = ("--layer_decay_type", "--clip_grad", "--head_init_scale", "--model_prefix", "--eval")
    for names in (*((flag,) for flag in flags), ("--evaluate", "-e"), ("--freeze_features", "-f")):
        parser.add_argument(*names, action=_Idle, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
