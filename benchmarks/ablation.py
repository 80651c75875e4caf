"""What each part of the method brings: every variant trained with the same budget, each at its own learning rate.

    .venv/bin/python benchmarks/ablation.py benchmarks/study/sketchy25.json --data_root DIR --weights FILE
    .venv/bin/python benchmarks/ablation.py benchmarks/study/sketchy25.json --report

The rate of a variant is the one with the best accuracy on held-back sketches of seen classes, of the first seed on the
first split; unseen classes have no say. Two rates in the middle are tried, then the neighbours of the best. Runs that
are done are not done again, one that was stopped goes on, and one that another process is at is left to it. What was
measured is kept beside the study's file, for the report: tables, figures, and each number with its commands.
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

from datasets.protocols import PROTOCOLS  # noqa: E402
from models.compare import difference_interval, over_seeds  # noqa: E402
from models.eval.report import QUERIES  # noqa: E402
from models.options import test_parser, train_parser  # noqa: E402
from utils.cli import InputError, one_line_errors  # noqa: E402
from utils.files import atomic_write, folder_lock, write_json  # noqa: E402

PARTS = {"train", "test", "splits", "variants", "base", "sweeps", "rates", "seeds"}
SWEEPS = {"split", "variant", "tests"}
SPLIT, VARIANT = {"script", "clusters", "train"}, {"name", "train", "splits"}


class Job(NamedTuple):
    """A training and its test."""

    split: str
    variant: str
    rate: str
    seed: int

    @property
    def key(self):
        return "/".join(map(str, self))


@one_line_errors()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("study", type=Path, help="what is varied, JSON")
    add("--data_root", metavar="DIR", help="the data set")
    add("--weights", metavar="FILE", help="ImageNet weights that all runs start from: a file, timm or none")
    add("--runs", type=Path, default=Path("checkpoint/study"), metavar="DIR", help="takes the runs")
    add("--threads", type=int, default=1, help="of each run; two studies side by side want one each")
    add("--report", action="store_true", help="run nothing, print the tables and draw the figures")
    options = parser.parse_args(argv)
    study = read_study(options.study)
    records = Records(options.study)
    if not options.report:
        if not (options.data_root and options.weights):
            raise InputError("--data_root and --weights: needed to run a study; --report does without")
        while (job := next_job(study, records, options.runs)) is not None:
            do(job, study, options)
            records.take(job, options.runs / job.key)
    results = collect(study, records)
    write_json(options.study.with_name(f"{options.study.stem}_results.json"), results)
    print(markdown(results))
    draw_differences(options.study.with_suffix(".png"), results)
    draw_sweeps(options.study.with_name(f"{options.study.stem}_sweeps.png"), results)


def read_study(path):
    """The content of a study's file. Raises InputError naming what is unknown, missing or misspelt in it."""
    try:
        study = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a study ({error}); see benchmarks/study/sketchy25.json") from None
    _check_parts(path, "the study", study, PARTS, PARTS)
    if study["base"] not in study["variants"]:
        raise InputError(f"{path}: base: there is no variant {study['base']}")
    _check_parts(path, "sweeps", study["sweeps"], SWEEPS, SWEEPS)
    for name, split in study["splits"].items():
        _check_parts(path, f"split {name}", split, SPLIT, SPLIT)
        if not (ROOT / f"{split['script']}.py").is_file():
            raise InputError(f"{path}: split {name}: there is no script {split['script']}.py")
    for name, variant in study["variants"].items():
        _check_parts(path, f"variant {name}", variant, VARIANT, VARIANT - {"splits"})
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


def _check_parts(path, where, found, known, needed):
    if not isinstance(found, dict):
        raise InputError(f"{path}: {where} is not names and values")
    for name in found.keys() - known:
        raise InputError(f"{path}: {where} has an unknown {name!r}; it may have {', '.join(sorted(known))}")
    for name in needed - found.keys():
        raise InputError(f"{path}: {where} lacks {name!r}")


def commands(job, study, data_root="DIR", weights="FILE", folder="RUN"):
    """The arguments of a Job's train script and of its test script, the script's name first."""
    split, variant = study["splits"][job.split], study["variants"][job.variant]
    common = ["--data_root", str(data_root), "--zero_version", job.split]
    train = [*study["train"].split(), "--lr", job.rate, *split["train"].split(), *shlex.split(variant["train"])]
    train += ["--seed", str(job.seed), "--finetune", str(weights), "--savedir", str(folder)]
    test = [*study["test"].split(), "--clusters", str(split["clusters"]), "--resume_dir", str(folder)]
    return ["train_sketchy_ext", *common, *train], [split["script"], *common, *test]


