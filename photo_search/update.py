"""Brings an index of photos up to date: features of new photos are computed, and a new index replaces the old one.

A PartialIndex keeps the batches that are done, so that an interrupted run continues from them:

    unfinished.features    features, float32
    unfinished.photos      a line of JSON with what the features depend on, then a line for each batch

A batch is complete once its line is written, which happens last. Its thumbnails are in the index's file of thumbnails.
"""

import json
import os
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from models.eval.codebooks import CollapsedComponent
from photo_search.encoder import add_photos
from photo_search.index import RECORD, is_index, open_index, remove_stale_files, write_index
from photo_search.photos import PhotoFile, find_photos
from utils.cli import InputError
from utils.distributed import log_rank0
from utils.files import check_writable, folder_lock, sha256_of
from utils.sampling import evenly_spaced

FEATURES_FILE, PHOTOS_FILE = "unfinished.features", "unfinished.photos"
MIN_PHOTOS_FOR_CLUSTERS = 200  # below this, no clusters by default: they would mix classes and hurt
MAX_DEFAULT_CLUSTERS = 100
MAX_FITTED_PHOTOS = 20_000  # size of the sample of photos that a codebook is fitted to
REFIT_SHARE = 1 / 3  # share of photos newer than the clusters from which --refit is recommended
FEATURE_KEYS = ("sha256", "model", "imagenet_classes", "input_size")  # the metadata that features depend on
MIN_UNUSED_BYTES = 1 << 20  # of thumbnails, below which their file is not rewritten


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
    seconds: float = 0.0


def update_index(folder, encoder, fit, options, add=add_photos):
    """Make the index in `folder` as IndexOptions say, or bring it up to date; returns UpdateStats.

    encoder: a function that returns the Encoder, called if features are to be computed or there is no index yet.
    fit: a function of features (N, D), M and K that returns their codebook, see encoder.fit_codebook.
    add: encoder.add_photos, or distributed_indexing.add_photos, which compute features.
    Raises InputError for folders without photos, an index of another checkpoint, and if another process is writing.
    """
    is_new = not folder.exists()
    check_writable(folder)
    try:
        with folder_lock(folder, "indexing"):
            return _update(folder, encoder, fit, options, add)
    except InputError:
        if is_new:
            with suppress(OSError):  # not empty: a later run continues from what it contains
                folder.rmdir()
        raise


def _update(folder, encoder, fit, options, add):
    started = time.perf_counter()
    old = open_index(folder) if is_index(folder) else None
    metadata = _metadata_of(old, options) if old else encoder().metadata
    _check_subspaces(options.subspaces, metadata["width"])
    files, unreadable = find_photos(options.folders, options.exclude)
    if not files:
        raise InputError(f"{options.folders[0]}: contains no photos; give a folder with photos")
    _check_clusters(options.clusters, len(files))

    partial = _open_partial_index(folder, old, metadata)
    known = KnownPhotos(old, partial)
    missing, known_rows = _split_by_known(files, known)
    before = len(partial.photos)
    if missing:
        add(encoder, metadata, missing, partial, options.batch_size, options.workers)
    rows = _rows_of_readable(files, known_rows, partial, known.first)
    if not rows:
        raise InputError(f"{options.folders[0]}: none of {len(files):,} photos can be read; give another folder")
    _check_clusters(options.clusters, len(rows))

    stats = _count_changes(rows, known)
    stats.photos, stats.extracted = len(rows), len(partial.photos) - before
    in_folders = set(files)
    stats.unreadable = unreadable + [
        f"{file.path}: {why}" for file, why in partial.unreadable.items() if file in in_folders
    ]
    codebook, is_changed = _choose_codebook(rows, known, fit, options, metadata["width"])
    metadata = metadata | {"folders": list(options.folders), "exclude": list(options.exclude)}
    if is_changed or _is_outdated(old, rows, known, metadata):
        with write_errors_as_input_errors(folder):
            _write(folder, metadata, rows, known, codebook, is_refitted=is_changed)
    partial.remove()
    remove_stale_files(folder)
    stats.seconds = time.perf_counter() - started
    return stats


def _metadata_of(old, options):
    """The metadata of an index that concern the encoder, with the present path of its checkpoint."""
    metadata = {name: old.metadata[name] for name in ("checkpoint", *FEATURE_KEYS, "width")}
    return metadata | ({"checkpoint": options.checkpoint} if options.checkpoint else {})


