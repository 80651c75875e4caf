"""The examples of CONTRIBUTING.md: applied to a copy of the project, and its commands run there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(
    re.findall(r"^## (Add a (?:protocol|loss|metric))\n(.*?)(?=^## )", TEXT, flags=re.MULTILINE | re.DOTALL)
)
PIECE = re.compile(r"```(\w*)\n(.*?)^```$|\]\(([\w/]+\.py)\)|`(\w+\.py)`", flags=re.MULTILINE | re.DOTALL)


def copy_project(target):
    """Copy scripts, packages and tests to `target`, without data, weights and environments."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, target)
    shutil.copy(ROOT / "pyproject.toml", target)
    for package in ("utils", "datasets", "models", "photo_search", "tests"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".npz", ".html") and "__pycache__" not in path.parts:
                (target / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.relative_to(ROOT))


def apply(diff, path):
    """Replace the lines of a diff that are in the file by those that shall be; without such lines, append or create."""
    lines = [line or " " for line in diff.splitlines()]
    before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in (" -", " +"))
    content = path.read_text(encoding="utf-8") if path.exists() else ""
    if before:
        assert content.count(f"\n{before}") == 1, f"{path.name} has these lines not once: {before}"
        path.write_text(content.replace(f"\n{before}", f"\n{after}"), encoding="utf-8")
    else:
        path.write_text(content + after, encoding="utf-8")


@pytest.mark.parametrize("section", SECTIONS)
def test_an_example_works_as_written(section, tmp_path):
    copy_project(tmp_path)
    files, commands = [], []
    for kind, block, link, name in PIECE.findall(SECTIONS[section]):
        if kind == "diff":
            apply(block, tmp_path / files[-1])
        elif block:
            commands += block.splitlines()
        elif link or name not in files:
            files.append(link or name)
    if "test_toys_zeroshot.py" in files:  # which the text describes by its difference from the train script
        script = (tmp_path / "test_toys_zeroshot.py").read_text()
        (tmp_path / "train_toys.py").write_text(script)
        (tmp_path / "test_toys_zeroshot.py").write_text(script.replace('"models.training"', '"models.testing"'))
        commands.append("python test_toys_zeroshot.py --help")
    assert len(commands) >= 2
    for command in commands:
        arguments = [sys.executable, *shlex.split(command)[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_all_three_examples_are_there():
    assert len(SECTIONS) == 3
