"""The photo search without PyTorch: the same features and photos, from a file that tells what it is."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from albums import write_photo
from PIL import Image, ImageDraw

import search_photos
from models import export
from models.checkpoints import save_checkpoint
from models.export import onnx_session
from models.networks import Student, create_backbone
from photo_search.encoder import STARTER, _run, load_encoder
from photo_search.index import open_index
from utils.cli import InputError
from utils.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"model": "convnextv2_atto", "input_size": 32, "imagenet_classes": 1000}
CLASSES = ["bell", "cow", "Ähre"]
# Runs a command of search_photos.py where torch cannot be imported.
WITHOUT_TORCH = """
import os
import sys

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "torch":
            raise ImportError("there is no torch")

sys.meta_path.insert(0, Refuse())
import search_photos
try:
    search_photos.main(sys.argv[1:])
finally:
    if "torch" in sys.modules:
        os._exit(9)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, the same exported, photos, a sketch and an index of either backend."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    student = Student(create_backbone("convnextv2_atto"), 3)
    save_checkpoint(folder / "c.pth.tar", student, options=OPTIONS, classes=CLASSES)
    export.main([str(folder / "c.pth.tar"), "--to", str(folder / "s.onnx")])
    for number in range(12):
        write_photo(folder / f"album/{number}.png", number)
    (folder / "album/torn.png").write_text("no image")
    image = Image.new("RGB", (80, 80), "white")
    ImageDraw.Draw(image).line([(10, 10), (70, 40), (20, 70)], fill="black", width=3)
    image.save(folder / "sketch.png")
    own = ["--clusters", "2", "--batch_size", "5"]
    run("index", folder / "album", "--index", folder / "torch", "--checkpoint", folder / "c.pth.tar", *own)
    without_torch(
        "index", folder / "album", "--index", folder / "onnx", "--checkpoint", folder / "s.onnx", *own, "--workers", 2
    )
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("photo_search.cli.draw_found", lambda *_: None)
    for name in ("torch", "onnx"):
        shutil.copytree(place / name, name)
    for name in ("c.pth.tar", "s.onnx", "sketch.png", "album"):
        (tmp_path / name).symlink_to(place / name)


def run(*arguments):
    return search_photos.main([str(argument) for argument in arguments])


def without_torch(*arguments):
    with started_without_torch(*arguments) as process:
        assert process.wait() == 0


def started_without_torch(*arguments):
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments), "--backend", "onnx"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def features_of(folder):
    index = open_index(folder)
    return {index.path(row): index.cells.features[row] for row in range(len(index))}


def found_with(index, *options):
    """{photo: distance} of the sketch."""
    found = run("find", "sketch.png", "--index", index, "--matching", "one-to-one", *options)[0]["found"]
    return {photo["photo"]: photo["distance"] for photo in found}


def test_both_backends_make_the_same_index_and_find_the_same(place):
    torch_rows, onnx_rows = features_of("torch"), features_of("onnx")
    assert list(map(str, sorted((place / "album").glob("[0-9]*")))) == sorted(torch_rows) == sorted(onnx_rows)
    assert max(np.abs(row - onnx_rows[path]).max() for path, row in torch_rows.items()) < 1e-4
    one, other = open_index("torch").metadata, open_index("onnx").metadata
    same = ("sha256", "model", "imagenet_classes", "input_size", "width")
    assert {name: one[name] for name in same} == {name: other[name] for name in same}
    plain = found_with("torch")
    for index, options in (
        ("onnx", []),
        ("torch", ["--checkpoint", "s.onnx"]),
        ("onnx", ["--checkpoint", "c.pth.tar"]),
    ):
        assert found_with(index, *options) == pytest.approx(plain, abs=1e-4)


