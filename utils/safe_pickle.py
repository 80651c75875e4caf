"""Pickles of arrays, read as data: nothing in them is called or imported, and arrays are the last thing to be built.

Once a whole pickle is read (see utils.opcodes), only the few shapes that our files have are walked, and each array
in them is built once, from bytes that nothing else holds. What is built, a file of a few bytes cannot make large.
"""

import re
from contextlib import contextmanager

import numpy as np

from utils.cli import InputError
from utils.opcodes import Call, Machine, Pairs, Text, unsound

_MOST_BYTES = 10  # to build for each byte of a file: a truth value in a list takes 1 byte there and 8 here
_NUMBERS = (bool, int, float)
_KINDS = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[SU]\d{1,9}")  # of arrays: numbers, truth values, strings


def read_pickled_list(path, most):
    """The first `most` items of a pickled list or tuple, from Python 2 or 3; later items are not built.

    An item is an array of real numbers (arrays or plain numbers, in up to two levels of lists, become one), or None
    where it is something else. Of any pickle but a list, there are no items.
    Raises InputError if the file is missing or torn, asks for anything but arrays, or for too much memory.
    """
    with _opened(path) as (content, builder):
        if not isinstance(content, list | tuple):
            return []
        return [builder.numbers(item, levels=2) for item in content[:most]]


def read_pickled_dict(path):
    """{whole number: array} of a pickled dict, from Python 2 or 3; {} for a pickle of anything else.

    An array is one of real numbers, or None where the dict holds neither that nor a list of plain numbers.
    Raises InputError as `read_pickled_list` does.
    """
    with _opened(path) as (content, builder):
        pairs = content.pairs if isinstance(content, Pairs) else []
        arrays = {}
        for key, value in pairs:
            label = builder.numbers(key, levels=0)
            if label is None or label.size != 1 or not 0 <= label.item() < 2**31 or label.item() % 1:
                return {}
            arrays[int(label.item())] = builder.numbers(value, levels=1)
        return arrays


@contextmanager
def _opened(path):
    """Read a pickle and give (its content as stand-ins, what builds arrays of them). Every failure is an InputError."""
    try:
        with open(path, "rb") as file:
            machine = Machine(file)
            yield machine.run(), _Builder(file, machine.size)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise InputError(f"{path}: too large for the memory of this machine; use one with more") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a torn or foreign pickle can fail in any way
        raise InputError(f"{path}: {unsound(type(error).__name__)}") from error


class _Builder:
    """Builds arrays of what a Machine made: each once, from bytes that nothing else holds."""

    def __init__(self, file, size):
        self.file, self.left, self.built = file, _MOST_BYTES * size, {}

    def spend(self, size):
        self.left -= size
        if self.left < 0:
            raise unsound("its arrays are larger than the file")

    def numbers(self, node, levels):
        """An array of real numbers of an array, a number, or up to `levels` levels of lists; None of anything else."""
        if type(node) is Call:
            return self.once(self.array, node) if node.name in ("array", "scalar", "buffer") else None
        if isinstance(node, list | tuple) and levels:
            self.spend(8 * len(node))
            node = [part if type(part) in _NUMBERS else self.numbers(part, levels - 1) for part in node]
            if any(part is None for part in node):
                return None
            self.spend(8 * sum(part.size for part in node if type(part) is np.ndarray))
        elif type(node) not in _NUMBERS:
            return None
        try:
            array = np.asarray(node)
        except (ValueError, OverflowError):  # lists of unlike lengths, numbers too large
            return None
        return array if array.dtype.kind in "biuf" else None

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
            case "buffer", (content, kind, tuple(shape), Text(size=1) as order), None:
                order = order.short(self.file)
            case _:
                raise unsound("an array of no known form")
        kind = self.once(self.kind, kind)
        if kind.kind not in "biuf":
            return None
        array = np.frombuffer(self.content(content), kind)
        if kind.kind == "b":  # NumPy trusts truth values to be 0 or 1
            array = array.view(np.uint8) != 0
        return array.reshape(shape, order=order)

    def kind(self, call):
        """The NumPy dtype that a call of numpy.dtype, with its state, stands for."""
        match call:
            case Call(name="dtype", arguments=(Text() as code, *_), state=None):
                order = "="
            case Call(name="dtype", arguments=(Text() as code, *_), state=(_, Text() as order, None, None, None, *_)):
                order = order.short(self.file)
            case _:
                raise InputError("the pickle holds an array with fields; only numbers and strings are read")
        code = code.short(self.file)
        if not _KINDS.fullmatch(code) or order not in ("<", ">", "=", "|"):
            why = "only numbers and strings are read, and no long doubles; save it as float32"
            raise InputError(f"the pickle holds an array of type {code[:20]!r}; {why}")
        return np.dtype(order + code)

    def content(self, node):
        """The bytes of an array."""
        match node:
            case Call(name="bytes", arguments=()):
                return bytearray()
            case Call(name="encode", arguments=(text, Text() as coding)) if self.once(self.name, coding) == "latin1":
                node = text
        if type(node) is not Text:
            raise unsound("an array without its bytes")
        self.spend(node.size)
        return node.read(self.file)

    def name(self, text):
        return text.short(self.file)
