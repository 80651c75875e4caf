"""Backbones without an ImageNet head: DINOv2's configuration and CLIP's, through training, resume, test and export."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_vit  # noqa: F401, timm knows its models from here on
from safetensors.torch import load_file
from torch.nn import functional as F

import test_sketchy_ext_zeroshot
import train_sketchy_ext
from models import export
from models.checkpoints import LAST, load_student, read_checkpoint
from models.networks import Student, create_backbone
from models.teacher_head import ClassEmbeddings, read_head
from models.weights import create_student, published_state
from photo_search.encoder import load_encoder

COMMON = "--device cpu --workers 0 --batch_size 3".split()
TRAIN = "--finetune none --epochs 2 --warmup_epochs 0 --max_steps 2 --no_validation".split()


@pytest.fixture
def heads(tmp_path):
    """Files of a linear head and of class embeddings, 1000 classes each, for tiny_dinov2 and for tiny_clip."""
    rng = np.random.default_rng(0)
    files = {"tiny_dinov2": tmp_path / "linear.npz", "tiny_clip": tmp_path / "texts.npz"}
    np.savez(files["tiny_dinov2"], weight=rng.normal(size=(1000, 24)), bias=rng.normal(size=1000))
    np.savez(files["tiny_clip"], embeddings=rng.normal(size=(1000, 16)))
    return files


def train(data, folder, *more):
    train_sketchy_ext.main([*COMMON, *TRAIN, "--data_root", str(data), "-s", str(folder), *map(str, more)])
    return read_checkpoint(folder / LAST)


def test_features_are_the_output_of_the_backbone():
    images = torch.randn(3, 3, 42, 42)
    for model, width in (("tiny_dinov2", 24), ("tiny_clip", 16), ("tiny_siglip", 24)):
        student = Student(create_backbone(model), 5).eval()
        output, pooled = student(images), student.backbone(images)
        assert student.width == width and student.head is None and output.imagenet_logits.shape == (3, 0)
        needs_norm = model != "tiny_dinov2"  # CLIP ends in a projection, SigLIP in the MLP of its attention pool
        torch.testing.assert_close(output.features, F.layer_norm(pooled, (width,)) if needs_norm else pooled)


@pytest.mark.parametrize("model", ["tiny_dinov2", "tiny_clip"])
def test_train_resume_test_and_export_without_a_head(tiny, tmp_path, model, monkeypatch):
    options = ["--model", model, "--losses", "cls", "ma", "--tune", "last:1"]
    (tiny / "zeroshot1/cid_mask.pickle").unlink()  # no loss reads it
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    one = train(tiny, whole, *options)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("models.logger.print_epoch", _interrupt)
        train(tiny, halves, *options)
    two = train(tiny, halves, *options, "--resume")
    assert "teacher" not in one and "optimizer_1" not in one and one["options"]["imagenet_classes"] == 0
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    torch.manual_seed(0)
    start = published_state(create_student(model, 2, "none"))
    changed = {name for name, value in start.items() if not torch.equal(value, one["state_dict"][f"module.{name}"])}
    assert {"linear.weight", "blocks.1.attn.qkv.weight"} <= changed
    assert not any(name.startswith(("blocks.0", "patch_embed", "mask_token")) for name in changed)
    test = [*COMMON, "--data_root", str(tiny), "--resume_dir", str(whole / LAST), "--mode", "1"]
    results = test_sketchy_ext_zeroshot.main(test)
    assert results["options"]["imagenet_classes"] == 0 and 0 < results["rows"][0]["mAP@all"] <= 1
    images = torch.randn(2, 3, 42, 42)
    # An ONNX file takes seconds. Its features are compared with PyTorch's as it is written.
    for name in ["student.safetensors"] + ["student.onnx"] * (model == "tiny_dinov2"):
        export.main([str(whole / LAST), "--to", str(tmp_path / name)])
    for name in ["student.safetensors"] + ["student.onnx"] * (model == "tiny_dinov2"):
        assert load_encoder(tmp_path / name, device="cpu").metadata["model"] == model  # photo search reads them
    again = load_student(tmp_path / "student.safetensors").student
    torch.testing.assert_close(again.features(images), load_student(whole / LAST).student.features(images))


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("model", ["tiny_dinov2", "tiny_clip"])
def test_a_teacher_head_is_aligned_in_both_phases(tiny, tmp_path, model, heads):
    content = train(tiny, tmp_path / "run", "--model", model, "--teacher_head", heads[model])
    assert content["options"]["imagenet_classes"] == 1000
    assert {"ka_student", "ka_teacher"} <= content["history"][1].keys()
    name = "weight" if model == "tiny_dinov2" else "embeddings"
    start = getattr(read_head(heads[model]), name)
    trained = [
        content[part][key]
        for part, key in (("teacher", f"added_head.{name}"), ("state_dict", f"module.added_head.{name}"))
    ]
    assert all(not torch.equal(start, value) and (start - value).abs().max() < 0.01 for value in trained)
    student = load_student(tmp_path / "run" / LAST).student  # retrieval needs no ImageNet head
    assert student.head is None
    export.main([str(tmp_path / "run" / LAST), "--to", str(tmp_path / "student.safetensors")])
    assert not any("added_head" in name for name in load_file(tmp_path / "student.safetensors"))


def test_other_input_sizes_interpolate_position_embeddings(tiny, tmp_path):
    weights, images = tmp_path / "dino.pt", torch.randn(2, 3, 70, 70)
    start = create_student("tiny_dinov2", 1, "none")
    torch.save(start.backbone.state_dict(), weights)
    options = ["--model", "tiny_dinov2", "--losses", "cls", "ma", "--input_size", "70", "--finetune", weights]
    content = train(tiny, tmp_path / "run", *options, "--lr", 0)
    assert content["options"]["input_size"] == 70 and content["state_dict"]["module.pos_embed"].shape == (1, 26, 24)
    student = load_student(tmp_path / "run" / LAST).student
    start.backbone.set_input_size(img_size=(70, 70))
    torch.testing.assert_close(student.features(images), start.eval().features(images))
    test = [*COMMON, "--data_root", str(tiny), "-s", str(tmp_path / "run" / LAST), "--mode", "1"]
    for more, size in ([], 70), (["--input_size", "42"], 42):
        assert test_sketchy_ext_zeroshot.main([*test, *more])["features"]["source"]["input_size"] == size


def test_class_embeddings_classify_as_clip_does():
    embeddings, pooled = torch.randn(7, 4), torch.randn(3, 4)
    expected = [[10 * F.cosine_similarity(one, other, dim=0) for other in embeddings] for one in pooled]
    torch.testing.assert_close(ClassEmbeddings(embeddings, 10)(pooled), torch.tensor(expected))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weight": np.ones((1000, 23))}, "takes features of 23 values, those of tiny_dinov2 have 24"),
        ({"embeddings": np.ones((1000, 768))}, "takes features of 768 values, those of tiny_dinov2 have 24"),
        ({"weight": np.ones((5, 24)), "bias": np.ones(4)}, "4 values of bias for 5 classes"),
        ({"weight": np.ones(24)}, "weight must be a matrix of numbers (classes, values), not float64 (24,)"),
        ({"weight": np.full((5, 24), np.nan)}, "weight holds NaN or infinity"),
        ({"embeddings": np.zeros((5, 24))}, "an embedding of zeros"),
        ({"embeddings": np.ones((5, 24)), "scale": -1}, "a scale of 0 or less"),
        ({"text": np.ones((5, 24))}, "holds text; it needs weight and bias, or embeddings and scale"),
        ({"weight": np.array([["a"]])}, "weight must be a matrix of numbers"),
        ({"weight": np.array([[None]], dtype=object)}, "not a readable .npz file"),
    ],
)
def test_a_teacher_head_that_does_not_fit_ends_in_one_line(tiny, tmp_path, fails, content, words):
    np.savez(tmp_path / "head.npz", **content)
    command = [*COMMON, *TRAIN, "--no_mask", "--data_root", tiny, "-s", tmp_path / "run", "--model", "tiny_dinov2"]
    line = fails(train_sketchy_ext.main, *command, "--teacher_head", tmp_path / "head.npz")
    assert "--teacher_head" in line and words in line
    assert not list(tmp_path.glob("run/*.tar"))


def test_options_that_do_not_fit_a_network_end_in_one_line(tiny, tmp_path, fails, heads):
    def error(*more):
        return fails(train_sketchy_ext.main, *COMMON, *TRAIN, "--data_root", tiny, "-s", tmp_path / "run", *more)

    headless = "--model", "tiny_dinov2", "--losses", "cls", "ma"
    head = "--teacher_head", heads["tiny_dinov2"]
    assert "tiny_dinov2: has no ImageNet head to align; train with --losses cls ma" in error(*headless[:2])
    assert "--tune last:99: this model has 3 groups of layers" in error(*headless, "--tune", "last:99")
    assert "'last:0' is not all, norm or last:N" in error(*headless, "--tune", "last:0")
    assert "not allowed with argument" in error(*headless, "--tune", "norm", "--freeze", 1)
    assert "the ImageNet head has 0 classes" in error(*headless, "--imagenet_classes", 16)
    assert "no such file" in error(*headless, "--teacher_head", tmp_path / "none.npz")
    assert "convnextv2_atto has an ImageNet head of its own" in error("--model", "convnextv2_atto", *head)
    clip = "--model", "vit_base_patch16_clip_224", "--imagenet_classes", 512
    assert "512 values are a projection, no classes; use --model vit_base_patch16_clip_224." in error(*clip)


def test_features_only_tests_a_network_untrained(tiny, tmp_path, fails):
    weights, out = tmp_path / "dino.pt", tmp_path / "out"
    student = create_student("tiny_dinov2", 1, "none")
    torch.save(
        {"model_state_dict": {f"module._orig_mod.{n}": v for n, v in student.backbone.state_dict().items()}}, weights
    )
    command = [*COMMON, "--data_root", tiny, "--mode", 1, "--model", "tiny_dinov2", "-s", out]
    assert "--finetune: is for --features_only" in fails(
        test_sketchy_ext_zeroshot.main, *command, "--finetune", weights
    )
    command = [str(each) for each in [*command, "--features_only", "--finetune", weights]]
    results = test_sketchy_ext_zeroshot.main(command)
    record = json.loads((out / "features_zero.json").read_text())
    before = (out / "features_zero.pickle").stat().st_mtime_ns
    assert test_sketchy_ext_zeroshot.main(command)["rows"] == results["rows"]
    assert (out / "features_zero.pickle").stat().st_mtime_ns == before and record["source"]["model"] == "tiny_dinov2"
    assert {path.name for path in out.glob("*.tar")} == set()
    torch.save({"ema": create_student("tiny_dinov2", 1, "none").backbone.state_dict()}, weights)
    test_sketchy_ext_zeroshot.main(command)
    assert (out / "features_zero.pickle").stat().st_mtime_ns != before  # other weights, other features
    (out / LAST).touch()
    assert f"--features_only: {out} holds {LAST}" in fails(test_sketchy_ext_zeroshot.main, *command)
    missing = [*command[:-1], tmp_path / "none.pt", "-s", tmp_path / "new"]
    assert "none.pt: no file of pretrained weights" in fails(test_sketchy_ext_zeroshot.main, *missing)
