"""Read thousands of broken .onnx and .safetensors files; each must be read, or refused in one line.

    make fuzz

Headers, graphs and metadata of small valid files are changed byte by byte; the networks that load are run. One process
reads them all, within bounds of memory and time: a crash or a hang leaves the file that caused it.
"""

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.fuzz_bounds import crash_with_traceback, limit_memory, limit_time  # noqa: E402
from models.checkpoints import read_checkpoint  # noqa: E402
from models.export import EXPORT_FORMAT, _with_digest  # noqa: E402
from models.weights import match_published  # noqa: E402
from photo_search.encoder import load_encoder  # noqa: E402
from utils.cli import InputError  # noqa: E402

MAX_EXTRA_BYTES = 3 << 30  # of address space that reading files may take on top of what the process has
CPU_SECONDS = 60  # that reading a file may take
METADATA = {
    "format": EXPORT_FORMAT, "sha256": "ab" * 32, "model": "convnextv2_atto", "imagenet_classes": "5",
    "input_size": "32", "width": "8", "seen_classes": "3", "classes": json.dumps(["a", "b", "c"]),
}  # fmt: skip


def onnx_file(with_digest=False):
    """A valid .onnx file (bytes) of a network with features (n, 8)."""
    import onnx

    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=kinds.FLOAT),
        helper.make_node("GlobalAveragePool", ["floats"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("MatMul", ["means", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("LpNormalization", ["sum"], ["features"], axis=1, p=2),
    ]
    values = {"weight": np.random.default_rng(0).normal(size=(3, 8)), "bias": np.ones(8)}
    graph = helper.make_graph(
        nodes, "student", [helper.make_tensor_value_info("images", kinds.UINT8, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("features", kinds.FLOAT, ["n", 8])],
        [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, METADATA)
    data = model.SerializeToString()
    return _with_digest(data) if with_digest else data


def safetensors_file():
    """A valid .safetensors file (bytes) of some weights."""
    from safetensors.numpy import save

    shapes = {"norm.weight": (320,), "head.weight": (5, 320), "linear.weight": (3, 320), "linear.bias": (3,)}
    return save({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, METADATA)


def read_onnx(path):
    load_encoder(path).embed(np.zeros((2, 3, 32, 32), np.uint8))


def read_safetensors(path):
    match_published(read_safetensors.student, read_checkpoint(path)["state_dict"], path)


READERS = {"onnx": read_onnx, "safetensors": read_safetensors}


def mutant(rng, content, other):
    """`content` (bytes) with changes near its beginning or anywhere; pieces come from `other` or are odd numbers."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(max(1, min(len(content), rng.choice((16, 400, 10**6)))))
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
    """The error message, or None if the file was read. Raises AssertionError unless it is a single line."""
    limit_time(CPU_SECONDS)
    try:
        READERS[kind](path)
        return None
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error), error
        return str(error)
    finally:
        limit_time()


def fuzz(count, seed, folder):
    """Read `count` mutants of each kind; returns {(kind, "read" or "refused"): how many}. `folder` holds the last."""
    import torch

    from models.weights import student_of

    with torch.device("meta"):
        read_safetensors.student = student_of("convnextv2_atto", 3, 5)
    rng, counts = random.Random(seed), collections.Counter()
    valid = {"onnx": [onnx_file(), onnx_file(with_digest=True)], "safetensors": [safetensors_file()]}
    everything = [content for contents in valid.values() for content in contents]
    for kind in tqdm([kind for kind in valid for _ in range(count)], desc="fuzz", unit="file", disable=None):
        path = folder / f"mutant.{kind}"
        path.write_bytes(mutant(rng, rng.choice(valid[kind]), rng.choice(everything)))
        counts[kind, "refused" if read(kind, path) else "read"] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000, help="number of broken files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    crash_with_traceback()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"--seed {options.seed}; a crash leaves its file in {folder}", flush=True)
    fuzz(1, 0, folder)  # libraries load some parts on first use
    limit_memory(MAX_EXTRA_BYTES)
    for (kind, end), number in sorted(fuzz(options.files, options.seed, folder).items()):
        print(f".{kind}: {number:,} {end}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
