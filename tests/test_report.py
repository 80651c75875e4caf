import sys

import numpy as np
import pytest
from PIL import Image

from datasets.protocols import PROTOCOLS
from models.eval.report import draw_retrievals, pick_queries, print_table


def test_best_and_worst_come_from_as_many_classes_as_there_are():
    average_precision = np.array([0.9, 1.0, 0.8, 0.1, 0.2, 0.3])
    labels = np.array([0, 0, 1, 0, 1, 2])
    best, worst = pick_queries(average_precision, labels, 2)
    assert (best, worst) == ([1, 2], [4, 3])
    best, worst = pick_queries(average_precision, labels, 5)
    assert sorted(best)[:3] == [0, 1, 2] and len(set(best)) == 5


def test_the_table_marks_as_many_clusters_as_classes(capsys):
    rows = [{"matching": "one-to-one", "mAP": 0.25, "Prec": 0.5}]
    rows += [{"matching": "one-to-many", "M": 2, "K": k, "mAP": 0.5, "Prec": 0.75} for k in (20, 21)]
    print_table({"queries": 1200, "gallery": 3400, "classes": 21, "rows": rows}, PROTOCOLS["sketchy_split"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Sketchy Ext Split: 1,200 sketches, 3,400 photos, 21 classes"
    assert lines[1].split() == ["matching", "M", "K", "mAP@200", "Prec@200"]
    assert [line.split()[2] for line in lines[2:5]] == ["-", "20", "21*"]
    assert lines[2].split()[3:] == ["0.2500", "0.5000"]


@pytest.fixture
def queries(tmp_path):
    for name, colour in (("sketch", "white"), ("right", "green"), ("wrong", "red")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    found = [(tmp_path / "right.png", True), (tmp_path / "wrong.png", False)]
    return [("a$_$b\nAP 0.50", tmp_path / "sketch.png", found)] * 2


def test_right_and_wrong_retrievals_are_framed_differently(queries, tmp_path):
    draw_retrievals(tmp_path / "r.png", queries, "title")
    with Image.open(tmp_path / "r.png") as image:
        colours = {colour for count, colour in image.convert("RGB").getcolors(1 << 20) if count > 50}
    assert {(44, 160, 44), (214, 39, 40)} <= colours  # matplotlib's tab:green and tab:red


def test_without_matplotlib_there_is_no_picture(queries, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        draw_retrievals(tmp_path / "r.png", queries, "title")
    assert not (tmp_path / "r.png").exists()
