"""Command lines as people have them from the authors' release."""

import dataclasses

import pytest
import torch

import test_quickdraw_ext_zeroshot
import test_sketchy_ext_split_zeroshot
import test_sketchy_ext_zeroshot
import test_tuberlin_ext_zeroshot
import train_quickdraw_ext
import train_sketchy_ext
import train_tuberlin_ext
from datasets.lists import open_benchmark, write_list
from datasets.protocols import PROTOCOLS
from models.checkpoints import LAST, read_checkpoint
from models.options import test_parser as parser_of_test
from models.options import train_parser

# What keeps these runs short; the rest of each command is the release's.
SMALL = "--model convnextv2_atto --input_size 32 --workers 0 --device cpu".split()
SHORT = [*SMALL, *"--finetune none --epochs 1 --max_steps 1 --no_validation".split()]
LISTS = {
    "sketchy": ("sketch_tx_000000000000_ready_filelist_{}.txt", "all_photo_filelist_{}.txt"),
    "tuberlin": ("png_ready_filelist_{}.txt", "ImageResized_ready_filelist_{}.txt"),
    "quickdraw": ("sketch_filelist_{}.txt", "all_photo_filelist_{}.txt"),
}


def lay_out(tiny, root, kind, zero_version):
    """The images of `tiny` under the list names of a data set, in root/<zero_version>."""
    (root / zero_version).mkdir(parents=True)
    for folder in tiny.iterdir():
        if folder.is_dir() and folder.name != "zeroshot1":
            (root / folder.name).symlink_to(folder)
    for path in (tiny / "zeroshot1").iterdir():
        name = path.name
        for ours, theirs in zip(LISTS["sketchy"], LISTS[kind], strict=True):
            for split in ("train", "test", "zero"):
                name = theirs.format(split) if path.name == ours.format(split) else name
        (root / zero_version / name).write_bytes(path.read_bytes())
    return ["--data_root", str(root)]


@pytest.mark.parametrize(
    ("script", "kind", "zero_version", "command"),
    [
        (train_sketchy_ext, "sketchy", "zeroshot1", "--zero_version zeroshot1 --batch_size 6 --lr 1e-4 -p 100"),
        (
            train_sketchy_ext,
            "sketchy",
            "zeroshot2",
            "--zero_version zeroshot2 --batch_size 6 --wd 5e-4 -p 50 --nb_classes 2",
        ),
        (
            train_tuberlin_ext,
            "tuberlin",
            "zeroshot",
            "--learning-rate 1e-4 --weight_decay 5e-4 --print-freq 50 --nb_classes 2 --batch_size 10 --drop_path 0",
        ),
        (train_quickdraw_ext, "quickdraw", "zeroshot", "--lr 1e-4 --wd 5e-4 --print-freq 10 --batch_size 10"),
    ],
)
def test_train_commands_of_the_release_run_unchanged(tiny, tmp_path, script, kind, zero_version, command):
    data = lay_out(tiny, tmp_path / "laid out", kind, zero_version)
    kept = script.main([*command.split(), *data, *SHORT, "-s", str(tmp_path / "out")])
    options = read_checkpoint(kept)["options"]
    assert options["savedir"] == str(tmp_path / "out") and options["zero_version"] == zero_version
    assert (options["lr"], options["weight_decay"]) == (1e-4, 5e-4)


@pytest.mark.parametrize(
    ("script", "kind", "zero_version"),
    [
        (test_sketchy_ext_zeroshot, "sketchy", "zeroshot1"),
        (test_sketchy_ext_split_zeroshot, "sketchy", "zeroshot2"),
        (test_tuberlin_ext_zeroshot, "tuberlin", "zeroshot"),
        (test_quickdraw_ext_zeroshot, "quickdraw", "zeroshot"),
    ],
)
def test_test_commands_of_the_release_run_unchanged(tiny, tmp_path, script, kind, zero_version):
    data = lay_out(tiny, tmp_path / "laid out", kind, zero_version)
    trained = lay_out(tiny, tmp_path / "for training", "sketchy", "zeroshot1")
    train_sketchy_ext.main([*SHORT, *trained, "--batch_size", "3", "--savedir", str(tmp_path / "out")])
    results = script.main(
        [*SMALL, *data, "-s", str(tmp_path / "out"), *"--mode 1 --nb_classes 2 --batch_size 4".split()]
    )
    assert results["queries"] == 4 and results["options"]["resume_dir"] == str(tmp_path / "out")


@pytest.mark.parametrize("flag", [
    "--layer_decay_type", "--clip_grad", "--head_init_scale", "--eval", "--evaluate", "-e", "--freeze_features", "-f",
    "--model_prefix",
])  # fmt: skip
@pytest.mark.parametrize("script", [train_sketchy_ext, test_sketchy_ext_zeroshot])
def test_options_that_never_did_anything_are_refused(script, flag, fails):
    for value in ([], ["1"]):
        message = fails(script.main, flag, *value)
        assert f"{flag}: does nothing in the release" in message and "leave it out" in message


