"""Keeps an index up to date while its page is served: scans its folders, and runs `index` where they have changed."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

from photo_search.photos import find_photos
from utils.cli import InputError

SCRIPT = Path(__file__).resolve().parents[1] / "search_photos.py"
NICENESS = 10  # of indexing: searches come first
MAX_SKIPPED = 60  # scans that are left out after one failed update after another
SECONDS_WITH_WATCHFILES = 600  # from one scan to the next where no change is reported: network disks report none


class Watcher(threading.Thread):
    """A context manager: within its block a thread brings an index up to date, in a process of low priority.

    reloading: server.ReloadingIndex of an index on disk; seconds: from one scan to the next; checkpoint, device: as of
    the page. A photo that is being copied is indexed again once it is whole.
    """

    def __init__(self, reloading, seconds, checkpoint=None, device=None):
        super().__init__(name="watch", daemon=True)
        self.reloading, self.seconds = reloading, seconds
        self.command = [sys.executable, str(SCRIPT), "index", "--index", str(reloading.location)]
        for name, value in (("--checkpoint", checkpoint), ("--device", device)):
            self.command += [name, str(value)] if value else []
        self.stopped, self.process = threading.Event(), None
        self.indexed = None  # what the last update found
        self.failures = self.skipped = 0

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        with contextlib.suppress(AttributeError, OSError):  # none runs, or it has just ended
            self.process.terminate()
        self.join()

    def run(self):
        """Scan, and scan again whenever something may have changed."""
        self.scan_once()
        opened = self.reloading.opened  # None while another process makes the index
        folders = opened.searcher.index.metadata["folders"] if opened else []
        for _ in possible_changes(folders, self.seconds, self.stopped):
            self.scan_once()

    def scan_once(self):
        """Scan once; if something has changed since the last update, update the index.

        After a failed update, which has said why, 1, 2, 4, ... scans are left out.
        """
        if self.skipped < min(2**self.failures - 1, MAX_SKIPPED):
            self.skipped += 1
            return
        self.skipped = 0
        try:
            metadata = self.reloading.latest().searcher.index.metadata
            folders = metadata["folders"]
            own = (self.reloading.location, bool(metadata.get("hidden")))
            found = find_photos(folders, metadata["exclude"], folders, *own)
        except (InputError, OSError) as error:
            print(f"note: not watched: {error}", file=sys.stderr)
            self.failures += 1
            return
        seen = (found.files, found.unlisted)
        if seen == self.indexed or self.update() == 0:
            self.indexed, self.failures = seen, 0
        else:
            self.failures += 1

    def update(self):
        """Run `index`; returns its exit status."""
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        with contextlib.suppress(AttributeError, OSError):  # Windows has no such call
            os.setpriority(os.PRIO_PROCESS, self.process.pid, NICENESS)
        if self.stopped.is_set():
            self.process.terminate()
        return self.process.wait()


def possible_changes(folders, seconds, stopped):
    """Yield whenever folders may have changed, until the event `stopped` is set.

    That is every `seconds`; where the package watchfiles is installed, soon after a change, and now and then.
    """
    try:
        from watchfiles import watch

        if not (folders := list(filter(os.path.isdir, folders))):
            raise OSError("none is there now")
        yield from watch(
            *folders, stop_event=stopped, debounce=1000 * seconds,
            rust_timeout=1000 * SECONDS_WITH_WATCHFILES, yield_on_timeout=True, raise_interrupt=False,
        )  # fmt: skip
    except (ImportError, OSError, RuntimeError):  # not installed; more folders than the system watches
        while not stopped.wait(seconds):
            yield
