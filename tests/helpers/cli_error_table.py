"""A table of bad input to all commands, and what each prints.

    .venv/bin/python tests/helpers/cli_error_table.py            # prints the table; status 1 if a row is not one line and status 2
    .venv/bin/python tests/helpers/cli_error_table.py --quick   # without those of fault_injection.py: kills, full disks, two processes

tests/test_cli_error_table.py runs the quick rows. Each is a command line on a small benchmark, some after damage to a file.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SCRIPTS = {
    "train_sketchy_ext": "-s {out} --finetune none", "train_tuberlin_ext": "-s {out} --finetune none",
    "train_quickdraw_ext": "-s {out} --finetune none", "test_sketchy_ext_zeroshot": "-s {features}",
    "test_sketchy_ext_split_zeroshot": "-s {features}", "test_tuberlin_ext_zeroshot": "-s {features}",
    "test_quickdraw_ext_zeroshot": "-s {features}",
}  # fmt: skip
SMALL = "--data_root {data} --model convnextv2_atto --input_size 32 --workers 0 --device cpu"
TRAINING = "--batch_size 3 --epochs 1 --max_steps 1"

NUMBERS = ("-1", "nan", "1.5", "ten", "", "99999999999")
OF_BOTH = [
    ("--data_root", ["", "{data}/nowhere", "{data}/zeroshot1/cname_cid.txt"]), ("--zero_version", ["", "a/b", "..", "."]),
    ("--model", ["", "vit", "convnextv2", "vit_small_patch14_dinov2", "resnet50.none"]), ("--nb_classes", [*NUMBERS, "100"]), ("--imagenet_classes", NUMBERS),
    ("--input_size", [*NUMBERS, "31", "5000"]), ("--workers", ["-1", "two", ""]),
    ("--device", ["", "abacus", "cuda:99", "meta"]), ("--precision", ["", "fp16", "FP32"]), ("--batch_size", [*NUMBERS, "0"]),
]  # fmt: skip
OF_TRAINING = [
    ("-s", [""]), ("--finetune", ["", "{data}/none.pt", "{data}"]), ("--drop_path", ["-0.1", "1", "nan", "half"]),
    ("--epochs", [*NUMBERS, "0"]), ("--warmup_epochs", NUMBERS), ("--batch_size", ["1", "2"]), ("--max_steps", ["0", "-3"]),
    ("--lr", ["-1", "nan", "inf", "fast"]), ("--learning-rate", ["-1"]), ("--teacher_lr", ["-1", "nan"]),
    ("--weight_decay", ["-1", "nan"]), ("--wd", ["much"]), ("--accum_steps", ["0", "-1"]), ("--seed", ["-1", "4294967296"]),
    ("--save_every", ["", "0e", "5", "1.5m", "ten", "3d"]), ("--print_freq", ["0"]), ("-p", ["often"]),
    ("--eval_every", ["-1"]), ("--losses", ["", "ka_student", "cls cls2"]), ("--mask_weight", ["-0.1", "nan", "inf", "x"]),
    ("--modality_weight", ["-1", "nan"]),
]  # fmt: skip
OF_TESTING = [
    ("-s", ["", "{data}"]), ("--mode", ["0", "3", "both"]), ("--clusters", ["0", "-2", "two", "61", ""]),
    ("--subspaces", ["0", "7", "-1", "many"]), ("--mixture", ["kmeans", ""]), ("--mixture_device", ["", "gpu", "cuda:99"]),
    ("--mixture_seeds", ["-1", "4294967296", "x"]), ("--cluster_weight", ["-0.1", "1.1", "nan", ""]),
    ("--distances", ["float16"]), ("--nearest", ["0", "51"]),
]  # fmt: skip
IDLE = ["--layer_decay_type", "--clip_grad", "--head_init_scale", "--eval", "--evaluate", "-e", "--freeze_features", "-f",
        "--model_prefix", "--epoch", "--no_such_option"]  # fmt: skip
PREPARE = [
    "", "draw", "check", "check {data}", "check {data}/none --protocol sketchy", "check {data} --protocol imagenet",
    "check {data} --protocol sketchy --custom", "lists {data} --protocol sketchy --held_back -1",
    "lists {data} --protocol sketchy --seed x", "lists {data} --protocol sketchy --convert a/b",
    "lists {data} --protocol sketchy --convert none", "lists {data} --protocol tuberlin", "mask {data}/none --protocol sketchy",
    "mask {data} --protocol sketchy", "miniature {data}", "miniature {data}/zeroshot1/cname_cid.txt",
    "miniature {out}/new --seed -1", "summary {data}/none", "summary {data} --zero_version none",
    "lists {data} --protocol sketchy --hold_out_classes 99", "lists {data}/none --custom --hold_out_classes 2",
    "lists {data} --custom --hold_out_photos nan", "lists {data} --custom --unseen {data}/none",
    "lists {data} --custom --unseen_classes 999", "lists {data} --custom --hold_out_classes 2 --out /proc/none/lists",
]  # fmt: skip


_PHOTO, _TEXT = "'{data}/photo of zero/0.png'", "{data}/zeroshot1/cname_cid.txt"
_NEW = "index {data} --index {out}/index"
SEARCH = [
    "", "index '' --index {out}/index", "index {data} --index ''", "index --index {out}/index",
    "index {data}/none --index {out}/index", "index {data}/zeroshot1 --index {out}/index", f"{_NEW} --exclude '*'",
    *(f"{_NEW} --checkpoint {file}" for file in ("''", "https://host/m.onnx", "{data}/none.onnx", _TEXT, "{data}/fifo.onnx",
                                                 "{data}/fifo.pt", "{data}/fifo.safetensors", "/dev/zero", "{data}")),
    *(f"{_NEW} {option}" for option in ("--clusters 0", "--subspaces x", "--workers -1", "--batch_size 0", "--input_size 8",
                                        "--backend tf", "--engine faiss", "--engine milvus", "--uri x", "--remove ''",
                                        "--device abacus", "--device cuda:99", "--no_such_option")),
    *(f"find {file} --index {{out}}/none" for file in ("", "''", "{data}", "{data}/none.png", _TEXT, "{data}/fifo.png",
                                                        "/dev/zero", _PHOTO)),
    *(f"find {_PHOTO} --index {{out}}/none {option}" for option in (
        "-k 0", "-k many", "--matching both", "--cluster_weight 2", "--cluster_weight nan", "--json ''", f"--json {_TEXT}",
        f"--json {_PHOTO}", "--json /dev/null", "--json {data}", "--json {data}/fifo.png", f"--json {_TEXT}/x",
        f"--picture {_TEXT}", f"--picture {_PHOTO}", "--picture {data}", "--picture {data}/fifo.png",
        "--json {out}/x --picture {out}/x")),
    "page --index {out}/none", "page --port 99999", "page --port x", "page --host 256.1.1.1 --index {out}/none",
]  # fmt: skip
EXPORT = [
    "", "{data}/none --to {out}/s.onnx", f"{_TEXT} --to {{out}}/s.onnx", "{data}/fifo.pt --to {out}/s.onnx",
    "{data} --to {out}/s.onnx", "'' --to {out}/s.onnx", "https://host/c --to {out}/s.onnx", f"{_TEXT} --to ''",
    f"{_TEXT} --to {{out}}/s.txt", f"{_TEXT} --to {{data}}/fifo.onnx",
]  # fmt: skip
COMPARE = ["", "''", "{data}", "{data}/none", _TEXT, "{data} --out ''", "{data} --names ''", "{data} --draws 1"]
EVAL = [
    "",
    "''",
    "{data}/none.npz",
    _TEXT,
    "{data}/fifo.npz",
    "{data}/fifo.pickle",
    "{data}",
    "{data}/none.npz --out ''",
]
PREPARE += [
    "check ''", "check {data} --custom --json ''", f"check {{data}} --custom --json {_TEXT}", "summary {data} --out ''",
    "check {data} --custom --json /dev/null", "check {data} --custom --json {data}/fifo.pt", "lists '' --custom",
    "mask {data} --protocol sketchy --wordnet ''", "miniature ''", "miniature {data}/fifo.pt",
]  # fmt: skip
MODULES = {"prepare": "datasets.prepare.__main__", "search_photos": "search_photos", "models.export": "models.export",
           "models.compare": "models.compare", "models.eval": "models.eval.command"}  # fmt: skip
FIFOS = ("fifo.png", "fifo.onnx", "fifo.pt", "fifo.safetensors", "fifo.npz", "fifo.pickle")


def fifo(name):
    def replace(data):
        (data / name).unlink(missing_ok=True)
        os.mkfifo(data / name)

    return replace


def device(name, target="/dev/zero"):
    def replace(data):
        (data / name).unlink(missing_ok=True)
        (data / name).symlink_to(target)

    return replace


def overwrite(name, content):
    return lambda data: (data / name).write_bytes(content)


def append(name, content):
    return lambda data: (data / name).write_bytes((data / name).read_bytes() + content)


def remove(name):
    return lambda data: shutil.rmtree(data / name) if (data / name).is_dir() else (data / name).unlink()


LIST, MASK = "zeroshot1/all_photo_filelist_train.txt", "zeroshot1/cid_mask.pickle"
DAMAGES = {  # of the benchmark folder, before training
    "no lists": remove("zeroshot1"), "no photo list": remove(LIST), "an empty list": overwrite(LIST, b""),
    "a list of blanks": overwrite(LIST, b" \n\n"), "a list that is no text": overwrite(LIST, b"\xff\xfe\x00"),
    "a line without label": append(LIST, b"a.png\n"), "a label below 0": append(LIST, b"a.png -1\n"),
    "a label too large": append(LIST, b"a.png 9\n"), "a label that is no number": append(LIST, b"a.png one\n"),
    "a path out of the folder": append(LIST, b"../a.png 0\n"), "an absolute path": append(LIST, b"/etc/passwd 0\n"),
    "a path with a zero byte": append(LIST, b"a\0.png 0\n"), "an image that is not there": append(LIST, b"a.png 0\n"),
    "no class names": remove("zeroshot1/cname_cid.txt"), "class names empty": overwrite("zeroshot1/cname_cid.txt", b""),
    "a class twice": append("zeroshot1/cname_cid.txt", b"cat 2\n"), "a label twice": append("zeroshot1/cname_cid.txt", b"dog 1\n"),
    "a label left out": append("zeroshot1/cname_cid.txt", b"dog 7\n"),
    "a class both seen and unseen": append("zeroshot1/cname_cid.txt", b"bell 2\n"),
    "title of no text": overwrite("zeroshot1/title.txt", b"\xff\xfe"), "an empty title": overwrite("zeroshot1/title.txt", b""),
    "no mask": remove(MASK), "a mask of nothing": overwrite(MASK, b""), "a torn mask": overwrite(MASK, b"\x80\x02}q"),
    "a mask of text": overwrite(MASK, b"hello"), "a mask that calls": overwrite(MASK, b"cos\nsystem\n(S'true'\ntR."),
    "a mask of lists": overwrite(MASK, pickle.dumps([1, 2])),
    "a mask of another width": overwrite(MASK, pickle.dumps({0: np.zeros(3), 1: np.zeros(3)})),
    "a mask without a class": overwrite(MASK, pickle.dumps({0: np.zeros(1000)})),
    "a mask with NaN": overwrite(MASK, pickle.dumps({0: np.full(1000, np.nan), 1: np.zeros(1000)})),
    "no validation list": remove("zeroshot1/sketch_tx_000000000000_ready_filelist_test.txt"),
    "no images": remove("photo of train"),
    "a list that is a FIFO": fifo(LIST), "a list that is a device": device(LIST),
    "a list that is a link to itself": device(LIST, "all_photo_filelist_train.txt"),
    "class names that are a FIFO": fifo("zeroshot1/cname_cid.txt"), "a mask that is a FIFO": fifo(MASK),
    "a mask that is a device": device(MASK),
    "torn images": lambda data: [path.write_bytes(path.read_bytes()[:40]) for path in (data / "photo of train").iterdir()],
    "images of text": lambda data: [path.write_text("hello") for path in (data / "sketch of train").iterdir()],
}  # fmt: skip
GALLERY, LABELS = np.eye(60, 16, dtype=np.float32) + 1, np.arange(60) % 3
FEATURES = {  # what lies at features_zero.pickle
    "nothing": b"", "text": b"hello", "torn": pickle.dumps([GALLERY, LABELS])[:90], "a call": b"cos\nsystem\n(S'true'\ntR.",
    "a number": pickle.dumps(3), "two items": pickle.dumps([GALLERY, LABELS]),
    "other labels": pickle.dumps([GALLERY, LABELS[:9], GALLERY, LABELS]), "no features": pickle.dumps([None] * 5),
    "features of text": pickle.dumps([["a"], [0], ["b"], [0]]), "NaN": pickle.dumps([GALLERY * np.nan, LABELS, GALLERY, LABELS]),
    "zeros": pickle.dumps([GALLERY * 0, LABELS, GALLERY, LABELS]), "labels below 0": pickle.dumps([GALLERY, LABELS - 1, GALLERY, LABELS]),
    "labels between numbers": pickle.dumps([GALLERY, LABELS + 0.5, GALLERY, LABELS]),
    "other widths": pickle.dumps([GALLERY, LABELS, GALLERY[:, :8], LABELS]),
    "a class without photos": pickle.dumps([GALLERY, LABELS % 2, GALLERY, LABELS]),
    "long doubles": pickle.dumps([GALLERY.astype(np.longdouble), LABELS, GALLERY, LABELS]),
    "complex numbers": pickle.dumps([GALLERY.astype(complex), LABELS, GALLERY, LABELS]),
    "objects": pickle.dumps([np.array([None]), LABELS, GALLERY, LABELS]),
}  # fmt: skip
CHECKPOINTS = {
    "nothing": b"",
    "text": b"hello",
    "a call": b"cos\nsystem\n(S'true'\ntR.",
    "half a zip": b"PK\x03\x04" + bytes(99),
}


def rows():
    """(name, script, arguments, damage or None) of every row."""
    for script, base in SCRIPTS.items():
        training = script.startswith("train")
        common = f"{SMALL} {base} {TRAINING}" if training else f"{SMALL} {base}"
        first = script in ("train_sketchy_ext", "test_sketchy_ext_zeroshot")
        options = [*OF_BOTH, *(OF_TRAINING if training else OF_TESTING)] if first else OF_BOTH[4:6]
        for option, values in options:
            for value in values:
                if (not training and option in ("--data_root", "--model")) or (
                    value == "{data}/zeroshot1/cname_cid.txt" and not training
                ):
                    continue  # features alone are enough for a test
                yield f"{option} {value!r}", script, [*common.split(), option, value], None
        for option in IDLE if first else ():
            yield option, script, [*common.split(), option], None
    for script, commands in {"prepare": PREPARE, "search_photos": SEARCH, "models.export": EXPORT,
                             "models.compare": COMPARE, "models.eval": EVAL}.items():  # fmt: skip
        for command in commands:
            yield command or "no command", script, shlex.split(command), None
    for name, damage in DAMAGES.items():
        yield name, "train_sketchy_ext", f"{SMALL} -s {{out}} --finetune none {TRAINING}".split(), damage
    test = f"{SMALL.replace('{data}', '{data}/none')} -s {{features}} --clusters 3 --subspaces 2".split()
    for name, content in FEATURES.items():
        yield (
            f"features: {name}",
            "test_tuberlin_ext_zeroshot",
            test,
            overwrite("../features/features_zero.pickle", content),
        )
    for name, content in CHECKPOINTS.items():
        yield (
            f"checkpoint: {name}",
            "test_sketchy_ext_zeroshot",
            [*SMALL.split(), "-s", "{data}/zeroshot1"],
            overwrite("zeroshot1/model_best.pth.tar", content),
        )


def run(script, arguments, damage, folder, benchmark):
    """(exit status or exception, lines on stderr, files and processes left) of a command in a copy of `benchmark`."""
    data, features, out = folder / "data", folder / "features", folder / "out"
    shutil.copytree(benchmark, data)
    features.mkdir()
    (features / "features_zero.pickle").write_bytes(pickle.dumps([GALLERY, LABELS, GALLERY, LABELS, None]))
    for name in FIFOS:
        os.mkfifo(data / name)
    if damage:
        damage(data)
    arguments = [each.format(data=data, features=features, out=out) for each in arguments]
    module = importlib.import_module(MODULES.get(script, script))
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            module.main(arguments)
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith(("note: ", "features: "))]
    left = [str(path) for path in folder.rglob(".*")] + [each.name for each in multiprocessing.active_children()]
    return status, lines, left


def is_good(status, lines, left):
    """Whether a command exited with status 2 and one line, and left no half-written file or process."""
    return status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and not left


def print_row(script, name, folder_of_row, printed, wrong):
    """Print a row of the table; wrong: what differs from the promise, or None."""
    printed = " ".join(printed).replace(str(folder_of_row), "").replace("|", "\\|")
    print(f"| {script} | {name} | {printed if wrong is None else f'**{json.dumps(wrong)}**'} |", flush=True)


def main():
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import fault_injection
    from helpers.tiny_benchmark import write_tiny

    results = []
    print("| script | input | what it prints |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_tiny(Path(folder) / "tiny")
        for name, script, arguments, damage in rows():
            with tempfile.TemporaryDirectory(dir=folder) as folder_of_row:
                ended = run(script, arguments, damage, Path(folder_of_row), Path(folder) / "tiny")
                results.append(None if is_good(*ended) else ended)
                print_row(script, name, folder_of_row, ended[1], results[-1])
        for name, (script, act) in {} if "--quick" in sys.argv else fault_injection.ROWS.items():
            with tempfile.TemporaryDirectory(dir=folder) as folder_of_row:
                wrong, printed = fault_injection.run(act, Path(folder_of_row), Path(folder) / "tiny")
                results.append(wrong)
                print_row(script, name, folder_of_row, printed, wrong)
    bad = sum(wrong is not None for wrong in results)
    print(f"\n{len(results)} rows, {bad} not as promised")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