def test_find_needs_no_torch(tmp_path):
    before = run("find", "sketch.png", "--index", "onnx", "-k", 5)[0]
    without_torch("find", "sketch.png", "--index", "onnx", "-k", 5, "--json", "found.json", "--picture", "found.png")
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["matching"] == "one-to-many" and len(found["found"]) == 5
    assert [photo["photo"] for photo in found["found"]] == [photo["photo"] for photo in before["found"]]
    for photo, other in zip(found["found"], before["found"], strict=True):
        assert photo["score"] == pytest.approx(other["score"], abs=1e-6)
        assert photo["score"] == pytest.approx(0.2 * photo["cluster_distance"] + 0.8 * photo["distance"], abs=1e-12)


def test_the_page_needs_no_torch():
    plain = found_with("onnx")
    with started_without_torch("page", "--index", "onnx", "--port", 0) as process:
        try:
            port = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())[1]
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
            connection.request("POST", "/find?matching=one-to-one&k=12", Path("sketch.png").read_bytes())
            found = json.loads(connection.getresponse().read())["found"]
            connection.close()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert {photo["path"]: photo["distance"] for photo in found} == pytest.approx(plain, abs=1e-6)


def test_an_index_of_torch_goes_on_with_what_was_exported(place):
    write_photo(Path("more/new.png").absolute(), 50)
    totals = run("index", "album", "more", "--index", "torch", "--checkpoint", "s.onnx", "--refit")
    assert (totals.new, totals.extracted, totals.photos) == (1, 1, 13)
    assert open_index("torch").metadata["checkpoint"].endswith("s.onnx")
    assert len(found_with("torch")) == 13


def test_an_exported_file_tells_what_it_is(place):
    told = export.read_onnx_metadata("s.onnx")
    assert told == {**OPTIONS, "sha256": sha256_of("c.pth.tar"), "width": 320}
    metadata = export.onnx_session("s.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == CLASSES
    assert {name: type(told[name])(metadata[name]) for name in told} == told


def foreign_model():
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    given, made = (helper.make_tensor_value_info(name, kind, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "another", [given], [made])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def failing_model(make, metadata):
    """A model with inputs, outputs and metadata of an exported student, whose nodes make(helper) compute other things.

    It gives ones (n, 320) but for what these nodes do.
    """
    helper, kinds = onnx.helper, onnx.TensorProto
    images = helper.make_tensor_value_info("images", kinds.UINT8, ["n", 3, 32, 32])
    features = helper.make_tensor_value_info("features", kinds.FLOAT, ["n", 320])
    nodes, constants = make(helper)
    initial = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "failing", [images], [features], initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata)
    return model


def repeated(value, shape):
    """A function that makes nodes which give `value` in a shape, whatever the images are."""

    def make(helper):
        node = helper.make_node("Expand", ["value", "shape"], ["features"])
        return [node], {"value": np.float32(value), "shape": np.array(shape)}

    return make


def failing(helper):
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=1),
        helper.make_node("Reshape", ["floats", "shape"], ["features"]),
    ]
    return nodes, {"shape": np.array([7, 320])}


def immense(helper):
    """Four terabytes on the way to ordinary features."""
    nodes = [
        helper.make_node("Expand", ["one", "square"], ["ones"]),
        helper.make_node("ReduceMean", ["ones"], ["mean"], keepdims=0),
        helper.make_node("Expand", ["mean", "shape"], ["features"]),
    ]
    return nodes, {"one": np.float32(1), "square": np.array([1 << 20, 1 << 20]), "shape": np.array([1, 320])}


