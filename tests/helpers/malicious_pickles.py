"""Malicious pickles, written opcode by opcode, with the error that each must cause.

A "value" is a piece of a pickle that leaves one value on the stack; `as_features` and `as_mask` make a whole file of
it. Each table gives for a value or file a part of the error message; "" if that differs between the kinds of file.
"""

import gzip
import pickle

COMMAND = b"touch sprung"  # runs if the file is trusted: a test looks for `sprung` in its folder


def string(content):
    return b"\x8c" + len(content).to_bytes(1, "little") + content


def raw(content):
    return b"B" + len(content).to_bytes(4, "little") + content


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def dtype(code, rest=b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0"):
    return b"cnumpy\ndtype\n" + string(code) + b"\x89\x88\x87R(K\3\x8c\1|" + rest + b"tb"


def state(kind, shape, content):
    if isinstance(shape, tuple):
        shape = b"(" + b"".join(map(number, shape)) + b"t"
    return b"(K\1" + shape + kind + b"\x89" + content + b"t"


def array(kind, shape, content=None):
    return EMPTY + state(kind, shape, content or FOUR) + b"b"


def buffer(content, shape=b"K\4\x85", order=b"\x8c\1C"):
    return b"cnumpy.core.numeric\n_frombuffer\n(" + content + BYTE + shape + order + b"tR"


def called(name, *arguments):
    return b"c" + name + b"\n(" + b"".join(arguments) + b"tR"


def nest(levels, start, end):
    """Containers of ten times the same container, `levels` deep."""
    inner = [start + b"h%c" % level * 10 + end + b"q%c" % (level + 1) for level in range(levels)]
    return b"(K\1q\0" + b"".join(inner) + b"l"


FOUR = raw(b"abcd")
EMPTY = called(b"numpy.core.multiarray\n_reconstruct", b"cnumpy\nndarray\nK\0\x85C\1b")
BYTE = dtype(b"u1")
STATE = state(BYTE, (4,), FOUR)
ARRAY = array(BYTE, (4,))
ORDERED = b"ccollections\nOrderedDict\n)R"
SYSTEM = b"cos\nsystem\n"

REFUSED = "which no array needs: refused, nothing was run"
ASKS_FOR_SYSTEM = "the pickle asks for os.system, " + REFUSED
DAMAGED = "not a readable pickle"
CHANGED_TWICE = "changes an object once it is built, " + REFUSED
WRONG_TYPE = "only numbers and strings are read"
TOO_MANY = "too many objects"
TOO_LARGE = "its arrays are larger than the file"

CALLS = {
    "REDUCE": (SYSTEM + string(COMMAND) + b"\x85R", ASKS_FOR_SYSTEM),
    "STACK_GLOBAL": (string(b"os") + string(b"system") + b"\x93" + string(COMMAND) + b"\x85R", ASKS_FOR_SYSTEM),
    "INST": (b"(" + string(COMMAND) + b"ios\nsystem\n", "holds INST"),
    "OBJ": (b"(cbuiltins\nbytes\nK\5o", "holds OBJ"),
    "OBJ of a command": (b"(" + SYSTEM + string(COMMAND) + b"o", "holds OBJ"),
    "NEWOBJ": (b"cnumpy\nndarray\nK\5\x85\x85\x81", "holds NEWOBJ"),
    "NEWOBJ of a command": (SYSTEM + string(COMMAND) + b"\x85\x81", "holds NEWOBJ"),
    "NEWOBJ_EX": (b"cnumpy\nndarray\nK\5\x85\x85}\x92", "holds NEWOBJ_EX"),
    "EXT1": (b"\x82\xf0" + string(COMMAND) + b"\x85R", "holds EXT1"),
    "EXT2": (b"\x83\xf0\0" + string(COMMAND) + b"\x85R", "holds EXT2"),
    "EXT4": (b"\x84\xf0\0\0\0" + string(COMMAND) + b"\x85R", "holds EXT4"),
    "PERSID": (b"Pos.system\n", "holds PERSID"),
    "BINPERSID": (string(b"x") + b"Q", "holds BINPERSID"),
    "NEXT_BUFFER": (b"\x97", "holds NEXT_BUFFER"),
    "READONLY_BUFFER": (FOUR + b"\x98", "holds READONLY_BUFFER"),
    "a call of a result": (called(b"builtins\nbytes") + b")R", DAMAGED),
    "a call of a string": (string(b"dtype") + string(b"O") + b"\x85R", DAMAGED),
    "a call with a list": (b"cbuiltins\nbytes\n]R", DAMAGED),
    "getattr": (called(b"builtins\ngetattr", ARRAY, string(b"tofile")), "asks for builtins.getattr"),
    "a name with dots": (string(b"numpy") + string(b"dtype.__class__") + b"\x93", "asks for numpy.dtype.__class__"),
    "a name of several lines": (string(b"a\nb\r") + string(b"\x1b[2J\nc") + b"\x93", "asks for a?b?.??2J?c,"),
    "a name that is an array": (ARRAY + string(b"dtype") + b"\x93", DAMAGED),
    "a name of a megabyte": (b"c" + b"a" * 2**20 + b"\nb\n", DAMAGED),
    "a line that hides opcodes": (b"c" + b"a" * 1500 + b"\n" + string(b"\n2222" + SYSTEM), DAMAGED),
    "a call of bytes for 2 gigabytes": (buffer(called(b"builtins\nbytes", number(2**31 - 1))), DAMAGED),
    "bytes in another coding": (buffer(called(b"_codecs\nencode", string(b"abcd"), string(b"zip"))), DAMAGED),
    "a call of the array class": (called(b"numpy\nndarray", b"K\2\x85", dtype(b"O"), raw(b"A" * 16)), ""),
}

ARRAYS = {
    "an array built twice": (EMPTY + STATE + b"b" + STATE + b"b", CHANGED_TWICE),
    "an array built under a view": (b"(" + ARRAY + b"q\1" + buffer(b"h\1") + b"h\1" + STATE + b"bl", CHANGED_TWICE),
    "a type built twice": (array(BYTE + b"(K\3\x8c\1|NNNK\0K\0K\0tb", (4,)), CHANGED_TWICE),
    "a list built": (b"]}b", DAMAGED),
    "an ordered dict built": (ORDERED + b"}b", CHANGED_TWICE),
    "a name built": (b"cnumpy\nndarray\n}b", CHANGED_TWICE),
    "SETITEMS on an array": (ARRAY + b"(K\0K\1u", DAMAGED),
    "APPEND to an array": (ARRAY + b"K\1a", DAMAGED),
    "a view of an array": (buffer(ARRAY), DAMAGED),
    "a view of a view": (buffer(buffer(FOUR)), DAMAGED),
    "a view of a list": (buffer(b"]"), DAMAGED),
    "a view beyond the end": (buffer(FOUR, shape=b"K\5\x85"), DAMAGED),
    "a view without an order": (buffer(FOUR, order=b"N"), DAMAGED),
    "a scalar of pointers": (called(b"numpy.core.multiarray\nscalar", dtype(b"O8"), raw(b"A" * 8)), WRONG_TYPE),
    "pointers": (array(dtype(b"O8"), (2,), raw(b"A" * 16)), WRONG_TYPE),
    "fields": (array(dtype(b"V8", b"N(\x8c\1at}K\x08K\1K\0"), (2,), raw(b"A" * 16)), WRONG_TYPE),
    "forged flags": (array(dtype(b"V8", b"NNNK\x08K\1K\x3f"), (2,), raw(b"A" * 16)), WRONG_TYPE),
    "dates": (array(dtype(b"M8"), (2,), raw(b"A" * 16)), WRONG_TYPE),
    "long doubles": (array(dtype(b"f16"), (1,), raw(b"A" * 16)), "no long doubles"),
    "a type of a gigabyte": (array(dtype(b"V999999999"), (1,)), WRONG_TYPE),
    "a type that is an array": (array(ARRAY, (4,)), WRONG_TYPE),
    "a type that is a list": (array(b"]", (4,)), DAMAGED),
    "a type of no known order": (array(dtype(b"u1").replace(b"|", b"x"), (4,)), WRONG_TYPE),
    "a shape beyond the bytes": (array(dtype(b"f8"), (10**9,)), DAMAGED),
    "a shape that overflows": (array(BYTE, (2**32, 2**32, 4)), DAMAGED),
    "a shape below 0": (array(BYTE, (-2, -2)), DAMAGED),
    "a shape of nothing, widely": (array(BYTE, (0, 2**60), raw(b"")), ""),
    "a shape of many axes": (array(BYTE, b"(" + number(2**40) * 300_000 + b"t"), DAMAGED),
    "a shape of long numbers": (array(BYTE, b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 10**4 + b"t"), DAMAGED),
    "a shape of lists": (array(BYTE, b"(]t"), DAMAGED),
    "a shape that is a list": (array(BYTE, b"(K\4l"), DAMAGED),
    "an array that is never built": (EMPTY, DAMAGED),
    "an array that is its state": (EMPTY + b"q\1h\1b", DAMAGED),
    "an array of its own bytes": (EMPTY + b"q\1" + state(BYTE, (4,), b"h\1") + b"b", DAMAGED),
    "an array of a list": (array(BYTE, (4,), b"]"), DAMAGED),
    "characters that are no bytes": (
        buffer(called(b"_codecs\nencode", string(b"\xe2\x82\xac" * 4), string(b"latin1"))), DAMAGED),
}  # fmt: skip

HEADERS = {
    "BINBYTES": (b"B\xff\xff\xff\xff", DAMAGED),
    "BINBYTES8": (b"\x8e" + (2**60).to_bytes(8, "little"), DAMAGED),
    "BYTEARRAY8": (b"\x96" + (2**63 - 1).to_bytes(8, "little"), DAMAGED),
    "BINUNICODE8": (b"\x8d" + (2**64 - 1).to_bytes(8, "little"), DAMAGED),
    "BINSTRING below 0": (b"T\xff\xff\xff\xff", DAMAGED),
    "LONG4": (b"\x8b\xff\xff\xff\x7f", "holds LONG4"),
    "LONG4 below 0": (b"\x8b\xff\xff\xff\xff", "holds LONG4"),
    "INT of a million digits": (b"I" + b"9" * 10**6 + b"\n", DAMAGED),
    "LONG of a million digits": (b"L" + b"9" * 10**6 + b"L\n", DAMAGED),
    "FLOAT of a million digits": (b"F" + b"9" * 10**6 + b"\n", DAMAGED),
    "INT in another base": (b"I0x10\n", ""),
    "STRING without an end": (b"S'" + b"a" * 10**6, DAMAGED),
    "STRING without quotes": (buffer(b"Sabcd\n"), DAMAGED),
    "LONG_BINPUT far away": (b"K\1r\xff\xff\xff\xff", ""),
    "PUT far away": (b"K\1p" + b"9" * 100 + b"\n", ""),
    "LONG_BINGET of nothing": (b"j\xff\xff\xff\xff", DAMAGED),
    "many memo entries": (b"K\1" + b"\x94" * 2_100_000, TOO_MANY),
    "many dicts": (b"(" + b"}" * 50_000 + b"l", TOO_MANY),
    "DUP": (b"K\0" + b"2" * 1000, "holds DUP"),
    "POP": (b"K\0K\0" + b"0", "holds POP"),
    "POP_MARK": (b"(1", "holds POP_MARK"),
    "EMPTY_SET": (b"\x8f(K\1\x90", "holds EMPTY_SET"),
    "FROZENSET": (b"(K\1\x91", "holds FROZENSET"),
    "a code of no pickle": (b"\xff", "no pickle holds the code 255"),
}

CONTAINERS = {
    "a list in itself": (b"]q\1(h\1h\1e", ""),
    "a list in its tuple": (b"]q\1(h\1\x85h\1\x85e", ""),
    "a dict in itself": (b"}q\1K\0h\1s", ""),
    "an ordered dict in itself": (ORDERED + b"q\1K\0h\1s", ""),
    "an ordered dict of numbers": (called(b"collections\nOrderedDict", b"K\5"), ""),
    "an ordered dict of threes": (called(b"collections\nOrderedDict", b"((K\1K\2K\3ll"), ""),
    "an ordered dict many times": (
        b"((" + b"(K\1K\2t" * 1000 + b"lq\1" + called(b"collections\nOrderedDict", b"h\1") * 2000 + b"l", ""),
    "a dict of three": (b"(K\1K\2K\3d", DAMAGED),
    "laughs of lists": (nest(100, b"(", b"l"), ""),
    "laughs of tuples": (nest(100, b"(", b"t"), ""),
    "lists, deep": (b"(" * 50_000 + b"l" * 50_000, ""),
    "tuples, deep": (b")" + b"\x85" * 50_000, ""),
    "dicts, deep": (b"(K\0" * 15_000 + b"}" + b"d" * 15_000, ""),
    "dicts of tuples, deep": (b"}" + b")" + b"\x85" * 50_000 + b"K\0s", ""),
    "calls, deep": (b"c_codecs\nencode\nq\1" + b"h\1" * 50_000 + b")" + b"\x85R" * 50_001, ""),
    "states, deep": ((EMPTY + b"(K\1") * 20_000 + b"N" + b"tb" * 20_000, DAMAGED),
    "a row many times": (b"(" + array(BYTE, (10**4,), raw(bytes(10**4))) + b"q\1" + b"h\1" * 10**5 + b"l", TOO_LARGE),
    "a list many times": (b"((" + b"K\1" * 10**4 + b"lq\1" + b"h\1" * 10**5 + b"l", ""),
    "bytes many times": (b"(" + raw(bytes(10**5)) + b"q\1" + array(BYTE, (10**5,), b"h\1") * 3000 + b"l", ""),
    "characters many times": (
        b"(X" + (10**5).to_bytes(4, "little") + bytes(10**5) + b"q\1"
        + array(BYTE, (10**5,), called(b"_codecs\nencode", b"h\1", string(b"latin1"))) * 3000 + b"l", ""),
}  # fmt: skip

FILES = {  # these are whole files of either kind
    "nothing": (b"", DAMAGED),
    "an end": (b".", DAMAGED),
    "an empty stack": (b"R" * 9 + b".", DAMAGED),
    "no mark": (b"tttt.", DAMAGED),
    "text": (b"not a pickle at all\n", ""),
    "gzip": (gzip.compress(pickle.dumps(bytes(10**8))), "no pickle holds the code 31"),
    "zip": (b"PK\3\4", "holds PERSID"),
    "a list that is its items": (b"](" + b"K\1" * 10 + b"e.", ""),
    "an ordered dict of threes, alone": (called(b"collections\nOrderedDict", b"((K\1K\2K\3ll") + b".", ""),
    "an ordered dict with items, too": (called(b"collections\nOrderedDict", b"((K\0K\1ll") + b"K\1K\1s.", ""),
    "a dict of lists as keys": (b"}(]K\1]K\2u.", ""),
    "keys that collide": (b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(10**5)) + b"u.", ""),
    "keys that are long": (b"}(" + b"".join(number(i + 2**2000) + b"N" for i in range(2000)) + b"u.", ""),
    "keys that are deep": (b"})" + b"\x85" * 50_000 + b"K\0s.", ""),
    "many labels": (b"}(" + b"".join(number(i) + b"K\1" for i in range(10**5)) + b"u.", ""),
    "a mask that shares its bytes": (
        b"}(" + raw(bytes(10**5)) + b"q\1" + b"K\1" + b"".join(
            number(i) + array(BYTE, (10**5,), b"h\1") for i in range(2000)) + b"u.", ""),
    "a name": (b"cnumpy\nndarray\n.", ""),
    "an array": (ARRAY + b".", ""),
}  # fmt: skip


def as_features(value):
    """A features_zero.pickle whose gallery features are `value`."""
    return b"\x80\4(" + value + b"NNNl."


def as_mask(value):
    """A cid_mask.pickle whose vector of class 0 is `value`."""
    return b"\x80\4}(K\0" + value + b"K\1Nu."


TABLES = CALLS, ARRAYS, HEADERS, CONTAINERS, FILES
EXPECTED_ERRORS = {name: message for table in TABLES for name, (_, message) in table.items()}


def write_malicious_files(folder):
    """Write <name>/features_zero.pickle and <name>/cid_mask.pickle of every construction here."""
    for table in TABLES:
        for name, (value, _) in table.items():
            (folder / name).mkdir()
            for kind, whole in (("features_zero", as_features), ("cid_mask", as_mask)):
                (folder / name / f"{kind}.pickle").write_bytes(value if table is FILES else whole(value))
