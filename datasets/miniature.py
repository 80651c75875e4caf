"""A small benchmark drawn by code: line drawings and coloured, textured, cluttered pictures of 36 categories.

Written in the exact layout of Sketchy Ext, so the real scripts run on it unchanged:

    <root>/256x256/sketch/tx_000000000000_ready/<class>/<n>.png
    <root>/256x256/photo/tx_000000000000_ready/<class>/<n>.jpg
    <root>/zeroshot1/  lists, cname_cid.txt, cname_cid_zero.txt, cid_mask.pickle

A category is a function of a random draw that returns parts in painter's order, in coordinates from -1 to 1 with y down;
a part is (points (n, 2), whether it is closed). Sketch and photo of one number are drawn from different shapes.
"""

import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from datasets.filelists import write_list, write_mask
from datasets.files import write_whole
from datasets.protocols import PROTOCOLS

SIDE = 128  # pixels of a stored image
OVERSAMPLING = 2  # drawn larger, then reduced, for smooth edges


def write_miniature(root, seed=0, sketches=40, photos=60, held_back=5, workers=None):
    """Draw the benchmark into `root`: per class `sketches` and `photos`, of seen classes `held_back` more sketches.

    The same seed gives the same files. workers: processes that draw (default: one a core).
    Raises InputError if the folder cannot be written.
    """
    root, protocol = Path(root), PROTOCOLS["sketchy"]
    jobs, lists = [], {}
    for split, names in (("train", SEEN), ("test", SEEN), ("zero", UNSEEN)):
        for kind in ("sketch", "photo"):
            count = {"train": (sketches, photos), "test": (held_back, 0), "zero": (sketches, photos)}[split][kind == "photo"]
            first = sketches if split == "test" else 0
            pattern = (protocol.sketch_lists if kind == "sketch" else protocol.photo_lists)[0]
            for label, name in enumerate(names):
                for number in range(first, first + count):
                    suffix = "png" if kind == "sketch" else "jpg"
                    path = f"256x256/{kind}/tx_000000000000_ready/{name}/{number:04d}.{suffix}"
                    jobs.append((root / path, name, kind, (seed, _LABELS[name], kind == "photo", number)))
                    lists.setdefault(pattern.format(split), []).append((path, label))
    with ProcessPoolExecutor(workers) as pool:
        done = pool.map(_draw_file, jobs, chunksize=32)
        for _ in tqdm(done, "drawing", total=len(jobs), unit="image", leave=False, disable=None):
            pass
    folder = root / protocol.zero_version
    for name, rows in lists.items():
        write_list(folder / name, *zip(*rows, strict=True))
    write_list(folder / "cname_cid.txt", SEEN, range(len(SEEN)))
    write_list(folder / "cname_cid_zero.txt", UNSEEN, range(len(UNSEEN)))
    write_mask(folder / "cid_mask.pickle", semantic_mask())


def semantic_mask():
    """Semantic mask of the seen classes: (C, 1000) float64, 1 for an ImageNet class of the same kind, 1/3 for a relative."""
    mask = np.zeros((len(SEEN), 1000))
    for label, name in enumerate(SEEN):
        same, related = _IMAGENET.get(name, ((), ()))
        mask[label, list(related)] = 1 / 3
        mask[label, list(same)] = 1
    return mask


def _draw_file(job):
    path, name, kind, seed = job
    rng = np.random.default_rng(seed)
    image = draw_sketch(name, rng) if kind == "sketch" else draw_photo(name, rng)
    with write_whole(path) as file:
        image.save(file, "PNG") if kind == "sketch" else image.save(file, "JPEG", quality=88)


def draw_sketch(name, rng):
    """A line drawing of category `name`: PIL grey image, black on white, drawn by an unsteady hand."""
    canvas = Image.new("L", (SIDE * OVERSAMPLING,) * 2, 255)
    pen = ImageDraw.Draw(canvas)
    width = int(rng.integers(3, 7))
    for points, closed in _place(CATEGORIES[name](rng), rng, unsteadiness=0.035):
        if closed:
            pen.polygon(_pixels(points), fill=255)
        for _ in range(1 + (rng.random() < 0.25)):  # now and then a line is drawn twice
            stroke = points + rng.normal(0, 0.006, points.shape)
            pen.line(_pixels(np.vstack([stroke, stroke[:1]]) if closed else stroke), fill=0, width=width, joint="curve")
    return canvas.reduce(OVERSAMPLING)


