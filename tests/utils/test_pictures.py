import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli import InputError
from utils.pictures import draw_or_note

ROOT = Path(__file__).resolve().parents[2]
DRAW = """
import sys
from utils.pictures import draw_or_note, save_png

def draw(path):
    from matplotlib.figure import Figure
    figure = Figure()
    figure.text(0.5, 0.5, "\\u732b")  # a letter that its font lacks
    save_png(figure, path, 50)

assert draw_or_note(draw, sys.argv[1])
"""


def test_no_setting_of_matplotlib_ends_or_disturbs_a_command(tmp_path):
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "HOME": "/proc/none"}
    environment.pop("MPLCONFIGDIR", None)
    command = [sys.executable, "-c", DRAW, str(tmp_path / "p.png")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and (tmp_path / "p.png").exists()


def test_a_failure_is_a_note_but_for_a_file_that_cannot_be_written(tmp_path, capsys):
    assert not draw_or_note(lambda path: 1 / 0, tmp_path / "p.png")
    assert capsys.readouterr().err == "note: no p.png, matplotlib failed: ZeroDivisionError: division by zero\n"

    def full(path):
        raise InputError("full")

    with pytest.raises(InputError):
        draw_or_note(full, "p.png")
