"""Pictures that matplotlib draws: extras whose failure is a note, never the end of a command."""

import logging
import os
import warnings
from contextlib import contextmanager

from utils.cli import InputError
from utils.distributed import log_rank0
from utils.files import atomic_write

SOFTWARE = "SBKA"  # what our PNGs name as the program that wrote it
OWN_PNG = rb"(?s)\A\x89PNG.{1,200}?Software\0(SBKA|Matplotlib)"  # its beginning; earlier versions named matplotlib


def draw_or_note(draw, path, *arguments):
    """Call draw(path, ...), which draws a picture with matplotlib; returns whether it is there, else prints a note.

    Raises InputError if the file cannot be written.
    """
    try:
        with _quiet_matplotlib():
            draw(path, *arguments)
        return True
    except InputError:
        raise
    except ImportError:
        reason = "matplotlib is not installed"
    except Exception as error:  # of matplotlib, its settings or its fonts
        reason = f"matplotlib failed: {type(error).__name__}: {error}".splitlines()[0]
    log_rank0(f"note: no {os.path.basename(path)}, {reason}")
    return False


@contextmanager
def _quiet_matplotlib():
    """Within this block matplotlib prints nothing, and can be imported whatever display MPLBACKEND names.

    Notebooks name one of their own there for all commands that they start.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of its cache folder, where HOME cannot be written
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that its font lacks
            yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def save_png(figure, path, dpi):
    """Write a Figure of matplotlib as PNG, whole or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": SOFTWARE})