def draw_photo(name, rng):
    """A picture of category `name` as a coloured, shaded object on a cluttered ground: PIL RGB image."""
    side = SIDE * OVERSAMPLING
    image = _texture(rng, side, contrast=rng.uniform(0.1, 0.5))
    image = _paint(image, _clutter(rng), rng, opacity=rng.uniform(0.25, 0.7))
    image = _paint(image, _place(CATEGORIES[name](rng), rng, unsteadiness=0.012), rng, opacity=1.0)
    light = _ramp(rng, side) * rng.uniform(0.1, 0.45)
    image = image * (1 + light[:, :, None]) + rng.normal(0, rng.uniform(0.01, 0.05), (side, side, 1))
    picture = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).reduce(OVERSAMPLING)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))


def _paint(image, parts, rng, opacity):
    """Lay parts over image (S, S, 3) in [0, 1], each in a colour and texture of its own or in that of the whole."""
    side = len(image)
    whole = _texture(rng, side, contrast=rng.uniform(0.05, 0.35))
    for points, closed in parts:
        mask = Image.new("L", (side, side))
        pen = ImageDraw.Draw(mask)
        if closed:
            pen.polygon(_pixels(points), fill=255)
            material = whole if rng.random() < 0.6 else _texture(rng, side, contrast=rng.uniform(0.05, 0.35))
        else:
            pen.line(_pixels(points), fill=255, width=int(rng.integers(5, 12)), joint="curve")
            material = _texture(rng, side, contrast=0.1)
        cover = np.asarray(mask, dtype=np.float32)[:, :, None] / 255 * opacity
        edge = np.asarray(mask.filter(ImageFilter.GaussianBlur(4)), dtype=np.float32)[:, :, None] / 255
        image = image * (1 - cover) + material * (0.55 + 0.45 * edge) * cover  # darker towards its edge
    return image


def _texture(rng, side, contrast):
    """A colour (side, side, 3) in [0, 1], varied by blotches or stripes."""
    colour = rng.uniform(0.1, 0.95, 3)
    if rng.random() < 0.5:
        blotches = rng.normal(0, 1, (int(rng.integers(3, 24)),) * 2).astype(np.float32)
        pattern = np.asarray(Image.fromarray(blotches).resize((side, side), Image.Resampling.BICUBIC))
    else:
        pattern = np.sin(_ramp(rng, side) * rng.uniform(5, 50))
    return np.clip(colour + contrast * pattern[:, :, None] * rng.uniform(0.3, 1, 3), 0, 1).astype(np.float32)


def _ramp(rng, side):
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    return axis[None, :] * np.float32(math.cos(angle)) + axis[:, None] * np.float32(math.sin(angle))


def _clutter(rng):
    """A few shapes that mean nothing."""
    parts = []
    for _ in range(int(rng.integers(2, 7))):
        x, y = rng.uniform(-1, 1, 2)
        w, h = rng.uniform(0.1, 0.6, 2)
        shapes = (lambda: oval(x, y, w, h), lambda: box(x, y, w, h), lambda: line((x, y), (x + w, y + h), (x - h, y + w)))
        parts.append(shapes[rng.integers(3)]())
    return parts


def _place(parts, rng, unsteadiness):
    """Turn, stretch, shift and bend a drawing as a whole; edges become chains of short steps first."""
    angle = math.radians(rng.normal(0, 9))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    stretch = rng.uniform(0.6, 0.85) * rng.uniform(0.85, 1.15, 2) * (1 if rng.random() < 0.5 else -1, 1)
    shift = rng.uniform(-0.12, 0.12, 2)
    waves = rng.normal(0, unsteadiness, (3, 2)), rng.uniform(1, 6, (3, 2)), rng.uniform(0, 2 * math.pi, 3)
    placed = []
    for points, closed in parts:
        points = _dense(points, closed)
        for amplitude, frequency, phase in zip(*waves, strict=True):
            points = points + amplitude * np.sin(points @ frequency + phase)[:, None]
        placed.append(((points * stretch) @ turn + shift, closed))
    return placed


