"""What a study found, as tables and figures; see study.py."""

from itertools import groupby

import numpy as np

from datasets.files import write_whole


def markdown(results):
    """The choice of rates, and a table a split: mean ± deviation over seeds, and the difference from cross entropy."""
    lines = [
        "Accuracy (%) on held-back sketches of seen classes, of the tested epoch and of the last three; * chosen:",
        "",
    ]
    lines += ["| variant | rates |", "|---|---|"]
    for variant, runs in groupby(results["rates"], key=lambda run: run["variant"]):
        lines.append(f"| {variant} | {'; '.join(map(_rate, runs))} |")
    for split, rows in groupby(results["rows"], key=lambda row: row["split"]):
        rows = list(rows)
        shown = list(dict.fromkeys(_matching(row) for row in rows))
        lines += ["", f"{split}, {rows[0]['metric']}:", "", f"| variant | seeds | {' | '.join(shown)} |"]
        lines.append("|---" * (len(shown) + 2) + "|")
        for variant, own in groupby(rows, key=lambda row: row["variant"]):
            own = list(own)
            lines.append(f"| {variant} | {own[0]['seeds']} | {' | '.join(map(_cell, own))} |")
    return "\n".join(lines)


def _rate(run):
    last = " ".join(f"{value:.1f}" for value in run["accuracy"][-3:])
    return f"{run['rate']}: {run['tested']:.1f} ({last}){' *' if run['chosen'] else ''}"


def _matching(row):
    return row["matching"] if row["M"] is None else f"{row['matching']}, M {row['M']}, K {row['K']}"


def _cell(row):
    text = f"{row['mean']:.3f}" + (f" ± {row['deviation']:.3f}" if row["deviation"] is not None else "")
    if "difference" in row:
        text += " ({:+.3f}, {:+.3f} to {:+.3f})".format(row["difference"], *row["interval"])
    return text


def draw_differences(path, results):
    """Draw the differences from cross entropy with their intervals, a panel a split."""
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
        axis.set(title=split, xlabel=f"{rows[0]['metric']}: difference from cross entropy alone, 95 %")
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=8)
    _write(path, figure)


def draw_sweeps(path, results):
    """Draw the metric over K for each M, and over the cluster weight: the mean, and a band of one deviation over
    trainings and mixtures. The first two sweeps of each run are drawn; nothing without any."""
    if not results["sweeps"]:
        return
    over_clusters, over_weight = ([run[number] for run in results["sweeps"]] for number in (0, 1))
    figure, panels = _figure(2, (5, 3.6))
    one_to_one = [row["values"][0] for run in over_clusters for row in run if row["M"] is None]
    rows = [row for run in over_clusters for row in run if row["M"] is not None]
    for subspaces in sorted({row["M"] for row in rows}):
        _band(panels[0], [(row["K"], row["values"]) for row in rows if row["M"] == subspaces], f"M {subspaces}")
    panels[0].set(xscale="log", xlabel="K, clusters in each of M sub-spaces", ylabel=results["rows"][0]["metric"])
    rows = [row for run in over_weight for row in run if row["M"] is not None]
    _band(panels[1], [(row["cluster_weight"], row["values"]) for row in rows], f"M {rows[0]['M']}, K {rows[0]['K']}")
    panels[1].axvline(0.8, color="grey", linewidth=0.8, linestyle=":", label="the paper's weight")
    panels[1].set(xlabel="weight of the cluster distance")
    for axis in panels:
        axis.axhline(np.mean(one_to_one), color="black", linewidth=0.8, linestyle="--", label="one-to-one")
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
    with write_whole(path) as file:
        figure.savefig(file, format="png", dpi=110)
