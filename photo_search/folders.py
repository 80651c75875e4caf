"""The folders that a search can be kept to: those of an index, and all folders in them that have photos."""

import os
from bisect import bisect_left
from typing import NamedTuple

import numpy as np

MAX_FOLDERS, MAX_FOLDER_DEPTH = 2000, 40  # folders that are offered, and how deep they lie at most
_SEPARATOR = os.fsencode(os.sep)


class Folder(NamedTuple):
    """A folder with photos. Photos have places in the order of their paths, so a folder's follow one another."""

    name: str
    depth: int  # 0 for a folder of the index, 1 for one directly in it, and so on
    first: int  # its photos have places from first to last - 1
    last: int

    def rows(self, index):
        """Which photos of the index are in it, as its `nearest` has them allowed."""
        return index.between(self.first, self.last)


def folders_of(index):
    """The Folders of an Index, in the order of their paths, a folder before those in it, MAX_FOLDERS at most."""
    rows = np.argsort(index.cells.path_order)
    found = []

    def path(place):
        return os.fsencode(index.path(rows[place]))

    def add(prefix, depth, among):
        """Add the folder with this path, if it has photos `among` these places, and those in it; returns its end."""
        after = prefix[:-1] + bytes([prefix[-1] + 1])
        first, last = (bisect_left(among, edge, key=path) + among.start for edge in (prefix, after))
        if first < last and len(found) < MAX_FOLDERS:
            found.append(Folder(readable(os.path.basename(prefix[:-1]) or prefix), depth, first, last))
            place = first
            while place < last and len(found) < MAX_FOLDERS:
                name, inside, _ = path(place).removeprefix(prefix).partition(_SEPARATOR)
                deeper = inside and depth < MAX_FOLDER_DEPTH
                place = add(prefix + name + inside, depth + 1, range(place, last)) if deeper else place + 1
        return last

    for root in filter(os.path.isabs, index.metadata["folders"]):
        add(os.path.join(os.fsencode(root), b""), 0, range(len(rows)))
    return found


def readable(path):
    """A path, or a part of one, as text that every output can show: bytes that are no text become "�"."""
    return os.fsencode(path).decode("utf-8", "replace")
