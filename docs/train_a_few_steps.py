"""Train a few steps without a command line: first the student alone, then both networks.

    python -m docs.train_a_few_steps demo/data

The folder is a benchmark's; `python -m datasets.prepare miniature demo/data` draws one. Nothing is written.
"""

import sys

import torch

from datasets.lists import open_benchmark
from datasets.loaders import LoaderOptions, open_training_data
from models.networks import place
from models.train_step import MEASURES, Recipe, Run, create_optimizers
from models.training import close_epoch, train_epoch
from models.weights import create_pair

benchmark = open_benchmark("sketchy", sys.argv[1] if len(sys.argv) > 1 else "demo/data")
data = open_training_data(benchmark, LoaderOptions(size=48, batch_size=30), max_steps=3)
torch.manual_seed(0)
student, teacher = create_pair("convnextv2_atto", len(benchmark.seen_names), finetune="none")
place(student, teacher, "cpu")
recipe = Recipe(epochs=2, last_warmup_epoch=0, lr=1e-3, teacher_lr=1e-3)
run = Run(student, teacher, create_optimizers(student, teacher, recipe.lr, recipe.teacher_lr, weight_decay=5e-4))
for epoch in range(recipe.epochs):
    for values in train_epoch(run, data, recipe):
        measures = dict(zip(MEASURES, values.tolist(), strict=True))
        print(f"epoch {epoch + 1}, step {run.step}:", *(f"{name} {value:.3f}" for name, value in measures.items()))
    close_epoch(run, data, recipe)
    print(f"epoch {epoch + 1}, {run.history[-1]['phase']}: validation accuracy {run.history[-1]['accuracy']:.1f} %")
