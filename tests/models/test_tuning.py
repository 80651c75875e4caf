"""Which layers --tune and --freeze train."""

import pytest
from helpers import tiny_vit  # noqa: F401, timm knows its models from here on
from torch import nn

from models.networks import create_backbone
from models.tuning import check_tune, freeze_layers, freeze_unused, tune_layers


def trained(model, tune=None, freeze=0):
    backbone = create_backbone(model)
    freeze_unused(backbone, 42 if model.startswith("tiny") else 64)
    tune_layers(backbone, tune or "all")
    freeze_layers(backbone, freeze)
    return {name for name, value in backbone.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    ("model", "layers", "last"),
    [
        ("tiny_dinov2", 3, "blocks.1."),
        ("tiny_clip", 3, "blocks.1."),
        ("test_convnext", 5, "stages.3."),
    ],
)
def test_layers_counted_from_the_end_are_those_counted_from_the_front(model, layers, last):
    everything = trained(model)
    assert trained(model, "all") == trained(model, f"last:{layers}") == everything - {"mask_token"}
    for count in range(1, layers):
        assert trained(model, f"last:{count}") == trained(model, freeze=layers - count) < everything
    kept = trained(model, "last:1")
    body = {name for name in kept if name.startswith(("patch_embed", "stem", "blocks", "stages"))}
    assert all(name.startswith(last) for name in body) and any("norm" in name for name in kept - body)
    with pytest.raises(ValueError, match=f"this model has {layers} groups of layers"):
        trained(model, f"last:{layers + 1}")


@pytest.mark.parametrize("model", ["tiny_dinov2", "tiny_clip", "tiny_siglip", "test_convnext"])
def test_norm_trains_normalisation_layers_and_the_classifier(model):
    head = {"head.fc.weight", "head.fc.bias"} if model == "test_convnext" else set()
    names = trained(model, "norm")
    assert head < names
    of_norms = "norm", "stem.1", ".downsample.0."  # the last two are LayerNorms of a ConvNeXt
    assert all(any(part in name for part in of_norms) for name in names - head)


def test_a_network_without_normalisation_layers():
    with pytest.raises(ValueError, match="no normalisation layers"):
        tune_layers(nn.Sequential(nn.Linear(2, 2)), "norm")


@pytest.mark.parametrize("text", ["last:0", "last:", "last:-1", "norms", "", "last:1.5"])
def test_other_values_are_refused(text):
    with pytest.raises(ValueError, match=r"is not all, norm or last:N"):
        check_tune(text)
