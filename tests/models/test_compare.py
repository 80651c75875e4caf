import json
import os

import numpy as np
import pytest

from models.compare import bootstrap, class_mean, compare, group, latex, main, markdown, read_tested

CLASSES = np.repeat(["bell", "cow", "owl"], [3, 5, 4])


def write_test(folder, precisions, seed=0, **changed):
    """What a test leaves: precisions (rows, Q), mAP@all for one-to-one matching and M 2, K 3."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "benchmark": "Toys",
        "protocol": "toys",
        "metrics": ["mAP@all"],
        "options": {"model": "m", "resume_dir": str(folder)},
    }
    results |= {"features": {"source": {"photo list": "p", "sketch list": "s"}}}
    (folder / "results.json").write_text(json.dumps(results | changed.pop("results", {})))
    options = {"lr": 1e-3, "seed": seed, "savedir": str(folder)} | changed.pop("options", {})
    (folder / "train.json").write_text(json.dumps({"options": options}))
    arrays = {
        "rows": np.array([[0, 0, 0], [2, 3, 0.8]]), "metrics": np.array(["mAP@all"]),
        "values": np.asarray(precisions, float)[:, None],
        "class": CLASSES, "sketch": np.array([f"{number}.png" for number in range(len(CLASSES))]),
    }  # fmt: skip
    np.savez_compressed(folder / "per_query.npz", **(arrays | changed))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two settings of two seeds each."""
    random = np.random.default_rng(0)
    return [
        write_test(tmp_path / f"{lr}" / f"{seed}", random.random((2, 12)) * 0.5 + lr, seed, options={"lr": lr})
        for lr in (0.1, 0.3)
        for seed in (0, 1)
    ]


def test_columns_and_devices_of_a_table_make_no_setting(runs):
    path = runs[1] / "results.json"
    results = json.loads(path.read_text())
    results["options"] |= {"metrics": ["Recall@5"], "device": "cuda"}
    path.write_text(json.dumps(results))
    assert [len(setting) for setting in group([read_tested(folder) for folder in runs])] == [2, 2]


def test_seeds_are_one_setting_and_differences_are_paired(runs):
    tested = [read_tested(folder) for folder in runs]
    settings = group(tested)
    assert [[run.folder for run in setting] for setting in settings] == [runs[:2], runs[2:]]
    table = compare(settings, ["a", "b"], "mAP@all", draws=200)
    assert [entry["row"] for entry in table] == ["one-to-one", "M 2, K 3"]
    values = np.stack([run.values[1, 0] for run in tested])
    means = [np.mean([run[name == CLASSES].mean() for name in ("bell", "cow", "owl")]) for run in values]
    first, second = table[1]["settings"]
    assert first["mean"] == pytest.approx(np.mean(means[:2])) and first["seeds"] == 2 and "difference" not in first
    assert second["deviation"] == pytest.approx(np.std(means[2:], ddof=1))
    assert second["difference"] == pytest.approx(np.mean(means[2:]) - np.mean(means[:2]))
    assert second["interval"][0] < second["difference"] < second["interval"][1]


def test_options_without_effect_on_results_do_not_split_a_setting(tmp_path, runs):
    """The same setting: a seed that was resumed or overwrote files, another test that also printed classes."""
    changed = {
        "overwrite": True, "resume": True, "workers": 8, "print_freq": 1, "accum_steps": 2, "grad_checkpointing": True,
        "losses": ["cls", "ka_student", "ma", "ka_teacher"], "modality_weight": 0.1,
    }  # fmt: skip
    folder = write_test(
        tmp_path / "again", np.zeros((2, 12)), seed=2, options={"lr": 0.1, **changed},
        results={"options": {"model": "m", "resume_dir": "x", "per_class": True, "recompute": True, "batch_size": 8}},
    )  # fmt: skip
    settings = group([read_tested(each) for each in (*runs, folder)])
    assert [len(setting) for setting in settings] == [3, 2]
    for options in ({"losses": ["cls"]}, {"modality_weight": 0.2}, {"batch_size": 9}):
        other = write_test(tmp_path / "other", np.zeros((2, 12)), options={"lr": 0.1, **options})
        assert len(group([read_tested(each) for each in (*runs, other)])) == 3
    test = {"options": {"mixture": "sklearn"}}
    other = write_test(tmp_path / "other", np.zeros((2, 12)), options={"lr": 0.1}, results=test)
    assert len(group([read_tested(each) for each in (*runs, other)])) == 3


