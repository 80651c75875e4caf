"""benchmarks/ablation.py: which runs it makes, at which rates, and what it makes of their numbers."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation as studies  # noqa: E402
from ablation_report import draw_sweeps, markdown  # noqa: E402

STUDIES = ROOT / "benchmarks/study"
SHIPPED = [path for path in sorted(STUDIES.glob("*.json")) if not path.stem.endswith(("_runs", "_results"))]


@pytest.fixture
def study(tmp_path):
    """A study of two variants, two splits and four rates; its file and its content."""
    content = {
        "train": "--model convnextv2_atto --input_size 32 --batch_size 30 --epochs 1 --warmup_epochs 0 --max_steps 1",
        "test": "--model convnextv2_atto --input_size 32 --workers 0 --device cpu --subspaces 2",
        "splits": {
            "zeroshot1": {"script": "test_sketchy_ext_zeroshot", "clusters": 3, "train": ""},
            "zeroshot2": {"script": "test_sketchy_ext_split_zeroshot", "clusters": 3, "train": "--no_mask"},
        },
        "variants": {
            "untrained": {"name": "no training", "train": "--lr 0 --no_validation"},
            "cls": {"name": "cross entropy alone", "train": "--losses cls --workers 0 --device cpu"},
            "method": {"name": "the method", "train": "", "splits": ["zeroshot1"]},
        },
        "base": "cls",
        "sweeps": {"split": "zeroshot1", "variant": "cls", "tests": ["--clusters 2 3 --mixture_seeds 1 2"]},
        "rates": ["1", "2", "3", "4"],
        "seeds": [0, 1],
    }
    path = tmp_path / "toys.json"
    path.write_text(json.dumps(content))
    return path, content


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_studies_are_some(path):
    assert studies.read_study(path)["base"] == "cls"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda study: "[", "toys.json: not a study"),
        (lambda study: [], "toys.json: the study is not names and values"),
        (lambda study: study.pop("seeds"), "the study lacks 'seeds'"),
        (lambda study: study.update(rate=[1]), "the study has an unknown 'rate'"),
        (lambda study: study["variants"]["cls"].update(train="--loses cls"), "variant cls: unrecognized arguments"),
        (lambda study: study["variants"]["cls"].update(train="--losses ma"), "variant cls: --losses: without cls"),
        (lambda study: study["variants"]["cls"].update(splits=["zeroshot3"]), "there is no split zeroshot3"),
        (lambda study: study["splits"]["zeroshot1"].update(script="test_shoes"), "there is no script test_shoes.py"),
        (lambda study: study.update(base="nothing"), "base: there is no variant nothing"),
        (lambda study: study["sweeps"].update(tests=["--cluster 3 x"]), "variant cls:"),
        (lambda study: study.update(hold_out={"classes": 3}), "hold_out lacks 'seed'"),
        (lambda study: study.update(hold_out={"classes": "3", "seed": 0}), "hold_out: classes is not a whole number"),
    ],
)  # fmt: skip
def test_a_faulty_study_ends_in_one_line(change, message, study, fails):
    path, content = study
    changed = change(content)
    path.write_text(changed if changed == "[" else json.dumps(changed if changed == [] else content))
    assert message in fails(studies.main, path, "--report")


def test_a_study_needs_data_and_weights(study, fails):
    assert "--data_root and --weights" in fails(studies.main, study[0])


def done(study, path, score):
    """Record all jobs of a study without running them. score: a function of a Job. Returns their keys."""
    records, keys = studies.Records(path), []
    while (job := studies.next_job(study, records, path.parent / "runs")) is not None:
        assert job.key not in keys
        keys.append(job.key)
        records.runs[job.key] = score(job)
    return keys


@pytest.mark.parametrize(
    "found, tried, best",
    [({"2": 5, "3": 6, "4": 4}, "234", "3"), ({"1": 7, "2": 6, "3": 1}, "123", "1"), ({"3": 6, "4": 7}, "234", "4")],
)
def test_rates_are_sought_upwards_of_the_middle_and_all_else_runs_at_the_best(found, tried, best, study):
    path, content = study
    accuracy = {("cls", rate): value for rate, value in found.items()} | {("method", "2"): 1}
    keys = done(content, path, lambda job: {"tested": accuracy.get((job.variant, job.rate), 0)})
    assert {key for key in keys if "zeroshot1/cls" in key} == {
        *(f"zeroshot1/cls/{rate}/0" for rate in tried), f"zeroshot1/cls/{best}/1"
    }  # fmt: skip
    assert {key for key in keys if "zeroshot2/" in key} == {
        "zeroshot2/untrained/0/0", f"zeroshot2/cls/{best}/0", f"zeroshot2/cls/{best}/1"
    }  # fmt: skip
    assert {key for key in keys if "method" in key} == {
        *(f"zeroshot1/method/{rate}/0" for rate in "123"), "zeroshot1/method/2/1"
    }  # fmt: skip


def test_each_split_has_the_rate_that_is_best_on_its_own_held_out_classes(study):
    path, content = study
    content["hold_out"] = {"classes": 4, "seed": 7}
    best = {("zeroshot1", "cls"): "1", ("zeroshot2", "cls"): "4", ("zeroshot1", "method"): "3"}

    def score(job):
        good = job.hold_out == 7 and best[job.split, job.variant] == job.rate
        # Accuracy on seen classes, and results on published unseen classes, are better at other rates.
        other = 2 if job.hold_out is None else 0
        near = 0.5 - 0.1 * abs(int(job.rate) - int(best.get((job.split, job.variant), 0)))
        return {"metrics": ["mAP@all"], "tested": 100 - near, "rows": [{"mAP@all": good + near + other}]}

    keys = done(content, path, score)
    assert {key for key in keys if "_held_out_7/" in key} == {
        *(f"zeroshot1_held_out_7/cls/{rate}/0" for rate in "123"),
        *(f"zeroshot2_held_out_7/cls/{rate}/0" for rate in "234"),
        *(f"zeroshot1_held_out_7/method/{rate}/0" for rate in "234"),
    }
    assert {key for key in keys if "_held_out_7/" not in key} == {
        "zeroshot1/untrained/0/0",
        "zeroshot2/untrained/0/0",
        *(f"{split}/{variant}/{rate}/{seed}" for (split, variant), rate in best.items() for seed in (0, 1)),
    }


def test_differences_are_paired_and_commands_stand_beside_them(study):
    path, content = study
    records, random = studies.Records(path), np.random.default_rng(0)
    rows = [
        {"matching": "one-to-one", "M": None, "K": None, "mAP@all": 0.25},
        {"matching": "one-to-many", "M": 2, "K": 3, "mAP@all": 0.5},
    ]
    untrained = studies.Job("zeroshot1", "untrained", "0", 0)
    trained = [studies.Job("zeroshot1", name, "2", seed) for name in ("cls", "method") for seed in (0, 1)]
    for job in [untrained, *trained]:
        records.runs[job.key] = {"metrics": ["mAP@all"], "tested": 5.0, "accuracy": [5.0], "rows": rows}
        records.queries[job.key] = random.random((2, 6)).astype(np.float32)
    for rate in ("1", "3"):
        for name in ("cls", "method"):
            found = {"metrics": ["mAP@all"], "tested": 1.0, "accuracy": [1.0], "rows": rows}
            records.runs[f"zeroshot1/{name}/{rate}/0"] = found
    records.queries["zeroshot1/classes"] = np.array([0, 0, 0, 0, 1, 1])
    results = studies.collect(content, records)
    method = [row for row in results["rows"] if row["variant"] == "the method"]

    def mean(name, seed, row, rate=2):
        values = records.queries[f"zeroshot1/{name}/{rate}/{seed}"][row].astype(float)
        return (values[:4].mean() + values[4:].mean()) / 2

    for number, row in enumerate(method):
        own, base = ([mean(name, seed, number) for seed in (0, 1)] for name in ("method", "cls"))
        assert row["mean"] == pytest.approx(np.mean(own)) and row["deviation"] == pytest.approx(np.std(own, ddof=1))
        assert row["difference"] == pytest.approx(np.mean(own) - np.mean(base))
        assert row["interval"][0] < row["difference"] < row["interval"][1]
        assert row["over_untrained"] == pytest.approx(np.mean(own) - mean("untrained", 0, number, rate=0))
        assert row["over_untrained_interval"][0] < row["over_untrained"] < row["over_untrained_interval"][1]
        assert "--lr 2 " in row["train"] and row["test"].startswith("test_sketchy_ext_zeroshot --data_root DIR")
    assert method[1]["gain"] == pytest.approx(method[1]["mean"] - method[0]["mean"]) and "gain" not in method[0]
    assert method[1]["gain_interval"][0] < method[1]["gain"] < method[1]["gain_interval"][1]
    assert [entry["rate"] for entry in results["rates"] if entry["chosen"]] == ["2", "2"]
    table = markdown(results)
    assert table.startswith("Rates chosen by accuracy on seen classes, not by retrieval of held-out classes.")
    assert "| the method | 1 | 1.0 (1.0) | 0.250 / 0.500 |\n| the method | 2 * | 5.0 (5.0) | 0.250 / 0.500 |" in table
    assert (
        f"| the method | 2 | {method[0]['mean']:.3f} ± {method[0]['deviation']:.3f} ({method[0]['difference']:+.3f}"
        in table
    )
    over = method[0]["over_untrained"]
    assert "zeroshot1, mAP@all: difference from no training:\n\n| variant |" in table
    assert f"| the method | 2 | {over:+.3f}, " in table and "| no training | 1 | " not in table.split("no training:")[1]


@pytest.mark.parametrize("accuracy, columns", [([0.0, 0.0], 4), ([50.0, 60.0], 5)])
def test_accuracy_on_seen_classes_is_shown_where_it_was_measured(accuracy, columns):
    run = {"split": "zeroshot2", "variant": "cross entropy", "rate": "3e-4", "tested": accuracy[-1], "chosen": True}
    run |= {"accuracy": accuracy, "metric": "mAP@200", "values": [0.25]}
    results = {"rates": [run], "chosen_by": {"classes": 20, "seed": 0}, "rows": []}
    text, _, head, _, line = markdown(results).split("\n", 1)[1].split("\n")
    assert head.count("|") == line.count("|") == columns + 1
    assert ("accuracy" in text, line.endswith("| 60.0 (50.0 60.0) |")) == (columns == 5, columns == 5)


def test_a_rate_is_chosen_then_trained_tested_swept_and_not_done_again(study, miniature, tmp_path, capsys, monkeypatch):
    commands = []

    def run_here(command, threads):  # as starting Python five times takes longer than all else
        commands.append(command)
        importlib.import_module(command[0]).main(command[1:])

    monkeypatch.setattr(studies, "_run", run_here)
    path, content = study
    content["variants"] = {"cls": content["variants"]["cls"]}
    del content["splits"]["zeroshot2"]
    content |= {"rates": ["1e-3"], "seeds": [0], "hold_out": {"classes": 4, "seed": 1}}
    path.write_text(json.dumps(content))
    run = ["--data_root", str(miniature), "--weights", "none", "--runs", str(tmp_path / "runs")]
    studies.main([str(path), *run])
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "toys_results.json").read_text())
    one, many = results["rows"]
    tested = json.loads((tmp_path / "runs/zeroshot1/cls/1e-3/0/results.json").read_text())
    assert [one["mean"], many["mean"]] == pytest.approx([row["mAP@all"] for row in tested["rows"]], abs=1e-6)
    assert f"{many['mean']:.3f}" in table
    sweep = results["sweeps"][0][0]
    assert [(row["M"], row["K"], len(row["values"])) for row in sweep] == [(None, None, 1), (2, 2, 2), (2, 3, 2)]
    chosen = json.loads((tmp_path / "runs/zeroshot1_held_out_1/cls/1e-3/0/results.json").read_text())
    assert chosen["benchmark"].endswith(", 4 seen classes held out as unseen ones (seed 1)")
    assert len(chosen["rows"]) == 1 and len(chosen["rows"][0]["per_class"]) == 4
    assert results["chosen_by"] == {"classes": 4, "seed": 1}
    assert f"| zeroshot1 | cross entropy alone | 1e-3 * | {chosen['rows'][0]['mAP@all']:.3f} |" in table
    # A training and a test on held-out classes; then a training, a sweep and a test on the published ones.
    lists = [command[command.index("--zero_version") + 1] for command in commands]
    assert lists == ["zeroshot1_held_out_1"] * 2 + ["zeroshot1"] * 3
    assert list(studies.Records(path).queries) == ["zeroshot1/classes", "zeroshot1/cls/1e-3/0"]
    left = (tmp_path / "toys_runs.json").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "away")
    studies.main([str(path), *run])
    assert (tmp_path / "toys_runs.json").read_bytes() == left and not (tmp_path / "runs").exists()


def test_sweeps_are_drawn_over_clusters_and_over_the_weight(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("ablation_report._band", lambda axis, points, label: drawn.update({label: sorted(points)}))
    one, found = {"M": None, "values": [0.3]}, {"values": [0.4, 0.5]}
    over_clusters = [one, *(found | {"M": m, "K": k, "cluster_weight": 0.8} for m in (1, 2) for k in (5, 9))]
    over_weight = [one, *(found | {"M": 2, "K": 9, "cluster_weight": weight} for weight in (0, 1))]
    draw_sweeps(tmp_path / "a.png", {"rows": [{"metric": "mAP@all"}], "sweeps": [[over_clusters, over_weight]] * 2})
    points = [(x, [0.4, 0.5]) for x in (5, 5, 9, 9)]
    assert drawn == {"M 1": points, "M 2": points, "M 2, K 9": [(x, [0.4, 0.5]) for x in (0, 0, 1, 1)]}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
