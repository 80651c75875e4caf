"""Features that are being extracted, kept as they come, so that a killed extraction goes on."""

import json

import numpy as np

from utils.cli import InputError


class PartialFeatures:
    """Features of a list of images in a hidden file.

    It holds a line of JSON that says what the features depend on, and then the features, float32.
    """

    def __init__(self, path, source, width, batch_size):
        """Go on with the file at `path` if it is of the same `source` (JSON), else start anew."""
        self.path, self.width = path, width
        self.header = json.dumps([source, width]).encode() + b"\n"
        self.done = 0  # in whole batches, so that the batches still to come are the same as without an interruption
        if self._is_same():
            rows = self.read()
            sound = np.abs(np.linalg.norm(rows, axis=1) - 1) < 0.01  # a torn disk can leave zeros
            self.done = int(np.append(sound, False).argmin()) // batch_size * batch_size
        with open(path, "r+b" if self.done else "wb") as file:
            if self.done:
                file.truncate(len(self.header) + 4 * width * self.done)
            else:
                file.write(self.header)

    def add(self, rows):
        """Append rows (n, width) float32; they outlive the process from here on. Raises InputError if that fails."""
        try:
            with open(self.path, "ab") as file:
                file.write(rows.tobytes())
        except OSError as error:
            raise InputError(
                f"{self.path.parent}: features cannot be kept ({error.strerror}); make room, and start again to go on"
            ) from error

    def read(self):
        """All rows so far: (n, width) float32."""
        values = np.fromfile(self.path, np.float32, offset=len(self.header))
        return values[: len(values) // self.width * self.width].reshape(-1, self.width)

    def remove(self):
        """Delete the file, once its features are somewhere else."""
        self.path.unlink()

    def _is_same(self):
        try:
            with open(self.path, "rb") as file:
                return file.readline() == self.header
        except FileNotFoundError:
            return False
