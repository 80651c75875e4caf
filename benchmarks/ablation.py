"""Ablation study: every variant of the method is trained with the same budget, each at its own learning rate.

    .venv/bin/python benchmarks/ablation.py benchmarks/study/sketchy25_held_out.json --data_root DIR --weights FILE
    .venv/bin/python benchmarks/ablation.py benchmarks/study/sketchy25_held_out.json --report

The rate of a variant on a split is the one with the best mAP (one-to-one, first seed) on seen classes that are held out
of its training, "hold_out" in the study's file; lists of them are made in the folder of the runs. Only the chosen rate
is trained on all seen classes and tested on the published unseen ones, once for each seed. Two rates in the middle are
tried first, then the neighbours of the best one. A study without "hold_out" chooses rates as earlier ones did: by the
accuracy on validation sketches of seen classes, on the first split.

Finished runs are kept, a stopped run is resumed, and one that another process works on is skipped. Measurements are
written beside the study's file; the report is made of them: tables, figures, and the commands behind each number.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ablation_report import draw_differences, draw_sweeps, markdown  # noqa: E402

from datasets.prepare import commands as prepare  # noqa: E402
from datasets.protocols import PROTOCOLS  # noqa: E402
from models.compare import difference_interval, over_seeds  # noqa: E402
from models.eval.report import QUERIES  # noqa: E402
from models.options import test_parser, train_parser  # noqa: E402
from utils.cli import InputError, OneLineParser, one_line_errors  # noqa: E402
from utils.files import atomic_write, folder_lock, write_json  # noqa: E402

STUDY_KEYS = {"train", "test", "splits", "variants", "base", "sweeps", "rates", "seeds", "hold_out"}
SWEEP_KEYS = {"split", "variant", "tests"}
HOLD_OUT_KEYS = {"classes", "seed"}
SPLIT_KEYS, VARIANT_KEYS = {"script", "clusters", "train"}, {"name", "train", "splits"}


class Job(NamedTuple):
    """A training and its test."""

    split: str
    variant: str
    rate: str
    seed: int
    hold_out: int | None = None  # seed of the held-out classes that are tested; None for the published unseen classes

    @property
    def lists(self):
        """Name of the folder of lists."""
        return self.split if self.hold_out is None else f"{self.split}_held_out_{self.hold_out}"

    @property
    def key(self):
        """Name of the job in the records, and its folder below --runs."""
        return "/".join(map(str, (self.lists, self.variant, self.rate, self.seed)))


@one_line_errors()
def main(argv=None):
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("study", type=Path, help="what is varied, JSON")
    add("--data_root", metavar="DIR", help="the data set")
    add("--test_data_root", type=_split_and_folder, nargs="+", default=[], metavar="SPLIT=DIR",
        help="other data sets with the unseen classes of a split, such as zeroshot2=../SketchySplit")  # fmt: skip
    add("--weights", metavar="FILE", help="ImageNet weights that all runs start from: a file, timm or none")
    add("--runs", type=Path, default=Path("checkpoint/study"), metavar="DIR", help="takes the runs")
    add("--threads", type=int, default=1, help="threads of each run; use 1 for two studies side by side")
    add("--report", action="store_true", help="train and test nothing, print the tables and draw the figures")
    options = parser.parse_args(argv)
    study = read_study(options.study)
    records = Records(options.study)
    if not options.report:
        if not (options.data_root and options.weights):
            raise InputError("--data_root and --weights: needed to run a study; --report does without")
        while (job := next_job(study, records, options.runs)) is not None:
            run_job(job, study, options)
            records.add(job, options.runs / job.key)
    results = collect(study, records)
    write_json(options.study.with_name(f"{options.study.stem}_results.json"), results)
    print(markdown(results))
    draw_differences(options.study.with_suffix(".png"), results)
    draw_sweeps(options.study.with_name(f"{options.study.stem}_sweeps.png"), results)


def _split_and_folder(text):
    split, sign, folder = text.partition("=")
    if not (split and sign and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not SPLIT=DIR")
    return split, Path(folder)


def read_study(path):
    """The content of a study's file. Raises InputError naming what is unknown, missing or misspelt in it."""
    try:
        study = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a study ({error}); see benchmarks/study/sketchy25.json") from None
    _check_keys(path, "the study", study, STUDY_KEYS, STUDY_KEYS - {"hold_out"})
    if "hold_out" in study:
        _check_keys(path, "hold_out", study["hold_out"], HOLD_OUT_KEYS, HOLD_OUT_KEYS)
        for name, value in study["hold_out"].items():
            if not isinstance(value, int):
                raise InputError(f"{path}: hold_out: {name} is not a whole number")
    if study["base"] not in study["variants"]:
        raise InputError(f"{path}: base: there is no variant {study['base']}")
    _check_keys(path, "sweeps", study["sweeps"], SWEEP_KEYS, SWEEP_KEYS)
    for name, split in study["splits"].items():
        _check_keys(path, f"split {name}", split, SPLIT_KEYS, SPLIT_KEYS)
        if not (ROOT / f"{split['script']}.py").is_file():
            raise InputError(f"{path}: split {name}: there is no script {split['script']}.py")
    for name, variant in study["variants"].items():
        _check_keys(path, f"variant {name}", variant, VARIANT_KEYS, VARIANT_KEYS - {"splits"})
        for split in variant.get("splits", study["splits"]):
            if split not in study["splits"]:
                raise InputError(f"{path}: variant {name}: there is no split {split}")
            job = Job(split, name, study["rates"][0], study["seeds"][0])
            train, test = commands(job, study)
            sweeps = [[*test, *more.split()] for more in sweeps_of(job, study)]
            for parser, command in [(train_parser, train), *((test_parser, each) for each in (test, *sweeps))]:
                try:
                    parser(PROTOCOLS["sketchy"]).parse_args(command[1:])
                except InputError as error:
                    raise InputError(f"{path}: variant {name}: {error}") from None
    return study


