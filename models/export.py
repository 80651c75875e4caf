"""Exports trained students as ONNX (with normalisation of inputs and outputs) or as safetensors, and reads such files.

    python -m models.export checkpoint/sketchy/zeroshot1/model_best.pth.tar --to student.onnx
    python -m models.export checkpoint/sketchy/zeroshot1/model_best.pth.tar --to student.safetensors

    student.onnx          images (n, 3, size, size) uint8, RGB, for any n → features (n, D) float32 of length 1
    student.safetensors   weights by their published names, including the classifier of the seen classes

With --half both store large matrices in float16, and compute in float32. Both carry the metadata of `export_metadata`,
as strings. Only writing needs PyTorch; reading does not.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import mmap
import os
import re
import warnings

import numpy as np

from utils.cli import (
    InputError,
    OneLineParser,
    first_line,
    image_side,
    is_out_of_memory,
    one_line_errors,
    path_type,
    positive_int,
    run_command,
)
from utils.files import atomic_write, check_output, open_regular, sha256_of
from utils.memory import limited_memory

EXPORT_FORMAT = "sbka student 1"  # value of the metadata entry "format"
METADATA_TYPES = {"sha256": str, "model": str, "imagenet_classes": int, "input_size": int, "width": int}
_BOUNDS = {"imagenet_classes": (0, 10**6), "input_size": (32, 4096), "width": (1, 10**5)}
# Metadata at the end of an ONNX file: the length of what is before them, and its SHA-256. A safetensors file has the
# SHA-256 of its values, and that of its header without this entry. Earlier versions wrote some or none.
CONTENT_BYTES, CONTENT_SHA256, HEADER_SHA256 = "content_bytes", "content_sha256", "header_sha256"
MAX_DIFFERENCE = 1e-4  # between a value of a feature of ONNX Runtime and of PyTorch
MAX_HALF_DIFFERENCE = 1e-3  # the same with --half
ONNX_IMAGES = 2  # of many images, those that a core computes at a time by ONNX Runtime: activations then fit its cache
MIN_HALF_SIZE = 30_000  # values of a matrix that --half stores in float16: smaller ones matter more, and save little
MAX_ONNX_BYTES = (1 << 31) - (1 << 24)  # of weights: an ONNX file is one protobuf message of at most 2 GiB
INSTALL = "pip install -r requirements-onnx.txt"
WAY_OUT = "python -m models.export writes one from a checkpoint"


def import_onnxruntime():
    """The module onnxruntime, with its telemetry and its log off. Every import of it in this project goes through here.

    Its wheels report use to their maker unless the environment variable is set before the import; without it the
    import alone writes a device id below the home folder. Raises ImportError.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(4)  # errors are raised; do not also print them
    return onnxruntime


