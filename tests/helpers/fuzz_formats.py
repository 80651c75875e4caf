"""Damages .safetensors and .onnx files by the fields of their formats, so that readers get past the first check."""

import contextlib
import hashlib
import json
import struct

from models.export import CONTENT_BYTES, CONTENT_SHA256, HEADER_SHA256, _with_digest, header_sha256

ODD_NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63))
ODD_TEXTS = (
    "", "x", "0", "-1", "33", "1e9", "inf", "nan", "9" * 5000, "\0", "a\nb", "\x1b[2J", "\u202e", "é" * 300, "../../x",
    "/etc/passwd", "/dev/zero", "module.x", "linear.weight", "resnet18", "hf-hub:a/b", "local-dir:/tmp", "[" * 500,
    "null", "[1]", '["a", "b"]', "sbka student 2",
)  # fmt: skip
DTYPES = (
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "I64", "I32", "I16", "I8", "U64", "U32", "U16",
    "U8", "BOOL", "C64", "x", "",
)  # fmt: skip
NOT_FINITE = struct.pack("<f", float("nan")), struct.pack("<f", float("-inf")), b"\0" * 4, struct.pack("<f", 3e38)


def damage_safetensors(rng, content, signed):
    """A .safetensors file (bytes) with changes of its header, its values or its lengths; signed: with new digests."""
    length = int.from_bytes(content[:8], "little")
    header, values = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change = rng.choice((_tensor, _tensor, _two_tensors, _metadata, _metadata, _value, _names))
        change(rng, header, values)
    if rng.random() < 0.5:
        values = _packed(header, values)
    if signed:
        _sign(header, values)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    text += b" " * rng.choice((0, 0, -len(text) % 8, 3))
    length = rng.choice([len(text)] * 200 + [len(text) + rng.choice((-8, -1, 1, 8)), *ODD_NUMBERS[:12]])
    end = rng.choice([len(values)] * 40 + [rng.randrange(len(values) + 1), len(values) + 5])
    return (length % 2**64).to_bytes(8, "little") + text + bytes(values[:end]) + bytes(max(0, end - len(values)))


def _packed(header, values):
    """Values one after the other as the entries of a header have them, without holes, which readers refuse."""
    packed = bytearray()
    for name in _names_of(header):
        with contextlib.suppress(TypeError, ValueError, KeyError):
            start, end = header[name]["data_offsets"]
            part = values[start:end]
            header[name]["data_offsets"] = [len(packed), len(packed) + len(part)]
            packed += part
    return packed


def _sign(header, values):
    """Renew the digests among the metadata of a header, as one would who means to deceive."""
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and CONTENT_SHA256 in metadata:
        metadata[CONTENT_SHA256] = hashlib.sha256(bytes(values)).hexdigest()
        metadata[HEADER_SHA256] = header_sha256(header)


def _names_of(header):
    return [name for name, entry in header.items() if isinstance(entry, dict) and "data_offsets" in entry]


def _tensor(rng, header, values):
    """Change a field of one tensor."""
    if not (names := _names_of(header)):
        return
    entry = header[rng.choice(names)]
    field = rng.choice(("dtype", "shape", "shape") * 4 + ("data_offsets", "add", "drop"))
    if field == "dtype":
        entry["dtype"] = rng.choice((*DTYPES, *("I32", "U32", "F32") * 10))  # often of the same width
    elif field == "shape" and isinstance(entry.get("shape"), list):
        shape = entry["shape"]
        odd = [1], [0], [], [2**40, 2**40], [rng.choice(ODD_NUMBERS)], [0.5], None, "x", [*shape, 0]
        same_size = [*shape, 1], [1, *shape], shape[::-1], [1] * 70 + shape, shape[1:] + shape[:1]
        entry["shape"] = rng.choice(odd if rng.random() < 0.2 else same_size)
    elif field == "data_offsets" and isinstance(entry.get("data_offsets"), list):
        start, end = (*entry["data_offsets"], 0, 0)[:2]
        by = rng.choice((1, 4, -4, len(values)))
        entry["data_offsets"] = rng.choice(
            ([start + by, end + by], [start, end + by], [end, start], [0, len(values)], [start], [start, start], None)
        )
    elif field == "add":
        entry[rng.choice(("x", "strides", "shape"))] = rng.choice((*ODD_NUMBERS, *ODD_TEXTS, [[[[]]]]))
    elif field == "drop":
        entry.pop(rng.choice(list(entry) or ["x"]), None)


