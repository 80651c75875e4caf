"""Exported students: read by the loaders of others, and computing what PyTorch computes."""

import hashlib
import json
import sys

import numpy as np
import onnx
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from models import export
from models.checkpoints import load_student, read_checkpoint, save_checkpoint
from models.export import EXPORT_FORMAT
from models.networks import Student, create_backbone
from models.torch_files import read_torch
from models.weights import create_pair, load_published, published_state
from utils.cli import InputError
from utils.files import sha256_of

OPTIONS = {"model": "convnextv2_atto", "input_size": 40, "imagenet_classes": 7}
CLASSES = ["alarm clock", "bell", 'a "cow"', "Éclair"]


def backbone_of(model):
    if not model.startswith("vit_"):
        return create_backbone(model, 7)
    return timm.create_model(model, num_classes=7, depth=2)


def new_student(model):
    torch.manual_seed(0)
    student = Student(backbone_of(model), len(CLASSES)).eval()
    for layer in student.modules():
        if getattr(layer, "running_mean", None) is not None:  # as those of a trained network
            layer.running_mean.normal_(0, 0.1), layer.running_var.uniform_(0.5, 2)
    return student


@pytest.fixture(scope="module")
def student():
    return new_student("convnextv2_atto")


@pytest.fixture
def checkpoint(student, tmp_path):
    save_checkpoint(tmp_path / "c.pth.tar", student, options=OPTIONS, classes=CLASSES)
    return tmp_path / "c.pth.tar"


def run(*arguments):
    return export.main([str(argument) for argument in arguments])


def expected(student, images):
    """Features as one writes them down: pixels to [0, 1], timm's statistics, length 1."""
    known = student.backbone.pretrained_cfg
    mean, std = (np.array(known[name], np.float64).reshape(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        pooled = student.backbone.forward_features(torch.from_numpy(((images / 255 - mean) / std).astype(np.float32)))
        pooled = student.backbone.forward_head(pooled, pre_logits=True)
    if student.needs_norm:
        pooled = (pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return F.normalize(pooled).numpy()


@pytest.mark.parametrize(("model", "size"), [("convnextv2_atto", 40), ("vit_tiny_patch16_224", 224), ("resnet10t", 40)])
def test_onnx_features_are_those_of_pytorch(model, size):
    student = new_student(model)
    facts = {"checkpoint": "c.pth.tar", "sha256": "ab" * 32, "imagenet_classes": 7, "input_size": size, "model": model}
    facts["width"] = student.width
    data = export.onnx_bytes(student, facts, export.export_metadata(student, facts))
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    assert b"site-packages" not in data and b"networks.py" not in data  # nothing of this machine
    session = export.onnx_session(data)
    random = np.random.default_rng(0)
    for count in (1, 2, 7):
        images = random.integers(0, 256, (count, 3, size, size), np.uint8)
        (features,) = session.run(None, {"images": images})
        assert features.dtype == np.float32 and features.shape == (count, student.width)
        np.testing.assert_allclose(features, expected(student, images), rtol=0, atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    content = data[: int(metadata.pop("content_bytes"))]
    assert metadata.pop("content_sha256") == hashlib.sha256(content).hexdigest() and len(data) - len(content) < 200
    assert metadata == {
        "format": "sbka student 1", "model": model, "imagenet_classes": "7", "input_size": str(size),
        "width": str(student.width), "sha256": "ab" * 32, "seen_classes": "4", "torch": torch.__version__,
    }  # fmt: skip


def test_safetensors_hold_the_weights_and_what_they_are(student, checkpoint, tmp_path, capsys):
    path = run(checkpoint, "--to", tmp_path / "new" / "s.safetensors")
    assert capsys.readouterr().out == f"{path}: convnextv2_atto at 40 × 40, features of 320 values\n"
    with safe_open(path, "numpy") as file:
        metadata, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = published_state(student)
    assert held.keys() == state.keys() and {"head.weight", "linear.weight", "norm.bias"} < held.keys()
    assert all(np.array_equal(value, state[name].numpy()) for name, value in held.items())
    assert json.loads(metadata["classes"]) == CLASSES and metadata["sha256"] == sha256_of(checkpoint)
    assert metadata["seen_classes"] == "4" and metadata["width"] == "320"
    again, facts, classes = load_student(path)
    assert (facts["model"], facts["input_size"], facts["imagenet_classes"]) == ("convnextv2_atto", 40, 7)
    assert classes == CLASSES
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 40, 40), np.uint8)
    np.testing.assert_array_equal(expected(again, images), expected(student, images))
    for network in create_pair("convnextv2_atto", 9, str(path), 7):  # --finetune
        assert all(torch.equal(value, state[name]) for name, value in published_state(network.backbone).items())


def test_half_precision_files_take_half_the_space_and_give_the_same_features(student, checkpoint, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 40, 40), np.uint8)
    for suffix in (".onnx", ".safetensors"):
        whole, half = tmp_path / f"whole{suffix}", tmp_path / f"half{suffix}"
        run(checkpoint, "--to", whole)
        run(checkpoint, "--half", "--to", half)
        assert half.stat().st_size < 0.6 * whole.stat().st_size
    again, _, _ = load_student(tmp_path / "half.safetensors")
    assert all(value.dtype == torch.float32 for value in again.parameters())
    np.testing.assert_allclose(expected(again, images), expected(student, images), rtol=0, atol=1e-3)
    (features,) = export.onnx_session(str(tmp_path / "half.onnx")).run(["features"], {"images": images})
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected(again, images), rtol=0, atol=1e-4)