def onnx_session(model, threads=0, optimize=True):
    """An InferenceSession on the CPU for a path or bytes. threads: 0 for ONNX Runtime's default.

    optimize: False leaves the graph as it is. Optimising computes constant parts of the graph, so it must not be done
    before a file is metadata to be ours. External weights are only read from the folder of the file.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Its fallback would print a failure, and try the same again.
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def read_onnx_metadata(path):
    """METADATA_TYPES by name, of a file that `main` wrote as ONNX; nothing of the file is computed.

    "sha256" is that of the exported checkpoint. Raises OSError, ImportError, and InputError for any other file.
    """
    with open_regular(path) as file:  # raises the OSError, which ONNX Runtime would hide
        if name := _unbounded_part(file):
            raise InputError(f"{path}: its graph contains {name}, as no exported student does; {WAY_OUT}")
    try:
        with limited_memory():
            metadata = onnx_session(str(path), optimize=False).get_modelmeta().custom_metadata_map
    except ImportError:
        raise
    except Exception as error:  # ONNX Runtime raises classes of its own
        if is_out_of_memory(error):
            raise InputError(f"{path}: needs more memory than there is; free some, or use another file") from error
        raise InputError(f"{path}: damaged, or not an ONNX file ({first_line(error)}); {WAY_OUT}") from error
    if metadata.get("format") != EXPORT_FORMAT:
        raise InputError(f"{path}: an ONNX file of another program, or of another version of this one; {WAY_OUT}")
    try:
        values = parse_metadata(metadata)
    except (KeyError, ValueError):
        values = None
    if values is None or any(not low <= values[name] <= high for name, (low, high) in _BOUNDS.items()):
        raise InputError(f"{path}: its metadata do not describe a student; {WAY_OUT}") from None
    if metadata.keys() & {CONTENT_BYTES, CONTENT_SHA256} and not _has_digest(path, metadata.get(CONTENT_BYTES, "")):
        raise InputError(f"{path}: damaged, its SHA-256 is another one; export it again")
    return values


def _has_digest(path, length):
    """Whether an ONNX file ends in the digest of its first `length` (text) bytes, and in nothing else: _with_digest."""
    if not re.fullmatch("[0-9]{1,15}", length):
        return False
    end = _digest_entries(length, sha256_of(path, length=int(length)))
    with open_regular(path) as file:
        start = file.seek(0, os.SEEK_END) - len(end)
        file.seek(max(start, 0))
        return start == int(length) and file.read() == end


def _digest_entries(length, digest):
    """Two entries of the metadata of an ONNX file, as protobuf: each is field 14 of a model, with a key and a value."""
    entries = b""
    for key, value in ((CONTENT_BYTES, length), (CONTENT_SHA256, digest)):
        entry = b"\x0a%c%b\x12%c%b" % (len(key), key.encode(), len(value), value.encode())
        entries += b"\x72%c%b" % (len(entry), entry)
    return entries


def _unbounded_part(file):
    """What an open ONNX file has that a small file could take endless time or memory with; None if it has nothing."""
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for name in ("Loop", "Scan", "SequenceMap"):
                # The field op_type of a node: tag, length, text.
                if content.find(b'"%c%s' % (len(name), name.encode())) >= 0:
                    return name
            fields = list(itertools.islice(_fields_of(content), MAX_FIELDS + 1))
            return "functions" if _FUNCTIONS in fields or len(fields) > MAX_FIELDS else None
    except (ValueError, IndexError):  # an empty file, or none of ONNX
        return None


MAX_FIELDS = 1000  # of a model; each node and weight is a field of its graph
_FUNCTIONS = 25  # the field of a model with functions, which may call each other; they are expanded when it is read


def _fields_of(message):
    """Yields the number of each field of a protobuf message (bytes). Raises IndexError, ValueError for others."""
    position = 0

    def number():
        nonlocal position
        value, shift = 0, 0
        while True:
            byte = message[position]
            value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("not a number of protobuf")

    while position < len(message):
        tag = number()
        if tag < 8:
            raise ValueError("not a field of protobuf")
        yield tag >> 3
        match tag & 7:
            case 0:
                number()
            case 1:
                position += 8
            case 2:
                length = number()
                position += length
            case 5:
                position += 4
            case 3 | 4:  # begin and end of fields
                pass
            case _:
                raise ValueError("not a field of protobuf")


def parse_metadata(metadata):
    """METADATA_TYPES by name, of exported metadata {name: string}. Raises KeyError, ValueError."""
    return {name: kind(metadata[name]) for name, kind in METADATA_TYPES.items()}


def create_parser():
    """The options."""
    parser = OneLineParser(prog="python -m models.export", description="Export a trained student to other programs.")
    add = parser.add_argument
    add("checkpoint", type=path_type, metavar="CHECKPOINT", help="checkpoint of a train script, ours or the authors'")
    add("--to", type=_target, required=True, metavar="FILE", help="file to write: FILE.onnx or FILE.safetensors")
    add("--model", help="timm model, for a checkpoint that does not record it (default: convnextv2_tiny)")
    add("--input_size", type=image_side,
        help="side of an input image, in pixels (default: what the checkpoint was trained with, else 224)")  # fmt: skip
    add("--imagenet_classes", type=positive_int,
        help="outputs of the ImageNet head (default: what the checkpoint records, else 1000)")  # fmt: skip
    add(
        "--half",
        action="store_true",
        help="store large matrices in float16, in about half the space",
    )
    add("--no_head", action="store_true",
        help="leave the ImageNet head out of a .safetensors file; an .onnx file has none in any case")  # fmt: skip
    return parser


@one_line_errors()
def main(argv=None):
    """Command line; returns the path that was written."""
    from models.checkpoints import load_student

    options = create_parser().parse_args(argv)
    if all(map(os.path.exists, (options.to, options.checkpoint))) and os.path.samefile(options.to, options.checkpoint):
        raise InputError(f"--to {options.to}: is the checkpoint itself; choose another name")
    target = check_output(options.to, "--to", EXPORT_FORMAT.encode())
    student, metadata, classes = load_student(
        options.checkpoint, options.model, options.input_size, options.imagenet_classes
    )
    strings = export_metadata(student, metadata, classes)
    if options.to.suffix == ".onnx":
        data = onnx_bytes(student, metadata, strings, options.half)
    else:
        data = safetensors_bytes(student, strings, options.half, options.no_head)
    with atomic_write(target) as file:
        file.write(data)
    size = metadata["input_size"]
    print(f"{options.to}: {metadata['model']} at {size} × {size}, features of {metadata['width']} values")
    return options.to


def export_metadata(student, metadata, classes=None):
    """Metadata {name: string} of an exported student.

    format: EXPORT_FORMAT; model, imagenet_classes, input_size, width, sha256 (of the checkpoint): as in `metadata`,
    which models.checkpoints.load_student gives; seen_classes: how many; classes: their names by label, as JSON, unless
    `classes` is None; torch: its version.
    """
    import torch

    named = {name: metadata[name] for name in ("model", "imagenet_classes", "input_size", "width", "sha256")}
    count = student.linear.out_features
    strings = {"format": EXPORT_FORMAT, **named, "seen_classes": count, "torch": torch.__version__}
    more = {} if classes is None else {"classes": json.dumps(classes)}
    return {name: str(value) for name, value in strings.items()} | more


def safetensors_bytes(student, strings, half=False, no_head=False):
    """A student as a safetensors file (bytes), which models.weights.load_published reads.

    half: large matrices in float16; no_head: without the ImageNet head.
    """
    import torch
    from safetensors.torch import save

    from models.weights import head_names, published_state

    left_out = head_names(student) if no_head else ()
    state = {name: value.detach().clone(memory_format=torch.contiguous_format)
             for name, value in published_state(student).items() if name not in left_out}  # fmt: skip
    if half:
        state = {
            name: value.half() if value.ndim > 1 and value.numel() >= MIN_HALF_SIZE else value
            for name, value in state.items()
        }
    data = save(state, strings)
    end = 8 + int.from_bytes(data[:8], "little")  # the length of the header, and the header
    header = json.loads(data[8:end])
    header["__metadata__"][CONTENT_SHA256] = hashlib.sha256(memoryview(data)[end:]).hexdigest()
    header["__metadata__"][HEADER_SHA256] = header_sha256(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values are aligned to 8 bytes
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[end:]))


def header_sha256(header):
    """SHA-256 of the header of a safetensors file (parsed), without its own entry of the metadata."""
    metadata = {name: text for name, text in header["__metadata__"].items() if name != HEADER_SHA256}
    return hashlib.sha256(json.dumps(header | {"__metadata__": metadata}, sort_keys=True).encode()).hexdigest()


def onnx_bytes(student, metadata, strings, half=False):
    """A student as an ONNX file (bytes), with features of ONNX Runtime within MAX_DIFFERENCE of PyTorch's.

    student: on the CPU, in evaluation mode; metadata: "checkpoint", "model" and "input_size"; half: large
    matrices in float16, and features within MAX_HALF_DIFFERENCE.
    Raises InputError if the student cannot be written as ONNX, or packages are missing.
    """
    import torch

    from models.torch_files import first_sentence

    try:
        import_onnxruntime()
        import onnx
        import onnxscript  # noqa: F401, torch.onnx needs it
    except ImportError as error:
        raise InputError(f"--to FILE.onnx: needs {error.name}; {INSTALL}") from None
    checkpoint, size = metadata["checkpoint"], metadata["input_size"]
    if sum(value.nbytes for value in student.state_dict().values()) > MAX_ONNX_BYTES:
        raise InputError(f"{checkpoint}: too large for an ONNX file, which holds 2 GiB; use --to FILE.safetensors")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, size, size), np.uint8))
    try:
        model = _traced(student, images)
        if half:
            _store_in_half(model)
        onnx.helper.set_model_props(model, strings)
        onnx.checker.check_model(model, full_check=True)
        data = _with_digest(model.SerializeToString())
        session = onnx_session(data)
        difference = max(_difference(session, student, images[:count]) for count in (1, 3))
    except Exception as error:  # torch.onnx or ONNX Runtime may not know an operator of the backbone
        reason = f"{metadata['model']} cannot be written as ONNX ({first_sentence(error)})"
        raise InputError(f"{checkpoint}: {reason}; use --to FILE.safetensors") from error
    if not difference <= (MAX_HALF_DIFFERENCE if half else MAX_DIFFERENCE):
        raise InputError(f"{checkpoint}: its ONNX features differ by {difference:.1g}; use --to FILE.safetensors")
    return data


def _with_digest(data):
    """An ONNX file (bytes) with its length and SHA-256 as metadata behind it: concatenated messages are one."""
    return data + _digest_entries(str(len(data)), hashlib.sha256(data).hexdigest())


def _traced(student, images):
    """onnx.ModelProto of a student, for any number of images."""
    import torch

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _feature_module(student), (images,), dynamo=True, verbose=False, input_names=["images"],
            output_names=["features"], dynamic_shapes={"images": {0: torch.export.Dim("n")}},
        )  # fmt: skip
    model = program.model_proto
    for each in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del each.metadata_props[:]  # paths of source files on this machine
    return model


def feature_session(student, images):
    """An InferenceSession, on one thread, of a student's features; without a file. images: some, (n, 3, H, W) uint8.

    Raises ImportError, and what torch.onnx and ONNX Runtime raise for a student that they cannot compute.
    """
    import torch

    import_onnxruntime()
    data = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(  # by TorchScript, which takes a tenth of the time of `_traced`
            _feature_module(student), (images,), data, dynamo=False, input_names=["images"], output_names=["features"],
            dynamic_axes={"images": {0: "n"}, "features": {0: "n"}},
            # An operator that it does not know is an error of ONNX Runtime then; its own would print the whole graph.
            operator_export_type=torch.onnx.OperatorExportTypes.ONNX_FALLTHROUGH,
        )  # fmt: skip
    return onnx_session(data.getvalue(), 1)


def _store_in_half(model):
    """Store the large matrices of an onnx.ModelProto in float16, and cast each to float32 where it is used."""
    import onnx

    for value in model.graph.initializer:
        is_large = len(value.dims) > 1 and np.prod(value.dims) >= MIN_HALF_SIZE
        if value.data_type == onnx.TensorProto.FLOAT and is_large:
            name, half = value.name, f"{value.name}.half"
            array = onnx.numpy_helper.to_array(value).astype(np.float16)
            value.CopyFrom(onnx.numpy_helper.from_array(array, half))
            cast = onnx.helper.make_node("Cast", [half], [name], f"{name}.cast", to=onnx.TensorProto.FLOAT)
            model.graph.node.insert(0, cast)


def _feature_module(student):
    """What models.eval.features.embed computes, as one nn.Module from uint8 images to features."""
    import torch
    from torch.nn import functional as F

    class FeatureModule(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student = student
            # networks.normalise caches such tensors, which must not hold those of a tracing.
            for name, values in zip(("mean", "std"), student.statistics, strict=True):
                self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

        def forward(self, images):
            return F.normalize(self.student.features((images / 255 - self.mean) / self.std), dim=1)

    return FeatureModule().eval()


def _difference(session, student, images):
    """The largest difference between features of ONNX Runtime and of PyTorch."""
    from models.eval.inference import embed

    (features,) = session.run(["features"], {"images": images.numpy()})
    return float(np.abs(features - embed(student, images, "cpu")).max())


def _target(text):
    path = path_type(text)
    if path.suffix not in (".onnx", ".safetensors"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .onnx nor in .safetensors; name one that does")
    return path


if __name__ == "__main__":
    run_command("models.export")