def _two_tensors(rng, header, values):
    """Exchange what two tensors have, or their names."""
    if len(names := _names_of(header)) < 2:
        return
    one, two = rng.sample(names, 2)
    same = [name for name in names if name != one and header[name].get("shape") == header[one].get("shape")]
    if same and rng.random() < 0.9:
        two = rng.choice(same)  # both still fit
    field = rng.choice(("data_offsets", "data_offsets", "shape", "all"))
    if field == "all":
        header[one], header[two] = header[two], header[one]
    else:
        header[one][field], header[two][field] = header[two].get(field), header[one].get(field)


def _metadata(rng, header, values):
    """Change an entry of the metadata."""
    metadata = header.setdefault("__metadata__", {})
    if not isinstance(metadata, dict) or rng.random() < 0.02:
        header["__metadata__"] = rng.choice((None, [], "x", {}, {"format": "pt"}, {"x": 1}))
        return
    name = rng.choice(list(metadata) or ["x"])
    change = rng.choice(("text", "text", "text", "drop", "drop", "digit", "digit", "add", "kind"))
    if change == "text":
        metadata[name] = rng.choice((*ODD_TEXTS, *(str(number) for number in ODD_NUMBERS)))
    elif change == "drop":
        metadata.pop(name, None)
    elif change == "digit" and isinstance(metadata.get(name), str) and metadata[name]:
        at = rng.randrange(len(metadata[name]))
        metadata[name] = metadata[name][:at] + chr(ord(metadata[name][at]) ^ 1) + metadata[name][at + 1 :]
    elif change == "kind":
        metadata[name] = rng.choice((1, None, [], {}))
    else:
        metadata[rng.choice(ODD_TEXTS)] = metadata.get(name, "")


def _value(rng, header, values):
    """Change values of tensors."""
    if values:
        at = rng.randrange(len(values)) // 4 * 4
        values[at : at + 4] = rng.choice((*NOT_FINITE, rng.randbytes(4)))
        del values[len(values) // 4 * 4 :]


def _names(rng, header, values):
    """Rename, leave out, double or add tensors, or write all names with a prefix."""
    if not (names := _names_of(header)):
        return
    name = rng.choice(names)
    change = rng.randrange(5)
    if change == 0:
        header[rng.choice(ODD_TEXTS)] = header.pop(name)
    elif change == 1:
        header.pop(name)
    elif change == 2:
        header[rng.choice((name + ".x", f"module.{name}", f"added_head.{name}", "__metadata__"))] = header[name]
    elif change == 3:
        shape = rng.choice(([], [0], [0, 2**40]))
        dtype, end = rng.choice(DTYPES), len(values)
        header[rng.choice((name, "x", "linear.weight"))] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end]}
    else:
        prefix = rng.choice(("module.", "_orig_mod.module.", "x."))
        for each in names:
            header[prefix + each] = header.pop(each)


def damage_onnx(rng, content, signed):
    """A .onnx file (bytes) with changes of fields of its message; signed: with a new digest."""
    import onnx

    model = onnx.ModelProto()
    model.ParseFromString(content)
    if signed or rng.random() < 0.5:
        entries = [entry for entry in model.metadata_props if entry.key not in (CONTENT_BYTES, CONTENT_SHA256)]
        del model.metadata_props[:]
        model.metadata_props.extend(entries)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change = rng.choice((_field, _field, _values, _operator, _external, _message, _input))
        with contextlib.suppress(ValueError, TypeError, UnicodeError):  # no value of this field
            change(rng, model)
    data = model.SerializeToString()
    return _with_digest(data) if signed else data


