"""Draws how seconds and memory grow with the number of photos, from records of other benchmarks.

    .venv/bin/python benchmarks/search.py --sizes 1000 10000 100000 1000000 --records growth.jsonl --folder DIR
    .venv/bin/python benchmarks/evaluation.py --tasks scaling --records matching_growth.jsonl
    .venv/bin/python benchmarks/growth.py growth.jsonl matching_growth.jsonl --to docs/growth.png

A record is a line of JSON, its memory optional: {"series": "open", "photos": 1000, "seconds": 0.01, "memory_gb": 0.1}.
Of several records of a series with one number of photos the last one counts.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+", help="files of records")
    parser.add_argument("--to", type=Path, required=True, help="PNG to write")
    options = parser.parse_args()
    series = read_series(options.records)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axis, (key, label) in zip(
        figure.subplots(1, 2), (("seconds", "seconds"), ("memory_gb", "memory, GB")), strict=True
    ):
        for number, (name, points) in enumerate(series.items()):
            shown = [(photos, record[key]) for photos, record in sorted(points.items()) if record.get(key)]
            if shown:
                style = dict(color=f"C{number}", linestyle="-" if number < 10 else "--", markersize=3, linewidth=1.2)
                axis.plot(*zip(*shown, strict=True), marker="o", label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="photos", ylabel=label)
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(options.to, dpi=100)


def read_series(paths):
    """{series: {photos: record}} in the order of the files."""
    series = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            series.setdefault(record["series"], {})[record["photos"]] = record
    return series


if __name__ == "__main__":
    main()
