"""Files under the names of a network's makers, which timm converts: DINOv2's, whole CLIPs, ConvNeXt's; and heads."""

import re
import warnings

import pytest
import timm
import torch
from helpers import tiny_vit  # noqa: F401, timm knows its models from here on

import train_sketchy_ext
from models.checkpoints import LAST, read_checkpoint
from models.networks import Student, create_backbone, projections_of
from models.torch_files import read_torch
from models.weights import create_pair, create_student, published_name
from utils.cli import InputError


def random_network(model):
    """A backbone with parameters of any values, as a trained one has them."""
    network = timm.create_model(model)
    for number, value in enumerate(network.parameters()):
        value.data.normal_(0.1, 0.5, generator=torch.Generator().manual_seed(number))
    return network.eval()


def of_dinov2(network):
    """The state dict as Facebook's DINOv2 writes it, with the mask token of its training."""
    state = {"mask_token": torch.ones(1, 24)} | network.state_dict()
    if "reg_token" in state:
        # There the position embedding has a value for the class token; only their sum counts.
        state["register_tokens"], first = state.pop("reg_token"), torch.randn(1, 1, 24)
        state["cls_token"] = state["cls_token"] - first
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
        gated = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
        state = {re.sub("mlp.fc[12]", lambda found: gated[found[0]], name): value for name, value in state.items()}
    return state


def of_clip(network):
    """The state dict of a whole CLIP as OpenAI's and OpenCLIP's code write it, with a network of texts."""
    names = {
        "patch_embed.proj": "conv1", "blocks": "transformer.resblocks", "norm_pre": "ln_pre", "norm1": "ln_1",
        "norm2": "ln_2", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "fc1": "c_fc", "fc2": "c_proj",
    }  # fmt: skip
    state = {"positional_embedding": torch.zeros(77, 8), "text_projection": torch.zeros(8, 16)}
    state |= {"logit_scale": torch.tensor(4.6), "context_length": torch.tensor(77)}  # OpenAI's files have such numbers
    for name, value in network.state_dict().items():
        name = name.replace("norm.", "ln_post.") if name.startswith("norm.") else name
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name == "cls_token":
            name, value = "class_embedding", value[0, 0]
        elif name == "pos_embed":
            name, value = "positional_embedding", value[0]
        elif name == "head.weight":
            name, value = "proj", value.T
        elif name == "head.bias":
            continue
        state[f"visual.{name}"] = value
    return state


def of_open_clip(network):
    """The state dict of an OpenCLIP model whose image network is timm's."""
    text = {"text.positional_embedding": torch.zeros(77, 8), "logit_scale": torch.tensor(4.6)}
    return text | {f"visual.trunk.{name}": value for name, value in network.state_dict().items()}


def of_convnext(network):
    """The state dict of ConvNeXt as Facebook publishes it."""
    state = {published_name(name): value for name, value in network.state_dict().items()}
    return {name: value.flatten(1) if re.search("pwconv..weight", name) else value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("model", "written"),
    [
        ("tiny_dinov2_timm", of_dinov2), ("tiny_dinov2_reg", of_dinov2), ("tiny_clip", of_clip),
        ("tiny_siglip", of_open_clip), ("test_convnext", of_convnext),
    ],
)  # fmt: skip
def test_files_of_the_makers_give_the_same_features(tmp_path, model, written, prefix):
    network = random_network(model)
    if model == "tiny_clip":
        torch.nn.init.zeros_(network.head.bias)  # CLIP's projection has none
    state = {f"{prefix}{name}": value for name, value in written(network).items()}
    torch.save({"model": state} if prefix else state, tmp_path / "file.pth")
    student = create_student(model, 3, str(tmp_path / "file.pth")).eval()
    images = torch.randn(2, 3, 42, 42)
    torch.testing.assert_close(student.backbone(images), network(images))
    assert student.backbone.pretrained_cfg.get("state_dict") is None  # which checkpoints would carry along


