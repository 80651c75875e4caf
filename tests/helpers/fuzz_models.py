"""Read thousands of damaged .onnx and .safetensors files; each must be read, or refused in one line.

    make fuzz

Small networks that load are changed byte by byte, and field by field of their formats. The networks that still load are
run, and must give the features of the whole file unless the digest of the file is gone or renewed. One process reads
all files, within bounds of memory and time: a crash or a hang leaves the file that caused it.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import tiny_convnext  # noqa: E402
from helpers.fuzz_bounds import crash_with_traceback, limit_memory, limit_time  # noqa: E402
from helpers.fuzz_formats import damage_onnx, damage_safetensors  # noqa: E402
from models import checkpoints, weights  # noqa: E402
from models.export import EXPORT_FORMAT, _with_digest, export_metadata, safetensors_bytes  # noqa: E402
from models.weights import create_student, student_of  # noqa: E402
from photo_search.encoder import load_encoder  # noqa: E402
from utils.cli import InputError, printable  # noqa: E402

MAX_EXTRA_BYTES = 3 << 30  # of address space that reading files may take on top of what the process has
CPU_SECONDS = 60  # that reading a file may take
MODEL, SIZE, WIDTH = tiny_convnext.NAME, 32, tiny_convnext.WIDTH
IMAGENET_CLASSES, CLASSES = 5, ["a", "b", "c"]
METADATA = {
    "model": MODEL,
    "imagenet_classes": IMAGENET_CLASSES,
    "input_size": SIZE,
    "width": WIDTH,
    "sha256": "ab" * 32,
}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3, SIZE, SIZE), np.uint8)


def onnx_file(with_digest=False):
    """A valid .onnx file (bytes) of a network with features (n, 8)."""
    import onnx

    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=kinds.FLOAT),
        helper.make_node("Div", ["floats", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "kernel"], ["map"], strides=[4, 4], pads=[0, 0, 0, 0]),
        helper.make_node("Reshape", ["map", "shape"], ["flat"]),
        helper.make_node("ReduceMean", ["flat", "axes"], ["pooled"], keepdims=0),
        helper.make_node("Gemm", ["pooled", "weight", "bias"], ["sum"], transB=1),
        helper.make_node("LpNormalization", ["sum"], ["features"], axis=1, p=2),
    ]
    rng = np.random.default_rng(0)
    values = {
        "scale": np.float32(255), "kernel": rng.normal(size=(4, 3, 4, 4)).astype(np.float32),
        "shape": np.array([0, 4, -1]), "axes": np.array([2]), "bias": np.ones(WIDTH, np.float32),
        "weight": rng.normal(size=(WIDTH, 4)).astype(np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes, "student", [helper.make_tensor_value_info("images", kinds.UINT8, ["n", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("features", kinds.FLOAT, ["n", WIDTH])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    strings = {"format": EXPORT_FORMAT, **METADATA, "seen_classes": 3, "classes": json.dumps(CLASSES)}
    helper.set_model_props(model, {name: str(value) for name, value in strings.items()})
    data = model.SerializeToString()
    return _with_digest(data) if with_digest else data


def safetensors_files():
    """Valid .safetensors files (bytes): exported students, one without digests, and a bare state dict."""
    from safetensors.torch import save

    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = student_of(MODEL, len(CLASSES), IMAGENET_CLASSES).eval()
    strings = export_metadata(student, METADATA, CLASSES)
    state = {name: value.contiguous() for name, value in weights.published_state(student).items()}
    whole = safetensors_bytes(student, strings)
    return [whole, whole, safetensors_bytes(student, strings, no_head=True), save(state, strings), save(state)]


def read_onnx(path):
    return load_encoder(path).embed(IMAGES)


def read_safetensors(path):
    """Features of a student as `index` and the tests compute them; then as weights to train from."""
    options = () if b'"format"' in path.read_bytes() else (MODEL, SIZE, IMAGENET_CLASSES)
    encoder = load_encoder(path, *options, device="cpu")
    size = encoder.metadata["input_size"]
    features = encoder.embed(IMAGES if size == SIZE else np.zeros((1, 3, size, size), np.uint8))
    try:
        create_student(MODEL, len(CLASSES), str(path), IMAGENET_CLASSES)
    except InputError as error:
        assert "ImageNet head" in str(error) or "classes" in str(error), error
    return features


ENDS = "refused", "same", "other"  # the last two: features that are those of the whole file or not
DIGESTS = {"onnx": (b"content_bytes", b"content_sha256"), "safetensors": (b"content_sha256", b"header_sha256")}
DAMAGE = {"onnx": (read_onnx, damage_onnx), "safetensors": (read_safetensors, damage_safetensors)}


def damage_bytes(rng, content, other):
    """`content` (bytes) with changes near its ends or anywhere; pieces come from `other` or are odd numbers."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(max(1, min(len(content), rng.choice((16, 400, 10**6)))))
        at = max(0, len(content) - 1 - at) if rng.random() < 0.2 else at
        piece = other[at : at + rng.randrange(1, 60)]
        odd = rng.choice((b"\0", b"\xff" * 8, b"-1", b"1e9", b"[" * 200, rng.randbytes(4), piece))
        change = rng.randrange(6)
        if change == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            content[at] = rng.randrange(256)
        elif change == 2:
            content[at:at] = odd
        elif change == 3:
            content[at : at + len(odd)] = odd
        elif change == 4:
            del content[at : at + rng.randrange(1, 20)]
        elif rng.random() < 0.2:
            del content[at:]
        content = content or bytearray(b"\0")
    return bytes(content)


