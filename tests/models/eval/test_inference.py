"""Features are the same however they are computed, and are computed in the faster way."""

import copy
import functools
import sys

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d

from models.eval import inference
from models.eval.batch_norm import fold_batch_norms
from models.eval.features import extract
from models.eval.inference import MIN_IMAGES, ONNX_IMAGES, SMALL_KERNEL_IMAGES, TORCH_IMAGES, Inference, embed


@pytest.fixture
def images():
    return torch.randint(1, 255, (11, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def loader(images):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(len(images))), batch_size=4)


class Means(torch.nn.Module):
    """A student whose features are the mean colour."""

    statistics = (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)

    def features(self, images):
        return images.mean(dim=(2, 3))


class Blocks(torch.nn.Module):
    """A student of convolutions and BatchNorms with statistics of their own. swapped: in another order than listed."""

    statistics, width = Means.statistics, 6

    def __init__(self, swapped=False):
        super().__init__()
        self.stem, self.norm = torch.nn.Conv2d(3, 6, 3, padding=1, bias=False), BatchNormAct2d(6)
        self.block = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 1), torch.nn.BatchNorm2d(6))
        self.swapped = swapped
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for values in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                    values.uniform_(0.5, 2)

    def features(self, images):
        maps = self.stem(self.norm(images.repeat(1, 2, 1, 1))[:, :3]) if self.swapped else self.norm(self.stem(images))
        return self.block(maps).mean(dim=(2, 3))


def test_batch_norms_are_folded_into_convolutions_in_a_copy(images):
    torch.manual_seed(0)
    student = Blocks().eval()
    before = copy.deepcopy(student.state_dict())
    folded = fold_batch_norms(student, lambda network: embed(network, images, "cpu"))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert isinstance(folded.norm, torch.nn.ReLU)
    np.testing.assert_allclose(embed(folded, images, "cpu"), embed(student, images, "cpu"), atol=1e-6)
    after = student.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    rows = np.concatenate(list(extract(student, loader(images), "cpu")))
    np.testing.assert_allclose(rows, embed(student, images, "cpu"), atol=1e-6)


def test_students_that_cannot_be_folded_are_used_as_they_are(images):
    torch.manual_seed(0)
    compute = functools.partial(embed, images=images, device="cpu")
    swapped, compiled, without = Blocks(swapped=True).eval(), Blocks().eval(), Means()
    compiled.features = compiled.features  # as compile_features leaves it
    for student in (swapped, compiled, without):
        assert fold_batch_norms(student, compute) is student


def test_bf16_is_near_and_not_the_same(images):
    class Linear(Means):
        def features(self, images):
            return images.flatten(1) @ torch.ones(48, 3).cumsum(0)

    rows = []
    for precision in ("fp32", "tf32", "bf16"):
        rows.append(np.concatenate(list(extract(Linear(), loader(images), "cpu", precision=precision))))
    assert np.array_equal(rows[0], rows[1])  # TF32 is for CUDA
    assert not np.array_equal(rows[0], rows[2])
    np.testing.assert_allclose(rows[0], rows[2], atol=0.02)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Blocks().eval().to(memory_format=torch.channels_last)


@pytest.fixture
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, MIN_IMAGES])
def test_features_on_threads_are_those_of_whole_batches_in_order(student, count, two_cores, capfd):
    batches = torch.randint(0, 256, (150, 3, 8, 8), dtype=torch.uint8).split(64)
    computing = Inference(student, "cpu")
    rows = list(computing.features(batches, count))
    assert computing.sizes == (ONNX_IMAGES if count else SMALL_KERNEL_IMAGES)
    assert [len(each) for each in rows] == [64, 64, 22]
    for one, images in zip(rows, batches, strict=True):
        np.testing.assert_allclose(one, embed(student, images, "cpu"), rtol=0, atol=1e-6)
    assert torch.get_num_threads() == 2
    note = "features: by ONNX Runtime, whose values differ from PyTorch's by less than 1e-05\n"
    assert capfd.readouterr() == ("", note if count else "")


@pytest.mark.parametrize(("cores", "batch", "sizes", "wanted"), [
    (2, 64, ONNX_IMAGES, (2, 1, 4)),
    (64, 64, ONNX_IMAGES, (64, 1, 1)),
    (2, 64, SMALL_KERNEL_IMAGES, (2, 1, 32)),
    (16, 64, SMALL_KERNEL_IMAGES, (4, 4, 16)),
    (4, 1, SMALL_KERNEL_IMAGES, (1, 4, 16)),
    (4, 8, TORCH_IMAGES, (4, 1, 2)),
])  # fmt: skip
def test_no_more_than_a_batch_is_computed_at_a_time(monkeypatch, cores, batch, sizes, wanted):
    """wanted: threads, cores of each, images of each."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert inference._shares(batch, sizes) == wanted


@pytest.mark.parametrize("reason", ["few images", "bf16", "compiled", "not installed", "no operator", "other", "slow"])
def test_onnx_runtime_is_left_where_it_does_not_apply(student, images, monkeypatch, capfd, reason):
    precision, count = "bf16" if reason == "bf16" else "fp32", MIN_IMAGES - (reason == "few images")
    if reason == "compiled":
        student.features = student.features  # as compile_features leaves it
    if reason == "not installed":
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    if reason == "no operator":
        plain = student.features
        monkeypatch.setattr(Blocks, "features", lambda self, images: torch.special.i0e(plain(images)))
    if reason == "other":
        session = type("Session", (), {"run": lambda self, _, given: [np.zeros((len(given["images"]), 6), np.float32)]})
        monkeypatch.setattr(inference, "feature_session", lambda *_: session())
    if reason == "slow":
        measured, ratio = inference._measured, {ONNX_IMAGES[1]: 2}
        monkeypatch.setattr(inference, "_measured", lambda f, i, size: (measured(f, i, size)[0], ratio.get(size, 1)))
    computing = Inference(student, "cpu", precision)
    rows = np.concatenate(list(computing.features(images.split(8), count)))
    assert computing.sizes == (None if reason == "compiled" else SMALL_KERNEL_IMAGES)
    assert np.array_equal(rows, np.concatenate([computing.compute(part) for part in images.split(8)]))
    np.testing.assert_allclose(
        rows, embed(student, images, "cpu", precision), rtol=0, atol=0.01 if reason == "bf16" else 1e-6
    )
    assert capfd.readouterr() == ("", "")


def test_an_extraction_that_is_left_early_restores_the_threads(student, images, two_cores):
    rows = Inference(student, "cpu").features(images.split(2))
    next(rows)
    rows.close()
    assert torch.get_num_threads() == 2
