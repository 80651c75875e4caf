"""The lists, class names and semantic masks of a benchmark folder, read and written; every line is checked.

    <root>/<zero_version>/<list>.txt     one image a line: `relative/path with spaces.png 12`, labels 0..C-1; the label
                                         follows a space or a tab
    <root>/<zero_version>/cname_cid.txt  seen classes, `class name 12`; cname_cid_zero.txt the unseen ones
    <root>/<zero_version>/cid_mask.pickle  {label: float64 vector (1000,)}, by Python 2 or 3
    <root>/<zero_version>/title.txt      optional, ours: a line, what tables and pictures call a benchmark of one's own

Reading never touches an image; `check_images` is the only function that looks for them.
"""

import io
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.protocols import LABEL_ORDERS, PROTOCOLS, Protocol, protocol_of
from utils.cli import InputError
from utils.files import atomic_write, check_stat, dump_pickle, read_bytes, stat_error
from utils.safe_pickle import read_pickled_dict

LIST_DESCRIPTIONS = {  # {(kind, split) of every list: its content}
    ("sketch", "train"): "training sketches",
    ("sketch", "test"): "validation sketches",
    ("sketch", "zero"): "unseen sketches",
    ("photo", "train"): "training photos",
    ("photo", "test"): "held-back photos",  # of seen classes, for generalised retrieval; optional
    ("photo", "zero"): "unseen photos",
}
CLASS_NAME_FILES = "cname_cid.txt", "cname_cid_zero.txt"  # of seen and of unseen classes
MASK_FILE = "cid_mask.pickle"
TITLE_FILE = "title.txt"
MAX_LIST_BYTES = 256 << 20  # of a text file; the published lists have a tenth of that
WINDOWS_PATHS = "Windows paths: replace each \\ in the list by /"
_MIXED = "lists of two releases in one folder; take all files from one release"
_MAKE_MASK = "make one with python -m datasets.prepare mask, or train without: --no_mask"


def raise_input_error(message):
    """The default `on_error` of the readers: raise InputError."""
    raise InputError(message)


@dataclass(frozen=True)
class FileList:
    """Images of one kind and split: `paths` relative to `root`, `labels` (n,) int64."""

    source: Path  # the list file, for messages
    root: Path
    paths: list[str]
    labels: np.ndarray
    lines: list[int]  # line number of each in `source`

    def __len__(self):
        return len(self.paths)


