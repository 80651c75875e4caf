"""Read thousands of broken features_zero.pickle and cid_mask.pickle; each must be read, or refused in one line.

    make fuzz

Valid small files of every protocol are changed opcode by opcode. The process reads them one after the other, within
bounds of memory and time. Each is written to the disk first, so that a crash leaves the file that caused it.
"""

import argparse
import collections
import json
import pickle
import pickletools
import random
import shutil
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from datasets.lists import read_mask  # noqa: E402
from helpers.fuzz_bounds import crash_with_traceback, limit_memory, limit_time  # noqa: E402
from models.eval.features import read_features  # noqa: E402
from utils.cli import InputError  # noqa: E402

CLASSES, WIDTH = 2, 5  # of the masks that are read here
READERS = {"features_zero": read_features, "cid_mask": lambda path: read_mask(path, CLASSES, WIDTH)}
MAX_EXTRA_BYTES = 400 << 20  # bytes that reading a file may take on top of what the process has
CPU_SECONDS = 30  # that reading a file may take


def pickle_as_python_2(value, protocol):
    """`value` (None, whole numbers, lists, dicts, arrays) as Python 2 and NumPy 1 pickled it, in protocol 0 or 2."""
    return (b"\x80\x02" if protocol else b"") + _pickle_as_python_2(value, protocol) + b"."


def _pickle_as_python_2(value, protocol):
    if value is None:
        return b"N"
    if isinstance(value, int):
        return struct.pack("<cH", b"M", value) if protocol else b"I%d\n" % value
    if isinstance(value, bytes):
        return struct.pack("<cI", b"T", len(value)) + value if protocol else b"S%b\n" % repr(value)[1:].encode()
    start, one, end = (b"]", b"", b"e") if protocol else (b"(lp1\n", b"a", b"")
    if isinstance(value, list):
        items = b"".join(_pickle_as_python_2(item, protocol) + one for item in value)
        return start + (b"(" if protocol else b"") + items + end
    if isinstance(value, dict):
        pairs = (
            _pickle_as_python_2(key, protocol) + _pickle_as_python_2(item, protocol) + b"s"
            for key, item in value.items()
        )
        return (b"}" if protocol else b"(dp2\n") + b"".join(pairs)
    shape = b"(" + b"".join(_pickle_as_python_2(side, protocol) for side in value.shape) + b"t"
    order, code = value.dtype.str[:1].encode(), value.dtype.str[1:].encode()
    kind = (
        b"cnumpy\ndtype\n("
        + _pickle_as_python_2(code, protocol)
        + b"I0\nI1\ntR(I3\n"
        + _pickle_as_python_2(order, protocol)
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + _pickle_as_python_2(b"b", protocol) + b"tR"
    )
    return (
        array
        + b"(I1\n"
        + shape
        + kind
        + b"NNNI-1\nI-1\nI0\ntbI00\n"
        + _pickle_as_python_2(value.tobytes(), protocol)
        + b"tb"
    )


def valid_files():
    """[(kind, pickle)] that READERS read: every protocol of Python 3, those of Python 2, arrays and lists."""
    rng = np.random.default_rng(0)
    gallery, query = (rng.normal(size=(count, 3)).astype(np.float32) for count in (4, 2))
    features = [gallery, np.arange(4), query, np.array([0, 1], np.int32), None]
    mask = dict(enumerate(rng.random((CLASSES, WIDTH))))
    lists = [np.asfortranarray(gallery), list(np.arange(4)), query.tolist(), [0, True], np.ones((2, 4))]
    ordered = collections.OrderedDict((np.int64(label), row.tolist()) for label, row in mask.items())
    files = [("features_zero", pickle_as_python_2(features, protocol)) for protocol in (0, 2)]
    files += [("cid_mask", pickle_as_python_2(mask, protocol)) for protocol in (0, 2)]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        files += [("features_zero", pickle.dumps(content, protocol)) for content in (features, lists)]
        files += [("cid_mask", pickle.dumps(content, protocol)) for content in (mask, ordered)]
    return files


def opcodes(content):
    """A pickle cut into its opcodes with their arguments."""
    readable = content.replace(b"\\x", b"/x")  # pickletools takes no escapes beyond ASCII
    starts = [start for _, _, start in pickletools.genops(readable)]
    return [content[one:two] for one, two in zip(starts, [*starts[1:], len(content)], strict=True)]


