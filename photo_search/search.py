"""Searches an index of photos with a sketch: matching, cluster weight, and the search hits."""

import os
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

from datasets.images import read_rgb
from photo_search.clean_sketch import clean_up
from photo_search.encoder import Encoder, encoder_of
from photo_search.index import Index, open_index
from photo_search.result import SearchResult, image_of
from utils.cli import InputError

ONE_TO_ONE, ONE_TO_MANY = MATCHINGS = ("one-to-one", "one-to-many")
DEFAULT_CLUSTER_WEIGHT = 0.2  # the paper's 0.8 ranks fewer relevant photos first in photo collections of users
MIN_REDUCED_SIDE = 2048  # pixels of a photo of a sketch that is decoded at a reduced scale
MIN_CONTRAST = 24  # grey levels; a drawing with less counts as blank


class SearchHit(NamedTuple):
    """A photo in a search result."""

    row: int  # in the index
    path: str
    score: float
    distance: float  # d
    cluster_distance: float | None  # D; None in an index without clusters
    copies: tuple["SearchHit", ...] = ()  # other photos with the same content, see Searcher.find_present


@dataclass(frozen=True)
class Searcher:
    """An index and its encoder. Safe to use from several threads."""

    index: Index  # or an object with the same methods, such as photo_search.milvus.MilvusIndex
    encoder: Encoder

    def __repr__(self):
        clusters = "M {}, K {}".format(*self.index.clusters) if self.index.clusters else "no clusters"
        return (
            f"<{self.index.name}: {len(self.index):,} photos, {clusters}, features of {self.encoder.metadata['model']}>"
        )

    def matching(self, asked=None):
        """The matching to use: `asked`, or by default one-to-many if the index has clusters.

        Raises InputError if one-to-many is asked for and there are no clusters, and for an unknown matching.
        """
        if asked not in (None, *MATCHINGS):
            raise InputError(f"matching {asked!r}: it is one of {', '.join(MATCHINGS)}")
        if asked == ONE_TO_MANY and not self.index.clusters:
            raise InputError(
                f"--matching {ONE_TO_MANY}: {self.index.name} has no clusters; index again with --clusters"
            )
        return asked or (ONE_TO_MANY if self.index.clusters else ONE_TO_ONE)

    def cluster_weight(self, matching=None, weight=None):
        """The weight of D in the score: 0 in one-to-one matching; in one-to-many, DEFAULT_CLUSTER_WEIGHT or `weight`.

        Raises InputError as `matching` does, if matching and weight contradict each other, and for a weight that is
        not from 0 to 1.
        """
        if weight is not None and not (isinstance(weight, Real) and 0 <= weight <= 1):
            raise InputError(f"weight {weight!r}: it is a number from 0 to 1")
        if matching == ONE_TO_ONE and weight:
            raise InputError(
                f"--cluster_weight {weight:g}: --matching {ONE_TO_ONE} has no cluster distance; leave one out"
            )
        if weight and not self.index.clusters:
            raise InputError(
                f"--cluster_weight {weight:g}: {self.index.name} has no clusters; index again with --clusters"
            )
        if self.matching(matching) == ONE_TO_ONE:
            return 0
        return DEFAULT_CLUSTER_WEIGHT if weight is None else weight

    def find(self, image, k=20, matching=None, allowed=None, as_drawn=False, weight=None):
        """The k nearest photos of a drawing: a SearchResult of SearchHits, nearest first, ties by path.

        image: path of a file, PIL.Image or array, see `result.image_of`. It is cleaned up unless `as_drawn`.
        Raises InputError if it cannot be read, or no line differs from the paper.
        allowed: the rows to search in, at least one, see Index.between; None for all.
        weight: of the cluster distance, 0 to 1; see `cluster_weight`.
        """
        image = read_sketch(image) if isinstance(image, str | os.PathLike) else image_of(image)
        image = image if as_drawn else clean_up(image)
        return self.find_features(self.encoder.features([image])[0], k, matching, allowed, weight)

    def find_features(self, features, k=20, matching=None, allowed=None, weight=None):
        """As `find`, for features (D,) of length 1: those of another drawing, or of a photo of the index."""
        if not isinstance(k, Integral) or k < 1:
            raise InputError(f"k {k!r}: it is a whole number from 1")
        nearest = self.index.nearest(features, k, self.cluster_weight(matching, weight), allowed)
        columns = [values.tolist() for values in nearest[:4]]
        hits = (
            SearchHit(row, path, score, distance, cluster if self.index.clusters else None)
            for row, score, distance, cluster, path in zip(*columns, self.index.paths_of(columns[0]), strict=True)
        )
        return SearchResult(hits, self.index)

    def find_present(self, features, k=20, matching=None, allowed=None, weight=None, left_out=None):
        """As `find_features`, of photos that exist now, copies of one photo as one hit: (hits, missing paths).

        left_out: a row that is not a hit. Photos of an index in Milvus may be on another machine: there they count as
        missing only if a folder of the index exists on this one.
        """
        asked, count = k + 2, len(self.index)
        may_be_missing = isinstance(self.index, Index) or any(map(os.path.isdir, self.index.metadata["folders"]))
        while True:
            hits = self.find_features(features, min(asked, count), matching, allowed, weight)
            missing = {hit.path for hit in hits if may_be_missing and is_missing(hit)}
            groups = {}
            for hit, digest in zip(hits, self.index.digests_of([hit.row for hit in hits]), strict=True):
                if hit.path not in missing and hit.row != left_out:
                    groups.setdefault(digest or hit.path, []).append(hit)
            # A photo more, so that no copy of the k-th is left out.
            if len(groups) > k or len(hits) < asked or asked >= count:
                break
            asked *= 4
        return [first._replace(copies=tuple(rest)) for first, *rest in groups.values()][:k], missing


def open_searcher(location, checkpoint=None, device=None):
    """The Searcher of an index; location: see open_index_at; the others: see encoder.encoder_of. Raises InputError."""
    index = open_index_at(location)
    return Searcher(index, encoder_of(index.metadata, checkpoint, device))


def open_index_at(location):
    """The index at a location, a folder or a photo_search.milvus.Server. Raises InputError."""
    return open_index(location) if isinstance(location, str | os.PathLike) else location.open()


def read_sketch(path):
    """Read a sketch upright as RGB PIL.Image. Raises InputError if it cannot be read, or is blank."""
    image = read_rgb(path, exif_transpose=True, draft_side=MIN_REDUCED_SIDE, way_out="name a picture of your sketch")
    check_drawn(image, path)
    return image


def check_drawn(image, name):
    """Raise InputError for a drawing, called `name`, that is blank or all black."""
    low, high = image.convert("L").getextrema()
    if high - low <= MIN_CONTRAST:
        kind = "all black" if high < 128 else "blank"
        raise InputError(f"{name}: the sketch is {kind}; draw dark lines on light paper")


def is_missing(hit):
    """Whether the file of a search hit does not exist any more."""
    return not os.path.isfile(hit.path)
