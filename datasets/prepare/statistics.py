"""Statistics of a benchmark folder for its summary page: counts, image sizes, sample thumbnails, oddities.

They come from samples of the images, the same every time, so that it takes only seconds.
"""

import io
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image

from datasets.images import decoded_formats, no_pillow_warnings, read_rgb
from datasets.lists import LIST_DESCRIPTIONS, Benchmark
from datasets.prepare.check import MAX_AREA_PX, MIN_SIDE_PX
from utils.cli import InputError
from utils.process_pool import parallel_map
from utils.sampling import evenly_spaced

THUMBNAIL_PX = 96  # pixels of a thumbnail's longer side
KIND_PLURALS = {"sketch": "sketches", "photo": "photos"}


@dataclass(frozen=True)
class Sample:
    """A sampled image."""

    path: str
    thumbnail: bytes | None  # JPEG; None if the image is missing or unreadable
    size: tuple[int, int] | None
    form: str  # format and mode, such as "JPEG, RGB"
    oddities: frozenset  # keys of _ADVICE, or "missing"


@dataclass(frozen=True)
class ClassRow:
    """A class with the number of its images in each list, {(kind, split): n}, and {kind: its samples}."""

    label: int
    name: str
    seen: bool
    counts: dict
    samples: dict

    @property
    def anchor(self):
        return f"{'seen' if self.seen else 'unseen'}-{self.label}"

    def count(self, kind):
        return sum(number for (of, _), number in self.counts.items() if of == kind)


@dataclass(frozen=True)
class DatasetStatistics:
    """Of a benchmark folder: lists {(kind, split): FileList}, classes (unseen first), lines about oddities."""

    benchmark: Benchmark
    lists: dict
    classes: list[ClassRow]
    odd: list[str]


def collect_statistics(benchmark, lists):
    """Count the images in `lists`, {(kind, split): FileList}, and look at samples of every class; returns a Survey.

    It reports odd counts and odd samples. datasets.prepare.check reports wrong lists and missing images.
    """
    classes = _sample_classes(benchmark, lists)
    return DatasetStatistics(benchmark, lists, classes, [*_odd_counts(classes), *_odd_images(classes)])


def evenly_sampled(items, count):
    """At most `count` of a list of items: the middle one of each of `count` equal parts."""
    return [items[index] for index in evenly_spaced(len(items), count, midpoints=True)]


def _sample_classes(benchmark, lists):
    """A ClassRow for every class, unseen classes first. The more classes there are, the fewer samples each has."""
    total = len(benchmark.unseen_names) + len(benchmark.seen_names)
    each = min(6, max(3, 400 // total))
    paths = {}  # {(seen, label, kind): all paths}
    for (kind, split), files in lists.items():
        for path, label in zip(files.paths, files.labels.tolist(), strict=True):
            paths.setdefault((split != "zero", label, kind), []).append(path)
    jobs = [(key, benchmark.root, path) for key in sorted(paths) for path in evenly_sampled(paths[key], each)]
    samples = {}
    for (key, *_), sample in zip(jobs, parallel_map(_read_sample, jobs, "looking", chunk=4), strict=True):
        samples.setdefault(key, []).append(sample)
    numbers = {key: np.bincount(files.labels, minlength=total).tolist() for key, files in lists.items()}
    rows = []
    for seen, names in ((False, benchmark.unseen_names), (True, benchmark.seen_names)):
        for label, name in enumerate(names):
            counts = {key: of[label] for key, of in numbers.items() if (key[1] != "zero") == seen}
            of_class = {kind: samples.get((seen, label, kind), []) for kind in KIND_PLURALS}
            rows.append(ClassRow(label, name, seen, counts, of_class))
    return rows


def _read_sample(job):
    """The Sample of a job (key, root, path). Colours are judged on the thumbnail, where very thin lines vanish."""
    (_, _, kind), root, path = job
    try:
        image = read_rgb(root / path)
        with no_pillow_warnings(), Image.open(root / path, formats=decoded_formats()) as file:
            form = f"{file.format}, {file.mode}"
    except (InputError, OSError):
        return Sample(path, None, None, "", frozenset(["broken" if os.path.isfile(root / path) else "missing"]))
    size, (low, high) = image.size, image.convert("L").getextrema()
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    pixels = np.asarray(image).astype(np.int16)
    grey, colour = pixels.mean(axis=2), np.ptp(pixels, axis=2).mean()
    light, dark, blank = (grey >= 192).mean(), (grey < 64).mean(), high - low < 16
    oddities = {
        "blank": blank,
        "inverted": kind == "sketch" and not blank and dark > 0.5,
        "like a photo": kind == "sketch" and not blank and dark <= 0.5 and light < 0.5,
        "like a sketch": kind == "photo" and not blank and colour < 2 and light > 0.6,
        "tiny": min(size) < MIN_SIDE_PX,
        "huge": size[0] * size[1] > MAX_AREA_PX,
        "elongated": max(size) > 4 * min(size),
    }
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=80, optimize=True)
    return Sample(path, stored.getvalue(), size, form, frozenset(name for name, holds in oddities.items() if holds))


# Lines about oddities: what is odd, and what to do about it.

_ADVICE = {  # {oddity of a sample: (what is odd, what to do)}
    "broken": ("Not readable as images", "Fetch them again, or take them out of their lists."),
    "blank": (
        "All of one shade",
        "Look at the originals. White lines on a transparent ground vanish, because that ground becomes white.",
    ),
    "inverted": ("Mostly black", "Dark lines on white paper are expected: invert the images."),
    "like a photo": ("Not lines on light paper", "Check whether photos are listed as sketches."),
    "like a sketch": (
        "Grey on white, like sketches",
        "A few may be drawings, or things on white. If there are many, sketches are in a list of photos.",
    ),
    "tiny": (f"Under {MIN_SIDE_PX} pixels high or wide", "The networks see only a blur; look for larger originals."),
    "huge": (f"Over {MAX_AREA_PX // 10**6} million pixels", "They are slow to decode: reduce them."),
    "elongated": ("Over 4 times as long as wide", "They are squeezed into a square: crop or pad them."),
}


def _some(names, count=3):
    """The first `count` names and the number of the others: "a, b, c and 4 more"."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _odd_counts(classes):
    """Lines about classes with fewer than a quarter of the median number of images in a list."""
    for key in LIST_DESCRIPTIONS:
        rows = [row for row in classes if key in row.counts]
        median = np.median([row.counts[key] for row in rows]) if rows else 0
        few = sorted((row.counts[key], row.name) for row in rows if row.counts[key] < median / 4)
        if few:
            names = _some([f"{name} {number:,}" for number, name in few], 8)
            yield (
                f"Far fewer {LIST_DESCRIPTIONS[key]} than the median of {median:,.0f}: {names}. "
                "Check whether all images were unpacked and listed."
            )


def _odd_images(classes):
    """A line for each oddity that samples of a kind have."""
    for kind, plural in KIND_PLURALS.items():
        samples = [sample for row in classes for sample in row.samples[kind]]
        for oddity, (what, advice) in _ADVICE.items():
            if hits := [sample.path for sample in samples if oddity in sample.oddities]:
                yield f"{what}: {len(hits):,} of the {len(samples):,} {plural} looked at ({_some(hits)}). {advice}"