def _dense(points, closed, step=0.12):
    ends = np.roll(points, -1, axis=0) if closed else points[1:]
    starts = points if closed else points[:-1]
    pieces = []
    for start, end in zip(starts, ends, strict=True):
        count = max(1, math.ceil(np.hypot(*(end - start)) / step))
        pieces.append(start + (end - start) * np.arange(count)[:, None] / count)
    return np.vstack(pieces if closed else [*pieces, points[-1:]])


def _pixels(points):
    return [tuple(point) for point in ((points + 1) / 2 * SIDE * OVERSAMPLING).tolist()]


# Parts


def line(*points):
    """An open chain of strokes."""
    return np.array(points, dtype=float), False


def shape(*points):
    """A closed polygon."""
    return np.array(points, dtype=float), True


def box(x, y, half_width, half_height, top=1.0):
    """An upright box; `top` is the width of its upper side as a share of the lower one."""
    narrow = half_width * top
    return shape(
        (x - narrow, y - half_height), (x + narrow, y - half_height), (x + half_width, y + half_height),
        (x - half_width, y + half_height),
    )  # fmt: skip


def oval(x, y, rx, ry, start=0.0, end=360.0):
    """An ellipse, or the arc of one from angle `start` to `end` in degrees, clockwise from the right."""
    whole = end - start >= 360
    angles = np.radians(np.linspace(start, end, 25, endpoint=not whole))
    return np.column_stack([x + rx * np.cos(angles), y + ry * np.sin(angles)]), whole


def segment(x, y, rx, ry, start, end):
    """The arc of an ellipse, closed by its chord."""
    return oval(x, y, rx, ry, start, end)[0], True


def burst(x, y, outer, inner, spikes):
    """A star."""
    angles = np.pi * np.arange(2 * spikes) / spikes - np.pi / 2
    radius = np.where(np.arange(2 * spikes) % 2, inner, outer)
    return np.column_stack([x + radius * np.cos(angles), y + radius * np.sin(angles)]), True


def petals(x, y, distance, size, count):
    """Circles around a point."""
    angles = 2 * np.pi * np.arange(count) / count
    return [oval(x + distance * math.cos(a), y + distance * math.sin(a), size, size) for a in angles]


# Categories


def airplane(r):
    w = r.uniform(0.55, 0.75)
    return [shape((-0.1, -0.1), (0.25, -0.1), (-0.15, -w)), oval(0, 0, 0.9, r.uniform(0.15, 0.22)),
            shape((-0.75, -0.1), (-0.55, -0.1), (-0.85, -0.5)), shape((-0.15, 0.05), (0.25, 0.05), (-0.3, w))]  # fmt: skip


def apple(r):
    return [oval(-0.2, 0.1, 0.5, r.uniform(0.55, 0.7)), oval(0.2, 0.1, 0.5, r.uniform(0.55, 0.7)), line((0, -0.45), (0.08, -0.85)),
            oval(0.3, -0.7, 0.22, 0.1)]  # fmt: skip


def axe(r):
    h = r.uniform(0.3, 0.45)
    return [box(-0.1, 0.05, 0.08, 0.9), shape((-0.2, -0.8), (0.3, -0.6 - h / 2), (0.7, -0.6), (0.7, -0.1), (0.3, -0.5 + h / 2), (-0.2, -0.4))]


def bell(r):
    w = r.uniform(0.55, 0.75)
    return [oval(0, 0.68, 0.15, 0.16), oval(0, -0.75, 0.13, 0.13),
            shape((-0.15, -0.65), (0.15, -0.65), (0.38, -0.4), (0.42, 0.2), (w, 0.6), (-w, 0.6), (-0.42, 0.2), (-0.38, -0.4)),
            line((-0.45, 0.35), (0.45, 0.35))]  # fmt: skip