def test_another_number_of_seen_classes_is_refused(tiny, tmp_path, fails):
    arguments = ["--data_root", tiny, "--nb_classes", 100]
    assert "--nb_classes 100: " in (message := fails(train_sketchy_ext.main, *SHORT, *arguments, "-s", tmp_path / "o"))
    assert "cname_cid.txt lists 2 seen classes" in message and "--imagenet_classes" in message
    assert not (tmp_path / "o").exists()
    torch.save({"epoch": 1, "state_dict": {}}, tmp_path / "checkpoint.pth.tar")
    assert "--nb_classes 100: " in fails(test_sketchy_ext_zeroshot.main, *SMALL, *arguments, "-s", tmp_path)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_help_has_the_number_of_seen_classes_of_a_benchmark(name):
    for parser in (train_parser(PROTOCOLS[name]), parser_of_test(PROTOCOLS[name])):
        assert f"{PROTOCOLS[name].title} has {PROTOCOLS[name].seen_classes}" in " ".join(parser.format_help().split())


def rewritten(path, **changes):
    """Write the checkpoint at `path` anew, with other options; None takes an option away."""
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        content["options"].pop(name, None)
        if value is not None:
            content["options"][name] = value
    torch.save(content, path)


def test_a_checkpoint_of_an_earlier_version_is_resumed(tiny, tmp_path):
    arguments = [
        *SMALL,
        *"--finetune none --max_steps 1 --batch_size 3 --warmup_epochs 0 --data_root".split(),
        str(tiny),
    ]
    kept = train_sketchy_ext.main([*arguments, "--epochs", "1", "-s", str(tmp_path)]).with_name(LAST)
    content = torch.load(kept, weights_only=True)
    content["step"], content["sums"] = 1, [1e3, 2e3, 3e3, 4e3, 5e3, 6e3, 7e3]  # without names, as they were then
    content["options"]["epochs"] = 2
    for state in (content["state_dict"], content["teacher"]):  # 1×1 convolutions, as they were then
        for name, value in state.items():
            if "pwconv" in name and name.endswith("weight"):
                state[name] = value[:, :, None, None]
    torch.save(content, kept)
    rewritten(kept, nb_classes=1000, imagenet_classes=None)
    arguments = [*arguments, "--epochs", "2", "--max_steps", "2", "-s", str(tmp_path), "--resume"]
    rewritten(kept, max_steps=2)
    train_sketchy_ext.main(arguments)
    entry = read_checkpoint(kept)["history"][1]
    names = ("cls", "ka_student", "ma", "ka_teacher", "student", "total", "train_accuracy")
    assert [round(entry[name] / 500) for name in names] == [1, 2, 3, 4, 5, 6, 7]  # the means of two steps
    assert read_checkpoint(kept)["options"]["imagenet_classes"] == 1000


def test_an_option_that_an_older_checkpoint_lacks_had_its_default(tiny, tmp_path, fails):
    arguments = [*SMALL, *"--finetune none --max_steps 1 --batch_size 3 --epochs 1 --data_root".split(), str(tiny)]
    arguments += ["-s", str(tmp_path)]
    kept = train_sketchy_ext.main(arguments).with_name(LAST)
    rewritten(kept, accum_steps=None, precision=None)
    train_sketchy_ext.main([*arguments, "--resume"])
    rewritten(kept, batch_size=None, precision=None)
    assert "was trained with --batch_size 210, not 3" in fails(train_sketchy_ext.main, *arguments, "--resume")
    rewritten(kept, batch_size=3)
    assert "was trained with --precision tf32, not bf16" in fails(
        train_sketchy_ext.main, *arguments, "--resume", "--precision", "bf16"
    )


@pytest.mark.parametrize("cut", ["mAP@0", "Prec@-1", "Prec@many", "R@10", "mAP"])
def test_a_protocol_with_a_metric_that_makes_no_sense_is_named(tmp_path, fails, monkeypatch, cut):
    monkeypatch.setitem(PROTOCOLS, "sketchy", dataclasses.replace(PROTOCOLS["sketchy"], metrics=("mAP@all", cut)))
    message = fails(test_sketchy_ext_zeroshot.main, "--resume_dir", tmp_path)
    assert "Sketchy Ext in datasets/protocols.py: " in message and cut in message


def test_a_folder_of_other_classes_goes_by_its_name_or_title(tiny, tmp_path, capsys):
    data = lay_out(tiny, tmp_path / "cats and cows", "sketchy", "zeroshot1")
    train_sketchy_ext.main([*SHORT, *data, "--batch_size", "3", "-s", str(tmp_path / "out")])
    arguments = [*SMALL, *data, "--mode", "1", "-s", str(tmp_path / "out")]
    assert test_sketchy_ext_zeroshot.main(arguments)["benchmark"] == "cats and cows"
    (tmp_path / "cats and cows/zeroshot1/title.txt").write_text("my benchmark\n")
    results = test_sketchy_ext_zeroshot.main(arguments)
    assert (results["benchmark"], results["protocol"]) == ("my benchmark", "sketchy")
    assert "my benchmark: 4 sketches, 4 photos, 2 classes\n" in capsys.readouterr().out
    lists = tmp_path / "cats and cows/zeroshot1"
    (lists / "title.txt").unlink()
    for file, names in (("cname_cid.txt", "seen_names"), ("cname_cid_zero.txt", "unseen_names")):
        write_list(lists / file, [(name, label) for label, name in enumerate(getattr(PROTOCOLS["sketchy"], names))])
    assert open_benchmark("sketchy", lists.parent).title == "Sketchy Ext"
