"""The four golden training steps, each rank with its share of every batch; rank 0 writes the weights.

    torchrun --nproc_per_node 2 tests/helpers/golden_steps.py golden.npz FOLDER

writes FOLDER/1.pt, without gradient accumulation, FOLDER/2.pt, with two micro-batches, FOLDER/cls.pt, with L_cls
alone, and FOLDER/tuned.pt, of a network without ImageNet head for each of TUNED.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from timm.models.convnext import ConvNeXt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers import tiny_vit  # noqa: F401, timm knows its models from here on
from models.losses import PAPER_WEIGHTS, Batch, LossWeights
from models.networks import Student, Teacher, create_backbone
from models.train_step import TrainState, create_optimizers
from models.training import train_step
from models.tuning import freeze_unused, tune_layers
from models.weights import load_published, published_state
from utils import distributed

ONLY_CLS = LossWeights({"cls": 1.0})  # no loss has a gradient for the ImageNet heads
TUNED = "all", "norm", "last:1"  # values of --tune: DistributedDataParallel waits for every parameter with a gradient


def main(golden, folder):
    with np.load(golden) as file:
        z = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "biuf"}
    distributed.init_process_group("cpu")
    for name, steps, loss_weights in (("1", 1, PAPER_WEIGHTS), ("2", 2, PAPER_WEIGHTS), ("cls", 1, ONLY_CLS)):
        weights = four_steps(z, steps, loss_weights)
        if distributed.get_rank() == 0:
            torch.save(weights, Path(folder) / f"{name}.pt")
    tuned = {tune: tuned_steps(tune) for tune in TUNED}
    if distributed.get_rank() == 0:
        torch.save(tuned, Path(folder) / "tuned.pt")
    distributed.destroy_process_group()


def four_steps(z, accum_steps, loss_weights=PAPER_WEIGHTS):
    """The weights after the steps."""
    sizes = dict(depths=z["depths"].tolist(), dims=z["dims"].tolist(), use_grn=True, ls_init_value=None)
    backbones = [ConvNeXt(num_classes=int(z["num_classes"]), **sizes) for _ in range(2)]
    networks = {"student": Student(backbones[0], int(z["linear_num"])), "teacher": Teacher(backbones[1])}
    for name, network in networks.items():
        state = {key.split("/", 1)[1]: value for key, value in z.items() if key.startswith(f"{name}_initial/")}
        load_published(network.double(), state, name)
    state = TrainState(
        *networks.values(),
        create_optimizers(*networks.values(), float(z["lr"]), float(z["lr"]), float(z["weight_decay"])),
    )
    state.wrap_ddp()
    for step, (batch, bidirectional) in enumerate(zip(z["step_batch"], z["step_bidirectional"], strict=True)):
        own = distributed.rank_slice(len(z["target"][batch]))
        values = (z["images"][batch].double(), z["target"][batch], z["tag"][batch, :, 0], z["cid_mask"][batch])
        batch = Batch(*(value[own] for value in (*values, z["noise"][step])))
        train_step(state, batch, bool(bidirectional), accum_steps, loss_weights=loss_weights)
    return {name: published_state(network) for name, network in networks.items()}


def tuned_steps(tune, count=2):
    """The weights of a tiny_dinov2, which has a mask token without a gradient, after `count` steps."""
    torch.manual_seed(0)
    student = Student(create_backbone("tiny_dinov2"), 4)
    freeze_unused(student.backbone, 42)
    tune_layers(student.double().backbone, tune)
    state = TrainState(student, None, create_optimizers(student, None, 1e-3, 1e-3, 5e-4))
    state.wrap_ddp()
    images, noise = torch.randn(5, 3, 42, 42).double(), torch.randn(5, 24).double()
    own = distributed.rank_slice(5)
    values = images, torch.arange(5) % 4, torch.ones(5).double(), torch.zeros(5, 1).double(), noise
    for _ in range(count):
        batch = Batch(*(value[own] for value in values))
        train_step(state, batch, bidirectional=True, loss_weights=LossWeights({"cls": 1.0, "ma": 0.1}))
    return published_state(student)


if __name__ == "__main__":
    main(*sys.argv[1:])