def bicycle(r):
    s = r.uniform(0.33, 0.42)
    return [oval(-0.5, 0.35, s, s), oval(0.5, 0.35, s, s), line((-0.5, 0.35), (-0.2, -0.2), (0.35, -0.2), (0, 0.35), (-0.5, 0.35)),
            line((0, 0.35), (-0.25, -0.4)), line((-0.4, -0.4), (-0.1, -0.4)), line((0.5, 0.35), (0.3, -0.5), (0.55, -0.55))]  # fmt: skip


def bottle(r):
    n = r.uniform(0.12, 0.2)
    return [shape((-n, -0.9), (n, -0.9), (n, -0.4), (0.38, -0.1), (0.38, 0.9), (-0.38, 0.9), (-0.38, -0.1), (-n, -0.4)),
            box(0, 0.35, 0.38, r.uniform(0.18, 0.3))]  # fmt: skip


def butterfly(r):
    w = r.uniform(0.35, 0.48)
    return [oval(-0.45, -0.35, w, 0.42), oval(0.45, -0.35, w, 0.42), oval(-0.38, 0.4, 0.33, 0.36), oval(0.38, 0.4, 0.33, 0.36),
            oval(0, 0, 0.09, 0.65), line((0, -0.6), (-0.25, -0.95)), line((0, -0.6), (0.25, -0.95))]  # fmt: skip


def candle(r):
    w = r.uniform(0.16, 0.28)
    return [box(0, 0.2, w, 0.6), line((0, -0.4), (0, -0.55)), shape((0, -0.95), (0.14, -0.6), (0, -0.45), (-0.14, -0.6)),
            oval(0, 0.82, r.uniform(0.45, 0.65), 0.14)]  # fmt: skip


def car(r):
    t = r.uniform(-0.6, -0.4)
    return [shape((-0.9, 0), (-0.5, -0.05), (-0.3, t), (0.35, t), (0.6, -0.05), (0.92, 0.05), (0.92, 0.4), (-0.9, 0.4)),
            shape((-0.35, -0.08), (-0.22, t + 0.1), (0, t + 0.1), (0, -0.08)), oval(-0.5, 0.42, 0.22, 0.22), oval(0.5, 0.42, 0.22, 0.22)]  # fmt: skip


def castle(r):
    h = r.uniform(-0.5, -0.2)
    tower = [box(x, 0.1, 0.22, 0.75) for x in (-0.65, 0.65)]
    return [box(0, 0.4, 0.5, 0.45), *tower, *[box(x + d, -0.75, 0.06, 0.1) for x in (-0.65, 0.65) for d in (-0.16, 0, 0.16)],
            *[box(x, h + 0.1, 0.07, 0.1) for x in (-0.3, 0, 0.3)], segment(0, 0.85, 0.2, 0.5, 180, 360)]  # fmt: skip


def chair(r):
    b = r.uniform(-0.95, -0.75)
    return [line((-0.45, b), (-0.45, 0.9)), line((0.45, 0.15), (0.5, 0.9)), line((-0.2, 0.2), (-0.2, 0.7)), line((0.2, 0.2), (0.2, 0.7)),
            shape((-0.45, 0.05), (0.3, 0.05), (0.55, 0.2), (-0.4, 0.22)), shape((-0.45, b), (-0.3, b), (-0.3, 0.05), (-0.45, 0.05))]  # fmt: skip


def clock(r):
    a = r.uniform(0, 2 * math.pi)
    return [oval(0, 0, 0.8, 0.8), oval(0, 0, 0.65, 0.65), line((0, 0), (0.5 * math.cos(a), 0.5 * math.sin(a))), line((0, 0), (0, -0.3)),
            *petals(0, 0, 0.55, 0.03, 4)]  # fmt: skip


