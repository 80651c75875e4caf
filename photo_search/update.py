"""Brings an index of photos up to date: features of new photos are computed, and added to the index.

Few photos are appended, and few are marked as removed, in time and bytes in proportion to them. Beyond MAX_TAIL_SHARE,
and where clusters are fitted, a new generation replaces the old one, with all photos sorted by cell.

A partial_index.PartialIndex keeps what an interrupted run has computed.
"""

import gc
import os
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial as partial_call
from typing import NamedTuple

import numpy as np

from photo_search.encoder import add_photos
from photo_search.index import RECORD, is_index, open_index
from photo_search.index_writer import append_to_index, is_of_index, remove_old_generations, write_index
from photo_search.partial_index import FEATURES_FILE, PHOTOS_FILE, PartialIndex, write_errors_as_input_errors
from photo_search.photos import UNREAD_SUFFIXES, PhotoFile, find_photos, suffixes_of
from photo_search.retention import photos_to_keep, unopened_to_keep, unread_to_keep
from photo_search.thumbnails import compact_thumbnails, restore_thumbnails
from utils.cli import InputError
from utils.distributed import log_rank0
from utils.files import check_writable, folder_lock, sha256_of
from utils.sampling import evenly_spaced

MIN_PHOTOS_FOR_CLUSTERS = 200  # below this, no clusters by default: they would mix classes and hurt
MAX_DEFAULT_CLUSTERS = 100
MAX_FITTED_PHOTOS = 20_000  # size of the sample of photos that a codebook is fitted to
MAX_TAIL_SHARE = 0.05  # added and removed photos, in the photos sorted by cell, above which all are sorted anew
REFIT_SHARE = 1 / 3  # share of photos newer than the clusters from which --refit is recommended
FEATURE_KEYS = ("sha256", "model", "imagenet_classes", "input_size")  # the metadata that features depend on
MIN_ANNOUNCED_FIT = 1000  # photos from which a line says that clusters are fitted, since that takes a while


class IndexOptions(NamedTuple):
    """What an index contains, and how it is made."""

    folders: list[str]
    exclude: list[str] = ()
    clusters: int | None = None  # K; None for the default, or the present number
    subspaces: int | None = None  # M
    refit: bool = False
    batch_size: int = 64
    workers: int = 0
    checkpoint: str | None = None  # present path of the checkpoint, if the index records another one
    only: bool = False  # remove every photo that is not found, see retention.photos_to_keep
    hidden: bool = False  # take hidden files and folders as well
    truncated: bool = False  # take files that are cut off


@dataclass
class UpdateStats:
    """What an update did."""

    photos: int = 0
    new: int = 0
    changed: int = 0
    moved: int = 0
    removed: int = 0
    unreadable: list[str] = field(default_factory=list)  # "path: why"
    extracted: int = 0  # photos whose features were computed
    extraction_seconds: float = 0.0
    unread: list[str] = field(default_factory=list)  # see photos.FoundPhotos, as the next two
    hidden: int = 0
    excluded: set[str] = field(default_factory=set)
    seconds: float = 0.0


def update_index(folder, encoder, fit, options, add=add_photos):
    """Make the index in `folder` as IndexOptions say, or bring it up to date; returns UpdateStats.

    encoder: a function that returns the Encoder, called if features are to be computed or there is no index yet.
    fit: a function of features (N, D), M and K that returns their codebook, see encoder.fit_index_codebook.
    add: encoder.add_photos, or distributed_indexing.add_photos, which compute features.
    Raises InputError for folders without photos, an index of another checkpoint, and if another process is writing.
    """
    is_new = not folder.exists()
    check_writable(folder)
    try:
        # Lists of many photos are made, which the collector would walk through again and again: a third of the time.
        with folder_lock(folder, "indexing"), _garbage_collection(False):
            return _update(folder, encoder, fit, options, add)
    except InputError:
        if is_new:
            with suppress(OSError):  # not empty: a later run continues from what it contains
                folder.rmdir()
        raise


@contextmanager
def _garbage_collection(enabled):
    """Within this block the cyclic garbage collector is enabled or disabled."""
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        yield
    finally:
        (gc.enable if before else gc.disable)()