def next_job(study, records, runs):
    """The first Job that is neither done nor in another process's hands; None where there is none."""
    for job in jobs(study, records):
        if job.key not in records.runs and not _is_taken(runs / job.key):
            return job
    return None


def jobs(study, records):
    """All Jobs in order: the first seed on the first split at every rate, then, at the chosen rates, the others."""
    splits, seeds = list(study["splits"]), study["seeds"]
    trained = [name for name in study["variants"] if name != "untrained"]
    for split in splits:
        if "untrained" in study["variants"]:
            yield Job(split, "untrained", "0", seeds[0])
    for number in range(len(study["rates"])):
        for variant in trained:
            tried = rates_to_try(study, records, variant)
            if number < len(tried):
                yield Job(splits[0], variant, tried[number], seeds[0])
    for seed in seeds:
        for split in splits:
            for variant in trained:
                rate = chosen_rate(study, records, variant)
                if rate and split in study["variants"][variant].get("splits", splits):
                    yield Job(split, variant, rate, seed)


def rates_to_try(study, records, variant):
    """The rates that are, or should be, tried by now: two in the middle, and the neighbours of the best one."""
    rates, middle = study["rates"], len(study["rates"]) // 2
    tried = rates[max(0, middle - 1) : middle + 1]
    while True:
        found = _accuracies(study, records, variant, tried)
        if len(found) < len(tried):
            return tried
        best = rates.index(max(found, key=found.get))
        new = [rate for rate in rates[max(0, best - 1) : best + 2] if rate not in tried]
        if not new:
            return tried
        tried = tried + new


def chosen_rate(study, records, variant):
    """The rate with the best accuracy on held-back sketches of seen classes; None while some are not measured."""
    tried = rates_to_try(study, records, variant)
    found = _accuracies(study, records, variant, tried)
    return max(found, key=found.get) if len(found) == len(tried) else None


def _accuracies(study, records, variant, rates):
    """{rate: accuracy of the tested epoch}, of the first seed on the first split, of those that are measured."""
    first, seed = next(iter(study["splits"])), study["seeds"][0]
    runs = {rate: records.runs.get(Job(first, variant, rate, seed).key) for rate in rates}
    return {rate: run["tested"] for rate, run in runs.items() if run}


def _is_taken(folder):
    """Whether another process trains or tests in a folder."""
    if not folder.is_dir():
        return False
    try:
        with folder_lock(folder, "training"), folder_lock(folder, "testing"):
            return False
    except InputError:
        return True


def do(job, study, options):
    """Train and test a Job, going on where it was stopped; then its sweeps, which leave sweep-0.json, ..."""
    folder = (options.runs / job.key).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    weights = options.weights if options.weights in ("none", "timm") else Path(options.weights).resolve()
    train, test = commands(job, study, Path(options.data_root).resolve(), weights, folder)
    if any((folder / name).exists() for name in ("checkpoint.pth.tar", "checkpoint.previous.pth.tar")):
        train.append("--resume")
    print(f"{job.key}: {' '.join(train)}", flush=True)
    _run(train, options.threads)
    for number, more in enumerate(sweeps_of(job, study)):
        _run([*test, *more.split()], options.threads)
        os.replace(folder / "results.json", folder / f"sweep-{number}.json")
    _run(test, options.threads)


