"""Make the lists of a benchmark from its image folders, or from the lists of another release.

`lists_from_images` reads class folders in any layout that the protocols name, `lists_from_class_folders` those of a
benchmark of one's own. `lists_from_lists` reads lists under any name that a release gives them. They return the lists
without writing them, and none opens an image.
"""

import difflib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.lists import CLASS_NAME_FILES, normalise_class_name, read_class_names, read_list
from datasets.protocols import PROTOCOLS
from utils.cli import InputError
from utils.files import check_stat, is_regular_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
CLASS_FOLDERS = {"sketch": ("sketch", "sketches"), "photo": ("photo", "photos", "images")}  # of other projects
SPLIT_FOLDERS = ("train", "val", "test")  # folders with such folders, in which seen and unseen classes are apart


def lists_from_images(protocol, root, held_back, seed=0):
    """Make the lists of `protocol` from all images in the class folders below `root`.

    held_back: number of sketches of each seen class in the validation list; seed: chooses these sketches.
    Returns ({file name: rows}, notes for the user). A row is (path relative to root, label); in the two files of class
    names it is (class name, label).
    Raises InputError if an image folder or a class is missing, or if a class has two folders, too few sketches or a
    file with a name that a list cannot hold.
    """
    notes = []
    classes = protocol.seen_names + protocol.unseen_names
    sketches = class_images(root, protocol.sketch_folders, classes, notes)
    photos = class_images(root, protocol.photo_folders, classes, notes)
    lists = _lists_of_classes(protocol, root, sketches, photos, held_back, seed)
    if held_back:
        notes.append(
            f"note: {held_back} sketches of each seen class are held back for validation, chosen by --seed {seed}; "
            "they are not the ones that the release held back"
        )
    return lists, notes


def _lists_of_classes(protocol, root, sketches, photos, held_back, seed):
    """{file name: rows}, see `lists_from_images`; sketches, photos: {class: paths} of all classes of `protocol`."""
    rows = {(kind, split): [] for kind in ("sketch", "photo") for split in ("train", "zero")}
    rows["sketch", "test"] = []
    for label, name in enumerate(protocol.seen_names):
        if len(sketches[name]) <= held_back:
            raise InputError(
                f"{root}: {name!r} has {len(sketches[name])} sketches, too few to hold back {held_back}; "
                "unpack the data again, or see --held_back"
            )
        chosen = np.random.default_rng((seed, label)).permutation(len(sketches[name]))[:held_back]
        for index, path in enumerate(sketches[name]):
            rows["sketch", "test" if index in chosen else "train"].append((path, label))
        rows["photo", "train"] += [(path, label) for path in photos[name]]
    for label, name in enumerate(protocol.unseen_names):
        rows["sketch", "zero"] += [(path, label) for path in sketches[name]]
        rows["photo", "zero"] += [(path, label) for path in photos[name]]
    lists = {protocol.list_names(*key)[0]: part for key, part in rows.items() if part}
    for name, names in zip(CLASS_NAME_FILES, (protocol.seen_names, protocol.unseen_names), strict=True):
        lists[name] = list(zip(names, range(len(names)), strict=True))
    return lists


def class_images(root, sources, classes, notes):
    """{class: sorted paths, relative to root} of the images in all folders that `sources` names.

    sources: `sketch_folders` or `photo_folders` of a Protocol. The name of a class folder may be another spelling of
    the class; then a line is added to `notes`. So is a line about folders that are no class.
    Raises InputError if a folder or a class is missing, or if a folder cannot be used.
    """
    images = {name: [] for name in classes}
    for alternatives in sources:
        source = next((each for each in alternatives if os.path.isdir(Path(root) / each)), None)
        if source is None:
            for each in alternatives:
                check_stat(Path(root) / each)
            raise InputError(f"{root}: no folder {' or '.join(alternatives)}; unpack the data there")
        for name, folder in _class_folders(Path(root) / source, classes, notes).items():
            found = _images(Path(root) / source / folder, notes)
            images[name] += [f"{source}/{folder}/{image}" for image in found]
    return images


