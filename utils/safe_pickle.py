"""Reads pickles of NumPy arrays from untrusted files: nothing in them is imported or called, memory is bounded.

A scan first checks each opcode against an allow-list and copies the pickle without its long strings. The standard
library's Unpickler then runs the copy, with stand-ins for dicts and for all names that pickled arrays refer to. Last,
each array is built once, in memory of its own.
"""

import io
import pickle
import pickletools
import re
import struct
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from utils.cli import InputError
from utils.files import open_regular

_MAX_BYTES_PER_BYTE = 10  # of arrays for a byte of the file; a bool in a list takes 1 byte there and 8 here
_MAX_OBJECTS = 2_000_000  # strings, containers, calls and memo entries: labels as NumPy scalars need some 6 each
_SHORT = 1000  # bytes; longer strings are left in the file until an array is built from them
_MAX_OUTLINED = 8  # items of a container that a message lists
_NUMBERS = (bool, int, float)
_DTYPES = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[SU]\d{1,9}")  # numbers, bools, strings

# The opcodes that pickles of arrays need, with the number of objects that each makes. Files of ours hold one dict.
_OPCODES = dict.fromkeys(
    "PROTO FRAME NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT APPEND APPENDS SETITEM "
    "SETITEMS GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL".split(), 0
) | dict.fromkeys(
    "MARK STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE "
    "BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST PUT BINPUT LONG_BINPUT MEMOIZE "
    "REDUCE BUILD".split(), 1
) | {"EMPTY_DICT": 100, "DICT": 100}  # fmt: skip
# What the copy has in place of an opcode: Q calls persistent_load, which makes the stand-in of a dict of a tuple.
_REPLACED = {"PROTO": b"", "FRAME": b"", "EMPTY_DICT": b")Q", "DICT": b"tQ"}
_WIDTHS = {  # bytes of the length of a string
    pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}  # fmt: skip
_ENCODINGS = {"STRING": "unicode_escape", "UNICODE": "raw_unicode_escape"} | dict.fromkeys(
    ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), "utf-8"
)  # of the other strings: Latin-1

# All names that pickles of arrays refer to, as Python 2 and 3 and NumPy 1 and 2 write them, and their stand-ins.
_NAMES = {
    ("numpy", "dtype"): "dtype",
    ("numpy", "ndarray"): "ndarray",
    ("collections", "OrderedDict"): "dict",
    ("builtins", "bytes"): "bytes",
    ("__builtin__", "bytes"): "bytes",
    ("_codecs", "encode"): "encode",  # how protocols before 3 write bytes
}
for _core in ("numpy.core", "numpy._core"):
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = "array"
    _NAMES[f"{_core}.multiarray", "scalar"] = "scalar"
    _NAMES[f"{_core}.numeric", "_frombuffer"] = "buffer"


def read_pickled_list(path, most):
    """The first `most` items of a pickled list or tuple, from Python 2 or 3; arrays of later items are not read.

    An item is an array of real numbers (arrays or plain numbers, in up to two levels of lists, become one), or None
    if it is something else. Of any other pickle there are no items.
    Raises InputError if the file is missing or damaged, refers to anything but arrays, or needs too much memory.
    """
    with _opened(path) as (content, builder):
        if not isinstance(content, list | tuple):
            return []
        return [builder.numbers(item, levels=2) for item in content[:most]]


def read_pickled_dict(path):
    """{whole number: array} of a pickled dict, from Python 2 or 3; {} for any other pickle.

    An array is one of real numbers, or None if the value is neither that nor a list of plain numbers.
    Raises InputError as `read_pickled_list` does.
    """
    with _opened(path) as (content, builder):
        arrays = {}
        for key, value in builder.pairs(content):
            label = builder.numbers(key, levels=0)
            if label is None or label.size != 1 or not 0 <= label.item() < 2**31 or label.item() % 1:
                return {}
            arrays[int(label.item())] = builder.numbers(value, levels=1)
        return arrays


def describe_pickle(path):
    """What a pickle holds, for messages: "dict of 2 ('photos': numbers (40, 512), 'names': list of 40, first text)".

    Raises InputError as `read_pickled_list` does.
    """
    with _opened(path) as (content, builder):
        return _outline(content, builder)


def _outline(node, builder, levels=2):
    """`describe_pickle` of a node, with the content of containers down to `levels` levels."""
    if (array := builder.numbers(node, levels=2)) is not None:
        return f"numbers {array.shape}" if array.ndim else "a number"
    if type(node) in (str, bytes, _FileString):
        return "text"
    if type(node) in (list, tuple):
        name, items = "list", [("", each) for each in node]
    elif items := builder.pairs(node):
        name, items = "dict", [(f"{key[:40]!r}: " if type(key) is str else "a key: ", each) for key, each in items]
    else:
        return "another object"
    name = f"{name} of {len(items)}"
    if not levels or not items:
        return name
    shown = [key + _outline(each, builder, levels - 1) for key, each in items[:_MAX_OUTLINED]]
    if len(set(shown)) == 1:
        return f"{name}, {'each' if len(items) == len(shown) else 'first'} {shown[0]}"
    return f"{name} ({', '.join(shown)}{', ...' if len(items) > len(shown) else ''})"


