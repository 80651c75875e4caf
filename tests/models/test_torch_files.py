"""Hostile torch files: each is refused in one line, in a process of its own, within bounds of memory and time."""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoints import load_student
from models.networks import Student
from models.torch_files import read_torch
from models.weights import create_pair, published_state
from utils.cli import InputError

ROOT = Path(__file__).resolve().parents[2]
# Reads each file as the scripts do, and prints what became of it before it goes on.
READ = """
import json, os, re, resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from utils.cli import InputError
from models.checkpoints import load_student, read_checkpoint
from models.networks import Student, create_backbone
from models.weights import create_pair, load_published
with torch.device("meta"):
    student = Student(create_backbone("convnextv2_atto"), 3)
def used():  # kB; what getrusage tells begins with the memory of the process that started this one
    if os.path.exists("/proc/self/status"):
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (used() * 1024 + (12 << 30),) * 2)
for path in sys.argv[2:]:
    try:
        load_published(student, read_checkpoint(path)["state_dict"], path)
        said = "read"
    except InputError as error:
        said = str(error)
    print(json.dumps([path, said]), flush=True)
    assert used() < 3 << 20, (path, used())
"""


def archive(data, storages=(), compression=zipfile.ZIP_STORED):
    """A torch file whose pickle is `data`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as parts:
        parts.writestr("archive/data.pkl", data)
        parts.writestr("archive/byteorder", "little")
        for name, content in storages:
            parts.writestr(f"archive/data/{name}", content)
        parts.writestr("archive/version", "3\n")
    return buffer.getvalue()


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def forged_scalar(code, state, content):
    kind = Calls(np.dtype, code, False, True, state=state)
    return Calls(np.float64(0).__reduce__()[0], kind, content)


def tensor(offset, size, stride, elements=4):
    """A pickle of a state dict with one tensor, whatever its storage holds."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK" + bytes(
        [elements]
    )
    build = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ"
    numbers = pickle.dumps((offset, size, stride), protocol=2)[2:-1]
    place = b"".join(pickle.dumps(part, protocol=2)[2:-1] for part in (offset, size, stride))
    assert numbers
    return (
        b"\x80\x02}X\n\x00\x00\x00state_dict}X\x0b\x00\x00\x00norm.weight"
        + build
        + place
        + (b"\x89ccollections\nOrderedDict\n)RtRss.")
    )


def nested(depth):
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def itself():
    content = []
    content.append(content)
    return content


# States of a dtype: one of objects, one with a field of objects, one that says it has objects, and a plain one.
OF_OBJECTS = (3, "|", None, None, None, -1, -1, 63)
OF_FIELDS = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
SAYS_OBJECTS = (3, "|", None, None, None, 8, 1, 63)
PLAIN = (3, "<", None, None, None, -1, -1, 0)

