"""Command lines: errors in one line, signals, argument types.

`InputError` is an error that a user can cause and correct. Every command prints it in one line and exits with status
2. Any other error is a bug and keeps its traceback.
"""

import argparse
import errno
import functools
import importlib
import io
import os
import platform
import re
import select
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

from utils import numpy_sort

RANK0_PRINT_TIMEOUT_S = 30


def run_command(module, *arguments):
    """Import a module of this project and call its `main` with `arguments`: all that a script does.

    Before the module is imported, NumPy's sort kernel is chosen. Ends in one line if a requirement is not installed.
    """
    _open_standard_streams()
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


def _open_standard_streams():
    """Open the null device in the place of standard streams that are closed: files would get their descriptors."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))


# Control characters, line separators, marks of the direction of writing, and bytes of names that are not UTF-8.
_ACTING = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """A text with escapes for all that would act on a terminal or break a line, such as file names may contain.

    >>> printable("new\\nline \\x1b[2J")
    'new\\\\nline \\\\x1b[2J'
    """
    return _ACTING.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


class InputError(ValueError):
    """The user gave something that cannot be used. The message names it and says what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception; see `sigterm_as_exception`."""


@contextmanager
def sigterm_as_exception():
    """Within this block SIGTERM raises Terminated, so that worker processes exit and temporary files are removed."""

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
    """An InputError raised on one rank only; printed whatever the rank."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError for a wrong command line. Its help names the defaults."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)
        self.add_argument(
            "--version",
            action=_Version,
            nargs=0,
            dest=argparse.SUPPRESS,
            help="print what a report of a fault should name",
        )

    def error(self, message):
        raise InputError(f"{message} (see --help)")


class _Version(argparse.Action):
    """Prints the commit of this project, if it is known, and the versions of Python and of the main libraries."""

    def __call__(self, parser, *_):
        import subprocess  # these two take longer to load than the rest of this module
        from importlib.metadata import PackageNotFoundError, version

        root = Path(__file__).resolve().parents[1]
        try:
            commit = subprocess.run(
                ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # a download without its history
            commit = "of an unknown commit"
        versions = [f"Python {platform.python_version()}"]
        for name in ("numpy", "pillow", "torch", "timm", "onnxruntime"):
            with suppress(PackageNotFoundError):
                versions.append(f"{name} {version(name)}")
        print(f"SBKA {commit}, {', '.join(versions)}, {platform.platform()}")
        parser.exit()


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        plain = action.default is None or isinstance(action.default, bool) or "(default:" in action.help
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


def nonempty_text(text):
    """An argparse type: a text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty string is no name")
    return text


def existing_text(text):
    """An argparse type: the name of a file or folder. An empty text, as of an unset variable, is none."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("an empty string is not a file or folder")
    if re.match(r"[a-z][a-z0-9+]{1,9}://", text):
        raise argparse.ArgumentTypeError(f"{text!r} is an address; download the file, and name that")
    return text


def path_type(text):
    """An argparse type: the Path of a file or folder, see `existing_text`."""
    return Path(existing_text(text))


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
    """A decorator for command lines: an error that a user can cause ends in one line instead of a traceback.

    The exit status is 2 after such an error, 130 after Ctrl-C, 143 after SIGTERM (see `sigterm_as_exception`), and 141
    if the output is a pipe that was closed, as after `| head`. Any other exception is a bug and passes.
    should_print: whether this process prints the line; one of several ranks with the same error is enough.
    """

    def decorate(command):
        @functools.wraps(command)
        def wrapped(*args, **kwargs):
            for stream in (sys.stdout, sys.stderr):
                _escape_unprintable(stream)
            try:
                try:
                    result = command(*args, **kwargs)
                except SystemExit:  # after --help
                    sys.stdout.flush()
                    raise
                sys.stdout.flush()  # so that a full disk or a closed pipe is an error here, not when Python exits
                return result
            except Terminated:
                message, status, is_own = "terminated", 143, False
            except KeyboardInterrupt:
                message, status, is_own = "interrupted", 130, False
            except Exception as error:
                is_closed = isinstance(error, BrokenPipeError) and any(map(_has_no_reader, (sys.stdout, sys.stderr)))
                message = None if is_closed else _user_message(error)
                if message is None and not is_closed:
                    raise
                _discard_unwritable_output()
                if is_closed:
                    raise SystemExit(141) from None
                message, status, is_own = f"error: {message}", 2, isinstance(error, RankError)
            if should_print() or is_own:
                print(printable(message), file=sys.stderr)
            elif status == 2:
                exit_quietly()
            raise SystemExit(status)

        return wrapped

    return decorate


def _escape_unprintable(stream):
    """Have a text stream write what its encoding lacks as escapes: file names can hold any bytes."""
    if isinstance(stream, io.TextIOWrapper) and (stream.errors == "strict" or stream.encoding.lower() != "utf-8"):
        stream.reconfigure(errors="backslashreplace")


def _discard_unwritable_output():
    """Redirect standard output and error to the null device if they cannot be written: Python flushes them at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            is_writable = not _has_no_reader(stream)
        except OSError:
            is_writable = False
        if not is_writable:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _has_no_reader(stream):
    """Whether a stream is a pipe that its reader has closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # events that are always reported: error and hang-up
    except (AttributeError, OSError, ValueError):  # Windows; a stream that is no file
        return False
    return bool(poll.poll(0))


def exit_quietly():
    """Exit with status 2 after an error that another rank prints, once that rank had the time to do so.

    torchrun ends all processes as soon as one has ended.
    """
    time.sleep(RANK0_PRINT_TIMEOUT_S)
    raise SystemExit(2)


def is_dead_worker(error):
    """Whether an error can mean that a worker of a DataLoader died: torch noticed it, or the worker's pipe broke."""
    return isinstance(error, EOFError | ConnectionResetError) or (
        isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    )


def first_line(error, length=160):
    """The first line of an exception's message, or of a text, cut to `length` characters; its class if it is empty."""
    return str(error).splitlines()[0][:length] if str(error) else type(error).__name__


def is_out_of_memory(error):
    """Whether an error says that memory is exhausted: of Python, torch, CUDA's libraries or ONNX Runtime."""
    if isinstance(error, MemoryError):
        return True
    # torch raises OutOfMemoryError, a RuntimeError, for its own CUDA allocator only.
    pattern = (
        r"CUDA( error:)? out of memory|DefaultCPUAllocator: |_STATUS_ALLOC_FAILED|"
        r"\[ONNXRuntimeError\].*(bad_alloc|Failed to allocate memory)"
    )
    is_of_runtime = isinstance(error, RuntimeError) or str(error).startswith("[ONNXRuntimeError]")
    return is_of_runtime and (type(error).__name__ == "OutOfMemoryError" or bool(re.search(pattern, str(error))))


_MACHINE_LIMITS = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}


