"""Shows a file in the file manager of the desktop that this process runs on."""

import os
import shutil
import subprocess
import sys
from urllib.parse import quote


def has_desktop():
    """Whether this process can open windows."""
    # Without a display, webbrowser would start a browser in this terminal.
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def show_in_folder(path):
    """Open the folder of the file at `path` (absolute), with the file selected where the file manager can.

    Returns whether a program for that was started.
    """
    return any(shutil.which(command[0]) and _run(command) for command in _commands(path))


def _commands(path):
    if sys.platform == "darwin":
        return [["open", "-R", path]]
    if sys.platform == "win32":
        return [["explorer", f"/select,{path}"]]
    address = "file://" + quote(os.fsencode(path))  # dbus-send separates by commas, which are quoted
    files = "org.freedesktop.FileManager1"
    return [
        ["dbus-send", "--session", "--print-reply", f"--dest={files}", "/org/freedesktop/FileManager1",
         f"{files}.ShowItems", f"array:string:{address}", "string:"],
        ["xdg-open", os.path.dirname(path)],
    ]  # fmt: skip


def _run(command):
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        status = subprocess.run(command, timeout=10, check=False, **quiet).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False
    return status == 0 or command[0] == "explorer"  # which ends with 1 even if it worked
