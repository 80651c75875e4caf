"""The folders that a search can be kept to: those of an index, and the folders directly in them."""

import os
from bisect import bisect_left
from typing import NamedTuple

import numpy as np

MOST = 500  # folders that are offered
_SEPARATOR = os.fsencode(os.sep)


class Folder(NamedTuple):
    """A folder with photos. Photos have places in the order of their paths, so a folder's follow one another."""

    name: str
    depth: int  # 0 for a folder of the index, 1 for one in it
    first: int  # its photos have places from first to last - 1
    last: int

    def rows(self, index):
        """Which photos of the index are in it, as its `nearest` has them allowed."""
        return index.between(self.first, self.last)


def folders_of(index):
    """The Folders of an Index, in the order of their paths, MOST at most."""
    rows = np.argsort(index.cells.places)
    found = []

    def path(place):
        return os.fsencode(index.path(rows[place]))

    def add(prefix, depth):
        after = prefix[:-1] + bytes([prefix[-1] + 1])
        first, last = (bisect_left(range(len(rows)), edge, key=path) for edge in (prefix, after))
        if first < last:
            found.append(Folder(readable(os.path.basename(prefix[:-1]) or prefix), depth, first, last))
        return first, last

    for root in filter(os.path.isabs, index.facts["folders"]):
        prefix = os.path.join(os.fsencode(root), b"")
        place, last = add(prefix, 0)
        while place < last and len(found) < MOST:
            name, inside, _ = path(place).removeprefix(prefix).partition(_SEPARATOR)
            place = max(place + 1, add(prefix + name + inside, 1)[1] if inside else 0)
    return found[:MOST]


def readable(path):
    """A path, or a part of one, as text that every output can show: bytes that are no text become "�"."""
    return os.fsencode(path).decode("utf-8", "replace")