def test_position_embeddings_of_another_size_have_a_note(tmp_path, capsys):
    state = {"mask_token": torch.ones(1, 24)}
    for size, notes in ((42, 0), (56, 1)):
        network = timm.create_model("tiny_dinov2_timm", img_size=size)
        torch.save(state | network.state_dict(), tmp_path / "file.pth")
        create_student("tiny_dinov2_timm", 3, str(tmp_path / "file.pth"))
        assert capsys.readouterr().err.count("position embeddings are of another image size") == notes


def test_files_of_another_network_are_refused(tmp_path):
    torch.save(of_dinov2(random_network("tiny_dinov2_timm")), tmp_path / "dino.pth")
    torch.save(of_clip(random_network("tiny_clip")), tmp_path / "clip.pt")
    patches = timm.create_model("tiny_dinov2_timm", patch_size=7).state_dict()  # timm would resample them
    torch.save({"mask_token": torch.ones(1, 24)} | patches, tmp_path / "patches.pth")
    cases = {
        ("dino.pth", "tiny_dinov2_reg"): r"pos_embed is \(1, 10, 24\), .* the file holds another network, see --model",
        ("patches.pth", "tiny_dinov2_timm"): r"pos_embed is \(1, 37, 24\), .* the file holds another network",
        ("clip.pt", "tiny_dinov2_timm"): "needs a name such as vit_base_patch16_clip_quickgelu_224.openai",
        ("clip.pt", "vit_tiny_patch16_224"): "a whole CLIP needs a name such as",
    }
    for (file, model), words in cases.items():
        with pytest.raises(InputError, match=rf"{file}: .*{words}"):
            create_student(model, 3, str(tmp_path / file))


def test_a_damaged_value_in_a_converted_file_is_named(tmp_path):
    state = of_dinov2(random_network("tiny_dinov2_timm"))
    state["blocks.1.ls1.gamma"][3] = torch.nan
    torch.save(state, tmp_path / "dino.pth")
    with pytest.raises(InputError, match=r"its blocks\.1\.ls1\.gamma is not finite"):
        create_student("tiny_dinov2_timm", 3, str(tmp_path / "dino.pth"))


def test_torchscript_is_refused_with_a_way_out(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(InputError, match=r"ViT-B-32\.pt: refused, a TorchScript archive.*torch\.jit\.load"):
        read_torch(tmp_path / "ViT-B-32.pt")


def test_a_registered_classifier_of_any_number_of_classes_is_one(tiny, tmp_path, fails):
    network = random_network("tiny_species")
    torch.save(network.state_dict(), tmp_path / "species.pt")
    student, teacher = create_pair("tiny_species", 2, str(tmp_path / "species.pt"), 30)
    images = torch.randn(2, 3, 42, 42)
    assert student.width == 24 and teacher.head.out_features == 30
    torch.testing.assert_close(student.eval()(images).imagenet_logits, network(images))
    pooled = network.forward_head(network.forward_features(images), pre_logits=True)
    torch.testing.assert_close(student(images).features, pooled)  # what the classifier gets
    command = "--device cpu --workers 0 --batch_size 3 --epochs 1 --max_steps 1 --no_validation --no_mask".split()
    command += [
        "--model",
        "tiny_species",
        "--finetune",
        tmp_path / "species.pt",
        "--data_root",
        tiny,
        "-s",
        tmp_path / "run",
    ]
    command = [str(each) for each in command]
    assert "its head has 30 classes, not 1000; set --imagenet_classes 30" in fails(train_sketchy_ext.main, *command)
    train_sketchy_ext.main([*command, "--imagenet_classes", "30"])
    assert read_checkpoint(tmp_path / "run" / LAST)["teacher"]["head.weight"].shape == (30, 24)


def test_a_projection_is_no_classifier_whatever_its_width():
    assert projections_of("vit_base_patch16_clip_224", 512)[0] == "vit_base_patch16_clip_224.datacompxl"
    assert not projections_of("tiny_species", 30) and not projections_of("vit_base_patch16_clip_224", 1000)
    assert Student(create_backbone("tiny_clip", 16), 2).head is None