def _check_keys(path, where, content, known, needed):
    if not isinstance(content, dict):
        raise InputError(f"{path}: {where} is not names and values")
    for name in content.keys() - known:
        raise InputError(f"{path}: {where} has an unknown {name!r}; it may have {', '.join(sorted(known))}")
    for name in needed - content.keys():
        raise InputError(f"{path}: {where} lacks {name!r}")


def commands(job, study, data_root="DIR", weights="FILE", folder="RUN", test_root=None):
    """The arguments of a Job's train script and of its test script, the script's name first."""
    split, variant = study["splits"][job.split], study["variants"][job.variant]
    lists = ["--zero_version", job.lists]
    train = [*study["train"].split(), "--lr", job.rate, *split["train"].split(), *shlex.split(variant["train"])]
    train += ["--seed", str(job.seed), "--finetune", str(weights), "--savedir", str(folder)]
    test = [*study["test"].split(), "--clusters", str(split["clusters"]), "--resume_dir", str(folder)]
    if job.hold_out is not None:
        test += ["--mode", "1"]
    data, test_data = ["--data_root", str(data_root), *lists], ["--data_root", str(test_root or data_root), *lists]
    return ["train_sketchy_ext", *data, *train], [split["script"], *test_data, *test]


def next_job(study, records, runs):
    """The first Job that is neither done nor run by another process; None if there is none."""
    for job in jobs(study, records):
        if job.key not in records.runs and not _is_taken(runs / job.key):
            return job
    return None


def jobs(study, records):
    """All Jobs in order: those without training, the first seed at the rates to try, then all seeds at the best."""
    splits, seeds = list(study["splits"]), study["seeds"]
    trained = [
        (split, variant)
        for split in splits
        for variant, about in study["variants"].items()
        if variant != "untrained" and split in about.get("splits", splits)
    ]
    for split in splits:
        if "untrained" in study["variants"]:
            yield Job(split, "untrained", "0", seeds[0])
    for number in range(len(study["rates"])):
        for split, variant in trained:
            tried = rates_to_try(study, records, split, variant)
            if number < len(tried):
                yield rate_job(study, split, variant, tried[number])
    for seed in seeds:
        for split, variant in trained:
            if rate := chosen_rate(study, records, split, variant):
                yield Job(split, variant, rate, seed)


def rate_job(study, split, variant, rate):
    """The Job whose result decides on a rate; without held-out classes it is one on the first split for all splits."""
    if hold_out := study.get("hold_out"):
        return Job(split, variant, rate, study["seeds"][0], hold_out["seed"])
    return Job(next(iter(study["splits"])), variant, rate, study["seeds"][0])


def rates_to_try(study, records, split, variant):
    """The rates that are, or should be, tried by now: two in the middle, and the neighbours of the best one."""
    rates, middle = study["rates"], len(study["rates"]) // 2
    tried = rates[max(0, middle - 1) : middle + 1]
    while True:
        scores = _scores(study, records, split, variant, tried)
        if len(scores) < len(tried):
            return tried
        best = rates.index(max(scores, key=scores.get))
        new = [rate for rate in rates[max(0, best - 1) : best + 2] if rate not in tried]
        if not new:
            return tried
        tried = tried + new


