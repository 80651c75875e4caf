import sys

import numpy as np
import pytest
from PIL import Image

from datasets.protocols import PROTOCOLS
from models.eval.figures import draw_precision_recall, draw_retrievals, main_rows, pick_queries, row_name
from models.eval.report import print_classes, print_table


def test_best_typical_and_worst_are_of_as_many_classes_as_possible():
    average_precision = np.array([0.9, 1.0, 0.8, 0.1, 0.2, 0.3, 0.5, 0.52])
    labels = np.array([0, 0, 1, 0, 1, 2, 0, 1])
    picked = pick_queries(average_precision, labels, 2)
    assert picked == {"best": [1, 2], "typical": [7, 6], "worst": [4, 3]}
    everyone = pick_queries(average_precision, labels, 3)
    assert everyone["best"] == [1, 2, 5] and sorted(index for group in everyone.values() for index in group) == list(
        range(8)
    )


def results_of(*rows, classes=21, protocol=PROTOCOLS["sketchy"]):
    names = ("mAP@all", "mAP@200", "Prec@100", "Prec@200")
    rows = [dict.fromkeys(names, 0.25) | {"precision_at_recall": [0.5] * 11} | row for row in rows]
    head = {"benchmark": protocol.title, "protocol": protocol.name, "metrics": list(protocol.metrics)}
    return {**head, "queries": 1200, "gallery": 3400, "classes": classes, "rows": rows}


ONE = {"matching": "one-to-one"}


def many(clusters, subspaces=2, **more):
    return {"matching": "one-to-many", "M": subspaces, "K": clusters, **more}


def test_the_table_marks_as_many_clusters_as_classes(capsys):
    results = results_of(ONE, many(20), many(21, **{"mAP@200": 0.5}), protocol=PROTOCOLS["sketchy_split"])
    print_table(results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Sketchy Ext Split: 1,200 sketches, 3,400 photos, 21 classes"
    assert lines[1].split() == ["matching", "M", "K", "mAP@200", "Prec@200"]
    assert [line.split()[2] for line in lines[2:5]] == ["-", "20", "21*"]
    assert lines[4].split()[3:] == ["0.5000", "0.2500"]


def test_the_table_shows_the_spread_of_seeds_and_collapsed_mixtures(capsys):
    results = results_of(
        ONE,
        many(20, spread={"mAP@all": {"deviation": 0.0123, "range": [0.2, 0.3]}}),
        many(21, spread={"mAP@all": {"deviation": None, "range": [0.25, 0.25]}}),
    )
    results["rows"].append(many(22, failed={"123": "sub-space 0: component 3 collapsed"}))
    print_table(results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("mAP@all over seeds")
    assert lines[3].endswith("± 0.0123, 0.2000 to 0.3000")
    assert lines[4].endswith("0.2500  0.2500 to 0.2500")
    assert lines[5].endswith("22    left out, a mixture collapsed")


def test_classes_are_printed_best_first(capsys):
    def classes(**values):
        return {"per_class": {name: {"mAP@all": ap, "Prec@100": ap / 2} for name, ap in values.items()}}

    rows = (
        ONE | classes(bell=0.5, cow=0.75),
        many(20) | classes(bell=0.125, cow=0.0),
        many(21) | classes(bell=0.25, cow=0.5),
    )
    print_classes(results_of(*rows))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[-2:] == ["M 2, K 21 mAP@all", "M 2, K 21 Prec@100"]
    assert [line.split() for line in lines[1:]] == [
        ["cow", "0.7500", "0.3750", "0.5000", "0.2500"],
        ["bell", "0.5000", "0.2500", "0.2500", "0.1250"],
    ]


def test_the_figure_shows_one_curve_for_each_number_of_subspaces(tmp_path):
    rows = [row | {"per_class": {}} for row in (ONE, many(20), many(21), many(22), many(20, 4), many(22, 4))]
    results = results_of(*rows)
    assert [row_name(row) for row in main_rows(results)] == ["one-to-one", "M 2, K 21", "M 4, K 22"]
    draw_precision_recall(tmp_path / "pr.png", results)
    with Image.open(tmp_path / "pr.png") as image:
        assert image.size == (650, 520)


@pytest.fixture
def groups(tmp_path):
    for name, colour in (("sketch", "white"), ("right", "green"), ("wrong", "red")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    photos = [(tmp_path / "right.png", True), (tmp_path / "wrong.png", False)]
    queries = [("a$_$b\nAP 0.50", tmp_path / "sketch.png", photos)] * 2
    return [("best", queries), ("typical", []), ("worst", queries[:1])]


def test_right_and_wrong_retrievals_are_framed_differently(groups, tmp_path):
    draw_retrievals(tmp_path / "r.png", groups, "title")
    with Image.open(tmp_path / "r.png") as image:
        colours = {colour for count, colour in image.convert("RGB").getcolors(1 << 20) if count > 50}
    assert {(44, 160, 44), (214, 39, 40)} <= colours  # matplotlib's tab:green and tab:red


def test_without_matplotlib_there_is_no_picture(groups, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        draw_retrievals(tmp_path / "r.png", groups, "title")
    assert not (tmp_path / "r.png").exists()
