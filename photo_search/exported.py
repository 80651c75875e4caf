"""Students that models.export wrote as .onnx, computed by ONNX Runtime: nothing here needs PyTorch.

What such a file tells of itself is read before ONNX Runtime sees it, so that a file of others is never run.
"""

import io
import os

import numpy as np

from utils.cli import InputError
from utils.process_pool import available_cores

FORMAT = "sbka student 1"  # marks our files
TOLD = {"sha256": str, "model": str, "imagenet_classes": int, "input_size": int, "width": int}
METADATA, FIELDS = 14, 64  # the number of metadata_props in ONNX's ModelProto; all are below FIELDS
NOT_OURS = "python -m models.export writes one from a checkpoint"


def told_by(path):
    """What an exported file tells of the network in it: TOLD by name, read without its weights.

    "sha256" is that of the checkpoint that it was exported from. Raises OSError, and InputError for other files.
    """
    with open(path, "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            metadata = dict(_text(entry) for _, entry in _fields(file, size, [METADATA]))
        except (ValueError, EOFError):
            raise InputError(f"{path}: torn, or no ONNX file; {NOT_OURS}") from None
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: an ONNX file of others, or of another version of this program; {NOT_OURS}")
    try:
        return parsed(metadata)
    except (KeyError, ValueError):
        raise InputError(f"{path}: does not tell what network it holds; {NOT_OURS}") from None


def parsed(metadata):
    """TOLD by name, of the metadata {name: text} that models.export writes. Raises KeyError, ValueError."""
    return {name: kind(metadata[name]) for name, kind in TOLD.items()}


def load(path, model, input_size, imagenet_classes, device):
    """(facts, compute) of a photo_search.encoder.Network; see load_network there."""
    if device not in (None, "cpu"):
        raise InputError(f"--device {device}: exported networks compute on the cpu; leave --device out")
    try:
        own = told_by(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); see --checkpoint") from None
    for name, asked in (("model", model), ("input_size", input_size), ("imagenet_classes", imagenet_classes)):
        if asked not in (None, own[name]):
            raise InputError(f"--{name} {asked}: {path} was exported with {own[name]}; leave --{name} out")
    session = _session(path, own)
    return {"checkpoint": str(path), **own}, lambda images: _run(session, images)


def share_cores(threads):
    """See photo_search.encoder: a session's threads compute for all who ask, so there is nothing to share out."""


def _session(path, own):
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"{path}: needs onnxruntime; pip install -r requirements-onnx.txt") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = 4  # errors are raised, too
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise InputError(f"{path}: damaged ({reason}); export it again") from error
    given, made = session.get_inputs(), session.get_outputs()
    size = own["input_size"]
    if [each.shape[1:] for each in (*given, *made)] != [[3, size, size], [own["width"]]]:
        raise InputError(f"{path}: holds another network than it tells; export it again")
    return session


def _run(session, images):
    return session.run(["features"], {"images": np.ascontiguousarray(images)})[0]


# --- protocol buffers, as far as this needs them


def _fields(file, size, wanted):
    """Yield (number, bytes) of the fields of a message of `size` bytes that are wanted. Raises ValueError, EOFError."""
    while file.tell() < size:
        number, kind = divmod(_whole(file), 8)
        if not 0 < number < FIELDS or kind not in (0, 2):
            raise ValueError("no field of ONNX")
        length = _whole(file)  # or the value itself, of kind 0
        if kind == 0:
            continue
        if length > size - file.tell():
            raise EOFError
        if number in wanted:
            yield number, file.read(length)
        else:
            file.seek(length, os.SEEK_CUR)


def _text(entry):
    """(name, value) of an entry of metadata."""
    parts = dict(_fields(io.BytesIO(entry), len(entry), (1, 2)))
    return parts.get(1, b"").decode(), parts.get(2, b"").decode()


def _whole(file):
    """A number of variable length."""
    value = 0
    for place in range(10):
        byte = file.read(1)
        if not byte:
            raise EOFError
        value |= (byte[0] & 127) << 7 * place
        if byte[0] < 128:
            return value
    raise ValueError("a number of more than ten bytes")