def crab(r):
    legs = [line((s * 0.4, y), (s * 0.75, y - 0.05), (s * 0.9, y + 0.25)) for s in (-1, 1) for y in (0.2, 0.35)]
    claws = [part for s in (-1, 1) for part in (line((s * 0.4, 0), (s * 0.7, -0.3)), segment(s * 0.7, -0.5, 0.2, 0.25, 300 if s > 0 else 290, 600 if s > 0 else 590))]
    return [*legs, *claws, oval(0, 0.2, r.uniform(0.48, 0.6), 0.36), oval(-0.15, -0.2, 0.08, 0.1), oval(0.15, -0.2, 0.08, 0.1)]


def cup(r):
    t = r.uniform(0.62, 0.7)
    return [oval(0.6, 0.05, 0.28, 0.3), oval(0.6, 0.05, 0.16, 0.18), shape((-t, -0.5), (t, -0.5), (0.42, 0.65), (-0.42, 0.65)),
            oval(0, -0.5, t, r.uniform(0.1, 0.16))]  # fmt: skip


def envelope(r):
    h = r.uniform(0.45, 0.6)
    return [box(0, 0, 0.85, h), line((-0.85, -h), (0, r.uniform(0, 0.15)), (0.85, -h))]


def eyeglasses(r):
    s = r.uniform(0.28, 0.36)
    return [oval(-0.45, 0, s, s), oval(0.45, 0, s, s), line((-0.45 + s, 0), (-0.05, -0.1), (0.45 - s, 0)), line((-0.45 - s, 0), (-0.95, -0.3)),
            line((0.45 + s, 0), (0.95, -0.3))]  # fmt: skip


def fish(r):
    h = r.uniform(0.3, 0.45)
    return [shape((0.4, 0), (0.9, -0.4), (0.8, 0), (0.9, 0.4)), shape((-0.1, -h + 0.05), (0.2, -h - 0.2), (0.3, -h + 0.15)), oval(-0.15, 0, 0.65, h),
            oval(-0.55, -0.1, 0.06, 0.06), oval(-0.5, 0, 0.2, 0.28, -60, 60)]  # fmt: skip


def flower(r):
    n = int(r.integers(5, 9))
    return [line((0, 0), (0.05, 0.95)), oval(0.28, 0.6, 0.22, 0.1), *petals(0, -0.3, 0.36, 0.6 / n**0.6, n), oval(0, -0.3, 0.2, 0.2)]


def guitar(r):
    n = r.uniform(0.06, 0.1)
    return [box(0, -0.45, n, 0.5), box(0, -0.9, n + 0.06, 0.1), oval(0, 0.15, 0.33, 0.28), oval(0, 0.58, 0.45, 0.36), oval(0, 0.3, 0.13, 0.13),
            box(0, 0.68, 0.2, 0.04)]  # fmt: skip


def hammer(r):
    w = r.uniform(0.4, 0.6)
    return [box(0, 0.2, 0.09, 0.75), shape((-w, -0.8), (0.3, -0.8), (0.7, -0.55), (0.3, -0.5), (-w, -0.45))]


def hourglass(r):
    w = r.uniform(0.4, 0.55)
    return [shape((-w, -0.75), (w, -0.75), (0.06, 0), (w, 0.75), (-w, 0.75), (-0.06, 0)), box(0, -0.82, w + 0.1, 0.08), box(0, 0.82, w + 0.1, 0.08),
            segment(0, 0.75, w * 0.8, 0.4, 180, 360)]  # fmt: skip


def house(r):
    p = r.uniform(-0.95, -0.75)
    return [box(0.4, -0.6, 0.1, 0.25), box(0, 0.35, 0.65, 0.5), shape((-0.8, -0.15), (0, p), (0.8, -0.15)), box(-0.25, 0.55, 0.15, 0.3),
            box(0.3, 0.3, 0.17, 0.15)]  # fmt: skip


def ice_cream(r):
    w = r.uniform(0.35, 0.45)
    scoops = [oval(0, -0.3, w, 0.35)] if r.random() < 0.5 else [oval(-0.2, -0.25, 0.3, 0.3), oval(0.2, -0.25, 0.3, 0.3), oval(0, -0.6, 0.3, 0.3)]
    return [*scoops, shape((-w - 0.05, -0.1), (w + 0.05, -0.1), (0, 0.95)), line((-0.2, -0.1), (0.12, 0.5)), line((0.2, -0.1), (-0.12, 0.5))]