def odd_opcodes():
    """Every opcode, with arguments that are large, small or invalid."""
    sizes = [0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**64 - 1]
    lines = [b"0\n", b"-1\n", b"01\n", b"9" * 30 + b"\n", b"1e400\n", b"nan\n", b"'\\x00'\n", b"os\nsystem\n", b"\n"]
    for opcode in pickletools.opcodes:
        code = opcode.code.encode("latin-1")
        yield code
        yield from (code + line for line in lines)
        yield from (code + size.to_bytes(8, "little")[:width] for size in sizes for width in (1, 2, 4, 8))
    for names in (b"os\nsystem", b"builtins\neval", b"builtins\nbytes", b"numpy\nndarray", b"numpy\ndtype"):
        yield b"c" + names + b"\n"


def mutant(rng, files, odd):
    """(kind, broken pickle) of one of `files`, [(kind, its opcodes)]."""
    kind, parts = rng.choice(files)
    parts = list(parts)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(parts))
        other = rng.choice((rng.choice(odd), rng.choice(rng.choice(files)[1]), rng.choice(parts)))
        change = rng.choice(("put in", "replace", "leave out", "repeat", "swap", "flip", "cut", "splice"))
        if change == "put in":
            parts.insert(at, other)
        elif change == "replace":
            parts[at] = other
        elif change == "leave out" and len(parts) > 1:
            del parts[at]
        elif change == "repeat":
            length = rng.randrange(1, 30)
            parts[at:at] = parts[at : at + length]
        elif change == "swap":
            to = rng.randrange(len(parts))
            parts[at], parts[to] = parts[to], parts[at]
        elif change == "flip" and parts[at]:
            part = bytearray(parts[at])
            part[rng.randrange(len(part))] = rng.randrange(256)
            parts[at] = bytes(part)
        elif change == "cut" and rng.random() < 0.2:
            parts[at] = parts[at][: rng.randrange(len(parts[at]) + 1)]
            del parts[at + 1 :]
        elif change == "splice":
            donor = rng.choice(files)[1]
            start = rng.randrange(len(donor))
            parts[at : at + rng.randrange(9)] = donor[start : start + rng.randrange(1, 40)]
    return kind, b"".join(parts)


class Reader:
    """Reads files within bounds; any audit event but opening the file is an error."""

    def __init__(self):
        crash_with_traceback()
        warnings.simplefilter("error")
        with tempfile.TemporaryDirectory() as folder:  # valid files first: libraries import some parts on first use
            for kind, content in valid_files():
                (path := Path(folder) / kind).write_bytes(content)
                READERS[kind](path)
        self.path, self.events = None, []
        sys.addaudithook(self._watch)
        limit_memory(MAX_EXTRA_BYTES)

    def _watch(self, event, arguments):
        if self.path is not None and not (event == "open" and str(arguments[0]) == str(self.path)):
            self.events.append(event)

    def read(self, kind, path):
        """The error message, or None if the file was read. Raises AssertionError unless it is a single line."""
        limit_time(CPU_SECONDS)
        message = None
        self.path, self.events = path, []
        try:
            READERS[kind](path)
        except InputError as error:
            message = str(error)
        finally:
            self.path = None
            limit_time()
        assert not self.events, f"{path}: reading it did {self.events}"
        assert message is None or (message.startswith(f"{path}: ") and message.isprintable()), message
        assert message is None or "memory" not in message, message
        return message


def fuzz(reader, count, seed, folder):
    """Read `count` mutants; returns {"read" or "refused": how many}. `folder` holds the last one."""
    rng, counts = random.Random(seed), collections.Counter()
    files = [(kind, opcodes(content)) for kind, content in valid_files()]
    odd = list(odd_opcodes())
    for _ in tqdm(range(count), desc="fuzz", unit="file", disable=None):
        kind, content = mutant(rng, files, odd)
        path = folder / f"{kind}.pickle"
        path.write_bytes(content)
        counts["refused" if reader.read(kind, path) else "read"] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000, help="number of broken files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--read", type=Path, metavar="FOLDER", help="first read its */KIND.pickle, and print the messages"
    )
    options = parser.parse_args()
    reader = Reader()
    for path in sorted(options.read.glob("*/*.pickle")) if options.read else ():
        print(json.dumps([path.parent.name, path.stem, reader.read(path.stem, path)]), flush=True)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"--seed {options.seed}; a crash leaves its file in {folder}", flush=True)
    counts = fuzz(reader, options.files, options.seed, folder)
    print(f"{counts['read']:,} read, {counts['refused']:,} refused")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
