"""Feature extraction for the photo search: encoders on PyTorch (checkpoints) or ONNX Runtime (exported files).

PyTorch is only imported where a checkpoint is loaded, so exported files need none. Code outside this module does not
depend on the backend.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from datasets.images import resize, stack
from models.export import INSTALL, ONNX_IMAGES, import_onnxruntime, onnx_session, read_onnx_metadata
from photo_search.photos import read_photo, thumbnail
from utils.cli import InputError, first_line, is_out_of_memory
from utils.distributed import bar_disabled, local_device, log_rank0
from utils.files import open_regular, sha256_of, sha256_of_file
from utils.memory import limited_memory
from utils.process_pool import available_cores, call_with_timeout, map_with_timeout, parallel_map

STARTER = Path(__file__).resolve().parents[1] / "checkpoint/starter/student.onnx"  # comes with the project
BACKENDS = ("torch", "onnx")
MAX_PHOTO_BYTES = 4 << 30  # of a file; a sparse one can be of any length
MAX_READS = 3  # of a photo that changes while it is read
MAX_SECONDS = 60  # for an image, and for loading a network, of an exported file; most take less than one
PRECISION = "tf32"  # of PyTorch on a GPU, as in the test scripts


@dataclass(frozen=True)
class Encoder:
    """Computes features of images; safe to use from several threads.

    metadata: "checkpoint", "sha256", "model", "imagenet_classes", "input_size", "width"; ready for JSON.
    compute: a function from (n, 3, size, size) uint8 to L2-normalised features (n, D) float32, both NumPy arrays.
    """

    metadata: dict
    compute: Callable

    def features(self, images):
        """L2-normalised features of RGB images (PIL.Image): (n, D) float32."""
        return self.embed(stack([resize(image, self.metadata["input_size"]) for image in images]))

    def embed(self, images):
        """L2-normalised features of (n, 3, size, size) uint8: (n, D) float32. Raises InputError if not finite."""
        rows = self.compute(images)
        if not np.isfinite(rows).all():
            raise InputError(f"{self.metadata['checkpoint']}: its features are not finite; use another checkpoint")
        return rows


def backend_of(checkpoint):
    """The one of BACKENDS that computes with a file, by the suffix of its name."""
    return "onnx" if Path(checkpoint).suffix.lower() == ".onnx" else "torch"


def load_encoder(checkpoint, model=None, input_size=None, imagenet_classes=None, device=None, threads=None):
    """The Encoder of a training checkpoint, ours or the authors', or of a file that models.export wrote.

    model, input_size, imagenet_classes: see models.checkpoints.load_student; device: None for a GPU if there is one;
    threads: with which ONNX Runtime computes an image, None for one for each core. One is best for many images.
    Raises InputError for a file of another kind, values that contradict it, or a device that does not exist.
    """
    path = Path(checkpoint).absolute()
    if backend_of(path) == "onnx":
        return _load_onnx(path, model, input_size, imagenet_classes, device, threads or available_cores())
    return _load_torch(path, model, input_size, imagenet_classes, device)


def check_encoder_device(checkpoint, device):
    """Raise InputError unless the network in a file can compute on `device`."""
    if backend_of(checkpoint) == "torch":
        from models.options import check_device

        check_device("--device", device)
    elif device != "cpu":
        raise InputError(f"--device {device}: exported networks compute on the cpu; leave --device out")


def _load_torch(path, model, input_size, imagenet_classes, device):
    import torch

    from models.checkpoints import load_student
    from models.eval.inference import embed

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_encoder_device(path, device)
    device = local_device(device)
    student, metadata, _ = load_student(path, model, input_size, imagenet_classes)
    del metadata["seen_classes"]  # an index does not record them
    student.to(device).to(memory_format=torch.channels_last)
    return Encoder(metadata, lambda images: embed(student, torch.from_numpy(images), device, PRECISION))


def _load_onnx(path, model, input_size, imagenet_classes, device, threads):
    if device is not None:
        check_encoder_device(path, device)
    metadata = _read_metadata(path)
    for name, given in (("model", model), ("input_size", input_size), ("imagenet_classes", imagenet_classes)):
        if given not in (None, metadata[name]):
            raise InputError(f"--{name} {given}: {path} was exported with {metadata[name]}; leave --{name} out")
    try:
        with limited_memory():
            session = call_with_timeout(lambda: onnx_session(str(path), threads), MAX_SECONDS)
        # Reading the shapes raises UnicodeDecodeError for a name of a dimension that is no UTF-8.
        shapes = [each.shape[1:] for each in (*session.get_inputs(), *session.get_outputs())]
    except TimeoutError:
        raise _too_slow(path) from None
    except Exception as error:  # ONNX Runtime raises classes of its own
        raise _failure(path, "damaged", error) from error
    if shapes != [[3, metadata["input_size"], metadata["input_size"]], [metadata["width"]]]:
        raise InputError(f"{path}: its network is not the one of its metadata; export it again")

    compute = partial(_run, session, path, metadata["width"])
    with limited_memory():
        compute(np.zeros((1, *shapes[0]), np.uint8))
    return Encoder({"checkpoint": str(path), **metadata}, compute)


def _run(session, path, width, images):
    """Features (n, width) float32 of images (n, 3, size, size) uint8. Raises InputError for anything else.

    What a file says about its graph need not be true of it, and a damaged one can fail when it runs, or not end.
    """
    options = import_onnxruntime().RunOptions()

    def run(share):
        parts = [share[start : start + ONNX_IMAGES] for start in range(0, len(share) or 1, ONNX_IMAGES)]
        inputs = [{"images": np.ascontiguousarray(part)} for part in parts]
        return np.concatenate([session.run(["features"], each, options)[0] for each in inputs])

    def stop():
        options.terminate = True

    # Each core computes a share, a few images at a time, so that their activations fit its cache.
    shares = np.array_split(images, max(1, min(available_cores(), -(-len(images) // ONNX_IMAGES))))
    try:
        rows = np.concatenate(map_with_timeout(run, shares, MAX_SECONDS * max(1, len(images)), stop))
    except TimeoutError:
        raise _too_slow(path) from None
    except Exception as error:  # ONNX Runtime raises classes of its own
        raise _failure(path, "damaged, it fails when it runs", error) from error
    fits = isinstance(rows, np.ndarray) and rows.dtype == np.float32 and rows.shape == (len(images), width)
    if not fits or (np.abs(np.linalg.norm(rows, axis=1) - 1) > 0.01).any():
        raise InputError(f"{path}: damaged, it does not compute features as its metadata say; export it again")
    return rows


def _failure(path, what, error):
    """The InputError for an exception of ONNX Runtime."""
    if is_out_of_memory(error):
        return InputError(f"{path}: needs more memory than there is; free some, or use another checkpoint")
    return InputError(f"{path}: {what} ({first_line(error)}); export it again")


def _too_slow(path):
    return InputError(f"{path}: does not compute an image within {MAX_SECONDS} seconds; use another checkpoint")


def _read_metadata(path):
    """What a file records without being loaded: "sha256" of the checkpoint; of an exported file, all its metadata."""
    try:
        return read_onnx_metadata(path) if backend_of(path) == "onnx" else {"sha256": sha256_of(path)}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); see --checkpoint") from None
    except ImportError:
        raise InputError(f"{path}: needs onnxruntime; {INSTALL}") from None


def encoder_of(metadata, checkpoint=None, device=None, threads=None):
    """The Encoder that an index was made with.

    metadata: of the index; checkpoint: its path now, None if the file was not moved; threads: see `load_encoder`.
    Raises InputError if the file does not exist, or is another one.
    """
    path = checkpoint or metadata["checkpoint"]
    if not Path(path).is_file():
        why = "is not a file" if Path(path).exists() else "does not exist"
        raise InputError(f"{path}: the checkpoint of the index {why}; give its path with --checkpoint")
    check_checkpoint(metadata, path)
    own = {name: metadata[name] for name in ("model", "input_size", "imagenet_classes")}
    encoder = load_encoder(path, **own, device=device, threads=threads)
    if encoder.metadata["width"] != metadata["width"]:
        raise InputError(
            f"{path}: computes features of {encoder.metadata['width']} values, the index has {metadata['width']}"
        )
    return encoder


def check_checkpoint(metadata, path):
    """Raise InputError unless the file at `path` is the checkpoint of an index with this metadata, or its export."""
    recorded = _read_metadata(path)
    if recorded["sha256"] != metadata["sha256"]:
        raise InputError(
            f"{path}: not the checkpoint that the index was made with, and features of two do not mix; "
            "give that one with --checkpoint, or another --index"
        )
    for name, value in recorded.items():
        if metadata[name] != value:
            raise InputError(
                f"{path}: exported with {name} {value}, while the index has {metadata[name]}; export it again with "
                f"--{name} {metadata[name]}, or give another --index"
            )


def fit_index_codebook(checkpoint, features, subspaces, clusters):
    """The codebook (M, K, D/M) of features (N, D): by our EM if PyTorch computes, else by scikit-learn.

    Both are slow to import, and most commands need neither. Raises CollapsedComponent.
    """
    from models.eval import codebooks

    mixture = "sklearn" if backend_of(checkpoint) == "onnx" else "torch"
    return codebooks.fit_codebook(features, subspaces, clusters, mixture=mixture)[0]


def share_cores(checkpoint, threads):
    """Limit PyTorch in this thread to its share of the cores, if `threads` threads compute at a time.

    ONNX Runtime needs no limit: all threads share the pool of their session.
    """
    if backend_of(checkpoint) == "torch":
        import torch

        torch.set_num_threads(max(1, available_cores() // threads))


def add_photos(encoder, metadata, photos, partial_index, batch_size=64, workers=0, truncated=False):
    """Compute the features of PhotoFiles, and add them to a PartialIndex batch by batch.

    encoder: a function that returns the Encoder, called once a photo can be read; metadata: of that Encoder.
    workers: processes that decode; with 0 the calling process decodes. truncated: take files that are cut off, with a
    note.
    """
    decode, cut_off = partial(_decode, size=metadata["input_size"], truncated=truncated), 0
    decoded = parallel_map(decode, photos, "photos", workers, -(-batch_size // max(workers, 1)), bar_disabled())
    while items := list(islice(decoded, batch_size)):
        batch, photos = list(zip(photos[: len(items)], items, strict=True)), photos[len(items) :]
        unreadable = {photo: item for photo, item in batch if isinstance(item, str)}
        readable = [(photo, *item) for photo, item in batch if not isinstance(item, str)]
        files, images, thumbnails, digests, are_cut_off = zip(*readable, strict=True) if readable else ((),) * 5
        rows = encoder().embed(stack(images)) if readable else np.empty((0, metadata["width"]), np.float32)
        partial_index.add(files, rows, digests, thumbnails, unreadable)
        cut_off += sum(are_cut_off)
    if cut_off:
        photos = "1 photo is" if cut_off == 1 else f"{cut_off:,} photos are"
        log_rank0(f"note: {photos} cut off; what is there of {'it' if cut_off == 1 else 'them'} is indexed")


def _decode_open(photo, size, truncated, file):
    """What `_decode` returns, of a PhotoFile that is open. Raises InputError if it cannot be read."""
    try:
        image, is_cut_off = read_photo(photo.path, size, file=file), False
    except InputError as error:
        if not (truncated and "(cut off" in str(error)):
            raise
        image, is_cut_off = read_photo(photo.path, size, truncated=True, file=file), True
    return resize(image, size), thumbnail(image), sha256_of_file(file), is_cut_off


def _decode(photo, size, truncated):
    """A PhotoFile decoded: (pixels (3, size, size) uint8, thumbnail, digest, is cut off), or why it cannot be read."""
    try:
        for _ in range(MAX_READS):
            # Pixels and digest are of one content, also where another program replaces or changes the file meanwhile.
            with open_regular(photo.path) as file:
                before = os.fstat(file.fileno())
                if before.st_size > MAX_PHOTO_BYTES:
                    raise InputError(f"larger than {MAX_PHOTO_BYTES >> 30} GiB")
                decoded = _decode_open(photo, size, truncated, file)
                after = os.fstat(file.fileno())
            if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
                return decoded
        return "changed again and again while it was read"
    except InputError as error:
        return str(error)
    except OSError as error:
        return error.strerror or type(error).__name__