def test_a_student_without_its_imagenet_head_has_the_same_features(student, checkpoint, tmp_path):
    path = run(checkpoint, "--no_head", "--to", tmp_path / "s.safetensors")
    with safe_open(path, "numpy") as file:
        assert set(published_state(student)) - set(file.keys()) == {"head.weight", "head.bias"}
    again, _, _ = load_student(path)
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 40, 40), np.uint8)
    np.testing.assert_array_equal(expected(again, images), expected(student, images))
    with pytest.raises(InputError, match=r"s\.safetensors: has no ImageNet head, which training needs"):
        create_pair("convnextv2_atto", 9, str(path), 7)
    state = read_checkpoint(path)["state_dict"]
    del state["norm.bias"]
    with pytest.raises(InputError, match=r"s: holds another network, without head\.bias and 2 more"):
        load_published(again, state, "s")


META = {"model": "m", "input_size": "40", "imagenet_classes": "7", "width": "3", "sha256": "ab" * 32}


@pytest.mark.parametrize("metadata", [
    None, META, META | {"format": EXPORT_FORMAT, "input_size": "x"}, META | {"format": EXPORT_FORMAT, "classes": "["},
    {"format": EXPORT_FORMAT, "model": "m", "input_size": "40"},
])  # fmt: skip
def test_safetensors_of_others_are_bare_weights(metadata, tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "s.safetensors", metadata)
    assert read_checkpoint(tmp_path / "s.safetensors").keys() == {"state_dict"}


@pytest.mark.parametrize("classes", [None, CLASSES[:3], [*CLASSES[:3], 5], "abcd"])
def test_class_names_are_exported_only_if_there_is_one_for_each_class(classes, student, tmp_path):
    save_checkpoint(tmp_path / "c.pth.tar", student, options=OPTIONS, classes=classes)
    metadata = export.export_metadata(*load_student(tmp_path / "c.pth.tar"))
    assert "classes" not in metadata and metadata["seen_classes"] == "4"


@pytest.mark.parametrize(("arguments", "message"), [
    ("none --to s.onnx", "none: no such file"),
    ("text --to s.onnx", "text: refused, it is torn or no torch file"),
    ("torn --to s.onnx", "torn: "),
    ("weights.pt --to s.onnx", "weights.pt: holds no classifier of seen classes"),
    ("c.pth.tar --to s.pt", "--to: 's.pt' ends neither in .onnx nor in .safetensors"),
    ("c.pth.tar", "required: --to"),
    ("c.pth.tar --to s.onnx --model resnet10t", "c.pth.tar was trained with convnextv2_atto; leave --model out"),
    ("c.pth.tar --to s.onnx --model resnet5", "--model resnet5: c.pth.tar was trained with convnextv2_atto; leave"),
    ("c.pth.tar --to s.onnx --imagenet_classes 9", "was trained with 7; leave --imagenet_classes out"),
    ("c.pth.tar --to s.onnx --input_size 7", "argument --input_size"),
    ("c.pth.tar --to text/s.safetensors", "--to text/s.safetensors: cannot be written"),
])  # fmt: skip
def test_what_cannot_be_exported_ends_in_one_line(arguments, message, checkpoint, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "torn").write_bytes(checkpoint.read_bytes()[:9000])
    torch.save({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "weights.pt")
    assert message in fails(export.main, *arguments.split())
    assert not [path for path in tmp_path.iterdir() if "s.onnx" in path.name or "s.safetensors" in path.name]


def another_network(student, images):
    """An ONNX model of one feature, the mean of the pixels."""
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["images"], ["a"], to=kinds.FLOAT), helper.make_node("Flatten", ["a"], ["b"]),
        helper.make_node("ReduceMean", ["b"], ["features"], axes=[1]),
    ]  # fmt: skip
    given = helper.make_tensor_value_info("images", kinds.UINT8, ["n", *images.shape[1:]])
    made = helper.make_tensor_value_info("features", kinds.FLOAT, ["n", 1])
    graph = helper.make_graph(nodes, "mean", [given], [made])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def refuse(*_, **__):
    raise RuntimeError("an operator that ONNX lacks. More of it\nand more")


@pytest.mark.parametrize(("patch", "expected"), [
    (("torch.onnx.export", refuse), "cannot be written as ONNX (an operator that ONNX lacks); use --to"),
    (("models.export._traced", another_network), "its ONNX features differ by"),
    (("models.export.MAX_ONNX_BYTES", 10**6), "too large for an ONNX file, which holds 2 GiB; use --to FILE"),
])  # fmt: skip
def test_a_network_that_onnx_cannot_hold_is_refused(patch, expected, checkpoint, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(*patch)
    message = fails(export.main, checkpoint, "--to", tmp_path / "s.onnx")
    assert f"{checkpoint}: " in message and expected in message
    assert not list(tmp_path.glob("*s.onnx*"))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(package, checkpoint, tmp_path, monkeypatch, fails):
    monkeypatch.setitem(sys.modules, package, None)
    message = fails(export.main, checkpoint, "--to", tmp_path / "s.onnx")
    assert f"needs {package}; pip install -r requirements-onnx.txt" in message


def test_only_files_of_this_command_are_replaced(checkpoint, tmp_path, fails):
    (tmp_path / "other.onnx").write_bytes(b"weights of another program" * 9999)
    (tmp_path / "link.safetensors").symlink_to("other.onnx")
    for name in ("other.onnx", "link.safetensors"):
        told = fails(export.main, checkpoint, "--to", tmp_path / name)
        assert f"--to {tmp_path / name}: holds something that this command did not write" in told
    for _ in range(2):
        run(checkpoint, "--to", tmp_path / "s.safetensors")


def test_a_safetensors_file_with_a_flipped_bit_is_refused(checkpoint, tmp_path):
    path = run(checkpoint, "--to", tmp_path / "s.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged, its SHA-256 is another one; export it again"):
        read_torch(path)