def test_a_test_without_the_images_at_hand_is_compared(tmp_path):
    """Its sketches and classes are numbers; the digests of the features or of the lists show that they are the same."""
    numbers = {"sketch": np.arange(12).astype(str), "class": np.repeat(["0", "1", "2"], [3, 5, 4])}
    features = {"sha256": "ab", "source": None}
    one = write_test(tmp_path / "one", np.zeros((2, 12)), results={"features": features, "benchmark": "My toys"})
    two = write_test(tmp_path / "two", np.ones((2, 12)), options={"lr": 0.2}, results={"features": features}, **numbers)
    table = compare(group([read_tested(one), read_tested(two)]), ["a", "b"], "mAP@all", draws=100)
    assert table[0]["settings"][1]["difference"] == 1.0
    three = write_test(tmp_path / "three", np.ones((2, 12)), **numbers)
    four = write_test(tmp_path / "four", np.ones((2, 12)), options={"lr": 0.2})
    assert len(group([read_tested(three), read_tested(four)])) == 2  # the same lists


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """1,000 pairs of runs whose true difference is known: classes differ, sketches within them, too."""
    random, classes = np.random.default_rng(0), np.repeat(np.arange(25), 25)
    covered = 0
    for pair in range(1000):
        of_class, noise = random.normal(0, 0.04, 25), random.normal(0, 0.2, 625)
        low, high = bootstrap(0.03 + of_class[classes] + noise, classes, draws=256, seed=pair)
        covered += low <= 0.03 <= high
    assert 930 <= covered <= 970


def test_the_interval_of_equal_sketches_is_a_point_and_shifts_with_the_values():
    classes = np.repeat(np.arange(3), 4)
    assert bootstrap(np.full(12, 0.25), classes, 100) == [0.25, 0.25]
    values = np.random.default_rng(1).random(12)
    low, high = bootstrap(values, classes, 300)
    assert bootstrap(values + 1, classes, 300) == pytest.approx([low + 1, high + 1])
    assert class_mean(np.arange(4.0), np.array([0, 0, 0, 1])) == 2.0


def test_the_command_leaves_tables_a_figure_and_json(runs, tmp_path, capsys):
    out = tmp_path / "out"
    main([*map(str, runs), "--names", "plain", "100_% better", "--draws", "100", "--out", str(out)])
    printed = capsys.readouterr().out
    assert (out / "comparison.md").read_text() in printed and "| one-to-one |" in printed
    assert r"100\_\% better" in (out / "comparison.tex").read_text()
    assert r"$\pm$" in (out / "comparison.tex").read_text()
    assert (out / "comparison.png").stat().st_size > 5000
    assert json.loads((out / "comparison.json").read_text())["rows"][0]["settings"][1]["name"] == "100_% better"


