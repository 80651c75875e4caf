"""An index brought up to date: only what changed is computed, and the new index replaces the old one as a whole."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from models.eval.codebooks import CollapsedComponent
from photo_search.encoder import add_photos
from photo_search.index import RECORD, is_index, open_index, remove_stale_files, write_index
from photo_search.photos import PhotoFile, find_photos
from photo_search.unfinished import PartialIndex, write_errors_as_input_errors
from utils.cli import InputError
from utils.distributed import log_rank0
from utils.files import check_writable, folder_lock, sha256_of
from utils.sampling import evenly_spaced

MIN_PHOTOS_FOR_CLUSTERS = (
    200  # photos that clusters are fitted to unasked; fewer may be too few of a class, which does harm
)
MAX_DEFAULT_CLUSTERS = 100  # clusters that are fitted unasked
MAX_FITTED_PHOTOS = 20_000  # photos that clusters are fitted to at most
REFIT_SHARE = 1 / 3  # share of photos newer than the clusters from which these should be fitted anew
FEATURE_KEYS = ("sha256", "model", "imagenet_classes", "input_size")  # what features depend on
MIN_UNUSED_BYTES = 1 << 20  # bytes of thumbnails that are no longer used, from which they may be left out


class IndexOptions(NamedTuple):
    """What an index is to hold, and how it is made."""

    folders: list[str]
    exclude: list[str] = ()
    clusters: int | None = None  # K; None for the default, or as it was
    subspaces: int | None = None  # M
    refit: bool = False
    batch_size: int = 64
    workers: int = 0
    checkpoint: str | None = None  # where the checkpoint is now, if that is not where the index had it from


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


def update_index(folder, network, fit, plan, add=add_photos):
    """Make the index in `folder` that of a IndexOptions, or bring it up to date; returns UpdateStats.

    network: a function that gives the Encoder, called where features are to be computed or there is no index yet.
    fit: a function of features (N, D), M and K that gives their codebook, see network.fit_codebook.
    add: network.add_photos, or sharing.add_photos, which computes them.
    Raises InputError for folders without photos, an index of another checkpoint, and where another process writes.
    """
    is_new = not folder.exists()
    check_writable(folder)
    try:
        with folder_lock(folder, "indexing"):
            return _Update(folder, network, fit, plan, add).run()
    except InputError:
        if is_new:
            with suppress(OSError):  # it holds what was done so far
                folder.rmdir()
        raise


class _Update:
    def __init__(self, folder, network, fit, plan, add):
        self.folder, self.network, self.fit, self.plan, self.add = folder, network, fit, plan, add
        self.began = time.perf_counter()
        self.old = open_index(folder) if is_index(folder) else None
        if self.old:
            self.metadata = {name: self.old.metadata[name] for name in ("checkpoint", *FEATURE_KEYS, "width")}
            self.metadata["checkpoint"] = plan.checkpoint or self.metadata["checkpoint"]
        else:
            self.metadata = network().metadata
        _check_subspaces(plan.subspaces, self.metadata["width"])
        self.thumbnails = folder / (self.old.metadata["thumbnails"] if self.old else "thumbnails-1.bin")
        self.totals = UpdateStats()

    def run(self):
        found, self.totals.unreadable = find_photos(self.plan.folders, self.plan.exclude)
        if not found:
            raise InputError(f"{self.plan.folders[0]}: no photos are there; name a folder with photos")
        self._check_clusters(len(found))
        remove_stale_files(self.folder, [self.thumbnails.name])
        used = self.old.metadata["files"][self.thumbnails.name] if self.old else 0
        source = {name: self.metadata[name] for name in FEATURE_KEYS}
        self.unfinished = PartialIndex(self.folder, source, self.metadata["width"], (self.thumbnails, used))
        self.known = KnownPhotos(self.old, self.unfinished)
        goes_on = len(self.unfinished.photos)
        if goes_on:
            log_rank0(f"note: {goes_on:,} photos are there already from an indexing that was stopped, going on")
        rows = self._extract(found)
        if not rows:
            raise InputError(f"{self.plan.folders[0]}: none of {len(found):,} photos can be read; name another folder")
        self._count(rows)
        self._check_clusters(len(rows))
        codebook, fitted = self._codebook(rows)
        if self._differs(rows, fitted):
            with write_errors_as_input_errors(self.folder):
                self._write(rows, codebook, fitted)
        self.unfinished.remove()
        remove_stale_files(self.folder)
        self.totals.photos, self.totals.seconds = len(rows), time.perf_counter() - self.began
        return self.totals

    def _extract(self, found):
        """{PhotoFile: row} of all photos that can be read, computing the features of those that are not known."""
        rows, rest = {}, []
        for each in found:
            row = self.known.row_of(each)
            rows[each] = row
            if row is None and each not in self.unfinished.unreadable:
                rest.append(each)
        if rest:
            before = len(self.unfinished.photos)
            self.add(self.network, self.metadata, rest, self.unfinished, self.plan.batch_size, self.plan.workers)
            self.totals.extracted = len(self.unfinished.photos) - before
            for number, photo in enumerate(self.unfinished.photos[before:], before + self.known.first):
                rows[photo.found] = number
        self.totals.unreadable += [
            f"{each.path}: {why}" for each, why in self.unfinished.unreadable.items() if each in rows
        ]
        return {each: row for each, row in rows.items() if row is not None}

    def _count(self, rows):
        """Fill in UpdateStats: a photo is new, changed, moved, or removed."""
        before = self.known.paths
        now = {each.path for each in rows}
        gone = {row for path, row in before.items() if path not in now}
        for each, row in rows.items():
            if each.path in before:
                self.totals.changed += not self.known.is_same(before[each.path], row)
            elif row in gone:
                gone.discard(row)
                self.totals.moved += 1
            else:
                self.totals.new += 1
        self.totals.removed = len(gone)

    def _check_clusters(self, photos):
        if self.plan.clusters and self.plan.clusters > photos:
            raise InputError(f"--clusters {self.plan.clusters}: there are only {photos:,} photos; use fewer")

    def _codebook(self, rows):
        """(codebook (M, K, D/M), M 0 for none; whether it is newly fitted)."""
        plan, photos, width = self.plan, len(rows), self.metadata["width"]
        asked = plan.clusters is not None or plan.subspaces is not None
        old = self.old.cells.codebook if self.old and self.old.clusters else None
        if old is not None and not plan.refit and not self._asks_for_others(old):
            return old, False
        subspaces = plan.subspaces or (2 if width % 2 == 0 else 1)
        few = (
            photos < MIN_PHOTOS_FOR_CLUSTERS
        )  # such have clusters only if they were asked for, and then as many as before
        clusters = plan.clusters or (old.shape[1] if few and old is not None else default_clusters(photos))
        none = np.empty((0, 0, 0), np.float32)
        if (few and not asked and old is None) or clusters > photos:
            return none, old is not None
        features = self.known.rows(np.fromiter(rows.values(), np.int64)[evenly_spaced(photos, MAX_FITTED_PHOTOS)])
        try:
            return self.fit(features, subspaces, clusters), True
        except CollapsedComponent as error:
            log_rank0(f"note: M {subspaces}, K {clusters}: {error}; there is one-to-one matching alone")
            return none, old is not None

    def _asks_for_others(self, codebook):
        plan, (subspaces, clusters) = self.plan, codebook.shape[:2]
        return plan.clusters not in (None, clusters) or plan.subspaces not in (None, subspaces)

    def _differs(self, rows, fitted):
        """Whether there is anything to write."""
        if fitted or not self.old or len(rows) != len(self.old) or not rows.keys() <= self.known.exact.keys():
            return True
        now = {"folders": list(self.plan.folders), "exclude": list(self.plan.exclude), **self.metadata}
        return any(self.old.metadata[name] != value for name, value in now.items())

    def _write(self, rows, codebook, fitted):
        numbers = np.fromiter(rows.values(), np.int64)
        records = self.known.records(numbers)
        records["size"] = [each.size for each in rows]
        records["mtime"] = [each.mtime for each in rows]
        if fitted:
            records["fitted"] = len(codebook) > 0
        thumbnails = self._compacted(records)
        metadata = {**self.metadata, "folders": list(self.plan.folders), "exclude": list(self.plan.exclude),
                 "thumbnails": thumbnails.name}  # fmt: skip
        paths = [os.fsencode(each.path) for each in rows]
        write_index(self.folder, metadata, (paths, records), lambda chosen: self.known.rows(numbers[chosen]), codebook)

    def _compacted(self, records):
        """The file of thumbnails; a new one, where less than half of the old one is used. Changes `records`."""
        used, stored = int(records["thumbnail_size"].sum()), self.unfinished.end
        if stored - used < max(used, MIN_UNUSED_BYTES):
            return self.thumbnails
        path = self.folder / f"thumbnails-{self.old.metadata['generation'] + 1 if self.old else 2}.bin"
        with open(self.thumbnails, "rb") as source, open(path, "wb") as target:
            for record in records:
                source.seek(record["thumbnail"])
                record["thumbnail"] = target.tell()
                target.write(source.read(record["thumbnail_size"]))
        return path


class KnownPhotos:
    """What is known of photos: rows below `first` are the old index's, then come those of PartialIndex.

    paths: {path: row} and exact: {PhotoFile: row} of the old index.
    """

    def __init__(self, old, unfinished):
        self.old, self.unfinished = old, unfinished
        self.first = len(old) if old else 0
        self.old_records = old.records if old else np.empty(0, RECORD)
        self.paths = {old.path(row): row for row in range(self.first)} if old else {}
        sizes, times = self.old_records["size"].tolist(), self.old_records["mtime"].tolist()
        self.exact = {PhotoFile(path, sizes[row], times[row]): row for path, row in self.paths.items()}
        self.added = {photo.found: row for row, photo in enumerate(unfinished.photos, self.first)}
        self.sizes = {*sizes, *(photo.found.size for photo in unfinished.photos)}
        self.by_digest = None

    def row_of(self, found):
        """The row of a photo that is known by its path, size and time, or by its digest; None if it is not."""
        row = self.exact.get(found, self.added.get(found))
        if row is not None or found.size not in self.sizes:
            return row
        if self.by_digest is None:
            every = enumerate(self.unfinished.photos, self.first)
            self.by_digest = {bytes.fromhex(photo.digest): row for row, photo in every}
            self.by_digest |= {record.tobytes(): row for row, record in enumerate(self.old_records["digest"])}
        try:
            return self.by_digest.get(bytes.fromhex(sha256_of(found.path)))
        except OSError:
            return None

    def records(self, numbers):
        """The records of rows (n,): (n,) of RECORD, without what index.write_index fills in."""
        result = np.zeros(len(numbers), RECORD)
        is_old = numbers < self.first
        result[is_old] = self.old_records[numbers[is_old]]
        for place in np.flatnonzero(~is_old):
            photo = self.unfinished.photos[numbers[place] - self.first]
            result["digest"][place] = np.frombuffer(bytes.fromhex(photo.digest), np.uint8)
            result["thumbnail"][place], result["thumbnail_size"][place] = photo.thumbnail, photo.thumbnail_size
        return result

    def is_same(self, one, other):
        """Whether two rows are of the same content."""
        one, other = self.records(np.array([one, other]))["digest"]
        return bool((one == other).all())

    def rows(self, numbers):
        """Features (n, D) of rows (n,)."""
        result = np.empty((len(numbers), self.unfinished.width), np.float32)
        is_old = numbers < self.first
        if is_old.any():
            result[is_old] = self.old.cells.features[numbers[is_old]]
        if not is_old.all():
            result[~is_old] = self.unfinished.rows()[numbers[~is_old] - self.first]
        return result


def default_clusters(photos):
    """K for a number of photos, of classes that nobody has counted; benchmarks/clusters.py compares it with others."""
    return max(2, min(MAX_DEFAULT_CLUSTERS, photos // 25))


def _check_subspaces(subspaces, width):
    if subspaces and width % subspaces:
        raise InputError(
            f"--subspaces {subspaces}: features of {width} values cannot be cut into {subspaces} equal parts"
        )