def _update(folder, encoder, fit, options, add):
    started = time.perf_counter()
    old = open_index(folder) if is_index(folder) else None
    if old is None:
        _check_own_folder(folder)
    metadata = _metadata_of(old, options) if old else encoder().metadata
    _check_subspaces(options.subspaces, metadata["width"])
    may_be_missing = old.metadata["folders"] if old and not options.only else ()
    find = partial_call(
        find_photos, options.folders, options.exclude, may_be_missing, index=folder, hidden=options.hidden
    )
    found = find()
    _check_contains_photos([each for each in options.folders if each not in may_be_missing], found.files, found)
    if old is None:
        _check_clusters(options.clusters, len(found.files))

    partial = _open_partial_index(folder, old, metadata, options, len(found.files))
    before, extraction_started = len(partial.photos), time.perf_counter()
    while True:
        known = KnownPhotos(old, partial)
        files, known_rows, missing = _compare(found, known, options)
        _check_contains_photos(options.folders, files, found)
        if missing:
            with _garbage_collection(True):
                add(encoder, metadata, missing, partial, options.batch_size, options.workers, options.truncated)
        vanished = [file for file in missing if file in partial.unreadable and not os.path.lexists(file.path)]
        if not vanished:
            break
        log_rank0(f"note: files have gone while they were read ({len(vanished):,}); their folders are searched again")
        for file in vanished:
            del partial.unreadable[file]
        found = find()
    instead, notes = unopened_to_keep(known, partial, missing)
    for note in notes:
        log_rank0(f"note: {note}")
    files = [instead.get(file, file) for file in files]
    known_rows |= {file: known.exact[file] for file in instead.values()}
    extraction_seconds = time.perf_counter() - extraction_started
    rows = _rows_of_readable(files, known_rows, partial, known.first)
    if not rows:
        raise InputError(f"{options.folders[0]}: none of {len(files):,} photos can be read; give another folder")
    _check_clusters(options.clusters, len(rows))

    stats = _count_changes(rows, known)
    stats.photos, stats.extracted = len(rows), len(partial.photos) - before
    stats.extraction_seconds = extraction_seconds
    in_folders = set(files)
    stats.unread = [path for path in found.unread if path not in known.paths]
    stats.hidden, stats.excluded = found.hidden, found.excluded
    unreadable = {file.path: why for file, why in partial.unreadable.items() if file in in_folders}
    unlisted = {path: why for path, why in sorted(found.unlisted.items()) if path not in may_be_missing}
    stats.unreadable = [f"{path}: {why}" for path, why in (unlisted | unreadable).items()]
    codebook, is_changed = _choose_codebook(rows, known, fit, options, metadata["width"])
    metadata = metadata | _walk_metadata(options)
    if is_changed or _is_outdated(old, rows, known, metadata):
        with write_errors_as_input_errors(folder):
            _write(folder, metadata, rows, known, codebook, is_changed, options.workers)
    partial.remove()
    remove_old_generations(folder)
    stats.seconds = time.perf_counter() - started
    return stats


def _compare(found, known, options):
    """(all PhotoFiles of the index to be, {PhotoFile: row} of those that are known, those that must be computed).

    found: FoundPhotos. Prints which photos stay though they are not found, or cannot be decoded.
    """
    unread, unread_notes = unread_to_keep(known, found)
    files = [*found.files, *unread]
    missing, known_rows = _split_by_known(files, known)
    kept, notes = photos_to_keep(known, dict.fromkeys(files) | known_rows, found.unlisted, options)
    for note in (*unread_notes, *notes):
        log_rank0(f"note: {note}")
    files += kept
    if unread or kept:
        files.sort(key=lambda file: os.fsencode(file.path))
    return files, known_rows | {file: known.exact[file] for file in kept}, missing


def _check_own_folder(folder):
    """Raise InputError if a folder without index has files that look like those of an index: they are the user's."""
    if (folder / PHOTOS_FILE).exists():
        return  # of an interrupted first run
    for path in folder.iterdir():
        if path.name == FEATURES_FILE or (is_of_index(path.name) and not path.name.startswith(".")):
            raise InputError(f"{folder}: has {path.name}, but no index; move that file, or choose another --index")


def _walk_metadata(options):
    """What an index records about the files that it is made of."""
    return {"folders": list(options.folders), "exclude": list(options.exclude), "hidden": options.hidden}


def _check_contains_photos(folders, files, found):
    """Raise InputError if none of the PhotoFiles lies in one of `folders`, unless there are no folders.

    found: the FoundPhotos, which say why.
    """
    roots = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
    if not roots or any(file.path.startswith(roots) for file in files):
        return
    if found.unread:
        suffix, count = suffixes_of(found.unread).most_common(1)[0]
        reason, way_out = f"contains no photos that are read, but {count:,} {suffix} files", UNREAD_SUFFIXES[suffix]
    elif found.excluded:
        reason, way_out = f"contains no photos beside those of --exclude {min(found.excluded)}", "correct the pattern"
    elif found.hidden:
        reason, way_out = "contains no photos that are not hidden", "--hidden takes them"
    else:
        reason, way_out = "contains no photos", "give a folder with photos"
    raise InputError(f"{folders[0]}: {reason}; {way_out}")