def chosen_rate(study, records, split, variant):
    """The rate with the best score; None while some are not measured."""
    tried = rates_to_try(study, records, split, variant)
    scores = _scores(study, records, split, variant, tried)
    return max(scores, key=scores.get) if len(scores) == len(tried) else None


def _scores(study, records, split, variant, rates):
    """{rate: score} of the measured ones: mAP on held-out classes, without them the accuracy of the tested epoch."""
    runs = {rate: records.runs.get(rate_job(study, split, variant, rate).key) for rate in rates}
    if "hold_out" not in study:
        return {rate: run["tested"] for rate, run in runs.items() if run}
    return {rate: run["rows"][0][run["metrics"][0]] for rate, run in runs.items() if run}


def _is_taken(folder):
    """Whether another process trains or tests in a folder."""
    if not folder.is_dir():
        return False
    try:
        with folder_lock(folder, "training"), folder_lock(folder, "testing"):
            return False
    except InputError:
        return True


def run_job(job, study, options):
    """Train and test a Job, resuming a stopped training; then its sweeps, which write sweep-0.json, ..."""
    folder = (options.runs / job.key).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    weights = options.weights if options.weights in ("none", "timm") else Path(options.weights).resolve()
    data_root, test_roots = (
        Path(options.data_root).resolve(),
        dict(options.test_data_root),
    )
    if job.hold_out is not None:
        data_root, test_root = hold_out(job, study, data_root, options.runs.resolve()), None
    else:
        test_root = test_roots[job.split].resolve() if job.split in test_roots else None
    train, test = commands(job, study, data_root, weights, folder, test_root)
    if any((folder / name).exists() for name in ("checkpoint.pth.tar", "checkpoint.previous.pth.tar")):
        train.append("--resume")
    print(f"{job.key}: {' '.join(train)}", flush=True)
    _run(train, options.threads)
    for number, more in enumerate(sweeps_of(job, study)):
        _run([*test, *more.split()], options.threads)
        os.replace(folder / "results.json", folder / f"sweep-{number}.json")
    _run(test, options.threads)


def hold_out(job, study, data_root, runs):
    """Make the lists of a Job with held-out classes, unless they are there; returns their data folder, in `runs`."""
    root = runs / "data"
    if not (root / job.lists).is_dir():
        held_out = ["--hold_out_classes", str(study["hold_out"]["classes"]), "--seed", str(job.hold_out)]
        source = [str(data_root), "--custom", "--zero_version", job.split]
        prepare.main(["lists", *source, *held_out, "--out", str(root / job.lists), "--force"])
    return root