def _messages(message, depth=0):
    """A protobuf message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None and depth < 12:
            for each in value if _is_list(message, field) else [value]:
                yield from _messages(each, depth + 1)


def _is_list(message, field):
    value = getattr(message, field.name)
    return hasattr(value, "__len__") and not isinstance(value, str | bytes)


def _field(rng, model):
    """Change one field of any message; a small message as likely as a large one."""
    message = rng.choice(list(_messages(model)))
    if not (fields := message.ListFields() if rng.random() < 0.8 else []):
        fields = [(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields]
    field, value = rng.choice(fields)
    if _is_list(message, field):
        values = getattr(message, field.name)
        change = rng.randrange(4)
        if change == 0 and len(values):
            del values[rng.randrange(len(values))]
        elif change == 1 and len(values) and field.message_type is None:
            values[rng.randrange(len(values))] = _odd(rng, model, field, values[0])
        elif change == 2 and field.message_type is None:
            values.append(_odd(rng, model, field, None))
        elif change == 3 and len(values):
            values.extend([rng.choice(values)] * rng.choice((1, 1, 70)))
        elif field.message_type is not None:
            values.add()
    elif field.message_type is not None or rng.random() < 0.1:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _odd(rng, model, field, value))


def _odd(rng, model, field, value):
    """An odd value for a protobuf field that is no message."""
    if field.type in (field.TYPE_STRING, field.TYPE_BYTES):
        used = [text for node in model.graph.node for text in (*node.input, *node.output, node.op_type, node.name)]
        text = rng.choice((*used, *ODD_TEXTS)) if rng.random() < 0.7 or not value else value
        if field.type == field.TYPE_STRING:
            return text if isinstance(text, str) else ""
        data = bytearray(value or b"") or bytearray(rng.randbytes(4))
        for _ in range(rng.choice((1, 1, 4))):
            data[rng.randrange(len(data))] = rng.choice((0, 127, 255, rng.randrange(256)))
        return bytes(data) if rng.random() < 0.7 else bytes(data[: rng.randrange(len(data))])
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    if field.type == field.TYPE_ENUM:
        return rng.choice(range(25))
    small = rng.choice((*ODD_NUMBERS, *range(-2, 25)))
    return small if rng.random() < 0.8 or not isinstance(value, int) else value + rng.choice((-1, 1))


def _values(rng, model):
    """Change numbers of a tensor: weights, or the shapes and axes that operators take."""
    tensor = rng.choice(list(model.graph.initializer) or [None])
    if tensor is None or not (data := bytearray(tensor.raw_data)):
        return
    width = 8 if tensor.data_type == 7 else 4
    at = rng.randrange(len(data)) // width * width
    number = rng.choice((*ODD_NUMBERS, 4, 64, -2)) % 256**width
    data[at : at + width] = (
        number.to_bytes(width, "little") if width == 8 else rng.choice((*NOT_FINITE, rng.randbytes(4)))
    )
    tensor.raw_data = bytes(data)


def _operator(rng, model):
    """Give a node another operator, or put a node of one in."""
    import onnx

    names = sorted({(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas()})
    more = ("FusedConv", "FusedMatMul", "MatMulNBits", "QAttention", "BiasGelu", "Inverse", "BeamSearch", "Sampling")
    domain, name = rng.choice((*names, *(("com.microsoft", each) for each in more)))
    if not model.graph.node:
        return
    node = rng.choice(model.graph.node)
    if rng.random() < 0.4:
        at = rng.randrange(len(model.graph.node))
        result = f"new{at}"
        count = rng.randrange(4)
        texts = [text for each in model.graph.node for text in (*each.input, *each.output)]
        new = onnx.helper.make_node(name, [rng.choice(texts) for _ in range(count)], [result], domain=domain)
        model.graph.node.insert(at, new)
        if node.input:
            node.input[0] = result
    else:
        node.op_type, node.domain = name, domain
    if domain and not any(entry.domain == domain for entry in model.opset_import):
        model.opset_import.add(domain=domain, version=1)


def _external(rng, model):
    """Say that the values of a tensor are in another file."""
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    if rng.random() < 0.7:
        tensor.ClearField("raw_data")
    tensor.data_location = 1
    places = ("mutant.onnx", "missing", "/etc/passwd", "/dev/zero", "../../../etc/passwd", "", ".", "\0", "fifo")
    for key, value in (("location", rng.choice(places)), ("offset", rng.choice(ODD_NUMBERS)),
                       ("length", rng.choice(ODD_NUMBERS))):  # fmt: skip
        if key == "location" or rng.random() < 0.6:
            tensor.external_data.add(key=key, value=str(value))


def _message(rng, model):
    """Exchange two messages of one kind, or their order in a list."""
    messages = list(_messages(model))
    one = rng.choice(messages)
    same = [each for each in messages if each.DESCRIPTOR is one.DESCRIPTOR and each is not one]
    if same:
        two, copy = rng.choice(same), type(one)()
        copy.CopyFrom(two)
        one.CopyFrom(copy)


def _input(rng, model):
    """Make an initializer an input as well, an output another value, or rename what a graph takes or gives."""
    graph = model.graph
    change = rng.randrange(3)
    if change == 0 and graph.initializer:
        graph.input.add(name=rng.choice(graph.initializer).name)
    elif graph.node and graph.output:
        texts = [text for node in graph.node for text in (*node.input, *node.output)]
        (rng.choice(graph.output) if change == 1 else rng.choice(graph.input or graph.output)).name = rng.choice(texts)
