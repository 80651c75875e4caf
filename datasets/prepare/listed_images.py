"""Whether the images of the lists are there, and whether they can be decoded."""

import collections
import os
import time
from dataclasses import dataclass

from utils.cli import InputError
from utils.process_pool import parallel_map

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z")
MIN_SIDE_PX = 32  # pixels; if a side is shorter than this, little can be seen
MAX_AREA_PX = 50_000_000  # pixels; decoding one such image takes about a second


def find_missing(lists, root, findings):
    """Report every listed image that does not exist; returns {(kind, split): its missing indices}.

    lists: {(kind, split): FileList}; findings: the Findings to add to.
    """
    missing = {key: _missing(files, findings) for key, files in lists.items()}
    if any(missing.values()):
        for name in _file_names(root).links:
            if name.endswith(ARCHIVES):
                findings.note("archives", f"{root / name}: an archive; images are missing, so unpack it again")
    return missing


def _missing(files, findings):
    folders, missing = {}, []
    root = os.path.join(os.path.realpath(files.root), "")
    for index, path in enumerate(files.paths):
        folder, _, name = path.rpartition("/")
        if folder not in folders:
            folders[folder] = _file_names(files.root / folder)
            _note_links(files.root / folder, folders[folder], root, findings)
        if name not in folders[folder].links:
            missing.append(index)
            message = f"{files.source}:{files.lines[index]}: no image {files.root / path}"
            findings.fault("missing images", f"{message}, {_way_out(files.root / path, folders[folder])}")
    return missing


def _way_out(path, names):
    """What the user can do about the missing image `path`; names: the _FileNames of its folder."""
    if names.error:
        return f"its folder cannot be read ({names.error}); correct that"
    if path.is_symlink():
        return "only a link that leads to no file; correct the link"
    if not names.links:
        return "nor any other in that folder; unpack the data there"
    if alike := names.stems.get(_stem(path.name)):
        return f"but {alike!r}; rename it"
    return "others of its folder are there; unpack it, or take the line out"


@dataclass
class _FileNames:
    """The files in a folder."""

    links: dict  # {name: whether it is a link}
    stems: dict  # {name in lower case without its ending: name}
    error: str | None  # why the folder cannot be read; None for a folder that can be, or that does not exist


def _file_names(folder):
    links, error = {}, None
    try:
        with os.scandir(folder) as entries:
            links = {entry.name: entry.is_symlink() for entry in sorted(entries, key=_name) if is_file(entry)}
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as failure:
        error = failure.strerror
    return _FileNames(links, {_stem(name): name for name in links}, error)


def _name(entry):
    return entry.name


def is_file(entry):
    """Whether an os.DirEntry is a file, or a link to one. A link that leads back to itself is no file."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _stem(name):
    return os.path.splitext(name)[0].casefold()


def _note_links(folder, names, root, findings):
    """Note whether `folder` leads out of `root`; if it does not, whether the first link to a file in it does."""
    first_link = [name for name, is_link in names.links.items() if is_link][:1]
    for path in (folder, *(folder / name for name in first_link)):
        target = os.path.realpath(path)
        if not os.path.join(target, "").startswith(root):
            findings.note("links", f"{path}: leads out of the data folder, to {target}; images must stay there")
            return


def decode_all(lists, missing, findings):
    """Decode every image that is not missing, and report those that cannot be decoded or have an odd size.

    Returns ({(kind, split): number of unreadable images}, (images, seconds)).
    """
    import datasets.images  # noqa: F401, loads torch, which takes seconds: once, before the worker processes start

    jobs, places = [], []
    for key, files in lists.items():
        absent = set(missing[key])
        for index, path in enumerate(files.paths):
            if index not in absent:
                jobs.append(files.root / path)
                places.append((key, index))
    began, unreadable = time.monotonic(), collections.Counter()
    for (key, index), path, result in zip(places, jobs, parallel_map(_size, jobs, "decoding"), strict=True):
        place = f"{lists[key].source}:{lists[key].lines[index]}"
        if isinstance(result, str):
            unreadable[key] += 1
            findings.fault("unreadable images", f"{place}: {result}")
            continue
        width, height = result
        if min(result) < MIN_SIDE_PX:
            findings.note("small images", f"{place}: {path}: only {width} x {height} pixels")
        elif width * height > MAX_AREA_PX:
            findings.note("large images", f"{place}: {path}: {width} x {height} pixels, slow to decode; reduce it")
    return {key: unreadable[key] for key in lists}, (len(jobs), time.monotonic() - began)


def _size(path):
    """(width, height) of a decoded image, or why it cannot be decoded."""
    from datasets.images import read_rgb

    try:
        return read_rgb(path).size
    except InputError as error:
        return str(error)
