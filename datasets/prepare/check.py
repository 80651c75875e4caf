"""Check whether a benchmark folder is ready: lists, class names, images and masks, each fault with file and line."""

import collections
import os
import posixpath
import time
from dataclasses import dataclass, field, replace

import numpy as np

from datasets.images import read_rgb
from datasets.lists import (
    CLASS_NAME_FILES,
    LIST_DESCRIPTIONS,
    MASK_FILE,
    TITLE_FILE,
    WINDOWS_PATHS,
    Benchmark,
    check_root,
    find_layout,
    normalise_class_name,
    open_benchmark,
)
from datasets.prepare.make_lists import link_note
from datasets.protocols import LABEL_ORDERS, PROTOCOLS
from utils.cli import InputError
from utils.files import is_regular_file, stat_error
from utils.process_pool import parallel_map

MAX_SHOWN_PER_KIND = 3  # so many messages of one kind are printed; the JSON has all of them
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z")
MIN_SIDE_PX = 32  # pixels; if a side is shorter than this, little can be seen
MAX_AREA_PX = 50_000_000  # pixels; decoding one such image takes about a second


@dataclass
class Findings:
    """The faults and notes of a check, each as {kind: [messages]}."""

    faults: dict = field(default_factory=dict)  # with a fault the scripts will not run, or their results will be wrong
    notes: dict = field(default_factory=dict)  # a note is worth knowing but stops nothing

    def fault(self, kind, message):
        """Add a fault; messages of one kind are shown together."""
        self.faults.setdefault(kind, []).append(message)

    def note(self, kind, message):
        """Add a note."""
        self.notes.setdefault(kind, []).append(message)

    def lines(self):
        """Lines to print, a few of each kind."""
        for severity, kinds in (("fault", self.faults), ("note", self.notes)):
            for kind, messages in kinds.items():
                yield from (f"{severity}: {message}" for message in messages[:MAX_SHOWN_PER_KIND])
                if len(messages) > MAX_SHOWN_PER_KIND:
                    yield f"       and {len(messages) - MAX_SHOWN_PER_KIND:,} more: {kind}"


@dataclass
class CheckResult:
    """The result of a check."""

    benchmark: Benchmark | None  # None if the folder could not be opened as a benchmark
    findings: Findings
    lists: dict = field(default_factory=dict)  # {(kind, split): FileList}, only lists with images
    rows: list = field(default_factory=list)  # a dict for each list, see _row
    opened: tuple | None = None  # (decoded images, seconds); None if no image was decoded


def check_benchmark(root, protocol_name=None, zero_version=None, decode=False, test_only=False):
    """Check a benchmark folder; returns a Checked.

    protocol_name: None for a user's own benchmark, which may have any known layout.
    decode: also decode every image, on all cores. Otherwise the check only looks whether the files exist.
    test_only: leave out what only training reads: the lists of seen classes and the mask.
    """
    findings = Findings()
    custom = protocol_name is None
    try:
        check_root(root)
        if custom:
            protocol_name, zero_version = find_layout(root, zero_version)
        benchmark = open_benchmark(
            protocol_name, root, zero_version, lambda message: findings.fault("class names", message)
        )
    except InputError as error:
        findings.fault("folders", str(error))
        return CheckResult(None, findings)
    other_split = custom or (benchmark.lists / TITLE_FILE).is_file()  # such as held-out classes
    if other_split:
        title = f"{benchmark.title}, in the layout of {benchmark.protocol.title}" if custom else benchmark.title
        benchmark = replace(benchmark, title=title, protocol=replace(benchmark.protocol, published={}))
    _check_class_names(benchmark, other_split, findings)
    lists = _read_lists(benchmark, custom, findings, {"zero"} if test_only else {"train", "test", "zero"})
    for (_, split), files in lists.items():
        _check_labels(files, benchmark, split, findings)
    _check_repeats(lists, findings)
    missing = find_missing(lists, benchmark.root, findings)
    unreadable, opened = decode_all(lists, missing, findings) if decode else ({}, None)
    if not test_only:
        _check_mask(benchmark, custom, findings)
    rows = [_row(key, files, benchmark, missing, unreadable) for key, files in lists.items()]
    for row in rows:
        if row["published"] not in (None, row["images"]):
            counts = f"{row['images']:,} images, published are {row['published']:,}"
            findings.note("counts", f"{benchmark.lists / row['list']}: {counts}")
    return CheckResult(benchmark, findings, lists, rows, opened)


def _row(key, files, benchmark, missing, unreadable):
    """A row of the table: the numbers of a list; None for an unknown number."""
    return {
        "list": files.source.name,
        "images": len(files),
        "published": benchmark.protocol.published.get(key),
        "classes": len(np.unique(files.labels)),
        "missing": len(missing[key]),
        "unreadable": unreadable.get(key),
    }


