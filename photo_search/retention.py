"""Decides which photos of an index stay in it though their files are not found.

A disk that is not mounted, or a folder without permission, looks like deleted photos. Their features took long to
compute, so that they are removed only where few are missing, or where the user asks for it.
"""

import os
from collections import Counter

from photo_search.photos import UNREAD_SUFFIXES, is_excluded_below, suffixes_of
from utils.files import open_regular

MAX_REMOVED_SHARE = 1 / 2  # share of the photos of an index above which an update removes none by itself


def unread_to_keep(known, found):
    """([PhotoFile, ...] of the old index whose files cannot be decoded any more, [note, ...] which say why).

    Their files are there: a library that reads them is not. known: update.KnownPhotos; found: photos.FoundPhotos.
    """
    unread = set(found.unread) if known.old else ()
    kept = [file for file in known.exact if file.path in unread]
    return kept, [
        f"{count:,} {suffix} photos cannot be read any more ({UNREAD_SUFFIXES[suffix]}); the index keeps them"
        for suffix, count in suffixes_of(file.path for file in kept).items()
    ]


def unopened_to_keep(known, partial, missing):
    """({PhotoFile: that of the old index}, [note, ...]) of changed files that cannot be opened now.

    known: update.KnownPhotos; partial: the PartialIndex that names unreadable files; missing: PhotoFiles to compute.
    """
    unreadable = [file for file in missing if file in partial.unreadable and file.path in known.paths]
    reasons = {file: reason for file in unreadable if (reason := _why_unopened(file.path))}
    old = {file.path: file for file in known.exact} if reasons else {}
    return {file: old[file.path] for file in reasons}, [
        f"{count:,} changed photo{'s' if count > 1 else ''} cannot be opened ({reason}); the index keeps what was there"
        for reason, count in Counter(reasons.values()).items()
    ]


def _why_unopened(path):
    """Why the file at `path` cannot be opened; None if it can be, or does not exist."""
    try:
        with open_regular(path) as file:
            file.read(1)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror
    return None


def photos_to_keep(known, rows, unlisted, options):
    """([PhotoFile, ...] that stay, [note, ...] which say why and how to remove them).

    known: update.KnownPhotos; rows: {PhotoFile: row or None} of the files that are found; unlisted: {folder: why it
    cannot be listed}; options: update.IndexOptions.
    """
    if known.old is None or options.only:
        return [], []
    missing = _missing_photos(known, rows, options)
    reasons, kept = Counter(), []
    emptied = [root for root in options.folders if not any(map(_is_in(root), (file.path for file in rows)))]
    for file in missing:
        if reason := next((each for each in (*unlisted, *emptied) if _is_in(each)(file.path)), None):
            reasons[reason] += 1
            kept.append(file)
    notes = [_folder_note(folder, unlisted.get(folder), count, options) for folder, count in reasons.items()]
    if len(missing) - len(kept) > MAX_REMOVED_SHARE * len(known.old):
        notes.append(
            f"{len(missing) - len(kept):,} of {len(known.old):,} photos are not found any more; they stay in the "
            "index, and index --only removes them"
        )
        kept = missing
    return kept, notes


def _missing_photos(known, rows, options):
    """The PhotoFiles of the old index in the folders of the options of which no file, moved or copied, is found."""
    paths = {file.path for file in rows}
    moved = {
        known.old_records["digest"][row].tobytes()
        for file, row in rows.items()
        if row is not None and row < known.first and file.path not in known.paths
    }
    return [
        file
        for file, row in known.exact.items()
        if file.path not in paths
        and known.old_records["digest"][row].tobytes() not in moved
        and any(
            not is_excluded_below(file.path, root, options.exclude)
            for root in options.folders
            if _is_in(root)(file.path)
        )
    ]


def _folder_note(folder, why, count, options):
    why = f"cannot be listed ({why})" if why else "contains no photos any more"
    way_out = f"--remove {folder}" if folder in options.folders else f"--exclude {os.path.basename(folder)}"
    return f"{folder}: {why}; the index keeps its {count:,} photos, and {way_out} removes them"


def _is_in(folder):
    """A function that says whether a path lies in `folder`."""
    prefix = os.path.join(folder, "")
    return lambda path: path.startswith(prefix)
