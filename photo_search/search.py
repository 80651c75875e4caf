"""A sketch of one's own against an index of photos: what `find` and others who search use."""

import os
from dataclasses import dataclass
from typing import NamedTuple

from datasets.images import read_rgb
from photo_search.clean_sketch import clean_up
from photo_search.encoder import Encoder, encoder_of
from photo_search.index import Index, open_index
from utils.cli import InputError

ONE_TO_ONE, ONE_TO_MANY = MATCHINGS = ("one-to-one", "one-to-many")
DEFAULT_CLUSTER_WEIGHT = 0.2  # for photos of one's own; the paper's 0.8 shows fewer right photos first
MIN_CONTRAST = 24  # grey levels, up to which a drawing shows nothing: paper and its noise


class SearchHit(NamedTuple):
    """A photo that was found."""

    row: int  # in the index
    path: str
    score: float
    distance: float  # d
    cluster_distance: float | None  # D; None in an index without clusters


@dataclass(frozen=True)
class Searcher:
    """An index, and the network that it was made with. It may be used by several threads."""

    index: Index  # or what gives the same, such as photo_search.milvus.MilvusIndex
    network: Encoder

    def matching(self, asked=None):
        """The matching to use: what is asked for, or one-to-many where the index has clusters.

        Raises InputError where one-to-many is asked for and there are none.
        """
        if asked == ONE_TO_MANY and not self.index.clusters:
            raise InputError(
                f"--matching {ONE_TO_MANY}: {self.index.name} has no clusters; index again with --clusters"
            )
        return asked or (ONE_TO_MANY if self.index.clusters else ONE_TO_ONE)

    def cluster_weight(self, matching=None, weight=None):
        """The weight of D in the score: 0 in one-to-one matching; in one-to-many, DEFAULT_CLUSTER_WEIGHT or `weight`.

        Raises InputError as `matching` does, and where the two contradict each other.
        """
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
        """The k nearest photos of a drawing (PIL.Image, RGB): [SearchHit, ...], nearest first, ties by path.

        The drawing is cleaned up unless `as_drawn`. Raises InputError where no line can be told from the paper.
        allowed: the rows that may be found, one at least, see Index.between; None for all.
        weight: of the cluster distance, from 0 to 1; see `cluster_weight`.
        """
        image = image if as_drawn else clean_up(image)
        return self.find_features(self.network.features([image])[0], k, matching, allowed, weight)

    def find_features(self, features, k=20, matching=None, allowed=None, weight=None):
        """As `find`, for features (D,) of length 1: those of another drawing, or of a photo of the index."""
        nearest = self.index.nearest(features, k, self.cluster_weight(matching, weight), allowed)
        columns = [values.tolist() for values in nearest[:4]]
        return [
            SearchHit(row, path, score, distance, cluster if self.index.clusters else None)
            for row, score, distance, cluster, path in zip(*columns, self.index.paths_of(columns[0]), strict=True)
        ]


def open_searcher(place, checkpoint=None, device=None):
    """The Searcher of an index; place: see open_location; the others: see encoder.encoder_of. Raises InputError."""
    index = open_location(place)
    return Searcher(index, encoder_of(index.metadata, checkpoint, device))


def open_location(place):
    """The index at a place, a folder or a photo_search.milvus.Server. Raises InputError."""
    return open_index(place) if isinstance(place, str | os.PathLike) else place.open()


def read_sketch(path):
    """A drawing as an RGB PIL.Image. Raises InputError if it cannot be read, or shows nothing."""
    try:
        image = read_rgb(path, exif_transpose=True)
    except InputError as error:
        raise InputError(str(error).split("; ")[0] + "; name a picture of your sketch") from None
    check_drawn(image, path)
    return image


def check_drawn(image, name):
    """Raise InputError for a drawing, called `name`, that is blank or all black."""
    low, high = image.convert("L").getextrema()
    if high - low <= MIN_CONTRAST:
        kind = "all black" if high < 128 else "blank"
        raise InputError(f"{name}: the sketch is {kind}; draw dark lines on light paper")


def is_missing(match):
    """Whether a photo that was found is no longer there."""
    return not os.path.isfile(match.path)