def slow(helper):
    """Products of matrices, without a loop, that take half a minute; they cannot be computed before the images come."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=1),
        helper.make_node("ReduceMean", ["floats"], ["mean"], keepdims=0),
        helper.make_node("Expand", ["mean", "square"], ["product0"]),
        *(helper.make_node("MatMul", [f"product{i}", "product0"], [f"product{i + 1}"]) for i in range(2000)),
        helper.make_node("ReduceMean", ["product2000"], ["one"], keepdims=0),
        helper.make_node("Expand", ["one", "shape"], ["features"]),
    ]
    return nodes, {"square": np.array([700, 700]), "shape": np.array([1, 320])}


FAILING = {"one_row": repeated(320**-0.5, (3, 320)), "long_rows": repeated(1, (5, 320)), "fails": failing,
           "immense": immense, "slow": slow}  # fmt: skip


@pytest.fixture(scope="module")
def bad_files(place, tmp_path_factory):
    folder, content = tmp_path_factory.mktemp("bad"), (place / "s.onnx").read_bytes()
    onnx.save(foreign_model(), folder / "foreign.onnx")
    stolen, model = foreign_model(), onnx.load_from_string(content)
    metadata = {entry.key: entry.value for entry in model.metadata_props if not entry.key.startswith("content_")}
    onnx.helper.set_model_props(stolen, metadata)
    onnx.save(stolen, folder / "stolen.onnx")
    for name, change in {
        "later": {"format": "sbka student 2"}, "unsized": {"input_size": "large"}, "other": {"sha256": "cd" * 32},
        "small": {"input_size": "48"}, "tiny": {"input_size": "0"}, "giant": {"input_size": "20000"},
        "unchecked": {},
    }.items():  # fmt: skip
        onnx.helper.set_model_props(model, metadata | change)
        onnx.save(model, folder / f"{name}.onnx")
    middle = len(content) // 2  # weights
    for name, damaged in {
        "torn": content[:-2000], "short": content[:3], "zeros": bytes(10**6), "text": b"no network " * 99, "empty": b"",
        "spoilt": content.replace(b"Conv", b"Cunv"), "encoding": content.replace(b"sbka student", b"sbka\xffstudent"),
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "looping": content.replace(b'"\x04Conv', b'"\x04Loop', 1),
    }.items():  # fmt: skip
        (folder / f"{name}.onnx").write_bytes(damaged)
    content = (folder / "unchecked.onnx").read_bytes()  # as earlier versions wrote them
    (folder / "nan.onnx").write_bytes(content[:middle] + b"\xff" * 4000 + content[middle + 4000 :])
    for name, make in FAILING.items():
        onnx.save(failing_model(make, metadata), folder / f"{name}.onnx")
    expanding = failing_model(repeated(1, (1, 320)), metadata)
    double = onnx.helper.make_node("Relu", ["x"], ["y"])
    expanding.functions.append(
        onnx.helper.make_function("own", "double", ["x"], ["y"], [double], expanding.opset_import)
    )
    onnx.save(expanding, folder / "expanding.onnx")
    os.mkfifo(folder / "fifo.onnx")
    (folder / "folder.onnx").mkdir()
    (folder / "s.bin").write_bytes(content)
    return folder


WITHOUT_METADATA = ("torn", "short", "zeros", "text", "empty", "spoilt", "encoding")
NEW = "index album --index new --workers 0 --checkpoint"
FOREIGN = "an ONNX file of another program, or of another version of this one; python -m models.export writes one"
DAMAGED, OTHER = "damaged, or not an ONNX file", "its network is not the one of its metadata"
BAD = [(f"{NEW} {name}.onnx", f"{name}.onnx: {message}") for name, message in [
    ("foreign", FOREIGN), ("later", FOREIGN), ("unsized", "its metadata do not describe a student"),
    ("stolen", OTHER), ("small", OTHER), *((name, DAMAGED) for name in WITHOUT_METADATA),
    ("tiny", "its metadata do not describe"), ("giant", "its metadata do not describe"),
    ("flipped", "damaged, its SHA-256 is another one"), ("looping", "its graph contains Loop, as no exported student"),
    ("expanding", "its graph contains functions, as no exported student"),
    ("immense", "needs more memory than there is"),
    ("fifo", "cannot be read (not a regular file)"), ("fails", "damaged, it fails when it runs ("),
    *((name, "damaged, it does not compute features as its metadata say") for name in ("one_row", "long_rows")),
    ("nan", "its features are not finite"), ("none", "cannot be read (No such file"),
    ("folder", "cannot be read (Is a directory)"),
]]  # fmt: skip
BAD += [
    ("find sketch.png --index torch --checkpoint other.onnx", "not the checkpoint that the index was made with"),
    ("find sketch.png --index torch --checkpoint small.onnx", "exported with input_size 48, while the index has 32"),
    ("find sketch.png --index torch --backend onnx", "--backend onnx: does not compute with"),
    ("page --index torch --backend onnx", "--backend onnx: does not compute with"),
    ("find sketch.png --index onnx --backend torch", "--backend torch: does not compute with"),
    (f"{NEW} s.bin --backend onnx", "--backend onnx: does not compute with s.bin"),
    (
        f"{NEW} s.onnx --device cuda",
        "--device cuda: exported networks compute on the",
    ),
    (
        f"{NEW} s.onnx --model resnet50",
        "was exported with convnextv2_atto; leave",
    ),
    (f"{NEW} s.onnx --input_size 64", "was exported with 32; leave --input_size out"),
    ("index --index onnx --checkpoint other.onnx", "other.onnx: not the checkpoint that the index was made with"),
    ("find sketch.png --index onnx --backend tensorflow", "argument --backend"),
]


def test_a_flipped_byte_of_the_network_that_comes_with_the_project_is_refused(tmp_path):
    content, path = bytearray(STARTER.read_bytes()), tmp_path / "student.onnx"
    for position in (len(content) // 3, len(content) // 2, len(content) - 100_000):
        content[position] ^= 0x7F
        path.write_bytes(content)
        content[position] ^= 0x7F
        with pytest.raises(InputError, match="damaged, its SHA-256 is another one; export it again"):
            export.read_onnx_metadata(path)


@pytest.mark.parametrize(("arguments", "told"), BAD)
def test_bad_input_ends_in_one_line(arguments, told, bad_files, fails):
    for path in bad_files.iterdir():
        Path(path.name).symlink_to(path)
    assert told in fails(search_photos.main, *arguments.split())
    assert not Path("new/index.json").exists()


def test_a_network_that_takes_for_ever_ends_in_one_line(bad_files, fails, monkeypatch):
    monkeypatch.setattr("photo_search.encoder.MAX_SECONDS", 0.5)
    told = fails(search_photos.main, *NEW.split(), bad_files / "slow.onnx")
    assert told.endswith("slow.onnx: does not compute an image within 0.5 seconds; use another checkpoint")


def test_many_images_are_computed_a_few_at_a_time_to_the_same_bits():
    whole = load_encoder(STARTER)
    size = whole.metadata["input_size"]
    images = np.random.default_rng(0).integers(0, 256, (5, 3, size, size), np.uint8)
    session, seen = onnx_session(str(STARTER), 1), []

    class Counting:
        def run(self, names, inputs, options):
            seen.append(len(inputs["images"]))
            return session.run(names, inputs, options)

    rows = _run(Counting(), STARTER, whole.metadata["width"], images)
    assert sum(seen) == 5 and max(seen) == 2
    (expected,) = session.run(["features"], {"images": images})
    assert np.array_equal(rows, expected) and np.array_equal(whole.embed(images), expected)
    assert whole.embed(images[:0]).shape == (0, whole.metadata["width"])


def test_a_missing_onnxruntime_is_named(monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    told = fails(search_photos.main, "find", "sketch.png", "--index", "onnx")
    assert told.endswith("s.onnx: needs onnxruntime; pip install -r requirements-onnx.txt")


def test_every_command_tells_which_backends_there_are(capsys):
    for command in ("index", "find", "page"):
        with pytest.raises(SystemExit):
            run(command, "--help")
        assert "--backend {torch,onnx}" in capsys.readouterr().out
