"""Students that models.export wrote as .onnx, computed by ONNX Runtime: nothing here needs PyTorch.

Metadata are checked before anything of the file is computed, so that a file of another program is never run.
"""

import numpy as np

from models.export import INSTALL, onnx_session, read_onnx_metadata
from utils.cli import InputError
from utils.process_pool import available_cores


def load(path, model, input_size, imagenet_classes, device):
    """(metadata, compute) of a photo_search.encoder.Encoder; see load_encoder there."""
    if device not in (None, "cpu"):
        raise InputError(f"--device {device}: exported networks compute on the cpu; leave --device out")
    try:
        own = read_metadata(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); see --checkpoint") from None
    for name, asked in (("model", model), ("input_size", input_size), ("imagenet_classes", imagenet_classes)):
        if asked not in (None, own[name]):
            raise InputError(f"--{name} {asked}: {path} was exported with {own[name]}; leave --{name} out")
    session = _session(path, own)
    return {"checkpoint": str(path), **own}, lambda images: _run(session, images)


def share_cores(threads):
    """See photo_search.encoder: a session's threads compute for all who ask, so there is nothing to share out."""


def read_metadata(path):
    """What an exported file records: export.METADATA_TYPES by name. Raises OSError and InputError."""
    try:
        return read_onnx_metadata(path)
    except ImportError:
        raise InputError(f"{path}: needs onnxruntime; {INSTALL}") from None


def _session(path, own):
    try:
        session = onnx_session(path, available_cores())
    except Exception as error:  # ONNX Runtime raises classes of its own
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise InputError(f"{path}: damaged ({reason}); export it again") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    size = own["input_size"]
    if [each.shape[1:] for each in (*inputs, *outputs)] != [[3, size, size], [own["width"]]]:
        raise InputError(f"{path}: its network is not the one of its metadata; export it again")
    return session


def _run(session, images):
    return session.run(["features"], {"images": np.ascontiguousarray(images)})[0]