def _check_class_names(benchmark, other_split, findings):
    protocol, names = benchmark.protocol, (benchmark.seen_names, benchmark.unseen_names)
    spellings = [{normalise_class_name(name): name for name in part} for part in names]
    for same in sorted(spellings[0].keys() & spellings[1].keys()):
        seen, unseen = (part[same] for part in spellings)
        if seen != unseen:  # open_benchmark reports equal names
            findings.fault("class names", f"{benchmark.lists}: {seen!r} is seen and {unseen!r} unseen: one class")
    if other_split:
        return
    for own, given, name in zip((protocol.seen_names, protocol.unseen_names), names, CLASS_NAME_FILES, strict=True):
        differing = set(map(normalise_class_name, own)) ^ set(map(normalise_class_name, given))
        if differing:
            findings.fault(
                "class names",
                f"{benchmark.lists / name}: not the {len(own)} classes of {protocol.title} "
                f"({min(differing)!r} is only in one of the two); see --protocol, --zero_version and --custom",
            )
        elif given != list(own) and not benchmark.release:
            findings.note(
                "class names",
                f"{benchmark.lists / name}: another order or spelling of the classes than published; "
                "published checkpoints and masks do not fit it",
            )


def _read_lists(benchmark, custom, findings, splits):
    """{(kind, split): FileList} of the lists of `splits` that can be read."""
    lists = {}
    for key in (each for each in LIST_DESCRIPTIONS if each[1] in splits):
        path, optional = benchmark.path(*key), key[1] == "test"
        if optional and not os.path.isfile(path) and not stat_error(path):
            if benchmark.protocol.has_validation and key[0] == "sketch":
                report = findings.note if custom else findings.fault
                report(
                    "lists",
                    f"{path}: no validation list; train with --no_validation, or make one with the command lists",
                )
            continue
        try:
            files = benchmark.read(*key, on_error=lambda message: findings.fault("lines", message))
        except InputError as error:
            findings.fault("lists", f"{error}{_other_lists(benchmark)}")
            continue
        with open(path, "rb") as file:
            start = file.read(1 << 16)
        if start.startswith(b"\xef\xbb\xbf") or b"\r\n" in start:
            what = "Windows line ends" if b"\r\n" in start else "a byte-order mark"
            findings.note("format", f"{path}: has {what}; this project reads it, but other programs may not")
        if len(files):
            lists[key] = files
    return lists


def _other_lists(benchmark):
    """A hint for the message, if the folder has lists of another protocol; else an empty text."""
    for protocol in PROTOCOLS.values():
        for name in protocol.list_names("photo", "zero"):
            own = benchmark.protocol.list_names("photo", "zero")
            if name not in own and os.path.isfile(benchmark.lists / name):
                return f" ({name} is there, a list of {protocol.title})"
    return ""


def _check_labels(files, benchmark, split, findings):
    """Report labels that contradict the class folder in the path, and classes without images."""
    names, agree = benchmark.names(split), {}
    spellings = [normalise_class_name(name) for name in names]
    known = set(map(normalise_class_name, benchmark.seen_names + benchmark.unseen_names))
    for index, path in enumerate(files.paths):
        folder, label = path.rsplit("/", 2)[-2:-1] or [""], files.labels[index]
        key = folder[0], label
        if key not in agree:
            same = normalise_class_name(folder[0])
            agree[key] = same == spellings[label] or same not in known  # other folders are no evidence
        if not agree[key]:
            findings.fault(
                "labels",
                f"{files.source}:{files.lines[index]}: {path!r} has the label {label}, which is {names[label]!r}; "
                "correct the label, or see whether the list is of another split",
            )
    empty = np.flatnonzero(np.bincount(files.labels, minlength=len(names)) == 0)
    report = findings.note if split == "test" else findings.fault
    for label in empty:
        report("empty classes", f"{files.source}: no image of {names[label]!r}; unpack the data again, or add some")


def _check_repeats(lists, findings):
    """Report images that are listed twice, in one list or in two."""
    seen = {}
    for files in lists.values():
        for index, path in enumerate(map(posixpath.normpath, files.paths)):
            location = files.source, files.lines[index]
            first = seen.setdefault(path, location)
            if first != location:
                twice = f"{files.source}:{files.lines[index]}: {path!r} is in {first[0].name}:{first[1]} already"
                findings.fault("repeats", f"{twice}; take one out")


