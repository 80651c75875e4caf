"""Derive lists from the lists of a benchmark: hold out seen classes, which play unseen, and hold back seen images.

Choose learning rates and epochs by retrieval of held-out classes; the published unseen classes are in none of their
lists. Held-back photos of seen classes are for the gallery of generalised retrieval. No image is opened.
"""

import os

import numpy as np

from datasets.lists import CLASS_NAME_FILES, LIST_DESCRIPTIONS, MASK_FILE, TITLE_FILE, format_list, format_mask
from utils.cli import InputError
from utils.safe_pickle import read_pickled_dict

MIN_SEEN = 2  # classes that remain seen, at least
_OPTIONS = {"photo": "--hold_out_photos", "sketch": "--held_back"}
_PLURALS = {"photo": "photos", "sketch": "sketches"}


def derive_lists(benchmark, hold_out=0, photos=0, sketches=0, seed=0):
    """Lists in which `hold_out` seen classes are the unseen ones and some images of the remaining ones are held back.

    hold_out: number of classes; with 0 the unseen classes stay those of `benchmark`. photos, sketches: of each class
    that remains seen, a share below 1 or a number of images; they move from the training list to the list "test".
    seed: chooses classes and images. Labels follow the order of `benchmark`.
    Returns {file name: content in bytes} of all lists, class names, mask (if `benchmark` has one) and title.txt.
    Raises InputError where lists are missing, fewer than two classes would remain seen, a held-out class has no image,
    a class has too few images, or there is a list of held-back images already.
    """
    seen, unseen = benchmark.seen_names, benchmark.unseen_names
    if hold_out > max(0, len(seen) - MIN_SEEN):
        raise InputError(
            f"--hold_out_classes {hold_out}: {benchmark.lists} has {len(seen)} seen classes, and {MIN_SEEN} or more "
            f"must remain seen; hold out {max(0, len(seen) - MIN_SEEN)} or fewer"
        )
    rows = {key: _named_rows(benchmark, key) for key in LIST_DESCRIPTIONS}
    title = benchmark.title
    if hold_out:
        chosen = np.random.default_rng(seed).permutation(len(seen))[:hold_out]
        unseen = [seen[label] for label in sorted(chosen)]
        seen = [name for name in seen if name not in unseen]
        rows = _hold_out(rows, unseen)
        title += f", {hold_out} seen classes held out as unseen ones (seed {seed})"
    for kind, count in (("photo", photos), ("sketch", sketches)):
        if count:
            if rows[kind, "test"]:
                old = benchmark.path(kind, "test")
                raise InputError(f"{old}: holds back {_PLURALS[kind]} already; leave out {_OPTIONS[kind]}")
            rows[kind, "train"], rows[kind, "test"] = _hold_back(rows[kind, "train"], seen, count, kind, seed)
            title += f", {count if count >= 1 else f'{count:.3g} of the'} {_PLURALS[kind]} of each seen class held back"
    return _contents(benchmark, rows, seen, unseen) | {TITLE_FILE: f"{title}\n".encode()}


def _named_rows(benchmark, key):
    """[(path, class name)] of a list; [] where there is no list of held-back images."""
    if key[1] == "test" and not os.path.isfile(benchmark.path(*key)):
        return []
    files, names = benchmark.read(*key), benchmark.names(key[1])
    return [(path, names[label]) for path, label in zip(files.paths, files.labels, strict=True)]


def _hold_out(rows, unseen):
    """The rows with all images of the seen classes `unseen` as those of the split "zero", class by class."""
    held_out = {}
    for kind in _PLURALS:
        own = [row for split in ("train", "test") for row in rows[kind, split] if row[1] in unseen]
        if without := sorted(set(unseen) - {name for _, name in own}):
            raise InputError(
                f"{without[0]!r} is to be held out and has no {_PLURALS[kind]} in the lists of seen classes; "
                "add some, or choose another --seed"
            )
        held_out[kind, "zero"] = sorted(own, key=lambda row: unseen.index(row[1]))
    return {key: [row for row in of if row[1] not in unseen] for key, of in rows.items()} | held_out


def _hold_back(rows, names, count, kind, seed):
    """(rows that remain, rows that are held back) of a training list; count: images, or a share, of each class."""
    places = {name: [] for name in names}
    for place, (_, name) in enumerate(rows):
        places[name].append(place)
    chosen = set()
    for number, (name, own) in enumerate(places.items()):
        wanted = count if count >= 1 else max(1, round(count * len(own)))
        if len(own) <= wanted:
            raise InputError(
                f"{name!r} has {len(own)} {_PLURALS[kind]}, too few to hold back {wanted}; see {_OPTIONS[kind]}"
            )
        chosen.update(np.random.default_rng((seed, number)).permutation(own)[:wanted].tolist())
    held_back = [row for place, row in enumerate(rows) if place in chosen]
    return [row for place, row in enumerate(rows) if place not in chosen], held_back


def _contents(benchmark, rows, seen, unseen):
    labels = {name: label for names in (seen, unseen) for label, name in enumerate(names)}
    contents = {
        benchmark.path(*key).name: format_list((path, labels[name]) for path, name in of)
        for key, of in rows.items()
        if of
    }
    for name, names in zip(CLASS_NAME_FILES, (seen, unseen), strict=True):
        contents[name] = format_list(zip(names, range(len(names)), strict=True))
    path = benchmark.lists / MASK_FILE
    if os.path.isfile(path):
        benchmark.read_mask()  # checks it
        mask = read_pickled_dict(path)  # float64, as published
        contents[MASK_FILE] = format_mask([mask[benchmark.seen_names.index(name)] for name in seen])
    return contents
