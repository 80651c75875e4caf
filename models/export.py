"""Trained students for other programs: as ONNX with all that the features need, or their weights as safetensors.

    python -m models.export checkpoint/sketchy/zeroshot1/model_best.pth.tar --to student.onnx
    python -m models.export checkpoint/sketchy/zeroshot1/model_best.pth.tar --to student.safetensors

    student.onnx          images (n, 3, size, size) uint8, RGB, for any n → features (n, D) float32 of length 1
    student.safetensors   weights by their published names, the classifier of seen classes among them

Both hold the metadata of `describe`, as texts.
"""

import argparse
import contextlib
import io
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from models.checkpoints import load_student
from models.eval.features import embed
from models.weights import check_size, gist, published_state
from photo_search.exported import FORMAT
from utils.cli import InputError, OneLineParser, image_side, one_line_errors, positive_int
from utils.files import atomic_write

CLOSE = 1e-4  # how far a value of a feature may be from PyTorch's
LARGEST = (1 << 31) - (1 << 24)  # bytes of weights in one ONNX file, a message of at most 2 GiB
PACKAGES = "pip install -r requirements-onnx.txt"


def create_parser():
    """The options."""
    parser = OneLineParser(prog="python -m models.export", description="Export a trained student to other programs.")
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="what a train script wrote, ours or the authors'")
    add("--to", type=_target, required=True, metavar="FILE", help="where it goes: FILE.onnx or FILE.safetensors")
    add("--model", help="of a checkpoint that does not tell (default: convnextv2_tiny)")
    add("--input_size", type=image_side,
        help="side of an input image, in pixels (default: what the checkpoint was trained with, else 224)")  # fmt: skip
    add(
        "--imagenet_classes",
        type=positive_int,
        help="outputs of the ImageNet head (default: what the checkpoint tells)",
    )
    return parser


@one_line_errors()
def main(argv=None):
    """Command line; returns the path that was written."""
    options = create_parser().parse_args(argv)
    student, facts, classes = load_student(
        options.checkpoint, options.model, options.input_size, options.imagenet_classes
    )
    check_size(student, facts["model"], facts["input_size"])
    metadata = describe(student, facts, classes)
    to_bytes = onnx_bytes if options.to.suffix == ".onnx" else safetensors_bytes
    data = to_bytes(student, facts, metadata)
    with atomic_write(options.to) as file:
        file.write(data)
    size = facts["input_size"]
    print(f"{options.to}: {facts['model']} at {size} × {size}, features of {facts['width']} values")
    return options.to


def describe(student, facts, classes=None):
    """Metadata {name: text} of an exported student.

    format: marks our files; model, imagenet_classes, input_size, width: as in `facts`; sha256: of the checkpoint;
    seen_classes: how many; classes: their names by label, JSON, if `classes` tells them; torch: its version.
    """
    count = student.linear.out_features
    named = {name: facts[name] for name in ("model", "imagenet_classes", "input_size", "width", "sha256")}
    metadata = {"format": FORMAT, **named, "seen_classes": count, "torch": torch.__version__}
    fits = isinstance(classes, list) and len(classes) == count and all(isinstance(each, str) for each in classes)
    return {name: str(value) for name, value in metadata.items()} | ({"classes": json.dumps(classes)} if fits else {})


def safetensors_bytes(student, facts, metadata):
    """A student as a safetensors file (bytes), which models.weights.load_published reads."""
    state = {name: value.detach().clone(memory_format=torch.contiguous_format)
             for name, value in published_state(student).items()}  # fmt: skip
    return save(state, metadata)


def onnx_bytes(student, facts, metadata):
    """A student as an ONNX file (bytes), whose features ONNX Runtime has found within CLOSE of PyTorch's.

    student: on the CPU, in evaluation mode. Raises InputError if it cannot be one, or packages are missing.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401, torch.onnx needs it
    except ImportError as error:
        raise InputError(f"--to FILE.onnx: needs {error.name}; {PACKAGES}") from None
    checkpoint, size = facts["checkpoint"], facts["input_size"]
    if sum(value.nbytes for value in student.state_dict().values()) > LARGEST:
        raise InputError(f"{checkpoint}: too large for an ONNX file, which holds 2 GiB; use --to FILE.safetensors")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, size, size), np.uint8))
    try:
        model = _traced(student, images)
        onnx.helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        data = model.SerializeToString()
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        apart = max(_apart(session, student, images[:count]) for count in (1, 3))
    except Exception as error:  # every part of a backbone can be one that torch.onnx or ONNX Runtime does not know
        reason = f"{facts['model']} cannot be written as ONNX ({gist(error)})"
        raise InputError(f"{checkpoint}: {reason}; use --to FILE.safetensors") from error
    if not apart <= CLOSE:
        raise InputError(f"{checkpoint}: its ONNX features differ by {apart:.1g}; use --to FILE.safetensors")
    return data


class _Features(nn.Module):
    """What models.eval.features.embed computes, as one network."""

    def __init__(self, student):
        super().__init__()
        self.student = student
        # networks.normalise keeps such tensors for later calls, where those of a tracing are of no use.
        for name, values in zip(("mean", "std"), student.statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images):
        return F.normalize(self.student.features((images / 255 - self.mean) / self.std), dim=1)


def _traced(student, images):
    """onnx.ModelProto of a student, for any number of images."""
    network = _Features(student).eval()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (images,), dynamo=True, verbose=False, input_names=["images"], output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim("n")}},
        )  # fmt: skip
    model = program.model_proto
    for each in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del each.metadata_props[:]  # where in this machine's files each step came from
    return model


def _apart(session, student, images):
    """How far the ONNX features of images are from PyTorch's, at most."""
    (features,) = session.run(["features"], {"images": images.numpy()})
    return float(np.abs(features - embed(student, images, "cpu")).max())


def _target(text):
    path = Path(text)
    if path.suffix not in (".onnx", ".safetensors"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .onnx nor in .safetensors; name one that does")
    return path


if __name__ == "__main__":
    main()