FILES = {
    "os.system": saved({"state_dict": Calls(__import__("os").system, "touch sprung")}),
    "eval": saved({"state_dict": Calls(eval, "1")}),
    "getattr": saved({"state_dict": Calls(getattr, "a", "upper")}),
    "subprocess": saved({"state_dict": Calls(subprocess.Popen, "touch sprung")}),
    "numpy.load": saved({"state_dict": Calls(np.load, "x")}),
    "numpy.frombuffer": saved({"state_dict": Calls(np.frombuffer, b"12345678")}),
    "an array": saved({"state_dict": {}, "best_acc1": np.ones(3)}),
    "a scalar of objects": saved({"state_dict": {}, "a": forged_scalar("O8", OF_OBJECTS, b"A" * 8)}),
    "a scalar of fields": saved({"state_dict": {}, "a": forged_scalar("V8", OF_FIELDS, b"A" * 8)}),
    "a scalar that says it has objects": saved({"state_dict": {}, "a": forged_scalar("V8", SAYS_OBJECTS, b"A" * 8)}),
    "a scalar too short": saved({"state_dict": {}, "a": forged_scalar("f8", PLAIN, b"A")}),
    "a type with a huge size": saved({"state_dict": {}, "a": Calls(np.dtype, "V2000000000")}),
    "a compressed bomb": archive(b"\x80\x02}X\n\x00\x00\x00state_dictX\x00\x00\x00@" + b"a" * (1 << 26) + b"s.",
                                 compression=zipfile.ZIP_DEFLATED),
    "a compressed storage": archive(tensor(0, (4,), (1,)), [("0", bytes(1 << 26))], zipfile.ZIP_BZIP2),
    "a list that holds itself": saved({"state_dict": itself()}),
    "a state dict of itself": saved(itself()),
    "lists deep within lists": archive(nested(200_000)),
    "a string of 4 GB": archive(b"\x80\x02X\xff\xff\xff\xffabc."),
    "a string of 2^60": archive(b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"abc."),
    "a memo at 2^31": archive(b"\x80\x02]r\xff\xff\xff\x7f."),
    "a number of a million digits": archive(b"\x80\x02\x8b\x00\x00\x10\x00" + b"\xff" * (1 << 20) + b"."),
    "a frame of 2^62": archive(b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"}."),
    "BUILD of a text": archive(b"\x80\x02X\x01\x00\x00\x00a}b."),
    "EXT": archive(b"\x80\x02\x82\x01."),
    "INST": archive(b"(S'touch sprung'\nios\nsystem\n."),
    "OBJ": archive(b"(cos\nsystem\nX\x01\x00\x00\x00ao."),
    "NEWOBJ": archive(b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x85\x81."),
    "STACK_GLOBAL": archive(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01a\x85R."),
    "PERSID": archive(b"Psomething\n."),
    "a foreign persistent id": archive(b"\x80\x02X\x01\x00\x00\x00aQ."),
    "a storage that is not there": archive(tensor(0, (4,), (1,))),
    "a storage too short": archive(tensor(0, (4,), (1,)), [("0", b"12")]),
    "a tensor beyond its storage": archive(tensor(0, (1 << 20,), (1,)), [("0", bytes(16))]),
    "a tensor that begins beyond its storage": archive(tensor(1 << 20, (4,), (1,)), [("0", bytes(16))]),
    "a tensor of 2^40 numbers": archive(tensor(0, (1 << 40,), (1,)), [("0", bytes(16))]),
    "a tensor of 2^60 numbers over one": archive(tensor(0, (1 << 60,), (0,)), [("0", bytes(16))]),
    "a tensor with strides below 0": archive(tensor(0, (4,), (-1,)), [("0", bytes(16))]),
    "a tensor with a size below 0": archive(tensor(0, (-4,), (1,)), [("0", bytes(16))]),
    "a tensor that begins below 0": archive(tensor(-8, (4,), (1,)), [("0", bytes(16))]),
    "a sparse tensor with places beyond it": saved({"state_dict": {"norm.weight": torch.sparse_coo_tensor(
        torch.tensor([[10**9]]), torch.ones(1), (320,), check_invariants=False)}}),
    "a sparse matrix with rows beyond it": saved({"state_dict": {"norm.weight": torch.sparse_csr_tensor(
        torch.tensor([0, 10**9]), torch.tensor([0]), torch.ones(1), (1, 320), check_invariants=False)}}),
    "a quantised tensor": saved({"state_dict": {"norm.weight": torch.quantize_per_tensor(
        torch.ones(320), 0.1, 0, torch.qint8)}}),
    "a module": saved({"state_dict": torch.nn.Linear(1, 1)}),
    "no zip, but its name": b"PK\x03\x04" + bytes(100),
    "a zip without data": archive(b"")[:60],
    "nothing": b"",
    "text": b"hello",
    "a pickle": pickle.dumps({"state_dict": {}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{name of a file: what reading it said}."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = {}
    for number, (name, content) in enumerate(FILES.items()):
        paths[folder / f"{number}.pth.tar"] = name
        (folder / f"{number}.pth.tar").write_bytes(content)
    command = [sys.executable, "-c", READ, str(ROOT), *map(str, paths)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    said = {paths[Path(path)]: line for path, line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, (done.returncode, list(said)[-1:], done.stderr[-500:])
    assert done.stderr == "" and not (folder / "sprung").exists()
    return said


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_in_one_line(answers, name):
    assert ".pth.tar: " in answers[name] and "\n" not in answers[name] and answers[name] != "read"


def test_scalars_of_numpy_become_numbers(tmp_path):
    kinds = ("f2", "f4", "f8", "i4", "i8", "u1", "b1")
    torch.save({kind: np.dtype(kind).type(1) for kind in kinds}, tmp_path / "f")
    assert read_torch(tmp_path / "f") == dict.fromkeys(kinds, 1)


def test_a_tensor_whose_values_are_not_all_in_the_file_is_no_ordinary_one(tmp_path):
    student = create_pair("convnextv2_atto", 3, "none", 5)[0]
    state = published_state(student)
    torch.save({"state_dict": state | {"linear.weight": torch.zeros(1, 1).expand(2_000_000, 320)}}, tmp_path / "a.pt")
    torch.save({"state_dict": state | {"norm.weight": torch.zeros(1).expand(320)}}, tmp_path / "b.pt")
    for name, parameter in (("a.pt", "linear.weight"), ("b.pt", "norm.weight")):
        with pytest.raises(InputError, match=f"{name}: {parameter} is no ordinary tensor; fetch the file again"):
            load_student(tmp_path / name, "convnextv2_atto", 32, 5)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = published_state(create_pair("convnextv2_atto", 3, "none", 5)[0])
    for value in (torch.nan, torch.inf):
        torch.save({"state_dict": state | {"norm.weight": torch.full((320,), value)}}, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"a\.pt: its norm\.weight is not finite; use another checkpoint"):
            load_student(tmp_path / "a.pt", "convnextv2_atto", 32, 5)


@pytest.mark.parametrize("options", [{"imagenet_classes": 10**6}, {"model": "convnextv2_huge"}])
def test_no_memory_is_taken_for_a_network_that_the_file_does_not_hold(tmp_path, options, monkeypatch):
    state = published_state(create_pair("convnextv2_atto", 3, "none", 5)[0])
    recorded = {"model": "convnextv2_atto", "input_size": 32, "imagenet_classes": 5} | options
    torch.save({"state_dict": state, "options": recorded}, tmp_path / "a.pt")
    devices, init = set(), Student.__init__

    def watched(self, backbone, classes):
        devices.update(value.device.type for value in backbone.parameters())
        init(self, backbone, classes)

    monkeypatch.setattr(Student, "__init__", watched)
    with pytest.raises(InputError, match=r"a\.pt: "):
        load_student(tmp_path / "a.pt")
    assert devices == {"meta"}
