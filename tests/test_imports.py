"""Imports point one way, and importing a module changes nothing in the process."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {  # package: the other packages of the project that it may import
    "utils": set(),
    "datasets": {"utils"},
    "models": {"datasets", "utils"},
    "photo_search": {"models", "datasets", "utils"},
}
# Of these, importing takes no time or needs no PyTorch: scripts import them before all else.
FIRST = ("utils/cli.py", "utils/numpy_sort.py")


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(nodes):
    """Dotted names that import statements among `nodes` name; "from a import b" names a and a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name whole paths"
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    assert modules(package)
    forbidden = ALLOWED.keys() - ALLOWED[package] - {package}
    for path in modules(package):
        for name in imported(ast.walk(ast.parse(path.read_text()))):  # those within functions, too
            assert name.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("name", FIRST)
def test_scripts_start_with_the_standard_library(name):
    names = {name.split(".")[0] for name in imported(ast.walk(ast.parse((ROOT / name).read_text())))}
    assert names <= sys.stdlib_module_names | {"utils"}


STATE = """
import contextlib, importlib, os, signal, sys, warnings

def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return dict(os.environ), handlers, list(warnings.filters), os.getcwd(), sys.excepthook, list(sys.path)

libraries, ours = (text.split() for text in sys.stdin.read().split(";"))
for name in libraries:  # their own effects do not count
    with contextlib.suppress(ImportError):  # names of functions are among them
        importlib.import_module(name)
before = state()
for name in ours:
    importlib.import_module(name)
    assert state() == before, f"importing {name} changes the process"
print(len(ours))
"""


def test_importing_changes_nothing_in_the_process():
    libraries, ours = set(), []
    for path in (path for package in ALLOWED for path in modules(package)):
        names = set(imported(ast.parse(path.read_text()).body))
        libraries |= {name for name in names if name.split(".")[0] not in ALLOWED}
        ours.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    command = [sys.executable, "-c", STATE]
    text = " ".join(sorted(libraries)) + ";" + " ".join(ours)
    # An environment of its own: this process has imported modules of ours, too.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    ended = subprocess.run(command, input=text, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) == len(ours)
