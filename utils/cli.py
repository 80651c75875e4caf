"""How command lines fail: `InputError` is an error that a user can cause and put right.

Every command line of the project prints such an error in one line and ends with exit status 2. Any other error is a bug
and keeps its traceback.
"""

import argparse
import functools
import importlib
import io
import os
import re
import signal
import sys
import time
from contextlib import contextmanager

from utils import numpy_sort

RANK0_PRINT_TIMEOUT_S = 30  # seconds


def run_command(module, *arguments):
    """Call `main` of a module of ours with `arguments`: all that a script does.

    Before the module is imported, NumPy's sort kernel is chosen. Ends in one line if a requirement is not installed.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # timm loads huggingface_hub
    numpy_sort.choose_sort_kernel()
    try:
        with signals_blocked():  # an import that Ctrl-C interrupts can fail in any way
            command = importlib.import_module(module).main
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] in ("utils", "datasets", "models", "photo_search"):
            raise
        way_out = (
            "`make test` makes a .venv with all requirements: run .venv/bin/python, or `. .venv/bin/activate` first"
        )
        print(f"error: {error.name} is not installed; {way_out}; or pip install -r requirements.txt", file=sys.stderr)
        raise SystemExit(2) from None
    return command(*arguments)


class InputError(ValueError):
    """The user gave something that cannot be used. The message names it and says what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception; see `sigterm_as_exception`."""


@contextmanager
def sigterm_as_exception():
    """Within this block SIGTERM raises Terminated, so that worker processes end and unfinished files are removed."""

    def end(*_):
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def signals_blocked():
    """Within this block Ctrl-C and SIGTERM have no effect; they take effect at its end."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RankError(InputError):
    """An InputError of this process alone, where several work together: it is always told."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError for a wrong command line. Its help names the defaults."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        plain = action.default is None or isinstance(action.default, bool)
        return action.help if plain else super()._get_help_string(action)


def number_type(kind, low, high, wanted):
    """An argparse type: a number of `kind` from `low` to `high`. The message about any other text calls it `wanted`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


seed_type = number_type(int, 0, 2**32 - 1, "a whole number from 0 to 4294967295")
positive_int = number_type(int, 1, 10**6, "a whole number from 1 to a million")
image_side = number_type(int, 32, 4096, "a whole number of pixels from 32 to 4096")


def folder_name(text):
    """An argparse type: the name of a folder inside the data set, not a path."""
    name = text.rstrip("/")
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder inside the data set")
    return name


def one_line_errors(should_print=lambda: True):
    """A decorator for command lines: they end in one line instead of a traceback.

    The exit status is 2 after an error that a user can put right, 130 after Ctrl-C and 143 after SIGTERM (see
    `sigterm_as_exception`). A bug keeps its traceback.
    should_print: says whether this process prints the line; of ranks with the same error, one is enough.
    """

    def decorate(command):
        @functools.wraps(command)
        def wrapped(*args, **kwargs):
            if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
                sys.stdout.reconfigure(errors="backslashreplace")  # file names can hold any bytes
            try:
                return command(*args, **kwargs)
            except Terminated:
                message, status, own = "terminated", 143, False
            except KeyboardInterrupt:
                message, status, own = "interrupted", 130, False
            except Exception as error:
                if (message := _one_line(error)) is None:
                    raise
                message, status, own = f"error: {message}", 2, isinstance(error, RankError)
            if should_print() or own:
                print(message, file=sys.stderr)
            elif status == 2:
                exit_quietly()
            raise SystemExit(status)

        return wrapped

    return decorate


def exit_quietly():
    """End with status 2 after an error that another process tells, once that had the time for it.

    torchrun ends all processes as soon as one has ended, and the one that tells may be slower.
    """
    time.sleep(RANK0_PRINT_TIMEOUT_S)
    raise SystemExit(2)


def is_dead_worker(error):
    """Whether an error means that a worker of a DataLoader died: torch noticed it, or the worker's pipe broke off."""
    return isinstance(error, EOFError | ConnectionResetError) or (
        isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    )


def is_out_of_memory(error):
    """Whether an error says that memory is short, in the words of Python, of torch, or of CUDA's libraries."""
    return isinstance(error, MemoryError) or bool(
        re.search(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", str(error))
    )


def _one_line(error):
    """The message for an error that a user can put right; None for a bug."""
    if isinstance(error, InputError):
        # A worker of a DataLoader puts a traceback before the message; the last line is the message.
        return re.sub(r"^[\w.]*InputError: ", "", str(error).strip().split("\n")[-1])
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}; change its permissions, or choose another"
    if is_dead_worker(error):
        return "a process that decodes images was killed, perhaps for memory; lower --workers"
    if isinstance(error, OSError):  # the machine refuses something: too many open files, a closed pipe
        return str(error)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({str(error).splitlines()[0]}); train without --compile"
    if type(error).__name__ == "BrokenProcessPool":  # its class takes long to import
        return "a process that works on images was killed, perhaps for memory; free some memory and try again"
    if isinstance(error, MemoryError | RuntimeError):  # torch raises RuntimeError when memory runs out
        if "NCCL" in str(error):
            return f"process {os.environ.get('RANK', 0)}: {str(error).strip().splitlines()[0]}"
        if re.search(r"gloo|[Cc]onnection closed by peer", str(error)):
            return "another process ended, and its message says why"
        if is_out_of_memory(error):
            return "out of memory; lower --batch_size or --input_size"
    return None