def test_one_run_alone_is_a_table_too(runs, tmp_path):
    main([str(runs[0]), "--draws", "100", "--out", str(tmp_path / "out")])
    settings = group([read_tested(runs[0])])
    table = compare(settings, ["a"], "mAP@all", draws=100)
    assert table[0]["settings"][0]["deviation"] is None
    assert markdown(table, ["a|<b>"], "mAP@all").splitlines()[:2] == [r"| mAP@all | a\|\<b> |", "|---|---|"]
    assert markdown(table, ["a"], "mAP@all").startswith("| mAP@all | a |") and "toprule" in latex(
        table, ["a"], "mAP@all"
    )


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"results": {"protocol": "tuberlin"}}, "of toys and of tuberlin"),
        ({"results": {"features": {"source": {"photo list": "q"}}}}, "different photo lists"),
        ({"sketch": np.array([f"other {number}.png" for number in range(12)])}, "different sketches"),
        ({"rows": np.array([[0, 0, 1.0], [4, 3, 0.8]])}, "no row in common"),
        ({"values": np.zeros((2, 1, 11))}, "per_query.npz: torn"),
        ({"values": np.full((2, 1, 12), np.inf)}, "per_query.npz: torn"),
        ({"values": np.full((2, 1, 12), 1.5)}, "per_query.npz: torn"),
        ({"metrics": np.array(["mAP@all", "Prec@100"])}, "per_query.npz: torn"),
        ({"values": np.array([[["x"] * 12]] * 2)}, "per_query.npz: torn"),
        ({"class": np.array([{}] * 12)}, "per_query.npz: torn"),
        ({"rows": np.array([[0, 0, np.nan], [4, 3, 0.8]])}, "per_query.npz: torn"),
        ({"rows": np.array([["a", "b", "c"]] * 2)}, "per_query.npz: torn"),
        ({"values": np.zeros((2, 1, 12), np.longdouble)}, "per_query.npz: torn"),
        ({"results": {"metrics": "mAP"}}, "results.json: not the results"),
        ({"results": {"metrics": []}}, "results.json: not the results"),
        ({"results": {"features": 3}}, "results.json: not the results"),
        ({"results": {"features": ["a"]}}, "results.json: not the results"),
        ({"results": {"features": {"source": "text"}}}, "results.json: not the results"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(runs, tmp_path, fails, changed, words):
    other = write_test(tmp_path / "other", np.zeros((2, 12)), **changed)
    assert words in fails(main, runs[0], other, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_torn_is_named(runs, tmp_path, fails):
    out = ["--out", tmp_path / "out"]
    assert "results.json: no such file; run the test first" in fails(main, tmp_path / "none", *out)
    linked = tmp_path / "link"
    linked.symlink_to(runs[1])
    for same in (runs[1], runs[1] / "results.json", linked):
        assert "is named twice; one run is no two seeds" in fails(main, *runs, same, *out)
    assert "--names: 1 names for 2 settings" in fails(main, *runs, "--names", "a", *out)
    assert "has mAP@all; test it with --metrics Prec@7" in fails(main, *runs, "--metric", "Prec@7", *out)
    values = np.zeros((2, 2, 12))
    more = write_test(tmp_path / "more", values[:, 0], metrics=np.array(["mAP@all", "Hit@1"]), values=values)
    assert f"--metric Hit@1: {runs[0]} has mAP@all" in fails(main, more, runs[0], "--metric", "Hit@1", *out)
    assert "--draws" in fails(main, *runs, "--draws", 5, *out)
    whole = (runs[1] / "per_query.npz").read_bytes()
    for torn in (whole[:200], b"", b"hello", whole[:-40]):
        (runs[1] / "per_query.npz").write_bytes(torn)
        assert "per_query.npz: torn" in fails(main, *runs, *out)
    (runs[1] / "per_query.npz").unlink()
    assert "per_query.npz: no such file" in fails(main, *runs, *out)
    (runs[1] / "results.json").write_text("{")
    assert "results.json: not the results of a test" in fails(main, *runs, *out)


@pytest.mark.parametrize(
    "content", ['{"options": []}', '{"options": "a"}', "[" * 100_000, '{"options": {"losses": 3}}']
)
def test_a_run_whose_options_are_not_known_is_a_setting_of_its_own(runs, tmp_path, content):
    other = write_test(tmp_path / "other", np.zeros((2, 12)), options={"lr": 0.1})
    (other / "train.json").write_text(content)
    assert len(group([read_tested(each) for each in (*runs, other)])) == 3


def test_no_file_is_waited_for_and_no_small_file_fills_memory(runs, tmp_path, fails, monkeypatch):
    out = ["--out", tmp_path / "out"]
    monkeypatch.setattr("models.compare.MAX_QUERY_BYTES", 1000)
    assert "per_query.npz: torn, or not what a test writes" in fails(main, *runs, *out)
    monkeypatch.undo()
    for name in ("train.json", "per_query.npz", "results.json"):
        (runs[1] / name).unlink()
        os.mkfifo(runs[1] / name)
        if name != "train.json":
            assert f"{name}: " in fails(main, *runs, *out)
    assert "argument --out: an empty string is not a file or folder" in fails(main, *runs, "--out", "")


def test_only_own_tables_are_replaced_and_names_are_printable(runs, tmp_path, fails, capsys):
    out = tmp_path / "out"
    main([*map(str, runs), "--names", "a\n\x1b[2J", os.fsdecode(b"\xff"), "--draws", "100", "--out", str(out)])
    assert r"| a\n\x1b[2J | \udcff |" in capsys.readouterr().out
    main([*map(str, runs), "--draws", "100", "--out", str(out)])
    (out / "comparison.md").write_text("my own notes")
    assert "comparison.md: holds something that this command did not write" in fails(main, *runs, "--out", out)
    assert (out / "comparison.md").read_text() == "my own notes"
