"""Backbones other than ConvNeXt V2: what comes with each of them, and a whole run of two."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision import transforms

import test_sketchy_ext_zeroshot
import train_sketchy_ext
from datasets.lists import open_benchmark
from datasets.loaders import LoaderOptions, evaluation_loader
from models.checkpoints import LAST, CheckpointSaver, load_student, read_checkpoint, save_checkpoint
from models.eval.features import extract
from models.losses import Batch
from models.networks import Student, Teacher, create_backbone, normalise
from models.train_step import TrainState, create_optimizers, train_step
from models.weights import create_pair, fit_input_size, load_published, published_state
from utils.cli import InputError


def shaken(backbone):
    """The backbone with statistics of BatchNorm that are not those of a new network."""
    generator = torch.Generator().manual_seed(0)
    for layer in backbone.modules():
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return backbone


@pytest.mark.parametrize(
    "model, width, needs_norm",
    [
        ("convnextv2_atto", 320, False),
        ("vit_tiny_patch16_224", 192, False),
        ("resnet10t", 512, True),
        ("tf_efficientnet_lite0", 1280, True),
        ("mobilenetv3_small_050", 1024, True),  # whose head has a layer of its own before it, wider than the trunk
        ("coat_tiny", 152, True),  # which calls some layers twice
    ],
)
def test_what_belongs_to_a_network_comes_with_it(model, width, needs_norm):
    student = Student(create_backbone(model, 7), 5).eval()
    assert (student.width, student.needs_norm) == (width, needs_norm)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = student(images)
        torch.testing.assert_close(output.imagenet_logits, student.backbone(images))  # as it was pretrained
        torch.testing.assert_close(output.seen_logits, student.linear(output.features))
        pooled = student.backbone.forward_head(student.backbone.forward_features(images), pre_logits=True)
    if needs_norm:
        pooled = pooled - pooled.mean(dim=1, keepdim=True)
        pooled = pooled / (pooled.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(output.features, pooled)
    torch.testing.assert_close(Teacher(student.backbone)(images).features, output.features)


def test_batchnorm_keeps_its_statistics_and_no_image_depends_on_its_batch():
    student, teacher = (
        Student(shaken(create_backbone("resnet10t", 7)), 5),
        Teacher(shaken(create_backbone("resnet10t", 7))),
    )
    before = {name: value.clone() for name, value in student.backbone.named_buffers()}
    run = TrainState(student, teacher, create_optimizers(student, teacher, 1e-3, 1e-3, 5e-4))
    images, labels = torch.randn(6, 3, 64, 64), torch.arange(6) % 5
    batch = Batch(images, labels, (labels > 1).float(), torch.zeros(6, 1), torch.randn(6, student.width))
    student.train(), teacher.train()
    train_step(run, batch, bidirectional=True)
    assert all(torch.equal(value, before[name]) for name, value in student.backbone.named_buffers())
    with torch.no_grad():
        for network, output in (
            (student, lambda x: student(x).seen_logits),
            (teacher, lambda x: teacher(x).imagenet_logits),
        ):
            network.train()
            together = output(images)
            torch.testing.assert_close(torch.cat([output(image[None]) for image in images]), together)
            network.eval()
            torch.testing.assert_close(output(images), together)


def test_features_equal_a_plain_timm_loop(tmp_path, tiny):
    backbone = shaken(create_backbone("tf_efficientnet_lite0"))
    torch.save(backbone.state_dict(), tmp_path / "lite0.pth")
    student, _ = create_pair("tf_efficientnet_lite0", 5, str(tmp_path / "lite0.pth"))
    files = [tiny / f"photo of zero/{number}.png" for number in range(4)]
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    plain.load_state_dict(torch.load(tmp_path / "lite0.pth"), strict=False)
    to_input = transforms.Compose([
        transforms.Resize((128, 128)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)
    ])  # fmt: skip
    with torch.no_grad():
        pooled = plain(torch.stack([to_input(Image.open(file).convert("RGB")) for file in files]))
    expected = F.normalize(
        (pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    )
    photos = open_benchmark("sketchy", tiny).read("photo", "zero")
    loader = evaluation_loader(photos, LoaderOptions(size=128, batch_size=3))
    found = torch.cat([torch.from_numpy(rows) for rows in extract(student, loader, "cpu")])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model, size", [("test_resnet", 32), ("test_vit", 160)])
def test_train_resume_and_test_end_to_end(tiny, tmp_path, monkeypatch, model, size):
    small = ["--data_root", tiny, "--model", model, "--device", "cpu", "--workers", 0, "--batch_size", 3]
    small += ["--input_size", size] if model != "test_vit" else []  # its own
    train = [*small, "--finetune", "none", "--epochs", 2, "--warmup_epochs", 0, "--max_steps", 1]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_sketchy_ext.main([str(each) for each in (*train, "--savedir", whole)])
    save = CheckpointSaver.save

    def save_then_stop(saver, state, *args):
        save(saver, state, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(CheckpointSaver, "save", save_then_stop)
        train_sketchy_ext.main([str(each) for each in (*train, "--savedir", halves)])
    train_sketchy_ext.main([str(each) for each in (*train, "--savedir", halves, "--resume")])
    one, two = (read_checkpoint(folder / LAST) for folder in (whole, halves))
    assert one["options"]["input_size"] == size and len(one["history"]) == 2
    assert one["classes"] == ["alarm clock", "cat"]
    names = {name.removeprefix("module.") for name in one["state_dict"]}
    assert names == {*timm.create_model(model).state_dict(), "linear.weight", "linear.bias"}  # timm's
    for part in ("state_dict", "teacher"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    test = [*small, "--resume_dir", halves, "--clusters", 2]
    results = test_sketchy_ext_zeroshot.main([str(each) for each in test])
    assert 0 < results["rows"][0]["mAP@all"] <= 1 and results["features"]["source"]["model"] == model
    assert json.loads((halves / "train.json").read_text())["options"]["model"] == model


def test_checkpoints_and_weights_of_other_backbones_move(tmp_path):
    student = Student(shaken(create_backbone("resnet10t", 7)), 5)
    save_checkpoint(tmp_path / "c.pth.tar", student)
    again, metadata, names = load_student(tmp_path / "c.pth.tar", "resnet10t", None, 7)
    assert metadata["seen_classes"] == 5 and metadata["input_size"] == 224 and names is None
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())
    state = published_state(student.backbone)
    save_file({name: value for name, value in state.items() if "num_batches" not in name}, tmp_path / "r.safetensors")
    other, teacher = create_pair("resnet10t", 5, str(tmp_path / "r.safetensors"), 7)  # old files lack the counters
    for network in (other, teacher):
        assert all(
            torch.equal(value, student.backbone.state_dict()[name])
            for name, value in network.backbone.state_dict().items()
        )


def test_weights_of_another_network_are_named(tmp_path):
    save_file(create_backbone("resnet10t", 7).state_dict(), tmp_path / "r.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "r.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"r\.safetensors: layer2.* the file holds another network, see --model"):
        create_pair("resnet18", 5, str(tmp_path / "r.safetensors"), 7)
    with pytest.raises(InputError, match=r"r\.safetensors: its head has 7 classes, not 9; set --imagenet_classes 7"):
        create_pair("resnet10t", 5, str(tmp_path / "r.safetensors"), 9)
    with pytest.raises(InputError, match=r"torn\.safetensors: not a readable safetensors file .*; fetch it again"):
        create_pair("resnet10t", 5, str(tmp_path / "torn.safetensors"), 7)
    student = Student(create_backbone("resnet10t", 7), 5)
    sick = published_state(student) | {"bn1.num_batches_tracked": torch.zeros(2)}
    with pytest.raises(InputError, match=r"bn1\.num_batches_tracked"):
        load_published(student, sick, "sick.pt")


def test_a_network_of_a_fixed_size_takes_no_other():
    assert fit_input_size("vit_tiny_patch16_224", None) == fit_input_size("vit_tiny_patch16_224", 224) == 224
    assert fit_input_size("vit_base_patch16_384", None) == 384
    assert fit_input_size("resnet10t", None) == 224 and fit_input_size("resnet10t", 96) == 96
    with pytest.raises(InputError, match="--input_size 128: vit_tiny_patch16_224 takes images of 224 pixels only"):
        fit_input_size("vit_tiny_patch16_224", 128)
    with pytest.raises(InputError, match="--model resnet5: timm knows no 'resnet5'"):
        fit_input_size("resnet5", 128)


def test_images_too_small_for_a_network_are_named_before_training(tiny, tmp_path, fails):
    small = ["--data_root", tiny, "--model", "inception_v3", "--device", "cpu", "--workers", 0, "--batch_size", 3]
    message = fails(train_sketchy_ext.main, *small, "--finetune", "none", "--input_size", 32, "--savedir", tmp_path)
    assert "--input_size 32: inception_v3 takes no images of that size" in message
    assert not list(tmp_path.glob("*.pth.tar"))


def test_a_network_that_cannot_compute_twice_is_named(tiny, tmp_path, fails):
    small = ["--data_root", tiny, "--model", "vgg11", "--device", "cpu", "--workers", 0, "--batch_size", 3]
    message = fails(train_sketchy_ext.main, *small, "--finetune", "none", "--grad_checkpointing", "--savedir", tmp_path)
    assert "--grad_checkpointing: this model does not support gradient checkpointing" in message


def test_statistics_are_the_networks_own():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    student = Student(create_backbone("tf_efficientnet_lite0", 7), 5)
    assert student.statistics == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    torch.testing.assert_close(normalise(images, *student.statistics), images / 127.5 - 1)


def test_a_checkpoint_gives_its_network(tmp_path):
    options = {"model": "resnet10t", "input_size": 64, "imagenet_classes": 7}
    student, path = Student(create_backbone("resnet10t", 7), 3), tmp_path / "c.pth.tar"
    save_checkpoint(path, student, options=options, classes=["a", "b", "c"])
    again, metadata, names = load_student(path)
    assert {name: metadata[name] for name in options} == options and metadata["width"] == 512
    assert names == ["a", "b", "c"] and metadata["seen_classes"] == 3 and not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())
    assert load_student(path, "resnet10t", 96, 7).metadata["input_size"] == 96  # convolutions take images of any size
    with pytest.raises(
        InputError, match=r"--model resnet18: .*c.pth.tar was trained with resnet10t; leave --model out"
    ):
        load_student(path, "resnet18")
    with pytest.raises(InputError, match=r"--imagenet_classes 9: .*c.pth.tar was trained with 7; leave"):
        load_student(path, imagenet_classes=9)


@pytest.mark.parametrize("model", ["resnet5", "convnextv2_giant"])
def test_a_recorded_model_that_timm_does_not_know_is_named_with_the_version_of_timm(tmp_path, model):
    student, path = Student(create_backbone("resnet10t", 7), 3), tmp_path / "c.pth.tar"
    save_checkpoint(path, student, options={"model": model}, versions={"timm": "0.9"})
    with pytest.raises(InputError, match=rf"c.pth.tar: needs timm 0.9 .* --model {model}: timm knows no '{model}'"):
        load_student(path)
    save_checkpoint(path, student)
    with pytest.raises(InputError, match=rf"^--model {model}: timm knows no"):
        load_student(path, model)