def _open_partial_index(folder, old, metadata):
    """The PartialIndex in `folder`, with what an interrupted run has computed."""
    thumbnails = folder / (old.metadata["thumbnails"] if old else "thumbnails-1.bin")
    remove_stale_files(folder, [thumbnails.name])
    used = old.metadata["files"][thumbnails.name] if old else 0
    source = {name: metadata[name] for name in FEATURE_KEYS}
    partial = PartialIndex(folder, source, metadata["width"], (thumbnails, used))
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
        if file.path in known.paths:
            stats.changed += not known.is_same(known.paths[file.path], row)
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
    features = known.rows(np.fromiter(rows.values(), np.int64)[evenly_spaced(photos, MAX_FITTED_PHOTOS)])
    try:
        return fit(features, subspaces, clusters), True
    except CollapsedComponent as error:
        log_rank0(f"note: M {subspaces}, K {clusters}: {error}; only one-to-one matching is available")
        return none


def _is_outdated(old, rows, known, metadata):
    """Whether the index must be written though its codebook has not changed."""
    if old is None or len(rows) != len(old) or not rows.keys() <= known.exact.keys():
        return True
    return any(old.metadata[name] != value for name, value in metadata.items())


def _write(folder, metadata, rows, known, codebook, is_refitted):
    numbers = np.fromiter(rows.values(), np.int64)
    records = known.records(numbers)
    records["size"] = [file.size for file in rows]
    records["mtime"] = [file.mtime for file in rows]
    if is_refitted:
        records["fitted"] = len(codebook) > 0
    thumbnails = _compact_thumbnails(folder, known, records)
    paths = [os.fsencode(file.path) for file in rows]
    write_index(
        folder, metadata | {"thumbnails": thumbnails.name}, (paths, records),
        lambda chosen: known.rows(numbers[chosen]), codebook,
    )  # fmt: skip


def _compact_thumbnails(folder, known, records):
    """The file of thumbnails; a new one if less than half of the old one is used. Changes `records`."""
    used, stored = int(records["thumbnail_size"].sum()), known.partial.end
    if stored - used < max(used, MIN_UNUSED_BYTES):
        return known.partial.thumbnails
    path = folder / f"thumbnails-{known.old.metadata['generation'] + 1 if known.old else 2}.bin"
    with open(known.partial.thumbnails, "rb") as source, open(path, "wb") as target:
        for record in records:
            source.seek(record["thumbnail"])
            record["thumbnail"] = target.tell()
            target.write(source.read(record["thumbnail_size"]))
    return path


class KnownPhotos:
    """Photos with computed features: rows below `first` are those of the old index, the others of a PartialIndex.

    paths: {path: row} and exact: {PhotoFile: row} of the old index.
    """

    def __init__(self, old, partial):
        self.old, self.partial = old, partial
        self.first = len(old) if old else 0
        self.codebook = old.cells.codebook if old and old.clusters else None
        self.old_records = old.records if old else np.empty(0, RECORD)
        self.paths = {old.path(row): row for row in range(self.first)} if old else {}
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
            self.by_digest |= {record.tobytes(): row for row, record in enumerate(self.old_records["digest"])}
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
            result[is_old] = self.old.cells.features[numbers[is_old]]
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


class ComputedPhoto(NamedTuple):
    """A photo of a PartialIndex."""

    file: PhotoFile
    digest: str  # SHA-256 in hex
    thumbnail: int  # offset in the file of thumbnails
    thumbnail_size: int


