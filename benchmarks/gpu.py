"""Every check and figure that needs a GPU, within ten minutes on one card, in one report.

    make gpu
    .venv/bin/python benchmarks/gpu.py --device cuda:1 --report gpu_report.md

Checks: a training step, features, mixtures, matching and metrics give what the CPU gives; so does the whole test of
Sketchy Ext from stored features. Figures: that test and QuickDraw Ext's, the training step in each precision beside
timm's own, memory. The report is written after each of them.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timm.models.convnext import ConvNeXt
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.eval.codebooks import fit_codebooks, mixture_device  # noqa: E402
from models.eval.evaluate import evaluate_rows  # noqa: E402
from models.eval.features import Features, extract  # noqa: E402
from models.losses import Batch  # noqa: E402
from models.networks import Student, Teacher, create_backbone, prepare_models  # noqa: E402
from models.train_step import (  # noqa: E402
    TrainState,
    create_optimizers,
    train_step,
)

# Figures, each a script of this folder with its options.
FIGURES = [
    "evaluation.py --tasks protocol devices --benchmark sketchy --only_ours",
    "evaluation.py --tasks protocol --benchmark quickdraw --only_ours",
    "training.py --tasks step --batch_size 64 --rounds 3 --precisions fp32 tf32_all bf16 --no_compile",
    "training.py --tasks memory --batch_size 64",
]
# What a user does, on a small scale; each command must succeed.
DATA = "--data_root {folder}/data --model tf_efficientnet_lite0 --input_size 96 --device {device}"
TRAIN = f"train_sketchy_ext.py {DATA} --finetune none --epochs 1 --savedir {{folder}}/checkpoint"
SCRIPTS = [
    "-m datasets.prepare miniature {folder}/data",
    TRAIN,
    f"{TRAIN} --resume",
    f"test_sketchy_ext_zeroshot.py {DATA} --clusters 8 --resume_dir {{folder}}/checkpoint",
    "search_photos.py index {folder}/data/256x256/photo --index {folder}/index --device {device} "
    "--checkpoint {folder}/checkpoint/checkpoint.pth.tar",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--report", type=Path, default=Path("gpu_report.md"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here; the tests (make test) check the same on a pretended one")
        raise SystemExit(2)
    began, properties = time.monotonic(), torch.cuda.get_device_properties(options.device)
    report = Report(options.report)
    report.add(
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, torch {torch.__version__}",
        f"mixtures are fitted on: {mixture_device(options.device)}",
        "",
        "| check against the CPU | largest difference | allowed |",
        "|---|---|---|",
    )
    passed = True
    for name, check, allowed in CHECKS:
        difference = check(options.device)
        passed &= difference <= allowed
        report.add(f"| {name} | {difference:.1e} | {allowed:.0e}{'' if difference <= allowed else ', FAILED'} |")
    with tempfile.TemporaryDirectory() as folder:
        for command in SCRIPTS:
            passed &= run(report, command.format(folder=folder, device=options.device))
    for command in FIGURES:
        passed &= run(report, f"benchmarks/{command} --device {options.device}", show=True)
    report.add(f"\n{time.monotonic() - began:.0f} s in all")
    print(f"report: {options.report}")
    raise SystemExit(0 if passed else 1)


class Report:
    """Lines of a file that are printed, too; what was added is there if the process is killed."""

    def __init__(self, path):
        self.path, self.lines = path, []

    def add(self, *lines):
        print(*lines, sep="\n", flush=True)
        self.lines += lines
        self.path.write_text("\n".join(self.lines) + "\n")


def run(report, command, show=False):
    """Run a script of the project; report its seconds, and its output if `show` or it fails. Returns its success."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    report.add("", f"`{command}`: {time.monotonic() - start:.0f} s")
    if done.returncode:
        report.add("FAILED", done.stderr.strip()[-2000:])
    if show or done.returncode:
        report.add("", done.stdout.strip())
    return done.returncode == 0


def step(device, precision="fp32"):
    """Weights of student and teacher after four steps in both phases."""
    torch.manual_seed(0)
    sizes = dict(num_classes=50, depths=[1, 1, 2, 1], dims=[16, 32, 48, 64], use_grn=True, ls_init_value=None)
    student, teacher = Student(ConvNeXt(**sizes), 5), Teacher(ConvNeXt(**sizes))
    prepare_models(student, teacher, device)
    run = TrainState(student, teacher, create_optimizers(student, teacher, 1e-4, 1e-4, 5e-4))
    labels = torch.arange(12) % 5
    batch = [torch.randn(12, 3, 64, 64), labels, (labels > 1).float(), torch.rand(12, 50), torch.randn(12, 64)]
    for bidirectional in (False, False, True, True):
        train_step(run, Batch(*(tensor.to(device) for tensor in batch)), bidirectional, 2, precision)
    return torch.cat([value.detach().cpu().flatten() for value in run.trainable_parameters()])


def differ_steps(device):
    return (step(device) - step("cpu")).abs().max().item()


def differ_features(device):
    """EfficientNet's features of 40 random images."""
    torch.manual_seed(0)
    student = Student(create_backbone("tf_efficientnet_lite0"), 5).eval()
    images = torch.randint(0, 256, (40, 3, 96, 96), dtype=torch.uint8)
    loaded = DataLoader(TensorDataset(images, torch.zeros(40)), batch_size=16)
    one, two = (np.concatenate(list(extract(student.to(each), loaded, each))) for each in ("cpu", device))
    return float(np.abs(one - two).max())


def example():
    """Features of ten classes, as hard as real ones."""
    rng = np.random.default_rng(0)
    centres, labels = rng.normal(size=(10, 96)), (np.arange(3000) % 10, np.arange(800) % 10)
    parts = [centres[each] + 1.5 * rng.normal(size=(len(each), 96)) for each in labels]
    gallery, query = ((part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32) for part in parts)
    return Features(gallery, labels[0], query, labels[1])


def differ_mixtures(device):
    one, two = (fit_codebooks(example().gallery, [(2, 10), (4, 12)], device=each)[0] for each in ("cpu", device))
    return max(float(np.abs(one[row] - two[row]).max()) for row in one)


def differ_metrics(device):
    features = example()
    rows = {None: None} | fit_codebooks(features.gallery, [(2, 10), (4, 12)])[0]
    with contextlib.redirect_stderr(io.StringIO()):
        one, two = (evaluate_rows(features, rows, device=each) for each in ("cpu", device))
    return max((one[row][name].mean() - two[row][name].mean()).abs().item() for row in rows for name in one[row])


CHECKS = [
    ("weights after four training steps, fp32", differ_steps, 1e-5),
    ("features, fp32", differ_features, 1e-5),
    ("codebooks", differ_mixtures, 1e-6),
    ("mAP and Prec of every row, float32", differ_metrics, 1e-5),
]

if __name__ == "__main__":
    main()