def _check_mask(benchmark, custom, findings):
    path, wanted = benchmark.lists / MASK_FILE, benchmark.protocol.has_mask
    there = os.path.isfile(path) or stat_error(path)
    if not (there or wanted):
        return
    try:
        mask = benchmark.read_mask()
    except InputError as error:
        report = findings.fault if wanted and not (custom and not there) else findings.note
        report("mask", str(error))
        return
    odd = np.unique(mask[~np.isin(mask, np.float32([0, 1 / 4, 1 / 3, 1]))])
    if len(odd):
        findings.note("mask", f"{path}: holds values such as {odd[0]:g} beside 0, 1/4, 1/3 and 1")
    empty = [name for name, row in zip(benchmark.seen_names, mask, strict=True) if not row.any()]
    if empty:
        findings.note("mask", f"{path}: {len(empty)} classes are like no ImageNet class, first {empty[0]!r}")


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
            linked = [name for name, is_link in folders[folder].links.items() if is_link][:1]
            for each in (files.root / folder, *(files.root / folder / name for name in linked)):
                if note := link_note(each, outside=root):
                    findings.note("links", note)
                    break
        if name not in folders[folder].links:
            missing.append(index)
            message = f"{files.source}:{files.lines[index]}: no image {files.root / path}"
            findings.fault("missing images", f"{message}, {_way_out(files.root / path, folders[folder])}")
    return missing


def _way_out(path, names):
    """What the user can do about the missing image `path`; names: the _FileNames of its folder."""
    if "\\" in str(path):
        return WINDOWS_PATHS
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
            links = {entry.name: entry.is_symlink() for entry in sorted(entries, key=_name) if is_regular_file(entry)}
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as failure:
        error = failure.strerror
    return _FileNames(links, {_stem(name): name for name in links}, error)


def _name(entry):
    return entry.name


def _stem(name):
    return os.path.splitext(name)[0].casefold()


def decode_all(lists, missing, findings):
    """Decode every image that is not missing, and report those that cannot be decoded or have an odd size.

    Returns ({(kind, split): number of unreadable images}, (images, seconds)).
    """
    jobs, locations = [], []
    for key, files in lists.items():
        absent = set(missing[key])
        for index, path in enumerate(files.paths):
            if index not in absent:
                jobs.append(files.root / path)
                locations.append((key, index))
    began, unreadable = time.monotonic(), collections.Counter()
    for (key, index), path, result in zip(locations, jobs, parallel_map(_size, jobs, "decoding"), strict=True):
        location = f"{lists[key].source}:{lists[key].lines[index]}"
        if isinstance(result, str):
            unreadable[key] += 1
            findings.fault("unreadable images", f"{location}: {result}")
            continue
        width, height = result
        if min(result) < MIN_SIDE_PX:
            findings.note("small images", f"{location}: {path}: only {width} x {height} pixels")
        elif width * height > MAX_AREA_PX:
            findings.note("large images", f"{location}: {path}: {width} x {height} pixels, slow to decode; reduce it")
    return {key: unreadable[key] for key in lists}, (len(jobs), time.monotonic() - began)


def _size(path):
    """(width, height) of a decoded image, or why it cannot be decoded."""
    try:
        return read_rgb(path).size
    except InputError as error:
        return str(error)


def print_check_result(checked):
    """Print the table of lists and the findings."""
    if checked.benchmark:
        print(f"{checked.benchmark.title}: {checked.benchmark.lists}")
        if of := label_order(checked.benchmark):
            print(f"label order: {of}")
    if checked.rows:
        width = max(len(row["list"]) for row in checked.rows)
        titles = ("images", "published", "classes", "missing", "unreadable")
        print("list".ljust(width) + "".join(f"{title:>12}" for title in titles))
        for row in checked.rows:
            cells = ("-" if row[title] is None else f"{row[title]:,}" for title in titles)
            print(row["list"].ljust(width) + "".join(f"{cell:>12}" for cell in cells))
    if checked.opened:
        images, seconds = checked.opened
        print(f"{images:,} images opened in {seconds:.1f} s, {images / max(seconds, 1e-9):,.0f} a second")
    for line in checked.findings.lines():
        print(line)


def label_order(benchmark):
    """Which release of a split the labels follow, if it was published in two orders; None for other classes."""
    names = [set(map(normalise_class_name, part)) for part in (benchmark.seen_names, benchmark.unseen_names)]
    published = ([set(map(normalise_class_name, part)) for part in orders] for orders in LABEL_ORDERS.values())
    return (benchmark.release or "that of no known release") if names in published else None


def check_result_to_json(checked):
    """The table and all findings, ready for JSON."""
    findings = {"faults": checked.findings.faults, "notes": checked.findings.notes}
    benchmark = checked.benchmark
    where = {"title": benchmark.title, "lists": str(benchmark.lists)} if benchmark else {}
    if benchmark and (of := label_order(benchmark)):
        where["label order"] = of
    return {**where, "rows": checked.rows, **findings}
