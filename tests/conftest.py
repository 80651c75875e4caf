"""What the tests share: golden numbers, networks of the golden size, small benchmarks and the way errors end."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_benchmark import write_tiny
from timm.models.convnext import ConvNeXt

from datasets.prepare.miniature import write_miniature

GOLDEN = Path(__file__).parent / "golden"
SHARED = "(visit", "helpers.forked"  # files with these words share a browser, or a process that has imported PyTorch


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One process more than cores for `-n auto`: tests also wait, for processes that they start and for disks."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run a file's tests in one process, which makes their fixtures once, and so those of all files with a browser."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.partition("::")[0]
            return next((name for name in SHARED if name in source(path)), path)

    source = functools.cache(lambda path: (config.rootpath / path).read_text())
    return Scheduling(config, log)


@pytest.fixture
def golden():
    """golden(name) gives the arrays of golden/<name>.npz as a dict of tensors."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "biuf"}

    return load


@pytest.fixture
def small_backbone():
    """small_backbone(golden arrays) is a ConvNeXt V2 of their depths and widths."""

    def build(arrays):
        depths, dims = arrays["depths"].tolist(), arrays["dims"].tolist()
        return ConvNeXt(
            num_classes=int(arrays["num_classes"]), depths=depths, dims=dims, use_grn=True, ls_init_value=None
        )

    return build


@pytest.fixture
def fails(capsys):
    """fails(command, *arguments) runs a command line that must end in one line with status 2, and returns the line."""

    def run(command, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("note:", "features:"))]
        assert end.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run


@pytest.fixture(autouse=True)
def without_figures(monkeypatch, request):
    """Figures take longer than all else in a tiny run, so only tests marked `draws` have them."""
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr("models.logger.draw_curves", lambda *_: None)
        monkeypatch.setattr("models.eval.report.draw_precision_recall", lambda *_: None)
        monkeypatch.setattr("models.eval.report.draw_retrievals", lambda *_: None)


class Trap:
    """Makes a file when a pickle of it is trusted; `sprung` tells."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)

    def sprung(self):
        return self.target.exists()


@pytest.fixture
def trap(tmp_path):
    """An object whose pickle runs code when it is trusted."""
    return Trap(tmp_path / "sprung")


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """The miniature benchmark with few images a class."""
    root = tmp_path_factory.mktemp("miniature")
    write_miniature(root, seed=3, sketches=4, photos=6, held_back=1, workers=2)
    return root


@pytest.fixture
def tiny(tmp_path):
    """A benchmark of plain squares in the layout of Sketchy Ext: 2 seen and 2 unseen classes, to break in tests."""
    return write_tiny(tmp_path / "data")


# One index, one page and one browser for all tests of the page in a browser; see photo_search/browser.py.


@pytest.fixture(scope="session")
def page_index(tmp_path_factory):
    from browser import make_index

    return make_index(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="session")
def reloading_index(page_index):
    from photo_search.server import ReloadingIndex

    return ReloadingIndex(page_index, device="cpu")


@pytest.fixture(scope="session")
def page_address(reloading_index):
    from pages import served

    with served(reloading_index) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="session")
def driver():
    from browser import browser

    with browser() as driver:
        yield driver


@pytest.fixture
def visit(driver, page_address):
    from browser import Visit

    yield Visit(driver, page_address).open()
    assert driver.get_log("browser") == []  # neither errors nor violations of the policy