def key(r):
    s = r.uniform(0.26, 0.36)
    return [box(0.25, 0, 0.65, 0.07), oval(-0.5, 0, s, s), oval(-0.55, 0, s / 2, s / 2), box(0.8, 0.18, 0.06, 0.14), box(0.55, 0.16, 0.06, 0.12)]


def ladder(r):
    w, n = r.uniform(0.22, 0.35), int(r.integers(4, 7))
    return [line((-w, -0.95), (-w - 0.1, 0.95)), line((w, -0.95), (w + 0.1, 0.95)), *[line((-w - 0.05, y), (w + 0.05, y)) for y in np.linspace(-0.75, 0.75, n)]]


def lamp(r):
    w = r.uniform(0.5, 0.7)
    return [box(0, 0.3, 0.06, 0.5), box(0, -0.5, w, 0.38, r.uniform(0.4, 0.7)), segment(0, 0.9, 0.42, 0.2, 180, 360)]


def mushroom(r):
    w = r.uniform(0.65, 0.85)
    return [box(0, 0.4, 0.28, 0.5, 0.75), segment(0, 0, w, 0.75, 180, 360), oval(-0.3, -0.3, 0.12, 0.1), oval(0.25, -0.4, 0.13, 0.1)]


def pear(r):
    return [shape(*[(x * r.uniform(0.95, 1.05), y) for x, y in ((0, -0.7), (0.2, -0.55), (0.28, -0.15), (0.55, 0.3), (0.4, 0.75), (0, 0.88),
                                                               (-0.4, 0.75), (-0.55, 0.3), (-0.28, -0.15), (-0.2, -0.55))]),
            line((0, -0.65), (0.1, -0.95)), oval(0.28, -0.78, 0.18, 0.08)]  # fmt: skip


def rabbit(r):
    h = r.uniform(0.35, 0.48)
    return [oval(-0.25, -0.55, 0.13, h), oval(0.25, -0.55, 0.13, h), oval(0, 0.25, 0.55, 0.5), oval(-0.2, 0.15, 0.07, 0.09), oval(0.2, 0.15, 0.07, 0.09),
            oval(0, 0.35, 0.09, 0.06), line((-0.15, 0.4), (-0.7, 0.35)), line((0.15, 0.4), (0.7, 0.35))]  # fmt: skip


def rocket(r):
    w = r.uniform(0.25, 0.35)
    return [shape((-w, 0.3), (-0.65, 0.8), (-w, 0.65)), shape((w, 0.3), (0.65, 0.8), (w, 0.65)), shape((-0.15, 0.65), (0, 0.98), (0.15, 0.65)),
            shape((0, -0.95), (w, -0.45), (w, 0.65), (-w, 0.65), (-w, -0.45)), oval(0, -0.2, 0.15, 0.15)]  # fmt: skip


def sailboat(r):
    m = r.uniform(-0.95, -0.8)
    return [line((0, 0.4), (0, m)), shape((0.08, m + 0.05), (0.75, 0.3), (0.08, 0.3)), shape((-0.08, m + 0.2), (-0.6, 0.3), (-0.08, 0.3)),
            shape((-0.85, 0.42), (0.85, 0.42), (0.55, 0.8), (-0.6, 0.8))]  # fmt: skip


def snail(r):
    s = r.uniform(0.42, 0.52)
    return [shape((-0.9, 0.7), (-0.85, 0.1), (-0.65, 0.1), (-0.55, 0.5), (0.8, 0.5), (0.95, 0.7)), oval(0.15, 0.1, s, s), oval(0.15, 0.1, s * 0.62, s * 0.62),
            oval(0.15, 0.1, s * 0.28, s * 0.28), line((-0.8, 0.1), (-0.95, -0.3)), line((-0.7, 0.1), (-0.65, -0.3))]  # fmt: skip


