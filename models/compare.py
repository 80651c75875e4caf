"""Tables and a figure of the results of several runs, with confidence intervals of their differences.

    python -m models.compare checkpoint/A/seed* checkpoint/B/seed* --out comparison

Each run is a folder that a test wrote results.json and per_query.npz into. Runs that differ in their seed alone are one
setting. The other settings are compared with the first. Writes a figure, a Markdown and a LaTeX table.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from models.eval.figures import row_name
from models.eval.metrics import class_means
from models.eval.report import QUERIES
from models.run_record import TEST_RESULT_OPTIONS, effective_options
from utils.cli import (
    InputError,
    OneLineParser,
    nonempty_text,
    number_type,
    one_line_errors,
    path_type,
    printable,
    seed_type,
)
from utils.files import atomic_write, check_output, read_bytes, read_npz
from utils.pictures import OWN_PNG, draw_or_note, save_png

MAX_JSON_BYTES, MAX_QUERY_BYTES = 64 << 20, 1 << 30  # of results.json and train.json; of the arrays of per_query.npz
# How the files begin that this command writes.
OWN_FILES = {"md": rb"\A\| ", "tex": rb"\A\\begin\{tabular\}", "json": rb'\A\{\s*"metric":', "png": OWN_PNG}


@dataclass(frozen=True)
class TestedRun:
    """The files of a test of one run."""

    folder: Path
    results: dict  # results.json
    rows: list[tuple]  # (M, K, cluster weight), zeros for one-to-one matching
    metrics: list[str]
    values: np.ndarray  # (rows, metrics, Q)
    classes: np.ndarray  # (Q,) text
    sketches: np.ndarray  # (Q,) text


@one_line_errors()
def main(argv=None):
    """Command line."""
    options = create_parser().parse_args(argv)
    runs = [read_tested(folder) for folder in options.runs]
    for number, run in enumerate(runs):
        if any(os.path.samefile(run.folder, other.folder) for other in runs[:number]):
            raise InputError(f"{run.folder}: is named twice; one run is no two seeds")
    settings = group(runs)
    names = [printable(name) for name in options.names or [runs[0].folder for runs in settings]]
    if len(names) != len(settings):
        raise InputError(f"--names: {len(names)} names for {len(settings)} settings; name each of them, or none")
    metric = options.metric or settings[0][0].results["metrics"][0]
    if without := next((run for runs in settings for run in runs if metric not in run.metrics), None):
        raise InputError(
            f"--metric {metric}: {without.folder} has {', '.join(without.metrics)}; test it with --metrics {metric}"
        )
    paths = {kind: check_output(options.out / f"comparison.{kind}", "--out", own) for kind, own in OWN_FILES.items()}
    table = compare(settings, names, metric, options.draws, options.seed)
    _write(paths["md"], markdown(table, names, metric))
    _write(paths["tex"], latex(table, names, metric))
    _write(paths["json"], json.dumps({"metric": metric, "rows": table}, indent=1) + "\n")
    print(markdown(table, names, metric), end="")
    has_figure = draw_or_note(draw, paths["png"], table, names, metric)
    print(f"{'tables and figure' if has_figure else 'tables'}: {printable(options.out)}")


def create_parser():
    """The options of the command."""
    parser = OneLineParser(prog="python -m models.compare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "runs",
        type=path_type,
        nargs="+",
        metavar="RUN",
        help="folders with results of a test; the setting of the first is the baseline",
    )
    add(
        "--names", nargs="+", type=nonempty_text, metavar="NAME", help="names of the settings, in the order of the runs"
    )
    add("--metric", help="metric to compare (default: the protocol's first)")
    add("--draws", type=number_type(int, 100, 10**6, "a whole number from 100 to a million"), default=10_000,
        help="number of bootstrap draws")  # fmt: skip
    add("--seed", type=seed_type, default=0, help="seed of the bootstrap")
    add("--out", type=path_type, default=Path("comparison"), metavar="DIR", help="folder for the figure and the tables")
    return parser


def read_tested(folder):
    """The TestedRun of a folder. Raises InputError if files are missing, torn or not those of a test."""
    folder = folder.parent if folder.name in ("results.json", QUERIES) else folder
    path = folder / "results.json"
    try:
        results = json.loads(read_bytes(path, MAX_JSON_BYTES))
        _check_results(results)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the test first") from None
    except Exception:  # a file from elsewhere can fail in any way
        raise InputError(f"{path}: not the results of a test; run the test again") from None
    path = folder / QUERIES
    try:
        stored = _read_queries(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run the test again, earlier versions did not write it") from None
    except Exception:  # a file from elsewhere can fail in any way
        raise InputError(f"{path}: torn, or not what a test writes; run the test again") from None
    rows, names = [tuple(row) for row in stored["rows"].tolist()], [str(name) for name in stored["metrics"]]
    return TestedRun(folder, results, rows, names, stored["values"], stored["class"], stored["sketch"])


def _check_results(results):
    """Raise ValueError unless `results` has what is read of results.json, in its types."""
    features = results.get("features") or {}
    source = features.get("source") or {}
    metrics = results["metrics"]
    fits = (
        isinstance(results["benchmark"], str) and isinstance(results["options"], dict) and isinstance(source, dict)
        and isinstance(metrics, list) and metrics and all(isinstance(name, str) for name in metrics)
    )  # fmt: skip
    if not fits:
        raise ValueError("not the results of a test")


def _read_queries(path):
    """The arrays of a per_query.npz by name. Raises ValueError, and what zipfile and NumPy raise for damaged files."""
    stored = read_npz(path, MAX_QUERY_BYTES, ("rows", "metrics", "values", "class", "sketch"))
    rows, values = stored["rows"], stored["values"]
    shape = len(rows), len(stored["metrics"]), len(stored["class"])
    if rows.shape != (shape[0], 3) or values.shape != shape or stored["sketch"].shape != shape[2:] or not all(shape):
        raise ValueError("shapes do not fit together")
    kinds = {name: array.dtype.kind for name, array in stored.items()}
    if kinds["rows"] not in "iuf" or values.dtype not in (np.float32, np.float64):
        raise ValueError("not numbers")
    if not np.isfinite(rows).all() or (rows < 0).any() or ((values < 0) | (values > 1)).any():
        raise ValueError("numbers out of range")
    if any(kinds[name] not in "US" for name in ("metrics", "class", "sketch")):
        raise ValueError("not texts")
    return stored


def group(runs):
    """TestedRuns as lists of one setting each, in order of appearance.

    Raises InputError if they are of different protocols, lists or sketches, or have no row in common.
    """
    settings, first = {}, runs[0]
    for run in runs:
        _check_alike(first, run)
        settings.setdefault(_setting(run), []).append(run)
    return list(settings.values())


def _check_alike(first, run):
    pair = f"{first.folder} and {run.folder}"
    features = [each.results.get("features") or {} for each in (first, run)]
    sources = [each.get("source") or {} for each in features]
    same_features = features[0].get("sha256") is not None and features[0]["sha256"] == features[1].get("sha256")
    # Without the images at hand a test has the protocol's title, and numbers for sketches and classes.
    for name in ("protocol",) if same_features else ("benchmark", "protocol"):
        one, two = (each.results.get(name) for each in (first, run))
        if one != two:
            raise InputError(f"{pair}: of {one} and of {two}; compare runs of the same benchmark")
    lists = ("photo list", "sketch list")
    known = all(name in source for name in lists for source in sources)
    for name in lists:
        if all(name in source for source in sources) and sources[0][name] != sources[1][name]:
            raise InputError(f"{pair}: tested on different {name}s; test both on the same lists")
    same_names = np.array_equal(first.sketches, run.sketches) and np.array_equal(first.classes, run.classes)
    same_count = len(first.sketches) == len(run.sketches)
    if not (same_count and (same_names or same_features or (known and _has_numbers(first, run)))):
        raise InputError(f"{pair}: tested with different sketches; test both on the same lists")
    if not set(first.rows) & set(run.rows):
        raise InputError(f"{pair}: have no row in common; test both with the same --subspaces and --clusters")


def _has_numbers(*runs):
    """Whether a test had no images at hand, so that its sketches are numbers."""
    return any(all(str(name).isdecimal() for name in run.sketches) for run in runs)


def _setting(run):
    """The options that runs of one setting share: those of the test and of training that change results, but seeds."""
    test = {name: run.results["options"].get(name) for name in TEST_RESULT_OPTIONS}
    try:
        options = effective_options(json.loads(read_bytes(run.folder / "train.json", MAX_JSON_BYTES))["options"])
        options.pop("seed", None)
    except Exception:  # a file from elsewhere can fail in any way
        options = {"folder": str(run.folder)}  # not known, so each folder is a setting
    return json.dumps([test, options], sort_keys=True, default=str)


def compare(settings, names, metric, draws=10_000, seed=0):
    """Rows that all settings have, each with all of them: a list of {"row", "settings": [{"name", "mean", "deviation"
    over seeds (None for one), "seeds", "difference" and "interval" against the first}, ...]}.

    settings: as `group` gives them; draws, seed: of the bootstrap.
    """
    first = settings[0][0]
    common = [row for row in first.rows if all(row in run.rows for runs in settings for run in runs)]
    classes = np.unique(first.classes, return_inverse=True)[1]
    table = []
    for row in common:
        per_setting = [np.stack([_of_row(run, row, metric) for run in runs]) for runs in settings]
        entries = []
        for name, values in zip(names, per_setting, strict=True):
            entry = {"name": name, **over_seeds(values, classes)}
            if values is not per_setting[0]:
                entry["difference"], entry["interval"] = difference_interval(
                    values, per_setting[0], classes, draws, seed
                )
            entries.append(entry)
        subspaces, clusters, weight = row
        row_labels = {"matching": "one-to-one"} if not clusters else {"M": int(subspaces), "K": int(clusters)}
        table.append(
            {"row": row_name(row_labels | ({"cluster_weight": weight} if clusters else {})), "settings": entries}
        )
    return table


def _of_row(run, row, metric):
    return np.nan_to_num(run.values[run.rows.index(row), run.metrics.index(metric)])


def over_seeds(values, classes):
    """{"mean", "deviation" (None for one seed), "seeds"} of values (seeds, Q); classes: (Q,) from 0."""
    means = class_mean(values, classes)
    deviation = float(means.std(ddof=1)) if len(means) > 1 else None
    return {"mean": float(means.mean()), "deviation": deviation, "seeds": len(means)}


def difference_interval(values, base, classes, draws=10_000, seed=0):
    """(difference, its interval) of two values (seeds, Q), whose sketches are paired; draws, seed: see bootstrap."""
    difference = values.mean(axis=0) - base.mean(axis=0)
    return float(class_mean(difference, classes)), bootstrap(difference, classes, draws, seed)


def class_mean(values, classes):
    """Mean over the sketches of a class, then over classes, of values (..., Q); classes: (Q,) from 0."""
    by_sketch = torch.from_numpy(np.moveaxis(np.asarray(values), -1, 0).copy())
    return class_means(by_sketch, torch.from_numpy(classes))[1].mean(dim=0).numpy()


def bootstrap(values, classes, draws=10_000, seed=0, level=0.95):
    """A confidence interval of the class mean of values (Q,): [low, high]; classes: (Q,) from 0.

    Two-stage bootstrap (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8): a draw takes
    C of the C classes with replacement and, in each, its number of sketches with replacement; b is the mean of their
    class means. With the class means m_1..m_C, their mean m and standard deviation s, the interval is
        m + k (q - m) for the quantiles q of b,   k = t(C - 1) / z · (s / √C) / std(b),
    t and z the two-sided quantiles of Student's and the normal distribution: the shape of the bootstrap, the width of
    a t-interval. Without k, the second stage counts the spread of sketches twice, and few classes vary too little.
    """
    random = np.random.default_rng(seed)
    groups = [values[classes == label] for label in range(classes.max() + 1)]
    count, by_class = len(groups), np.array([group.mean() for group in groups])
    drawn = np.empty((draws, count))
    for start in range(0, draws, 256):
        chunk = drawn[start : start + 256]
        chosen = random.integers(count, size=chunk.shape)
        for label, group in enumerate(groups):
            where = np.nonzero(chosen == label)
            chunk[where] = group[random.integers(len(group), size=(len(where[0]), len(group)))].mean(axis=1)
    spread = drawn.mean(axis=1) - by_class.mean()
    if count > 1 and spread.std() > 0:
        quantiles = stats.t.ppf((1 + level) / 2, count - 1) / stats.norm.ppf((1 + level) / 2)
        spread *= quantiles * by_class.std(ddof=1) / np.sqrt(count) / spread.std()
    return (by_class.mean() + np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])).tolist()


def markdown(table, names, metric):
    """The table in Markdown: a line a row, a column a setting."""
    titles = [re.sub(r"[|<]", r"\\\g<0>", each) for each in (metric, *names)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join([entry["row"], *map(cell, entry["settings"])]) + " |" for entry in table]
    return "\n".join([*lines, "", _LEGEND, ""])


def latex(table, names, metric):
    """The table in LaTeX, for booktabs."""
    lines = [r"\begin{tabular}{l" + "c" * len(names) + "}", r"\toprule"]
    lines += [" & ".join(map(_escaped, [metric, *names])) + r" \\", r"\midrule"]
    for entry in table:
        cells = [_escaped(cell(each)).replace("±", r"$\pm$") for each in entry["settings"]]
        lines.append(" & ".join([_escaped(entry["row"]), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% {_LEGEND}", ""])


_LEGEND = (
    "Mean ± deviation over seeds; difference from the first and its 95 % interval "
    "(bootstrap of classes, then sketches, with the width of Student's t for the number of classes)."
)


def cell(entry):
    """The text of what over_seeds and apart give."""
    text = f"{entry['mean']:.3f}" + ("" if entry["deviation"] is None else f" ± {entry['deviation']:.3f}")
    if "difference" in entry:
        text += f" ({signed(entry['difference'], entry['interval'])})"
    return text


def signed(difference, interval):
    """The text of a difference and its interval."""
    return "{:+.3f}, {:+.3f} to {:+.3f}".format(difference, *interval)


def _escaped(text):
    for sign in "\\&%$#_{}~^":
        text = text.replace(sign, {"\\": r"\textbackslash ", "~": r"\~{}", "^": r"\^{}"}.get(sign, "\\" + sign))
    return text


def draw(path, table, names, metric):
    """Draw the differences from the first setting with their intervals, or, of one setting, its means.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.28 * len(table) * max(1, len(names) - 1)), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(names[1:] or names):
        entries = [row["settings"][number + (len(names) > 1)] for row in table]
        heights = [line + 0.8 * number / max(1, len(names) - 1) for line in range(len(table))]
        if len(names) == 1:
            axis.plot([entry["mean"] for entry in entries], heights, "o", label=name)
            continue
        middle = np.array([entry["difference"] for entry in entries])
        ends = np.abs(np.array([entry["interval"] for entry in entries]).T - middle)
        axis.errorbar(middle, heights, xerr=ends, fmt="o", capsize=3, label=name)
    if len(names) > 1:
        axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(table)), [row["row"] for row in table])
    axis.invert_yaxis()
    what = f"{metric}: difference from {names[0]}, 95 % interval" if len(names) > 1 else metric
    axis.set_xlabel(what, parse_math=False)
    axis.grid(axis="x", alpha=0.3)
    for text in axis.legend(fontsize=8).get_texts():
        text.set_parse_math(False)
    save_png(figure, path, dpi=120)


def _write(path, text):
    with atomic_write(path) as file:
        file.write(text.encode())


if __name__ == "__main__":
    sys.exit(main())
