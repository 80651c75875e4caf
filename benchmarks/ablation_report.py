"""Tables and figures of an ablation study; see ablation.py."""

from itertools import groupby

import numpy as np

from models.compare import cell, signed
from utils.files import atomic_write


def markdown(results):
    """The choice of rates, and a table a split: mean ± deviation over seeds, and the difference from the base."""
    lines = _rates_table(results["rates"], results["chosen_by"])
    for split, rows in groupby(results["rows"], key=lambda row: row["split"]):
        rows = list(rows)
        lines += ["", f"{split}, {rows[0]['metric']}, and its difference from {results['base']}:", ""]
        lines += _table(rows, cell, lambda row: signed(row["gain"], row["gain_interval"]))
        if trained := [row for row in rows if "over_untrained" in row]:
            lines += ["", f"{split}, {rows[0]['metric']}: difference from no training:", ""]
            lines += _table(trained, lambda row: signed(row["over_untrained"], row["over_untrained_interval"]))
    return "\n".join(lines)


def _table(rows, show, gain=None):
    """Lines of a table: a line a variant, a column a matching with the text show(row), and one of gains over the first
    matching with the texts gain(row), joined."""
    shown = list(dict.fromkeys(_matching(row) for row in rows))
    heads = ["variant", "seeds", *shown] + ([f"gain over {shown[0]}"] if gain else [])
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for variant, own in groupby(rows, key=lambda row: row["variant"]):
        own = list(own)
        cells = [variant, str(own[0]["seeds"]), *map(show, own)] + (["; ".join(map(gain, own[1:]))] if gain else [])
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rates_table(runs, chosen_by):
    """Lines on the choice of rates. chosen_by: the study's "hold_out", or a text for a study without."""
    seen = "Seen: accuracy (%) on validation sketches of seen classes, of the tested epoch and of the last three"
    metrics = " and ".join(dict.fromkeys(run["metric"] for run in runs))
    if isinstance(chosen_by, dict):
        held_out = f"{chosen_by['classes']} seen classes that are held out (seed {chosen_by['seed']})"
        validated = any(any(run["accuracy"]) for run in runs)
        lines = [f"Held out: {metrics}, one-to-one, on {held_out};"]
        lines += ["the best rate (*) is taken." + f" {seen}." * validated, ""]
        lines += ["| split | variant | rate | held out |" + " seen |" * validated, "|---" * (4 + validated) + "|"]
    else:
        lines = [f"Rates chosen by {chosen_by}, not by retrieval of held-out classes. {seen};"]
        lines += [f"the best rate (*) is taken. Unseen: {metrics} by each matching; it decides nothing.", ""]
        lines += ["| variant | rate | seen | unseen |", "|---|---|---|---|"]
    for run in runs:
        values = " / ".join(f"{value:.3f}" for value in run["values"])
        seen = f"{run['tested']:.1f} ({' '.join(f'{value:.1f}' for value in run['accuracy'][-3:])})"
        cells = [run["variant"], f"{run['rate']}{' *' if run['chosen'] else ''}"]
        if isinstance(chosen_by, dict):
            cells = [run["split"], *cells, values, *[seen] * validated]
        else:
            cells += [seen, values]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _matching(row):
    return row["matching"] if row["M"] is None else f"{row['matching']}, M {row['M']}, K {row['K']}"


def draw_differences(path, results):
    """Draw the differences from the base with their intervals, a panel a split."""
    splits = {split: list(rows) for split, rows in groupby(results["rows"], key=lambda row: row["split"])}
    figure, panels = _figure(len(splits), (5.5, 3.6))
    for axis, (split, rows) in zip(panels, splits.items(), strict=True):
        rows = [row for row in rows if "difference" in row]
        if not rows:
            continue
        names = list(dict.fromkeys(row["variant"] for row in rows))
        for number, matching in enumerate(dict.fromkeys(_matching(row) for row in rows)):
            own = [row for row in rows if _matching(row) == matching]
            middle = np.array([row["difference"] for row in own])
            ends = np.abs(np.array([row["interval"] for row in own]).T - middle)
            places = [names.index(row["variant"]) + 0.25 * number - 0.125 for row in own]
            axis.errorbar(middle, places, xerr=ends, fmt="o", capsize=3, label=matching)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set(title=split, xlabel=f"{rows[0]['metric']}: difference from {results['base']}, 95 %")
        axis.locator_params(axis="x", nbins=6)  # more labels overlap
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    _write(path, figure)


def draw_sweeps(path, results):
    """Draw the metric of each sweep over its cluster weights, or else over K, a line for each M: the mean of all
    trainings and mixtures, and a band of one deviation. Draws nothing without sweeps."""
    runs = results["sweeps"]
    if not runs:
        return
    figure, panels = _figure(len(runs[0]), (5, 3.6))
    for axis, rows in zip(panels, map(sum, zip(*runs, strict=True), [[]] * len(runs[0])), strict=True):
        one_to_one = [row["values"][0] for row in rows if row["M"] is None]
        rows = [row for row in rows if row["M"] is not None]
        varied = "cluster_weight" if len({row["cluster_weight"] for row in rows}) > 1 else "K"
        what = {"cluster_weight": "weight of the cluster distance", "K": "K, clusters in each of M sub-spaces"}[varied]
        for subspaces in sorted({row["M"] for row in rows}):
            own = [row for row in rows if row["M"] == subspaces]
            label = f"M {subspaces}" + (f", K {own[0]['K']}" if varied != "K" else "")
            _band(axis, [(row[varied], row["values"]) for row in own], label)
        axis.axhline(np.mean(one_to_one), color="black", linewidth=0.8, linestyle="--", label="one-to-one")
        axis.set(xlabel=what, ylabel=results["rows"][0]["metric"], xscale="log" if varied == "K" else "linear")
        if varied == "K":
            ticks = sorted({row["K"] for row in rows})
            axis.set_xticks(ticks, ticks)
            axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    _write(path, figure)


def _band(axis, points, label):
    """points: [(x, values), ...], several of one x."""
    places = sorted({x for x, _ in points})
    values = [np.concatenate([each for x, each in points if x == place]) for place in places]
    mean, deviation = (np.array([getattr(each, name)() for each in values]) for name in ("mean", "std"))
    axis.plot(places, mean, marker=".", label=label)
    axis.fill_between(places, mean - deviation, mean + deviation, alpha=0.2)


def _figure(panels, size):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * panels, size[1]), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _write(path, figure):
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
