"""Runs a pickle as data: what would be a call is only noted down, nothing is called, imported or changed.

A pickle is a program for a small machine with a stack and a memo. `Machine` runs the part of it that arrays in lists
and dicts need, as module pickletools of Python's library describes it, and refuses every other code. Its result is
made of numbers, None, names (str), lists, tuples and the stand-ins below. A list may hold itself, and two lists the
same third one: whoever walks the result bounds how deep and how far.
"""

import os
import pickletools
import re
import struct

from utils.cli import InputError

_MOST_STEPS = 200_000_000  # the largest features need 112 million, if they are lists of numbers
_MOST_THINGS = 2_000_000  # strings, containers, calls and memo entries: labels as NumPy scalars need some 6 each
_LONGEST_LINE = 1000  # of a number or a name

# All names that pickles of arrays hold, as Python 2 and 3 and NumPy 1 and 2 write them, and how they are called here.
_NAMES = {
    ("numpy", "dtype"): "dtype",
    ("numpy", "ndarray"): "ndarray",
    ("collections", "OrderedDict"): "OrderedDict",
    ("builtins", "bytes"): "bytes",
    ("__builtin__", "bytes"): "bytes",
    ("_codecs", "encode"): "encode",  # how protocols before 3 spell bytes
}
for _core in ("numpy.core", "numpy._core"):
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = "array"
    _NAMES[f"{_core}.multiarray", "scalar"] = "scalar"
    _NAMES[f"{_core}.numeric", "_frombuffer"] = "buffer"


def unsound(why):
    """The InputError of a pickle that is torn, or no pickle of ours."""
    return InputError(f"not a readable pickle ({why}); fetch it again")


def _refused(what):
    return InputError(f"the pickle {what}, which no array needs: refused, nothing was run")


def _too_many():
    return InputError("the pickle holds too many objects; save features and labels as arrays")


class Text:
    """Stands for a string, of bytes or of characters: where it is in the file, and how it is coded there."""

    __slots__ = ("coding", "size", "start")

    def __init__(self, start, size, coding):
        self.start, self.size, self.coding = start, size, coding

    def read(self, file):
        """Its bytes, in a new bytearray; characters become Latin-1, which is how protocols before 3 spell bytes."""
        file.seek(self.start)
        content = bytearray(self.size)
        if file.readinto(content) != self.size:
            raise unsound("it became shorter")
        if self.coding == "unicode_escape":  # a quoted string of Python 2
            if self.size < 2 or content[:1] not in (b"'", b'"') or content[:1] != content[-1:]:
                raise unsound("a string without its quotes")
            content = memoryview(content)[1:-1]
        return content if self.coding == "latin-1" else bytearray(str(content, self.coding), "latin-1")

    def short(self, file):
        """A name, as a str; the file stays where it is."""
        if self.size > _LONGEST_LINE:
            raise unsound("a name that is too long")
        here = file.tell()
        name = str(self.read(file), "latin-1")
        file.seek(here)
        return name