def _run(command, threads):
    script, *arguments = command
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    status = subprocess.run([sys.executable, ROOT / f"{script}.py", *arguments], env=environment, cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


def sweeps_of(job, study):
    """More options of further tests of a Job, one text each."""
    sweeps = study["sweeps"]
    return sweeps["tests"] if (job.lists, job.variant) == (sweeps["split"], sweeps["variant"]) else []


class Records:
    """Measurements of the runs of a study, in files beside its own: <study>_runs.json and <study>_queries.npz."""

    def __init__(self, path):
        self.json, self.arrays = path.with_name(f"{path.stem}_runs.json"), path.with_name(f"{path.stem}_queries.npz")
        self.read()

    def read(self):
        """Read both files."""
        self.runs = json.loads(self.json.read_text()) if self.json.exists() else {}
        self.queries = {}
        if self.arrays.exists():
            with np.load(self.arrays, allow_pickle=False) as arrays:
                self.queries = {name: arrays[name] for name in arrays.files}

    def add(self, job, folder):
        """Add the results in the folder of a Job to the files, which another process may have changed."""
        self.read()
        results, trained = (json.loads((folder / f"{name}.json").read_text()) for name in ("results", "train"))
        if job.hold_out is None:
            with np.load(folder / QUERIES, allow_pickle=False) as arrays:
                column = list(arrays["metrics"]).index(results["metrics"][0])
                self.queries[job.key] = arrays["values"][:, column].astype(np.float32)
                classes = np.unique(arrays["class"], return_inverse=True)[1]
                self.queries[f"{job.split}/classes"] = classes.astype(np.int16)
        measured = {
            "metrics": results["metrics"],
            "accuracy": [entry.get("accuracy", 0.0) for entry in trained["epochs"]],
            # of the epoch that is tested, the best one after warm-up
            "tested": max([e.get("accuracy", 0.0) for e in trained["epochs"] if e["phase"] != "warm-up"], default=0.0),
            "rows": [
                {name: row.get(name) for name in ("matching", "M", "K", *results["metrics"])} for row in results["rows"]
            ],
        }
        self.runs[job.key] = measured | (
            {"sweeps": sweeps} if (sweeps := _sweeps(folder, results["metrics"][0])) else {}
        )
        write_json(self.json, dict(sorted(self.runs.items())))
        with atomic_write(self.arrays) as file:
            np.savez_compressed(file, **dict(sorted(self.queries.items())))


def _sweeps(folder, metric):
    """The metric of each row of a run's sweeps: a list of [{"M", "K", "cluster_weight", "values"}, ...]."""
    sweeps, number = [], 0
    while (path := folder / f"sweep-{number}.json").is_file():
        rows = json.loads(path.read_text())["rows"]
        sweeps.append([
            {name: row.get(name) for name in ("M", "K", "cluster_weight")}
            | {"values": [each[metric] for each in row["seeds"].values()] if "seeds" in row else [row[metric]]}
            for row in rows if metric in row
        ])  # fmt: skip
        number += 1
    return sweeps


def collect(study, records):
    """The results so far, ready for JSON: the choice of rates, the rows of each split, and the sweeps."""
    names = {variant: about["name"] for variant, about in study["variants"].items()}
    rates = {
        (split, variant): "0" if variant == "untrained" else chosen_rate(study, records, split, variant)
        for split in study["splits"]
        for variant in names
    }
    rows, sweeps = [], []
    for split in study["splits"]:
        base = untrained = None
        for variant, name in names.items():
            done = [
                job
                for seed in study["seeds"]
                if (job := Job(split, variant, rates[split, variant], seed)).key in records.runs
            ]
            if not done:
                continue
            values = np.stack([records.queries[job.key] for job in done], axis=1).astype(np.float64)
            is_base = variant == study["base"]
            base = values if is_base else base
            summary = _rows(values, None if is_base else base, untrained, records.queries[f"{split}/classes"])
            untrained = values if variant == "untrained" else untrained
            train, test = (" ".join(each) for each in commands(done[0], study))
            for row, numbers in zip(records.runs[done[0].key]["rows"], summary, strict=True):
                about = {"split": split, "variant": name, "metric": records.runs[done[0].key]["metrics"][0]}
                about |= {part: row[part] for part in ("matching", "M", "K")}
                rows.append(about | numbers | {"rate": rates[split, variant], "train": train, "test": test})
            sweeps += [records.runs[job.key]["sweeps"] for job in done if "sweeps" in records.runs[job.key]]
    choice = {"chosen_by": study.get("hold_out", "accuracy on seen classes"), "rates": _choice(study, records, rates)}
    return {"base": names[study["base"]], **choice, "rows": rows, "sweeps": sweeps}


def _rows(values, base, untrained, classes):
    """For each row of values (rows, seeds, Q): its mean, deviation over seeds, and differences from base and untrained,
    shaped alike but for the seeds, or None; of rows after the first, which is one-to-one, also the gain over that."""
    for number, row in enumerate(values):
        summary = over_seeds(row, classes)
        if base is not None:
            summary["difference"], summary["interval"] = difference_interval(row, base[number], classes)
        if untrained is not None:
            over = difference_interval(row, untrained[number], classes)
            summary["over_untrained"], summary["over_untrained_interval"] = over
        if number:
            summary["gain"], summary["gain_interval"] = difference_interval(row, values[0], classes)
        yield summary


def _choice(study, records, rates):
    """Measurements at all rates: [{"split", "variant", "rate", "tested", "accuracy", "chosen", "metric", "values"}].

    "tested", "accuracy": on validation sketches of seen classes, in %, of the tested epoch and of all; "values": the
    metric of each row of the test, on held-out classes, or, without them, on unseen classes, which decides nothing.
    """
    choice = []
    for split in study["splits"] if "hold_out" in study else [next(iter(study["splits"]))]:
        for variant, about in study["variants"].items():
            for rate in study["rates"]:
                if run := records.runs.get(rate_job(study, split, variant, rate).key):
                    metric = run["metrics"][0]
                    entry = {"split": split, "variant": about["name"], "rate": rate, "tested": run["tested"]}
                    entry |= {"accuracy": run["accuracy"], "chosen": rate == rates[split, variant], "metric": metric}
                    choice.append(entry | {"values": [row[metric] for row in run["rows"]]})
    return choice


if __name__ == "__main__":
    sys.exit(main())