def _metadata_of(old, options):
    """The metadata of an index that concern the encoder, with the present path of its checkpoint."""
    metadata = {name: old.metadata[name] for name in ("checkpoint", *FEATURE_KEYS, "width")}
    return metadata | ({"checkpoint": options.checkpoint} if options.checkpoint else {})


def _open_partial_index(folder, old, metadata, options, photos):
    """The PartialIndex in `folder`, with what an interrupted run has computed."""
    thumbnails = folder / (old.metadata["thumbnails"] if old else "thumbnails-1.bin")
    used = old.metadata["files"][thumbnails.name] if old else 0
    if old and not old.has_thumbnails:
        thumbnails, used = folder / f"thumbnails-{old.metadata['generation'] + 1}.bin", 0
        log_rank0(f"note: {folder}: its thumbnails are lost, and are made again")
    remove_old_generations(folder, [thumbnails.name])
    source = {name: metadata[name] for name in FEATURE_KEYS}
    partial = PartialIndex(folder, source, metadata["width"], (thumbnails, used))
    if old is None or any(old.metadata.get(name) != value for name, value in _walk_metadata(options).items()):
        partial.record_options(metadata | _walk_metadata(options), photos)
    if partial.photos:
        log_rank0(f"note: continuing an interrupted run, which has computed {len(partial.photos):,} photos")
    return partial


def _split_by_known(files, known):
    """([PhotoFile, ...] whose features must be computed, {PhotoFile: row} of those that are known)."""
    rows = {file: known.row_of(file) for file in files}
    missing = [file for file, row in rows.items() if row is None and file not in known.partial.unreadable]
    return missing, {file: row for file, row in rows.items() if row is not None}


def _rows_of_readable(files, known_rows, partial, first):
    """{PhotoFile: row} of all photos that can be read, in the order of `files`."""
    computed = {photo.file: row for row, photo in enumerate(partial.photos, first)}
    rows = {file: known_rows.get(file, computed.get(file)) for file in files}
    return {file: row for file, row in rows.items() if row is not None}


def _count_changes(rows, known):
    """UpdateStats with the numbers of new, changed, moved and removed photos."""
    stats = UpdateStats()
    now = {file.path for file in rows}
    removed = {row for path, row in known.paths.items() if path not in now}
    for file, row in rows.items():
        if (old_row := known.paths.get(file.path)) is not None:
            stats.changed += old_row != row and not known.is_same(old_row, row)
        elif row in removed:
            removed.discard(row)
            stats.moved += 1
        else:
            stats.new += 1
    stats.removed = len(removed)
    return stats


def _choose_codebook(rows, known, fit, options, width):
    """(codebook (M, K, D/M), M 0 for none; whether it differs from that of the old index)."""
    photos, old = len(rows), known.codebook
    wanted = options.subspaces, options.clusters
    if (
        old is not None
        and not options.refit
        and all(each in (None, present) for each, present in zip(wanted, old.shape[:2], strict=True))
    ):
        return old, False
    none = np.empty((0, 0, 0), np.float32), old is not None
    is_small = photos < MIN_PHOTOS_FOR_CLUSTERS
    if is_small and old is None and wanted == (None, None):
        return none
    subspaces = options.subspaces or (2 if width % 2 == 0 else 1)
    # A small index only has clusters because --clusters or --subspaces asked for them: their number stays.
    clusters = options.clusters or (old.shape[1] if is_small and old is not None else default_clusters(photos))
    if clusters > photos:
        return none
    from models.eval.codebooks import CollapsedComponent  # takes long

    features = known.rows(np.fromiter(rows.values(), np.int64)[evenly_spaced(photos, MAX_FITTED_PHOTOS)])
    if len(features) >= MIN_ANNOUNCED_FIT:
        log_rank0(f"note: fitting clusters (M {subspaces}, K {clusters}) to {len(features):,} photos")
    try:
        return fit(features, subspaces, clusters), True
    except CollapsedComponent as error:
        log_rank0(f"note: M {subspaces}, K {clusters}: {error}; only one-to-one matching is available")
        return none


def _is_outdated(old, rows, known, metadata):
    """Whether the index must be written though its codebook has not changed."""
    if old is None or not old.has_thumbnails or len(rows) != len(old) or not rows.keys() <= known.exact.keys():
        return True
    return any(old.metadata.get(name) != value for name, value in metadata.items())