def _class_folders(source, classes, notes):
    """{class: name of its folder in `source`}."""
    wanted, folders, others = {normalise_class_name(name): name for name in classes}, {}, []
    for entry in (entries := _entries(source)):
        if not os.path.isdir(entry.path):  # unlike entry.is_dir(), no error for a link that leads back to itself
            continue
        name = wanted.get(normalise_class_name(entry.name))
        if name is None:
            others.append(entry.name)
            continue
        if name in folders:
            raise InputError(f"{source}: {folders[name]!r} and {entry.name!r} are both the class {name!r}; merge them")
        _check_name(entry.name, source)
        folders[name] = entry.name
        if entry.name != name:
            notes.append(f"note: {source / entry.name}: taken for the class {name!r}")
        _note_links([entry], source, notes)
    if missing := [name for name in classes if name not in folders]:
        for entry in entries:
            if wanted.get(normalise_class_name(entry.name)) in missing:
                check_stat(entry.path)
        alike = difflib.get_close_matches(missing[0], others, n=1)
        way_out = f"rename {alike[0]!r} if that is it" if alike else "unpack the data again, or rename its folder"
        raise InputError(
            f"{source}: {len(missing)} of {len(classes)} classes are missing, first {missing[0]!r}; {way_out}"
        )
    if others:
        notes.append(
            f"note: {source}: {len(others)} folders are no class of this protocol, first {others[0]!r}: left out"
        )
    return folders


def _images(folder, notes):
    """Sorted names of the images in `folder`."""
    names, others, entries = [], [], _entries(folder)
    for entry in entries:
        if not entry.name.lower().endswith(SUFFIXES) or not is_regular_file(entry):
            others.append(entry.name)
            continue
        _check_name(entry.name, folder)
        names.append(entry.name)
    if not names:
        raise InputError(f"{folder}: holds no image; unpack the data again")
    _note_links(entries, folder, notes)
    if others:
        notes.append(f"note: {folder}: {len(others)} files are no images, first {others[0]!r}: left out")
    return names


def _check_name(name, folder):
    if set("\r\n") & set(name) or name != name.encode(errors="replace").decode():
        raise InputError(f"{folder}: no list can hold the name {name!r}; rename it")