def _run(command, threads):
    script, *arguments = command
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    status = subprocess.run([sys.executable, ROOT / f"{script}.py", *arguments], env=environment, cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


def sweeps_of(job, study):
    """More options of further tests of a Job, one text each."""
    sweeps = study["sweeps"]
    return sweeps["tests"] if (job.split, job.variant) == (sweeps["split"], sweeps["variant"]) else []


class Records:
    """What was measured in the runs of a study, beside its file: <study>_runs.json and <study>_queries.npz."""

    def __init__(self, path):
        self.json, self.arrays = path.with_name(f"{path.stem}_runs.json"), path.with_name(f"{path.stem}_queries.npz")
        self.read()

    def read(self):
        """Take what is there."""
        self.runs = json.loads(self.json.read_text()) if self.json.exists() else {}
        self.queries = {}
        if self.arrays.exists():
            with np.load(self.arrays, allow_pickle=False) as arrays:
                self.queries = {name: arrays[name] for name in arrays.files}

    def take(self, job, folder):
        """Add what a Job left in its folder, to what is there by now."""
        self.read()
        results, trained = (json.loads((folder / f"{name}.json").read_text()) for name in ("results", "train"))
        with np.load(folder / QUERIES, allow_pickle=False) as arrays:
            self.queries[job.key] = arrays["values"][:, list(arrays["metrics"]).index(results["metrics"][0])].astype(
                np.float32
            )
            self.queries[f"{job.split}/classes"] = np.unique(arrays["class"], return_inverse=True)[1].astype(np.int16)
        found = {
            "metrics": results["metrics"],
            "accuracy": [entry.get("accuracy", 0.0) for entry in trained["epochs"]],
            # of the epoch that is tested, the best one after warm-up
            "tested": max([e.get("accuracy", 0.0) for e in trained["epochs"] if e["phase"] != "warm-up"], default=0.0),
            "rows": [
                {name: row.get(name) for name in ("matching", "M", "K", *results["metrics"])} for row in results["rows"]
            ],
        }
        self.runs[job.key] = found | ({"sweeps": sweeps} if (sweeps := _sweeps(folder, results["metrics"][0])) else {})
        write_json(self.json, dict(sorted(self.runs.items())))
        with atomic_write(self.arrays) as file:
            np.savez_compressed(file, **dict(sorted(self.queries.items())))


def _sweeps(folder, metric):
    """The metric of each row of a run's sweeps: a list of [{"M", "K", "cluster_weight", "values"}, ...]."""
    found, number = [], 0
    while (path := folder / f"sweep-{number}.json").is_file():
        rows = json.loads(path.read_text())["rows"]
        found.append([
            {name: row.get(name) for name in ("M", "K", "cluster_weight")}
            | {"values": [each[metric] for each in row["seeds"].values()] if "seeds" in row else [row[metric]]}
            for row in rows if metric in row
        ])  # fmt: skip
        number += 1
    return found


def collect(study, records):
    """What a study has found so far, ready for JSON: the choice of rates, the rows of each split, and the sweeps."""
    names = {variant: about["name"] for variant, about in study["variants"].items()}
    rates = {variant: "0" if variant == "untrained" else chosen_rate(study, records, variant) for variant in names}
    rows, sweeps = [], []
    for split in study["splits"]:
        base = None
        for variant, name in names.items():
            done = [
                job for seed in study["seeds"] if (job := Job(split, variant, rates[variant], seed)).key in records.runs
            ]
            if not done:
                continue
            values = np.stack([records.queries[job.key] for job in done], axis=1).astype(np.float64)
            is_base = variant == study["base"]
            base = values if is_base else base
            found = _rows(values, None if is_base else base, records.queries[f"{split}/classes"])
            train, test = (" ".join(each) for each in commands(done[0], study))
            for row, numbers in zip(records.runs[done[0].key]["rows"], found, strict=True):
                about = {"split": split, "variant": name, "metric": records.runs[done[0].key]["metrics"][0]}
                about |= {part: row[part] for part in ("matching", "M", "K")}
                rows.append(about | numbers | {"rate": rates[variant], "train": train, "test": test})
            sweeps += [records.runs[job.key]["sweeps"] for job in done if "sweeps" in records.runs[job.key]]
    return {"base": names[study["base"]], "rates": _choice(study, records, rates), "rows": rows, "sweeps": sweeps}


def _rows(values, base, classes):
    """For each row of values (rows, seeds, Q): its mean, deviation over seeds, and difference from base (shaped alike);
    of rows after the first, which is one-to-one, also the gain over that."""
    for number, row in enumerate(values):
        found = over_seeds(row, classes)
        if base is not None:
            found["difference"], found["interval"] = difference_interval(row, base[number], classes)
        if number:
            found["gain"], found["gain_interval"] = difference_interval(row, values[0], classes)
        yield found


def _choice(study, records, rates):
    """What rates were chosen by: [{"variant", "rate", "tested", "accuracy", "chosen", "unseen"}, ...].

    "tested", "accuracy": in %; "unseen": the metric of each row on unseen classes, which has no say.
    """
    split, seed, choice = next(iter(study["splits"])), study["seeds"][0], []
    for variant, about in study["variants"].items():
        for rate in study["rates"]:
            if run := records.runs.get(Job(split, variant, rate, seed).key):
                found = {"variant": about["name"], "rate": rate, "tested": run["tested"], "accuracy": run["accuracy"]}
                unseen = [row[run["metrics"][0]] for row in run["rows"]]
                choice.append(found | {"chosen": rate == rates[variant], "unseen": unseen})
    return choice


if __name__ == "__main__":
    sys.exit(main())