class PartialIndex:
    """The batches of photos that have been computed for the index in `folder`.

    source: what the features depend on, JSON; thumbnails: (path of their file, bytes of it that the index uses).
    Raises InputError if an interrupted run in this folder had another source.
    """

    def __init__(self, folder, source, width, thumbnails):
        self.folder, self.width = folder, width
        self.thumbnails, self.end = thumbnails
        self.photos, self.unreadable = [], {}  # {PhotoFile: why}
        header = json.dumps([source, width, self.thumbnails.name]).encode() + b"\n"
        length = self._read(header)
        with write_errors_as_input_errors(folder):
            with open(folder / PHOTOS_FILE, "ab") as file:
                file.truncate(length)
                if not length:
                    file.write(header)
            for path, length in ((folder / FEATURES_FILE, 4 * width * len(self.photos)), (self.thumbnails, self.end)):
                with open(path, "ab") as file:
                    file.truncate(length)

    def _read(self, header):
        """Read the complete batches; returns the length of their lines."""
        try:
            lines = (self.folder / PHOTOS_FILE).read_bytes().splitlines(keepends=True)
            features = np.fromfile(self.folder / FEATURES_FILE, np.float32)
            stored = self.thumbnails.stat().st_size
        except FileNotFoundError:
            return 0
        if not lines or not lines[0].endswith(b"\n"):
            return 0
        if lines[0] != header:
            if _source_of(lines[0]) == json.loads(header)[:2]:
                return 0  # of an index with another file of thumbnails
            raise InputError(
                f"{self.folder}: contains an unfinished index of another checkpoint, model or input size; continue "
                "with the same, or delete the folder"
            )
        features = features[: len(features) // self.width * self.width].reshape(-1, self.width)
        is_unit = np.abs(np.linalg.norm(features, axis=1) - 1) < 0.01  # a crash can leave blocks of zeros
        length = len(header)
        for line in lines[1:]:
            photos, unreadable = _parse_batch(line)
            rows = is_unit[len(self.photos) : len(self.photos) + len(photos or ())]
            end = max([self.end, *(photo.thumbnail + photo.thumbnail_size for photo in photos or ())])
            if photos is None or len(rows) < len(photos) or not rows.all() or end > stored:
                break
            self.photos += photos
            self.unreadable |= unreadable
            self.end, length = end, length + len(line)
        return length

    def add(self, files, rows, digests, thumbnails, unreadable):
        """Add a batch: PhotoFiles, their features (n, width), digests, thumbnails, and unreadable {PhotoFile: why}."""
        photos = []
        for file, digest, thumbnail in zip(files, digests, thumbnails, strict=True):
            photos.append(ComputedPhoto(file, digest, self.end, len(thumbnail)))
            self.end += len(thumbnail)
        line = [[[*photo.file, *photo[1:]] for photo in photos], [[*file, why] for file, why in unreadable.items()]]
        with write_errors_as_input_errors(self.folder):
            for path, content in (
                (self.thumbnails, b"".join(thumbnails)),
                (self.folder / FEATURES_FILE, np.ascontiguousarray(rows, np.float32).tobytes()),
                (self.folder / PHOTOS_FILE, json.dumps(line).encode() + b"\n"),
            ):
                with open(path, "ab") as file:
                    file.write(content)
        self.photos += photos
        self.unreadable |= unreadable

    def rows(self):
        """All features so far, (n, width) float32, mapped."""
        if not self.photos:
            return np.empty((0, self.width), np.float32)
        return np.memmap(self.folder / FEATURES_FILE, np.float32, "r", shape=(len(self.photos), self.width))

    def remove(self):
        """Delete its files, once its photos are in the index."""
        (self.folder / PHOTOS_FILE).unlink()
        (self.folder / FEATURES_FILE).unlink()


@contextmanager
def write_errors_as_input_errors(folder):
    """Within this block, which writes the index in `folder`, an OSError becomes an InputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{folder}: the index cannot be written ({reason}); free some space, and run the command again to continue"
        ) from error


def _source_of(header):
    """[source, width] of a first line, or None."""
    try:
        return json.loads(header)[:2]
    except (ValueError, TypeError, RecursionError):
        return None


def _parse_batch(line):
    """(photos, unreadable) of a line, (None, None) if it is damaged."""
    try:
        photos, unreadable = json.loads(line if line.endswith(b"\n") else b"")
        photos = [ComputedPhoto(_photo_file(*values[:3]), *_checked_record(*values[3:])) for values in photos]
        return photos, {_photo_file(*values[:3]): str(values[3]) for values in unreadable}
    except (ValueError, TypeError, IndexError, RecursionError):
        return None, None


def _photo_file(path, size, mtime):
    if not isinstance(path, str) or not os.path.isabs(path):
        raise ValueError("not an absolute path")
    os.fsencode(path)
    return PhotoFile(path, int(size), int(mtime))


def _checked_record(digest, thumbnail, size):
    if len(bytes.fromhex(digest)) != 32 or min(int(thumbnail), int(size)) < 0:
        raise ValueError("not the record of a photo")
    return digest, int(thumbnail), int(size)