@dataclass(frozen=True)
class QueryGallery:
    """The unseen-class part of a benchmark folder."""

    gallery: FileList  # photos
    query: FileList  # sketches

    def items(self):
        """(FileList, what it holds), the gallery first."""
        return (self.gallery, "photos"), (self.query, "sketches")

    def check(self):
        """Raise InputError for the first image that is not there."""
        for files, _ in self.items():
            check_images(files)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark folder: where its lists lie and what its classes are called."""

    protocol: Protocol
    title: str  # what tables and pictures call it
    root: Path
    lists: Path  # root/zero_version
    seen_names: list[str]
    unseen_names: list[str]

    def names(self, split):
        """Class names of `split`, in the order of their labels."""
        return self.unseen_names if split == "zero" else self.seen_names

    def path(self, kind, split):
        """The list of `kind` ("sketch" or "photo") and `split` ("train", "test" for validation, or "zero")."""
        names = self.protocol.list_names(kind, split)
        return next((self.lists / name for name in names if os.path.isfile(self.lists / name)), self.lists / names[0])

    def read(self, kind, split, on_error=raise_input_error):
        """FileList of `kind` and `split`, see `path` and `read_list`.

        Raises InputError if its labels follow another release than the class names do, and as `read_list` does.
        """
        files = read_list(self.path(kind, split), self.root, len(self.names(split)), on_error)
        self._check_release(files, split)
        return files

    def _check_release(self, files, split):
        pairs = set(zip((path.rpartition("/")[0] for path in files.paths), files.labels.tolist(), strict=True))
        labels = {(normalise_class_name(folder.rpartition("/")[2]), label) for folder, label in pairs}
        if not labels or labels <= set(_label_order(self.names(split))):
            return
        for release, orders in LABEL_ORDERS.items():
            if labels <= set(_label_order(orders[split == "zero"])):
                name = CLASS_NAME_FILES[split == "zero"]
                raise InputError(f"{files.source}: its labels follow {release}, unlike {name}: {_MIXED}")

    @property
    def release(self):
        """Which of LABEL_ORDERS the class names follow; None for none of them."""
        own = [_label_order(names) for names in (self.seen_names, self.unseen_names)]
        return next((name for name, of in LABEL_ORDERS.items() if own == [*map(_label_order, of)]), None)

    def read_query_gallery(self):
        """QueryGallery."""
        return QueryGallery(self.read("photo", "zero"), self.read("sketch", "zero"))

    def check_seen_classes(self, count):
        """Raise InputError unless it has `count` seen classes; None is any number."""
        if count not in (None, len(self.seen_names)):
            raise InputError(
                f"--nb_classes {count}: {self.lists / CLASS_NAME_FILES[0]} lists {len(self.seen_names)} seen classes; "
                "leave the option out, or see --zero_version (the outputs of the ImageNet head are --imagenet_classes)"
            )

    def read_mask(self, imagenet_classes=1000):
        """Semantic mask (seen classes, imagenet_classes) float32."""
        return read_mask(self.lists / MASK_FILE, len(self.seen_names), imagenet_classes)


def open_benchmark(protocol_name, root=None, zero_version=None, on_error=raise_input_error):
    """Open a benchmark folder laid out like `protocol_name`'s; `root` and `zero_version` default to the protocol's.

    on_error: as in `read_list`, for class names. Raises InputError if the folder, or a file of class names in it, is
    missing, and what `on_error` raises.
    """
    protocol = PROTOCOLS[protocol_name]
    root = Path(root or protocol.data_root)
    lists = root / (zero_version or protocol.zero_version)
    check_stat(root)
    check_stat(lists)
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such data folder; unpack {protocol.title} there or name another with --data_root")
    if not os.path.isdir(lists):
        raise InputError(
            f"{lists}: no such folder of lists; name the right one with --zero_version, or make it with "
            "python -m datasets.prepare lists"
        )
    seen, unseen = (read_class_names(lists / name, on_error) for name in CLASS_NAME_FILES)
    if both := sorted(set(seen) & set(unseen)):
        on_error(f"{lists}: {both[0]!r} is in cname_cid.txt and in cname_cid_zero.txt; unseen classes must be new")
    _check_one_release(lists, seen, unseen, on_error)
    return Benchmark(protocol, _benchmark_title(protocol, lists, seen, unseen), root, lists, seen, unseen)


def _label_order(names):
    return [(normalise_class_name(name), label) for label, name in enumerate(names)]


def _check_one_release(lists, seen, unseen, on_error):
    """Call `on_error` if the seen and the unseen class names follow two of LABEL_ORDERS."""
    releases = [
        [name for name, of in LABEL_ORDERS.items() if _label_order(of[part]) == _label_order(names)]
        for part, names in enumerate((seen, unseen))
    ]
    if all(releases) and releases[0] != releases[1]:
        on_error(
            f"{lists}: {CLASS_NAME_FILES[0]} follows {releases[0][0]}, {CLASS_NAME_FILES[1]} {releases[1][0]}: {_MIXED}"
        )


def _benchmark_title(protocol, lists, seen, unseen):
    """The line of title.txt; without one, the protocol's title if the classes are its own, else the folder's name."""
    if os.path.isfile(lists / TITLE_FILE):
        return _numbered_lines(lists / TITLE_FILE)[0][1]
    pairs = ((seen, protocol.seen_names), (unseen, protocol.unseen_names))
    published = all(
        set(map(normalise_class_name, own)) == set(map(normalise_class_name, names)) for own, names in pairs
    )
    # A folder's name need not be UTF-8; titles are written as UTF-8.
    return protocol.title if published else lists.parent.resolve().name.encode(errors="replace").decode()


def check_root(root):
    """Raise InputError unless `root` is a folder."""
    check_stat(root)
    if not os.path.isdir(root):
        what = "is a file, perhaps an archive to unpack" if os.path.exists(root) else "no such folder"
        raise InputError(f"{root}: {what}; name the folder of the data set")


def find_layout(root, zero_version=None):
    """(protocol name, folder of lists) of the first known layout found in `root`, a folder of any benchmark.

    zero_version: the folder of lists, where it is known. Raises InputError where there is none.
    """
    check_root(root)
    folders = [zero_version] if zero_version else sorted(path.name for path in Path(root).iterdir())
    for name, protocol in PROTOCOLS.items():
        for folder in sorted(folders, key=lambda each: each != protocol.zero_version):
            kinds = (protocol.list_names(kind, "zero") for kind in ("sketch", "photo"))
            if all(any(os.path.isfile(Path(root) / folder / each) for each in names) for names in kinds):
                return protocol_of(name, folder), folder
    inside = Path(root) / zero_version if zero_version else f"{root}/zeroshot*"
    hidden = _hidden_lists(root, folders)
    raise InputError(
        f"{inside}: no lists of unseen sketches and photos under any known names{hidden}; make them with "
        "python -m datasets.prepare lists, or name their folder with --zero_version"
    )


def _hidden_lists(root, folders):
    """A hint for the message where lists of unseen images may be that cannot be seen; else an empty text."""
    keys = [key for key in LIST_DESCRIPTIONS if key[1] == "zero"]
    names = {name for protocol in PROTOCOLS.values() for key in keys for name in protocol.list_names(*key)}
    for folder in folders:
        for name in (".", *sorted(names)):  # "." can be seen by who may look into the folder
            if why := stat_error(os.path.join(root, folder, name)):
                return f" ({os.path.normpath(os.path.join(root, folder, name))} cannot be read: {why})"
    return ""


def read_list(path, root, classes, on_error=raise_input_error):
    """Read a list of images whose labels lie in 0..classes-1.

    on_error: takes a message, naming file and line, for each line without a label or with one out of range, and for
    each path that is absolute or climbs out of `root`; if it returns, the line is left out.
    Raises InputError if the list is missing or empty, and what `on_error` raises.
    """
    paths, labels, numbers = [], [], []
    for number, line in _numbered_lines(path):
        if (parts := _split_label(path, number, line, on_error)) is None:
            continue
        name, label = parts
        if label >= classes:
            on_error(f"{path}:{number}: label {label} is outside 0..{classes - 1}, the classes of cname_cid*.txt")
        elif name.startswith("/") or ".." in name.split("/"):
            on_error(f"{path}:{number}: {name!r} leaves the data folder; paths are relative to {root}")
        else:
            paths.append(name)
            labels.append(label)
            numbers.append(number)
    return FileList(Path(path), Path(root), paths, np.array(labels, dtype=np.int64), numbers)


def read_class_names(path, on_error=raise_input_error):
    """Class names in the order of their labels, which must be 0..C-1; no name may occur twice.

    on_error: as in `read_list`. Raises InputError if the file is missing or empty, and what `on_error` raises.
    """
    names, used = {}, set()
    for number, line in _numbered_lines(path):
        if (parts := _split_label(path, number, line, on_error)) is None:
            continue
        name, label = parts
        if label in names:
            on_error(f"{path}:{number}: label {label} is already that of {names[label]!r}")
        elif name in used:
            on_error(f"{path}:{number}: the class {name!r} already has a label")
        else:
            names[label] = name
            used.add(name)
    if missing := sorted(set(range(len(names))) - set(names)):
        on_error(f"{path}: labels must be 0..{len(names) - 1}, but {missing[0]} is missing")
    return [names[label] for label in sorted(names)]


def read_names(path):
    """Class names of a text file, one a line; a file like cname_cid.txt, with labels from 0, is read as well."""
    lines = [line for _, line in _numbered_lines(path)]
    labels = [line.rpartition(" ")[2] for line in lines]
    return read_class_names(path) if sorted(labels) == sorted(map(str, range(len(lines)))) else lines


def read_mask(path, classes, imagenet_classes=1000):
    """Semantic mask a (classes, imagenet_classes) float32, row c for seen class c.

    Raises InputError if the file is missing, refused or damaged, lacks a class, or holds vectors of another length.
    """
    check_stat(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no semantic mask; {_MAKE_MASK}")
    mask = read_pickled_dict(path)
    if set(mask) != set(range(classes)):
        raise InputError(f"{path}: not a mask of the {classes} classes in cname_cid.txt; {_MAKE_MASK}")
    rows = [mask[label] for label in range(classes)]
    if is_valid := all(row is not None and row.shape == (imagenet_classes,) for row in rows):
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused below
            rows = np.stack(rows, dtype=np.float64).astype(np.float32)
    if not is_valid or not np.isfinite(rows).all():
        raise InputError(
            f"{path}: every class needs a vector of {imagenet_classes} finite numbers (see --imagenet_classes)"
        )
    return rows


def check_images(files):
    """Raise InputError naming list and line of the first image of FileList `files` that is not there."""
    for index, name in enumerate(files.paths):
        if not os.path.isfile(files.root / name):
            location = f"{files.source}:{files.lines[index]}"
            if why := stat_error(files.root / name):
                raise InputError(f"{location}: {files.root / name} cannot be read ({why}); correct that")
            way_out = WINDOWS_PATHS if "\\" in name else "unpack the data, or set --data_root"
            raise InputError(f"{location}: no image {files.root / name}; {way_out}")


def write_list(path, rows):
    """Write (path or class name, label) rows as a list, or as a file of class names."""
    with atomic_write(path) as file:
        file.write(format_list(rows))


def format_list(rows):
    """Bytes of a list of (path or class name, label) rows."""
    return "".join(f"{name} {label}\n" for name, label in rows).encode()


def normalise_class_name(name):
    """A class name without case, spaces and punctuation: equal for all spellings of one class.

    Vowel signs stay, and so do + and #: C, C++ and C# are three classes. A name of punctuation only stays as it is.
    """
    signs = unicodedata.normalize("NFKC", name).casefold()
    return "".join(sign for sign in signs if sign == "#" or unicodedata.category(sign)[0] not in "CPZ") or signs


def write_mask(path, mask):
    """Write mask (C, 1000) as the authors do: a pickled {label: float64 vector}, for any Python and NumPy."""
    with atomic_write(path) as file:
        file.write(format_mask(mask))


def format_mask(mask):
    """Bytes of a mask (C, 1000), see `write_mask`."""
    file = io.BytesIO()
    dump_pickle(file, dict(enumerate(np.asarray(mask, dtype=np.float64))), protocol=2)
    return file.getvalue()


def _numbered_lines(path):
    """Numbered lines of a text file that are not blank; Windows line ends and a byte-order mark are accepted."""
    try:
        text = read_bytes(path, MAX_LIST_BYTES).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path}: no such list; python -m datasets.prepare lists makes it, or see --zero_version"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); correct that, or choose another") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{path}: the list is empty")
    return lines


def _split_label(path, number, line, on_error):
    end = max(line.rfind(" "), line.rfind("\t"))
    name, label = line[: max(end, 0)], line[end + 1 :]
    if not name.strip() or "\0" in name or not label.isascii() or not label.isdigit() or len(label) > 9:
        on_error(f"{path}:{number}: expected 'path label' with a whole number 0.. at the end, found {line!r}")
        return None
    return name.strip(), int(label)