class Call:
    """Stands for a call, and for the state that the result is given (BUILD)."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name, arguments):
        self.name, self.arguments, self.state = name, arguments, None


class Pairs:
    """Stands for a dict: its pairs, whose keys are not hashed."""

    __slots__ = ("pairs",)

    def __init__(self):
        self.pairs = []


class Machine:
    """Runs the pickle in an open binary file, whose `size` (bytes) bounds what strings may claim."""

    def __init__(self, file):
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.stack, self.marks, self.memo, self.things = [], [], {}, 0

    def run(self):
        """The content of the pickle. Raises InputError, or any other error where the pickle is torn."""
        for _ in range(_MOST_STEPS):
            code = self.file.read(1)
            if code == b".":
                return self.stack.pop()
            if code not in _STEPS:
                raise _stranger(code)
            step, argument = _STEPS[code]
            step(self, argument)
        raise _too_many()

    # What the steps share.

    def count(self, things=1):
        self.things += things
        if self.things > _MOST_THINGS:
            raise _too_many()

    def take(self, size):
        content = self.file.read(size)
        if len(content) != size:
            raise unsound("it ends in the middle")
        return content

    def line(self):
        line = self.file.readline(_LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise unsound("a line without an end")
        return line[:-1]

    def whole(self, width):
        """A whole number of `width` bytes, without a sign; of a line if that is 0."""
        return int.from_bytes(self.take(width), "little") if width else int(self.line())

    def top(self, count):
        """Take the last `count` values off the stack; those since the last mark if that is None."""
        at = self.marks.pop() if count is None else len(self.stack) - count
        if at < 0:
            raise unsound("its stack is empty")
        items = self.stack[at:]
        del self.stack[at:]
        return items

    # The steps; each takes the argument that stands with it in _STEPS.

    def mark(self, _):
        self.count()
        self.marks.append(len(self.stack))

    def skip(self, width):
        self.take(width)

    def push(self, value):
        self.stack.append(value)

    def push_packed(self, form):
        self.stack.append(form.unpack(self.take(form.size))[0])

    def push_long(self, width):
        self.stack.append(int.from_bytes(self.take(self.whole(width)), "little", signed=True))

    def push_decimal(self, _):
        line = self.line()
        self.stack.append(line == b"01" if line in (b"00", b"01") else int(line.rstrip(b"L")))

    def push_float(self, _):
        self.stack.append(float(self.line()))

    def push_text(self, width_and_coding):
        width, coding = width_and_coding
        size, start = self.whole(width), self.file.tell()
        if start + size > self.size:
            raise unsound("it ends in the middle")
        self.file.seek(start + size)
        self.count()
        self.stack.append(Text(start, size, coding))

    def push_text_line(self, coding):
        start, part = self.file.tell(), b""
        while not part.endswith(b"\n"):
            if not (part := self.file.readline(1 << 20)):
                raise unsound("a line without an end")
        self.count()
        self.stack.append(Text(start, self.file.tell() - 1 - start, coding))

    def push_tuple(self, count):
        self.count()
        self.stack.append(tuple(self.top(count)))

    def push_list(self, count):
        self.count()
        self.stack.append(self.top(count))

    def push_dict(self, count):
        self.count(100)  # our files hold one dict
        self.push_pairs(Pairs(), self.top(count))

    def add_items(self, count):
        items = self.top(count)
        if type(self.stack[-1]) is not list:
            raise unsound("what is no list gets an item")
        self.stack[-1].extend(items)

    def add_pairs(self, count):
        items = self.top(count)
        self.push_pairs(self.stack.pop(), items)

    def push_pairs(self, target, items):
        if type(target) is not Pairs:
            raise unsound("what is no dict gets a key")
        self.count(1 + len(items) // 2)
        target.pairs.extend(zip(items[::2], items[1::2], strict=True))
        self.stack.append(target)

    def put(self, width):
        self.count()
        self.memo[len(self.memo) if width is None else self.whole(width)] = self.stack[-1]

    def get(self, width):
        self.stack.append(self.memo[self.whole(width)])

    def look_up(self, on_stack):
        if on_stack:
            module, name = (text.short(self.file) for text in self.top(2))
        else:
            module, name = (str(self.line(), "latin-1") for _ in range(2))
        if (module, name) not in _NAMES:
            asked = re.sub(r"[^\w.]", "?", f"{module}.{name}", flags=re.ASCII)[:100]
            raise _refused(f"asks for {asked}")
        self.stack.append(_NAMES[module, name])

    def call(self, _):
        name, arguments = self.top(2)
        if type(name) is not str or type(arguments) is not tuple:
            raise _refused("calls what is no function")
        self.count()
        self.stack.append(self.ordered_dict(*arguments) if name == "OrderedDict" else Call(name, arguments))

    def ordered_dict(self, pairs=()):
        """Python 2 gives an OrderedDict all its pairs, lists of two; Python 3 sets them later."""
        self.count(len(pairs))
        if any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
            raise unsound("pairs that are none")
        result = Pairs()
        result.pairs.extend(map(tuple, pairs))
        return result

    def build(self, _):
        call, state = self.top(2)
        if type(call) is not Call or call.state is not None:
            raise _refused("changes an object once it is built")
        call.state = state
        self.stack.append(call)


def _stranger(code):
    """The error for a code that is not in _STEPS."""
    if not code:
        return unsound("it ends in the middle")
    opcode = pickletools.code2op.get(str(code, "latin-1"))
    return _refused(f"holds {opcode.name}") if opcode else unsound(f"no pickle holds the code {code[0]}")


_STEPS = {  # code: (what it does, with which argument); the codes of all else are refused
    b"(": (Machine.mark, None),
    b"\x80": (Machine.skip, 1),  # PROTO
    b"\x95": (Machine.skip, 8),  # FRAME
    b"N": (Machine.push, None),
    b"\x88": (Machine.push, True),
    b"\x89": (Machine.push, False),
    b"K": (Machine.push_packed, struct.Struct("<B")),
    b"M": (Machine.push_packed, struct.Struct("<H")),
    b"J": (Machine.push_packed, struct.Struct("<i")),
    b"G": (Machine.push_packed, struct.Struct(">d")),
    b"\x8a": (Machine.push_long, 1),  # LONG1; LONG4, of more than 255 bytes, is refused
    b"I": (Machine.push_decimal, None),
    b"L": (Machine.push_decimal, None),
    b"F": (Machine.push_float, None),
    b"S": (Machine.push_text_line, "unicode_escape"),
    b"V": (Machine.push_text_line, "raw_unicode_escape"),
    b"U": (Machine.push_text, (1, "latin-1")),  # strings of Python 2
    b"T": (Machine.push_text, (4, "latin-1")),
    b"C": (Machine.push_text, (1, "latin-1")),  # bytes
    b"B": (Machine.push_text, (4, "latin-1")),
    b"\x8e": (Machine.push_text, (8, "latin-1")),
    b"\x96": (Machine.push_text, (8, "latin-1")),  # a bytearray
    b"\x8c": (Machine.push_text, (1, "utf-8")),  # characters
    b"X": (Machine.push_text, (4, "utf-8")),
    b"\x8d": (Machine.push_text, (8, "utf-8")),
    b")": (Machine.push_tuple, 0),
    b"\x85": (Machine.push_tuple, 1),
    b"\x86": (Machine.push_tuple, 2),
    b"\x87": (Machine.push_tuple, 3),
    b"t": (Machine.push_tuple, None),
    b"]": (Machine.push_list, 0),
    b"l": (Machine.push_list, None),
    b"a": (Machine.add_items, 1),
    b"e": (Machine.add_items, None),
    b"}": (Machine.push_dict, 0),
    b"d": (Machine.push_dict, None),
    b"s": (Machine.add_pairs, 2),
    b"u": (Machine.add_pairs, None),
    b"p": (Machine.put, 0),
    b"q": (Machine.put, 1),
    b"r": (Machine.put, 4),
    b"\x94": (Machine.put, None),  # MEMOIZE
    b"g": (Machine.get, 0),
    b"h": (Machine.get, 1),
    b"j": (Machine.get, 4),
    b"c": (Machine.look_up, False),
    b"\x93": (Machine.look_up, True),
    b"R": (Machine.call, None),
    b"b": (Machine.build, None),
}