def _user_message(error):
    """The message for an error that a user can cause; None for a bug."""
    if isinstance(error, InputError):
        text = str(error)
        # A worker of a DataLoader puts a traceback before the message.
        return text.rpartition("InputError: ")[2].strip() if text.startswith("Caught ") else text
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}; change its permissions, or choose another"
    if is_dead_worker(error) and _raised_in(error, "torch.utils.data", "multiprocessing"):
        return "a process that decodes images was killed, perhaps for memory; lower --workers"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
        return f"the output cannot be written ({error.strerror}); make room, or redirect it elsewhere"
    if isinstance(error, OSError) and error.errno and (error.filename or error.errno in _MACHINE_LIMITS):
        return str(error)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({str(error).splitlines()[0]}); train without --compile"
    if type(error).__name__ == "BrokenProcessPool":  # its class takes long to import
        return "a process that works on images was killed, perhaps for memory; free some memory and try again"
    if is_out_of_memory(error):
        return "out of memory; lower --batch_size or --input_size"
    return _peer_message(error)


def _peer_message(error):
    """The message for an error of torch.distributed; None for any other."""
    distributed = sys.modules.get("torch.distributed")
    if isinstance(error, getattr(distributed, "DistError", ())):  # of NCCL, of the store, of the network
        return f"process {os.environ.get('RANK', 0)}: {str(error).strip().splitlines()[0]}"
    # Gloo has no exception of its own: its messages begin with its source file, and torch's modules raise them.
    is_gloo = type(error) is RuntimeError and re.match(r"\[\S*/gloo/\S+\]", str(error))
    return "a peer process died; see its output above" if is_gloo and _raised_in(error, "torch") else None


def _raised_in(error, *packages):
    """Whether a frame of the error's traceback belongs to one of `packages`."""
    frames = traceback.walk_tb(error.__traceback__)
    names = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    return any(f"{name}.".startswith(f"{package}.") for name in names for package in packages)