def read(kind, path):
    """The features, or None for a file that is refused, which must be in a line that names it."""
    limit_time(CPU_SECONDS)
    try:
        return DAMAGE[kind][0](path)
    except InputError as error:
        assert str(path) in str(error) and len(printable(error)) < 1000, str(error)
        return None
    finally:
        limit_time()


@contextlib.contextmanager
def networks_built_once():
    """Within this block each network is built once: timm takes longer for that than the reading of a small file."""
    networks = {}

    def kept(model, classes, imagenet_classes=1000, *rest, **options):
        key = model, classes, imagenet_classes, torch.empty(0).device.type
        if key not in networks and len(networks) < 50:
            networks[key] = student_of(model, classes, imagenet_classes, *rest, **options)
        return networks.get(key) or student_of(model, classes, imagenet_classes, *rest, **options)

    with mock.patch.object(checkpoints, "student_of", kept), mock.patch.object(weights, "student_of", kept):
        yield


@networks_built_once()
def fuzz(count, seed, folder):
    """Read `count` damaged files of each kind; returns {(kind, "bytes" or "fields", end): how many}.

    end: one of ENDS. `folder` holds the last file of a kind.
    """
    rng, counts = random.Random(seed), collections.Counter()
    valid = {"onnx": [onnx_file(), onnx_file(with_digest=True)], "safetensors": safetensors_files()}
    expected = {}
    for kind, contents in valid.items():
        for content in contents:
            (folder / f"mutant.{kind}").write_bytes(content)
            expected[content] = read(kind, folder / f"mutant.{kind}")
    everything = [content for contents in valid.values() for content in contents]
    for kind in tqdm([kind for kind in valid for _ in range(count)], desc="fuzz", unit="file", disable=None):
        path, content = folder / f"mutant.{kind}", rng.choice(valid[kind])
        by, signed = rng.choice(("bytes", "bytes", "fields", "fields", "fields")), rng.random() < 0.6
        if by == "bytes":
            damaged, signed = damage_bytes(rng, content, rng.choice(everything)), False
        else:
            damaged = DAMAGE[kind][1](rng, content, signed)
        path.write_bytes(damaged)
        features = read(kind, path)
        end = "refused" if features is None else "same" if np.array_equal(features, expected[content]) else "other"
        has_digests = all(name in damaged for name in DIGESTS[kind]) and not signed
        assert end != "other" or not has_digests, f"{path}: gives other features"
        counts[kind, by, end] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000, help="number of broken files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    crash_with_traceback()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"--seed {options.seed}; a crash leaves its file in {folder}", flush=True)
    fuzz(20, 0, folder)  # libraries load some parts on first use
    limit_memory(MAX_EXTRA_BYTES)
    for (kind, by, end), number in sorted(fuzz(options.files, options.seed, folder).items()):
        print(f".{kind}, damaged by {by}: {number:,} {end}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