def _entries(folder):
    """The entries of `folder`, sorted by name, without hidden files such as the `._photo.jpg` that macOS makes."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _note_links(entries, folder, notes):
    if links := [entry.name for entry in entries if entry.is_symlink()]:
        notes.append(f"note: {link_note(folder / links[0], more=len(links) - 1)}")


def link_note(path, more=0, outside=None):
    """Note on the symbolic link `path` beside `more` others; outside: a folder within which a target needs no note."""
    target = os.path.realpath(path)
    if outside and os.path.join(target, "").startswith(outside):
        return None
    what = "leads out of the data folder, to" if outside else "a link to"
    others = f", and {more} more links there" if more else ""
    return f"{path}: {what} {target}{others}; the images must stay there"


def lists_from_lists(protocol, root, source):
    """Make the lists of `protocol` from the lists in the folder `source` of `root`, whatever release named them.

    Some releases hold back sketches but have no list of them. The validation list is then made of the sketches of seen
    classes that are in the image folders and not in the training list.
    Returns the same as `lists_from_images`. Raises InputError if a list is missing, has a line that cannot be used, or
    belongs to another protocol.
    """
    folder, notes, lists = Path(root) / source, [], {}
    check_stat(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder of lists; name the one to convert, such as zeroshot0")
    classes = {}
    for name, split, own in zip(
        CLASS_NAME_FILES, ("train", "zero"), (protocol.seen_names, protocol.unseen_names), strict=True
    ):
        classes[split] = read_class_names(folder / name)
        if set(map(normalise_class_name, classes[split])) != set(map(normalise_class_name, own)):
            raise InputError(f"{folder / name}: not the classes of {protocol.title}; choose another --protocol")
        lists[name] = list(zip(classes[split], range(len(own)), strict=True))
    for kind, split in (("sketch", "train"), ("sketch", "zero"), ("photo", "train"), ("photo", "zero")):
        files = read_list(_find_list(folder, protocol, kind, split), root, len(classes[split]))
        lists[protocol.list_names(kind, split)[0]] = list(zip(files.paths, files.labels.tolist(), strict=True))
    if protocol.has_validation:
        name = protocol.list_names("sketch", "test")[0]
        found = _find_list(folder, protocol, "sketch", "test")
        if os.path.isfile(found):
            files = read_list(found, root, len(classes["train"]))
            lists[name] = list(zip(files.paths, files.labels.tolist(), strict=True))
        elif rows := _left_out(protocol, root, classes, lists, notes):
            lists[name] = rows
    return lists, notes


def _find_list(folder, protocol, kind, split):
    names = [name for each in (protocol, *PROTOCOLS.values()) for name in each.list_names(kind, split)]
    return next((folder / name for name in names if os.path.isfile(folder / name)), folder / names[0])


def _left_out(protocol, root, classes, lists, notes):
    """Rows of a validation list that is missing, see `lists_from_lists`; [] and a note if they cannot be found."""
    name = protocol.list_names("sketch", "train")[0]
    without = "there is no validation list; make lists from the images, or train with --no_validation"
    try:
        sketches = class_images(root, protocol.sketch_folders, classes["train"] + classes["zero"], [])
    except InputError as error:
        notes.append(f"note: {error}; {without}")
        return []
    listed = {path for path, _ in lists[name]}
    if missing := listed.difference(*sketches.values()):
        notes.append(f"note: {len(missing):,} images of {name} are not there, first {min(missing)}; {without}")
        return []
    rows = [
        (path, label) for label, each in enumerate(classes["train"]) for path in sketches[each] if path not in listed
    ]
    counts = np.bincount([label for _, label in rows], minlength=len(classes["train"]))
    if not counts.all():
        notes.append(f"note: {without}")
        return []
    notes.append(
        f"note: the validation list is the {len(rows):,} sketches of seen classes that {name} leaves out, "
        f"{counts.min()}{f' to {counts.max()}' if counts.max() > counts.min() else ''} of each class"
    )
    return rows


def lists_from_class_folders(protocol, root, folders=None, unseen=None, held_back=0, seed=0):
    """Make lists of a benchmark of one's own, named like those of `protocol`, from any folders of class folders.

    folders: {"sketch": [...], "photo": [...]}, relative to root; None finds `sketch` and `photo`, or both of them in
    `train` and `val`. unseen: a number of classes, chosen by `seed`, or names of classes; with None they are the
    classes of `val`. held_back: as in `lists_from_images`. Labels follow the alphabet.
    Returns the same as `lists_from_images`. Raises InputError where there are no such folders or classes, where no
    class remains seen, and as `lists_from_images` does.
    """
    notes, images = [], {"sketch": {}, "photo": {}}  # {kind: {normalised class name: {folder: paths}}}
    names = {}
    for kind, known in images.items():
        for source in map(os.path.normpath, (folders or {}).get(kind) or _find_class_folders(root, kind)):
            if os.path.isabs(source) or source.startswith(".."):
                raise InputError(f"{source}: is not inside {root}; lists name images by paths inside the data folder")
            check_stat(Path(root) / source)
            if not os.path.isdir(Path(root) / source):
                raise InputError(f"{Path(root) / source}: no such folder; name folders of class folders inside {root}")
            for name, folder in _own_class_folders(Path(root) / source, notes).items():
                names.setdefault(name, folder)
                found = _images(Path(root) / source / folder, notes)
                known.setdefault(name, {})[source] = [f"{source}/{folder}/{image}" for image in found]
    both = images["sketch"].keys() & images["photo"].keys()
    if without := sorted(names[name] for name in names.keys() - both):
        notes.append(f"note: {len(without)} classes have no sketches or no photos, first {without[0]!r}: left out")
    classes = sorted(both, key=names.get)
    if unseen is None:
        chosen = _classes_of_val(root, images, classes, names)
    else:
        chosen = _choose_unseen(root, classes, names, unseen, seed)
    if not chosen or len(chosen) == len(classes):
        raise InputError(f"{root}: {len(chosen)} of {len(classes)} classes are unseen; some must be, and not all")
    seen = [names[name] for name in classes if name not in chosen]
    own = replace(protocol, seen_names=tuple(seen), unseen_names=tuple(names[n] for n in classes if n in chosen))
    paths = {
        kind: {names[name]: [path for part in images[kind][name].values() for path in part] for name in classes}
        for kind in images
    }
    return _lists_of_classes(own, root, paths["sketch"], paths["photo"], held_back, seed), notes


def _choose_unseen(root, classes, names, unseen, seed):
    """The unseen ones of normalised class names, see `lists_from_class_folders`."""
    if isinstance(unseen, int):
        if unseen >= len(classes):
            raise InputError(f"--unseen_classes {unseen}: {root} has {len(classes)} classes; some must remain seen")
        return {classes[index] for index in np.random.default_rng(seed).permutation(len(classes))[:unseen]}
    for name in unseen:
        if normalise_class_name(name) not in classes:
            alike = difflib.get_close_matches(name, names.values(), n=1)
            way_out = f"; rename it to {alike[0]!r} if that is it" if alike else ""
            raise InputError(f"--unseen: {name!r} is no class of {root} with sketches and photos{way_out}")
    return set(map(normalise_class_name, unseen))


def _find_class_folders(root, kind):
    """Folders of class folders under the names that other projects give them, relative to `root`."""
    for parts in ([""], SPLIT_FOLDERS):
        own = [os.path.join(part, name) for part in parts for name in CLASS_FOLDERS[kind]]
        if found := [each for each in own if os.path.isdir(Path(root) / each)]:
            return found
    option = {"sketch": "--sketches", "photo": "--photos"}[kind]
    raise InputError(
        f"{root}: no folder {CLASS_FOLDERS[kind][0]} or train/{CLASS_FOLDERS[kind][0]}; "
        f"name the folders of class folders with {option}"
    )


def _own_class_folders(source, notes):
    """{normalised class name: name of its folder in `source`}."""
    folders = {}
    for entry in _entries(source):
        if not os.path.isdir(entry.path):
            check_stat(entry.path)
            continue
        _check_name(entry.name, source)
        name = normalise_class_name(entry.name)
        if name in folders:
            raise InputError(f"{source}: {folders[name]!r} and {entry.name!r} are one class; merge them")
        folders[name] = entry.name
        _note_links([entry], source, notes)
    return folders


def _classes_of_val(root, images, classes, names):
    """The unseen ones of normalised class names in `train` and `val`: those that are not in `train`."""
    parts = {
        name: {source.split("/")[0] for kind in images for source in images[kind][name]} & set(SPLIT_FOLDERS)
        for name in classes
    }
    if not all(parts.values()):
        raise InputError(f"{root}: choose the unseen classes by --unseen FILE or --unseen_classes N")
    if both := [names[name] for name in classes if "train" in parts[name] and len(parts[name]) > 1]:
        raise InputError(
            f"{root}: {both[0]!r} is in train and in {max(parts[normalise_class_name(both[0])] - {'train'})}, so these "
            "folders do not part the classes; choose the unseen ones by --unseen FILE or --unseen_classes N"
        )
    return {name for name in classes if "train" not in parts[name]}
