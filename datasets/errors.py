"""How command lines fail: `InputError` is what a user can cause and mend.

Every command line of the project ends such an error in one line with exit status 2. Anything else is a bug and keeps
its traceback.
"""

import argparse
import functools
import io
import re
import signal
import sys
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and the way out."""


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, see `sigterm_raises`."""


@contextmanager
def sigterm_raises():
    """Within this block SIGTERM raises Terminated, so that worker processes and unfinished files are cleaned up."""

    def end(*_):
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def signals_wait():
    """Within this block Ctrl-C and SIGTERM have no effect; they take effect at its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError for a wrong command line, and whose help names the defaults."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        plain = action.default is None or isinstance(action.default, bool)
        return action.help if plain else super()._get_help_string(action)


def number(kind, low, high, wanted):
    """An argparse type: a number of `kind` from `low` to `high`, described as `wanted` where it is not."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


seed = number(int, 0, 2**32 - 1, "a whole number from 0 to 4294967295")


def folder_name(text):
    """An argparse type: the name of a folder inside the data set, not a path."""
    name = text.rstrip("/")
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder inside the data set")
    return name


def ends_in_one_line(speaks=lambda: True):
    """A decorator: the command line ends what a user can mend in one line (status 2), Ctrl-C in one word (status 130).

    speaks: tells whether this process prints that line; of several processes that meet the same error one is enough.
    """

    def decorate(command):
        @functools.wraps(command)
        def wrapped(*args, **kwargs):
            if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
                sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
            try:
                return command(*args, **kwargs)
            except Terminated:
                message, status = "terminated", 143
            except KeyboardInterrupt:
                message, status = "interrupted", 130
            except Exception as error:
                if (message := _one_line(error)) is None:
                    raise
                message, status = f"error: {message}", 2
            if speaks():
                print(message, file=sys.stderr)
            raise SystemExit(status)

        return wrapped

    return decorate


def lost_worker(error):
    """Whether an error says that a DataLoader's worker is gone: torch polls for it, or a pipe ends in the middle."""
    return isinstance(error, EOFError) or (isinstance(error, RuntimeError) and "DataLoader worker" in str(error))


def _one_line(error):
    """What to tell of an error that a user can mend, or None for a bug."""
    if isinstance(error, InputError):
        # A DataLoader worker wraps the message in its own traceback, of which the last line is ours.
        return re.sub(r"^[\w.]*InputError: ", "", str(error).strip().split("\n")[-1])
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}; change its permissions, or choose another"
    if isinstance(error, OSError):  # what the machine refuses: too many open files, a closed pipe
        return str(error)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({str(error).splitlines()[0]}); train without --compile"
    if type(error).__name__ == "BrokenProcessPool":  # importing the class here would make every command start later
        return "a process that works on images was killed, perhaps for memory; make room and try again"
    if lost_worker(error):
        return "a process that decodes images was killed, perhaps for memory; lower --workers"
    if isinstance(error, MemoryError | RuntimeError):  # torch knows its own limits only as RuntimeError
        if re.search(r"gloo|NCCL|[Cc]onnection closed by peer", str(error)):
            return "another process ended, and has told why"
        if isinstance(error, MemoryError) or "memory" in str(error):
            return "out of memory; lower --batch_size or --input_size"
    return None
