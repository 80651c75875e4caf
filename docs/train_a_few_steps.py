"""Train a few steps without a command line: first the student alone, then both networks.

    python -m docs.train_a_few_steps demo/data

The folder is a benchmark's; `python -m datasets.prepare miniature demo/data` draws one. Nothing is written.
"""

import sys

import torch

from datasets.lists import open_benchmark
from datasets.loaders import LoaderOptions, open_training_data
from models.networks import prepare_models
from models.train_step import LOGGED, TrainConfig, TrainState, create_optimizers
from models.training import close_epoch, train_epoch
from models.weights import create_pair

benchmark = open_benchmark("sketchy", sys.argv[1] if len(sys.argv) > 1 else "demo/data")
data = open_training_data(benchmark, LoaderOptions(size=48, batch_size=30), max_steps=3)
torch.manual_seed(0)
student, teacher = create_pair("convnextv2_atto", len(benchmark.seen_names), finetune="none")
prepare_models(student, teacher, "cpu")
config = TrainConfig(epochs=2, last_warmup_epoch=0, lr=1e-3, teacher_lr=1e-3)
state = TrainState(
    student, teacher, create_optimizers(student, teacher, config.lr, config.teacher_lr, weight_decay=5e-4)
)


def print_step(values):
    losses = (f"{name} {value:.3f}" for name, value in zip(LOGGED, values.tolist(), strict=True))
    print(f"epoch {len(state.history) + 1}, step {state.step}:", *losses)


for epoch in range(config.epochs):
    train_epoch(state, data, config, after_step=print_step)
    close_epoch(state, data, config)
    entry = state.history[-1]
    print(f"epoch {epoch + 1}, {entry['phase']}: validation accuracy {entry['accuracy']:.1f} %")