@contextmanager
def _opened(path):
    """Open a pickle; gives (its content as stand-ins, an _ArrayBuilder). Every failure is an InputError."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            copy, strings = _scan(file, size)
            yield _Unpickler(copy, strings).load(), _ArrayBuilder(file, size)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise InputError(f"{path}: too large for the memory of this machine; use one with more") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise InputError(f"{path}: {_damaged(type(error).__name__)}") from error


def _damaged(reason):
    return InputError(f"not a readable pickle ({reason}); fetch it again")


def _refused(action):
    return InputError(f"the pickle {action}, which no array needs: refused, nothing was run")


class _FileString(NamedTuple):
    """A long string that is still in the file: its offset, its length in bytes and its encoding there."""

    start: int
    size: int
    encoding: str


def _scan(file, size):
    """Check the opcodes of a pickle; returns (a copy without long strings, the _FileStrings that it refers to)."""
    copy, strings, objects = io.BytesIO(), [], 0
    while (code := file.read(1)) != b".":
        opcode = pickletools.code2op.get(str(code, "latin-1"))
        if opcode is None:
            raise _damaged(f"no pickle holds the code {code[0]}" if code else "it ends in the middle")
        if opcode.name not in _OPCODES:
            raise _refused(f"holds {opcode.name}")
        objects += _OPCODES[opcode.name]
        if objects > _MAX_OBJECTS:
            raise InputError("the pickle holds too many objects; save features and labels as arrays")
        argument = _read_argument(file, size, opcode)
        if isinstance(argument, _FileString):
            copy.write(struct.pack("<cic", b"J", len(strings), b"Q"))
            strings.append(argument)
            continue
        if opcode.name in ("PUT", "LONG_BINPUT"):
            index = int(argument) if opcode.name == "PUT" else int.from_bytes(argument, "little")
            if not 0 <= index <= _MAX_OBJECTS:  # the Unpickler allocates a memo of this length
                raise _damaged("a memo index that is too large")
        copy.write(_REPLACED.get(opcode.name, code + argument))
    copy.write(b".")
    copy.seek(0)
    return copy, strings


def _read_argument(file, size, opcode):
    """The bytes of an opcode's argument, or a _FileString in place of a long string."""
    width = opcode.arg.n if opcode.arg else 0
    start, encoding = file.tell(), _ENCODINGS.get(opcode.name, "latin-1")
    if width == pickletools.UP_TO_NEWLINE:
        lines = [file.readline(_SHORT) for _ in range(2 if opcode.name == "GLOBAL" else 1)]
        if all(line.endswith(b"\n") for line in lines):
            return b"".join(lines)
        if opcode.name not in _ENCODINGS:
            raise _damaged("a line that is too long")
        while not lines[-1].endswith(b"\n"):
            if not lines[-1]:
                raise _damaged("it ends in the middle")
            lines = [file.readline(1 << 20)]
        return _FileString(start, file.tell() - 1 - start, encoding)
    header, length = b"", width
    if width in _WIDTHS:
        header = file.read(_WIDTHS[width])
        start, length = file.tell(), int.from_bytes(header, "little")
    if start + length > size or (width in _WIDTHS and len(header) < _WIDTHS[width]):
        raise _damaged("it ends in the middle")
    if length > _SHORT:
        file.seek(start + length)
        return _FileString(start, length, encoding)
    return header + file.read(length)


class _Global:
    """Stands for a function or class that a pickle refers to; a call of it is only recorded."""

    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __call__(self, *arguments):
        return _Call(self.name, arguments)

    def __setstate__(self, state):
        raise _refused("changes an object once it is built")


class _Call:
    """Stands for the result of a call: its name and arguments, the state that BUILD sets, the items of a dict."""

    __slots__ = ("arguments", "items", "name", "state")

    def __init__(self, name, arguments):
        self.name, self.arguments, self.state, self.items = name, arguments, None, None

    def __setstate__(self, state):
        if self.state is not None or self.name == "dict":
            raise _refused("changes an object once it is built")
        self.state = state

    def __setitem__(self, key, value):  # keys are not hashed: equal hashes would take hours, deep tuples the stack
        if self.name != "dict":
            raise _damaged("an item of what is no dict")
        self.items = self.items or []
        self.items += (key, value)


_STAND_INS = {name: _Global(short) for name, short in _NAMES.items()}