def _write(folder, metadata, rows, known, codebook, is_refitted, workers):
    added = {file: row for file, row in rows.items() if known.exact.get(file) != row}
    removed = np.array([row for file, row in known.exact.items() if rows.get(file) != row], np.int64)
    if not is_refitted and known.old and _has_small_tail(known.old, len(added) + len(removed)):
        thumbnails = known.partial.thumbnails
        photos, numbers = _photos_of(added, known)
        append_to_index(known.old, metadata | {"thumbnails": thumbnails.name}, photos, known.rows(numbers), removed)
        return
    (paths, records), numbers = _photos_of(rows, known)
    if is_refitted:
        records["fitted"] = len(codebook) > 0
    if known.old and not known.old.has_thumbnails:
        is_old = numbers < known.first
        lost = records[is_old]
        old_paths = [file.path for file, row in rows.items() if row < known.first]
        restore_thumbnails(old_paths, lost, known.partial, metadata["input_size"], workers)
        records[is_old] = lost
    thumbnails = compact_thumbnails(folder, known, records)
    write_index(
        folder, metadata | {"thumbnails": thumbnails.name}, (paths, records),
        lambda chosen: known.rows(numbers[chosen]), codebook,
    )  # fmt: skip


def _has_small_tail(old, changes):
    """Whether `changes` more added and removed photos may be appended to an Index."""
    sorted_photos, stored = len(old.cells.features), len(old.records)
    present = stored - sorted_photos + stored - len(old)
    return old.has_thumbnails and present + changes <= MAX_TAIL_SHARE * sorted_photos


def _photos_of(rows, known):
    """((paths, records), numbers (n,)) of {PhotoFile: row}."""
    numbers = np.fromiter(rows.values(), np.int64, len(rows))
    records = known.records(numbers)
    records["size"] = [file.size for file in rows]
    records["mtime"] = [file.mtime for file in rows]
    return ([os.fsencode(file.path) for file in rows], records), numbers


class KnownPhotos:
    """Photos with computed features: rows below `first` are stored photos of the old index, others of a PartialIndex.

    paths: {path: row} and exact: {PhotoFile: row} of the old index.
    """

    def __init__(self, old, partial):
        self.old, self.partial = old, partial
        self.first = len(old.records) if old else 0
        self.codebook = old.cells.codebook if old and old.clusters else None
        self.old_records = old.records if old else np.empty(0, RECORD)
        paths, self.old_rows = (old.stored_paths(), old.stored.tolist()) if old else ([], [])
        self.paths = {paths[row]: row for row in self.old_rows}
        sizes, times = self.old_records["size"].tolist(), self.old_records["mtime"].tolist()
        self.exact = {PhotoFile(path, sizes[row], times[row]): row for path, row in self.paths.items()}
        self.added = {photo.file: row for row, photo in enumerate(partial.photos, self.first)}
        self.sizes = {*sizes, *(photo.file.size for photo in partial.photos)}
        self.by_digest = None

    def row_of(self, file):
        """The row of a PhotoFile with known path, size and time, or else with known digest; None if it is not known."""
        row = self.exact.get(file, self.added.get(file))
        if row is not None or file.size not in self.sizes:
            return row
        if self.by_digest is None:
            computed = enumerate(self.partial.photos, self.first)
            self.by_digest = {bytes.fromhex(photo.digest): row for row, photo in computed}
            self.by_digest |= {self.old_records["digest"][row].tobytes(): row for row in self.old_rows}
        try:
            return self.by_digest.get(bytes.fromhex(sha256_of(file.path)))
        except OSError:
            return None

    def records(self, numbers):
        """The records of rows (n,): (n,) of RECORD, without the fields that index.write_index sets."""
        result = np.zeros(len(numbers), RECORD)
        is_old = numbers < self.first
        result[is_old] = self.old_records[numbers[is_old]]
        for i in np.flatnonzero(~is_old):
            photo = self.partial.photos[numbers[i] - self.first]
            result["digest"][i] = np.frombuffer(bytes.fromhex(photo.digest), np.uint8)
            result["thumbnail"][i], result["thumbnail_size"][i] = photo.thumbnail, photo.thumbnail_size
        return result

    def is_same(self, one, other):
        """Whether two rows have the same content."""
        one, other = self.records(np.array([one, other]))["digest"]
        return bool((one == other).all())

    def rows(self, numbers):
        """Features (n, D) of rows (n,)."""
        result = np.empty((len(numbers), self.partial.width), np.float32)
        is_old = numbers < self.first
        if is_old.any():
            result[is_old] = self.old.stored_features(numbers[is_old])
        if not is_old.all():
            result[~is_old] = self.partial.rows()[numbers[~is_old] - self.first]
        return result


def default_clusters(photos):
    """K by the number of photos; benchmarks/clusters.py compares this rule with others."""
    return max(2, min(MAX_DEFAULT_CLUSTERS, photos // 25))


def _check_subspaces(subspaces, width):
    if subspaces and width % subspaces:
        raise InputError(
            f"--subspaces {subspaces}: features of {width} values cannot be cut into {subspaces} equal parts"
        )


def _check_clusters(clusters, photos):
    if clusters and clusters > photos:
        raise InputError(f"--clusters {clusters}: there are only {photos:,} photos; use fewer")
