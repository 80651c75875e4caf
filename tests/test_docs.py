"""The documentation is true: links have targets, options exist, and the scripts in docs/ run."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.forked import Forked

from datasets.prepare.commands import create_parser
from datasets.protocols import PROTOCOLS
from models import compare, export, options
from models.eval import command
from photo_search.cli import create_parser as search_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / name / "README.md" for name in ("pretrained_model", "checkpoint", "tests/golden")]
LINK = re.compile(r"\[([^]]*)\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# Options of torchrun, milvus-lite, pytest and pip, the one that CONTRIBUTING.md adds to a train script, and options of
# docker and systemd-run.
OTHERS = {"--nproc_per_node", "--standalone", "--data-dir", "--norm_weight", "--doctest-modules", "--no-deps"}
OTHERS |= {"--rm", "--read-only", "--cap-drop", "--security-opt", "--user", "--shm-size", "--pty", "--uid"}


def links(page):
    """(text, path, anchor or "") of every relative link of a page."""
    return [
        (text, page.parent / target if target else page, anchor) for text, target, anchor in LINK.findall(read(page))
    ]


def read(path):
    return path.read_text(encoding="utf-8")


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", read(page), flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.fixture(scope="module")
def known_options():
    parsers = [
        create_parser(),
        search_parser(),
        compare.create_parser(),
        export.create_parser(),
        command.create_parser(),
    ]
    for protocol in PROTOCOLS.values():
        parsers += [options.train_parser(protocol), options.test_parser(protocol)]
    for action in parsers[0]._actions + parsers[1]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    return OTHERS.union(*(parser._option_string_actions for parser in parsers))


@every_page
def test_links_lead_to_what_they_name(page):
    for text, path, anchor in links(page):
        assert path.exists(), f"{text}: no {path}"
        if anchor:
            assert anchor in anchors(path), f"{path}: no heading #{anchor}"
        name = re.fullmatch(r"`(\w+)`", text)
        if name and path.suffix == ".py":
            assert re.search(rf"^(def |class )?{name[1]}\b", read(path), flags=re.MULTILINE), f"{path}: no {name[1]}"


@every_page
def test_options_exist(page, known_options):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(page)))
    assert named <= known_options, named - known_options


def test_the_front_page_is_short_and_pictures_are_small():
    assert len(read(ROOT / "README.md").splitlines()) <= 150
    pictures = [path for path in (ROOT / "docs").iterdir() if path.suffix not in (".md", ".py") and path.is_file()]
    assert pictures and all(path.stat().st_size < 300_000 for path in pictures)


def test_contributing_lists_every_module():
    listed = {path for _, path, _ in links(ROOT / "CONTRIBUTING.md")}
    packages = ("utils", "datasets", "models", "photo_search")
    modules = {path for package in packages for path in (ROOT / package).glob("**/*.py")}
    missing = [str(path.relative_to(ROOT)) for path in modules - listed if path.name != "__init__.py"]
    assert not missing


def test_every_golden_array_is_described():
    page = read(ROOT / "tests/golden/README.md")
    sections = dict(re.findall(r"^## (\w+)\.npz\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL))
    files = {path.stem: path for path in (ROOT / "tests/golden").glob("*.npz")}
    assert sections.keys() == files.keys()
    prefix = re.compile(r"(case\d|M\dK\d|(nomask_)?(warmup|bidirectional))_")
    for name, path in files.items():
        with np.load(path, allow_pickle=False) as file:
            arrays = {re.sub(r"/.*", "/…", prefix.sub("", array.removesuffix("_f64"))) for array in file.files}
        missing = {array for array in arrays if f"`{array}`" not in sections[name]}
        assert not missing, (name, missing)


def run(*arguments):
    process = Forked(*arguments)
    printed, complaints = process.communicate()
    assert process.returncode == 0, complaints.decode()
    return printed.decode()


def test_a_few_steps_of_both_phases_need_no_command_line(miniature):
    lines = run("-m", "docs.train_a_few_steps", miniature).splitlines()
    steps = [line for line in lines if ", step " in line]
    assert [line.split(":")[0] for line in steps] == [f"epoch {e}, step {s}" for e in (1, 2) for s in (1, 2, 3)]
    learnt = [float(re.search(r"ka_teacher (\S+)", line)[1]) for line in steps]
    assert learnt[:3] == [0, 0, 0] and min(learnt[3:]) > 1  # the teacher learns in the second epoch
    assert re.fullmatch(r"epoch 2, bidirectional: validation accuracy \d+\.\d %", lines[-1])


def test_a_folder_is_evaluated_without_a_command_line(miniature):
    first, *rows = run("-m", "docs.evaluate_a_folder", miniature).splitlines()
    assert first == "32 sketches, 48 photos, features of 320 values"
    assert [row.split(":")[0] for row in rows] == ["one-to-one", "M 2, K 8"]
    for row in rows:
        mean, best = map(float, re.search(r"mAP@all (0\.\d+), best class \w+ (0\.\d+)", row).groups())
        assert 0.1 < mean < best  # the network is untrained


def test_python_in_the_pages_runs(capsys):
    pages = [
        page for page in PAGES if page.name != "search.md"
    ]  # which needs an index: tests/photo_search/test_result.py
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", read(page), flags=re.DOTALL)]
    assert blocks
    for block in blocks:
        exec(block, {})
        assert 0 < float(re.search(r"tensor\((\S+),", capsys.readouterr().out)[1]) < 1