def spider(r):
    legs = [line((0, y), (s * 0.55, y - 0.35), (s * 0.9, y + d)) for s in (-1, 1) for y, d in ((-0.2, -0.3), (-0.05, 0.0), (0.1, 0.3), (0.25, 0.6))]
    return [*legs, oval(0, 0.25, r.uniform(0.26, 0.36), 0.38), oval(0, -0.25, 0.2, 0.2)]


def star(r):
    return [burst(0, 0, 0.95, r.uniform(0.32, 0.5), 5)]


def table(r):
    h = r.uniform(-0.35, -0.1)
    return [line((-0.65, h), (-0.7, 0.75)), line((0.65, h), (0.7, 0.75)), line((-0.4, h), (-0.4, 0.5)), line((0.4, h), (0.4, 0.5)),
            shape((-0.65, h - 0.25), (0.65, h - 0.25), (0.92, h), (-0.92, h))]  # fmt: skip


def umbrella(r):
    w = r.uniform(0.75, 0.92)
    return [line((0, -0.1), (0, 0.7), (0.12, 0.85), (0.28, 0.75), (0.28, 0.62)), line((0, -0.8), (0, -0.95)), segment(0, -0.05, w, 0.75, 180, 360),
            line((0, -0.8), (-0.3, -0.05)), line((0, -0.8), (0.3, -0.05))]  # fmt: skip


def windmill(r):
    a = r.uniform(0, 90)
    blades = [(_turn(shape((0, -0.05), (0.75, -0.13), (0.75, 0.13), (0, 0.05)), a + q, (0, -0.3))) for q in (0, 90, 180, 270)]
    return [box(0, 0.3, 0.42, 0.65, 0.5), box(0, 0.75, 0.12, 0.2), shape((-0.25, -0.35), (0, -0.62), (0.25, -0.35)), *blades, oval(0, -0.3, 0.07, 0.07)]


def _turn(part, degrees, about):
    angle = math.radians(degrees)
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return part[0] @ matrix + about, part[1]


_DRAWN = (
    airplane, apple, axe, bell, bicycle, bottle, butterfly, candle, car, castle, chair, clock, crab, cup, envelope, eyeglasses, fish, flower,
    guitar, hammer, hourglass, house, ice_cream, key, ladder, lamp, mushroom, pear, rabbit, rocket, sailboat, snail, spider, star, table,
    umbrella, windmill,
)  # fmt: skip

CATEGORIES = {function.__name__.replace("_", " "): function for function in _DRAWN}
UNSEEN = ["bell", "bicycle", "fish", "house", "mushroom", "rabbit", "sailboat", "umbrella"]
SEEN = [name for name in CATEGORIES if name not in UNSEEN]
_LABELS = {name: number for number, name in enumerate(CATEGORIES)}

# ImageNet classes that are the same kind of thing, and ones that are relatives of it.
_IMAGENET = {
    "airplane": ((404, 895), (405, 908)), "apple": ((948,), (949, 950, 951)), "axe": ((596,), (587,)),
    "bottle": ((440, 720, 737, 898, 907), (504,)), "butterfly": ((321, 322, 323, 324, 325, 326), (319, 320)),
    "candle": ((470,), (607, 846)), "car": ((436, 511, 817), (609, 627, 656)), "castle": ((483,), (497, 663)),
    "chair": ((423, 559, 765), (831,)), "clock": ((409, 530, 892), (531, 604)),
    "crab": ((118, 119, 120, 121), (122, 123, 124, 125)), "cup": ((968,), (504, 647)), "envelope": ((549,), ()),
    "eyeglasses": ((837,), (836,)), "flower": ((985, 986), ()), "guitar": ((402, 546), (420, 889)),
    "hammer": ((587,), (596, 784)), "hourglass": ((604,), (409, 892)), "ice cream": ((928,), (929,)),
    "lamp": ((846,), (619, 818)), "rocket": ((657, 744), (812,)), "snail": ((113,), (114,)),
    "spider": ((72, 73, 74, 75, 76, 77), (70, 71, 78, 79)), "star": ((327,), (328, 329)), "table": ((532,), (526, 736)),
}  # fmt: skip