class _Unpickler(pickle.Unpickler):
    """Runs what `_scan` has copied: no name leads to anything but a stand-in."""

    def __init__(self, file, strings):
        super().__init__(io.BufferedReader(file), encoding="latin1")
        self.strings = strings

    def find_class(self, module, name):
        if (module, name) not in _STAND_INS:
            asked = re.sub(r"[^\w.]", "?", f"{module}.{name}", flags=re.ASCII)[:100]
            raise _refused(f"asks for {asked}")
        return _STAND_INS[module, name]

    def persistent_load(self, pid):
        """The string of a number, or a dict of the tuple of its keys and values; `_scan` lets no other pid pass."""
        if isinstance(pid, int):
            return self.strings[pid]
        if len(pid) % 2:
            raise _damaged("a key without a value")
        made = _Call("dict", ())
        made.items = list(pid)
        return made


class _ArrayBuilder:
    """Builds arrays of what the _Unpickler made: each once, and all together within a multiple of the file's size."""

    def __init__(self, file, size):
        self.file, self.left, self.built = file, _MAX_BYTES_PER_BYTE * size, {}

    def spend(self, size):
        self.left -= size
        if self.left < 0:
            raise _damaged("its arrays are larger than the file")

    def numbers(self, node, levels):
        """An array of real numbers of an array, a number, or up to `levels` levels of lists; None of anything else."""
        if type(node) is _Call:
            return self.once(self.array, node) if node.name in ("array", "scalar", "buffer") else None
        if type(node) in (list, tuple) and levels:
            self.spend(8 * len(node))
            node = [part if type(part) in _NUMBERS else self.numbers(part, levels - 1) for part in node]
            if any(part is None for part in node):
                return None
            self.spend(8 * sum(part.size for part in node if type(part) is np.ndarray))
        elif type(node) not in _NUMBERS:
            return None
        try:
            array = np.asarray(node)
        except (ValueError, OverflowError):  # lists of unequal lengths, numbers that are too large
            return None
        return array if array.dtype.kind in "biuf" else None

    def pairs(self, node):
        """(key, value) pairs of a dict; none of anything else. An OrderedDict of Python 2 has them as its argument."""
        match node:
            case _Call(name="dict", arguments=(), items=items):
                items = items or []
                return list(zip(items[::2], items[1::2], strict=True))
            case _Call(name="dict", arguments=(list(pairs),), items=None):
                return [(key, value) for key, value in pairs]
        return []

    def once(self, build, call):
        if call not in self.built:
            self.built[call] = build(call)
        return self.built[call]

    def array(self, call):
        match call.name, call.arguments, call.state:
            case "array", _, (*_, tuple(shape), kind, fortran, content):
                order = "F" if fortran else "C"
            case "scalar", (kind, content), None:
                shape, order = (), "C"
            case "buffer", (content, kind, tuple(shape), order), None:
                order = _text(order)
            case _:
                raise _damaged("an array of no known form")
        if type(kind) is not _Call:
            raise _damaged("an array without a type")
        kind = self.once(self.dtype, kind)
        if kind.kind not in "biuf":
            return None
        array = np.frombuffer(self.content(content), kind)
        if kind.kind == "b":  # NumPy relies on bools being 0 or 1
            array = array.view(np.uint8) != 0
        return array.reshape(shape, order=order)

    def dtype(self, call):
        """The NumPy dtype of a recorded call of numpy.dtype and its state."""
        match call:
            case _Call(name="dtype", arguments=(code, *_), state=None):
                order = "="
            case _Call(name="dtype", arguments=(code, *_), state=(_, order, None, None, None, *_)):
                order = _text(order)
            case _:
                raise InputError("the pickle holds an array with fields; only numbers and strings are read")
        code = _text(code)
        if not _DTYPES.fullmatch(code) or order not in ("<", ">", "=", "|"):
            why = "only numbers and strings are read, and no long doubles; save it as float32"
            raise InputError(f"the pickle holds an array of type {code[:20]!r}; {why}")
        return np.dtype(order + code)

    def content(self, node):
        """The bytes of an array, in memory of its own."""
        match node:
            case _Call(name="bytes", arguments=()):
                node = b""
            case _Call(name="encode", arguments=(text, coding)) if _text(coding) == "latin1":
                node = text
        if type(node) not in (bytes, bytearray, str, _FileString):
            raise _damaged("an array without its bytes")
        self.spend(node.size if type(node) is _FileString else len(node))
        if type(node) is _FileString:
            node = self.long_string(*node)
        return bytearray(node.encode("latin-1") if type(node) is str else node)

    def long_string(self, start, size, encoding):
        """The content of a _FileString: bytes, or str if it is encoded."""
        self.file.seek(start)
        content = self.file.read(size)
        if encoding == "unicode_escape":  # a quoted string of Python 2
            if content[:1] not in (b"'", b'"') or content[:1] != content[-1:]:
                raise _damaged("a string without its quotes")
            content = content[1:-1]
        return content if encoding == "latin-1" else str(content, encoding)


def _text(value):
    """A short name as str; Python 3 writes those of dtypes as str, in some protocols as bytes."""
    if type(value) not in (str, bytes):
        raise _damaged("an array of no known form")
    return value if type(value) is str else str(value, "latin-1")
