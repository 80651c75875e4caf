"""The folders of an index that a search can be limited to: in the order of paths, their photos are consecutive."""

import os
from bisect import bisect_left
from typing import NamedTuple

import numpy as np

MAX_FOLDERS, MAX_FOLDER_DEPTH = 2000, 40
_SEPARATOR = os.fsencode(os.sep)


class Folder(NamedTuple):
    """A folder with photos. In the order of all paths, its photos are consecutive."""

    name: str
    depth: int  # 0 for a folder of the index, 1 for one directly in it, and so on
    first: int  # its photos are those from first to last - 1 in the order of all paths
    last: int

    def rows(self, index):
        """Its photos, for `allowed` of the `nearest` of the index."""
        return index.between(self.first, self.last)


def folders_of(index):
    """The Folders of an Index, in the order of their paths, each before its subfolders, MAX_FOLDERS at most."""
    rows = np.argsort(index.cells.path_order[index.stored])
    found = []

    def path(place):
        return os.fsencode(index.path(rows[place]))

    def add(prefix, depth, among):
        """Add a folder with photos in the range `among`, and its subfolders; returns the end of its photos."""
        after = prefix[:-1] + bytes([prefix[-1] + 1])
        first, last = (bisect_left(among, edge, key=path) + among.start for edge in (prefix, after))
        if first < last and len(found) < MAX_FOLDERS:
            found.append(Folder(readable(os.path.basename(prefix[:-1]) or prefix), depth, first, last))
            place = first
            while place < last and len(found) < MAX_FOLDERS:
                name, inside, _ = path(place).removeprefix(prefix).partition(_SEPARATOR)
                deeper = inside and depth < MAX_FOLDER_DEPTH
                end = add(prefix + name + inside, depth + 1, range(place, last)) if deeper else place
                place = max(end, place + 1)  # paths of a damaged index may be in disorder
        return last

    for root in filter(os.path.isabs, index.metadata["folders"]):
        add(os.path.join(os.fsencode(root), b""), 0, range(len(rows)))
    return found


def readable(path):
    """A path, or a part of one, as valid Unicode; other bytes become "�"."""
    return os.fsencode(path).decode("utf-8", "replace")
