"""A small benchmark drawn by code: line drawings and coloured pictures, textured and cluttered, of 37 categories.

Its layout is exactly that of Sketchy Ext, so the real scripts run on it unchanged:

    <root>/256x256/sketch/tx_000000000000_ready/<class>/<n>.png
    <root>/256x256/photo/tx_000000000000_ready/<class>/<n>.jpg
    <root>/zeroshot1/  lists, cname_cid.txt, cname_cid_zero.txt, cid_mask.pickle, title.txt

A sketch and a photo with the same number show different shapes. The classes are drawn in drawings.py.
"""

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from datasets.lists import CLASS_NAME_FILES, MASK_FILE, TITLE_FILE, write_list, write_mask
from datasets.prepare.drawings import CATEGORIES, box, line, oval
from datasets.protocols import PROTOCOLS
from utils.cli import InputError
from utils.files import atomic_write
from utils.process_pool import parallel_map

UNSEEN_CATEGORIES = ["bell", "bicycle", "fish", "house", "mushroom", "rabbit", "sailboat", "umbrella"]
SEEN_CATEGORIES = [name for name in CATEGORIES if name not in UNSEEN_CATEGORIES]
_LABELS = {name: number for number, name in enumerate(CATEGORIES)}

IMAGE_PX = 128  # pixels of a stored image
OVERSAMPLING = 2  # outlines are drawn larger, then reduced, for smooth edges


def write_miniature(root, seed=0, sketches=40, photos=60, held_back=5, workers=None):
    """Draw the benchmark into `root`, which must be new or empty.

    sketches, photos: number of images of each class. held_back: number of validation sketches of each seen class.
    workers: number of processes that draw (None: one for each core). The same seed gives the same files.
    The lists appear after all images. Raises InputError if `root` cannot be made or already holds something.
    """
    root = Path(root)
    unfinished = root / ".unfinished"
    if root.is_file() or (root.is_dir() and any(path != unfinished for path in root.iterdir())):
        raise InputError(f"{root}: is not an empty folder; name a new one")
    shutil.rmtree(unfinished, ignore_errors=True)
    jobs, lists = _list_jobs(unfinished, seed, sketches, photos, held_back)
    _make_folders({path.parent for path, *_ in jobs})
    for _ in parallel_map(_draw_file, jobs, "drawing", workers):
        pass
    folder = unfinished / PROTOCOLS["sketchy"].zero_version
    for name, rows in lists.items():
        write_list(folder / name, rows)
    for name, classes in zip(CLASS_NAME_FILES, (SEEN_CATEGORIES, UNSEEN_CATEGORIES), strict=True):
        write_list(folder / name, zip(classes, range(len(classes)), strict=True))
    write_mask(folder / MASK_FILE, miniature_mask())
    with atomic_write(folder / TITLE_FILE) as file:
        file.write(b"miniature benchmark\n")
    for name in ("256x256", folder.name):  # the lists come last: if they exist, everything does
        (unfinished / name).replace(root / name)
    unfinished.rmdir()


def _list_jobs(root, seed, sketches, photos, held_back):
    """(arguments of _draw_file for every image, {list name: its rows})."""
    protocol = PROTOCOLS["sketchy"]
    jobs, lists = [], {}
    for kind, split, names, numbers in (
        ("sketch", "train", SEEN_CATEGORIES, range(sketches)),
        ("sketch", "test", SEEN_CATEGORIES, range(sketches, sketches + held_back)),
        ("sketch", "zero", UNSEEN_CATEGORIES, range(sketches)),
        ("photo", "train", SEEN_CATEGORIES, range(photos)),
        ("photo", "zero", UNSEEN_CATEGORIES, range(photos)),
    ):
        suffix = "png" if kind == "sketch" else "jpg"
        rows = lists[protocol.list_names(kind, split)[0]] = []
        for (label, name), number in itertools.product(enumerate(names), numbers):
            path = f"256x256/{kind}/tx_000000000000_ready/{name}/{number:04d}.{suffix}"
            jobs.append((root / path, name, kind, (seed, _LABELS[name], kind == "photo", number)))
            rows.append((path, label))
    return jobs, lists


def miniature_mask():
    """Semantic mask (C, 1000) float64: 1 for ImageNet classes of a seen class's own kind, 1/3 for related ones."""
    mask = np.zeros((len(SEEN_CATEGORIES), 1000))
    for label, name in enumerate(SEEN_CATEGORIES):
        same, related = _IMAGENET.get(name, ((), ()))
        mask[label, list(related)] = 1 / 3
        mask[label, list(same)] = 1
    return mask


def _make_folders(folders):
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be made ({error.strerror}); choose another folder") from error


def _draw_file(job):
    path, name, kind, seed = job
    rng = np.random.default_rng(seed)
    image = draw_sketch(name, rng) if kind == "sketch" else draw_photo(name, rng)
    try:
        image.save(path, quality=88)
    except OSError as error:
        reason = f"{path.parents[4]}: images cannot be written ({error.strerror or error})"
        raise InputError(f"{reason}; make room, or choose another folder") from error


def draw_sketch(name, rng):
    """A line drawing of category `name`, as if by an unsteady hand: PIL grey image, black on white."""
    canvas = Image.new("L", (IMAGE_PX * OVERSAMPLING,) * 2, 255)
    pen = ImageDraw.Draw(canvas)
    width = int(rng.integers(3, 7))
    for points, closed in _pose(CATEGORIES[name](rng), rng, unsteadiness=0.035):
        if closed:
            pen.polygon(_pixels(points), fill=255)
        for _ in range(1 + (rng.random() < 0.25)):  # some lines are drawn twice
            stroke = points + rng.normal(0, 0.006, points.shape)
            pen.line(_pixels(np.vstack([stroke, stroke[:1]]) if closed else stroke), fill=0, width=width, joint="curve")
    return canvas.reduce(OVERSAMPLING)


def draw_photo(name, rng):
    """A picture of category `name`, a coloured and shaded object in front of clutter: PIL RGB image."""
    image = _texture(rng, contrast=rng.uniform(0.03, 0.25))
    image = _paint(image, _clutter(rng), rng, opacity=rng.uniform(0.1, 0.4))
    image = _paint(image, _pose(CATEGORIES[name](rng), rng, unsteadiness=0.012), rng, opacity=1.0)
    light = _ramp(rng) * np.float32(rng.uniform(0.1, 0.45))
    grain = np.float32(rng.uniform(0.01, 0.05)) * rng.standard_normal((IMAGE_PX, IMAGE_PX, 1), dtype=np.float32)
    picture = Image.fromarray(((image * (1 + light[:, :, None]) + grain).clip(0, 1) * 255).astype(np.uint8))
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))


def _paint(image, parts, rng, opacity):
    """Paint parts over image (S, S, 3) in [0, 1]. A part has its own colour and texture or shares a common one."""
    whole = _texture(rng, contrast=rng.uniform(0.02, 0.2))
    for points, closed in parts:
        mask = Image.new("L", (IMAGE_PX * OVERSAMPLING,) * 2)
        pen = ImageDraw.Draw(mask)
        if closed:
            pen.polygon(_pixels(points), fill=255)
            material = whole if rng.random() < 0.7 else _texture(rng, contrast=rng.uniform(0.02, 0.2))
        else:
            pen.line(_pixels(points), fill=255, width=int(rng.integers(5, 12)), joint="curve")
            material = _texture(rng, contrast=0.1)
        mask = mask.reduce(OVERSAMPLING)
        cover = np.asarray(mask, dtype=np.float32)[:, :, None] * np.float32(opacity / 255)
        edge = np.asarray(mask.filter(ImageFilter.BoxBlur(2)), dtype=np.float32)[:, :, None] / 255
        image = image * (1 - cover) + material * (0.55 + 0.45 * edge) * cover  # darker towards its edge
    return image


def _texture(rng, contrast):
    """A colour (S, S, 3) in [0, 1], varied by blotches or stripes."""
    colour = rng.uniform(0.1, 0.95, 3).astype(np.float32)
    if rng.random() < 0.5:
        blotches = rng.normal(0, 1, (int(rng.integers(3, 24)),) * 2).astype(np.float32)
        pattern = np.asarray(Image.fromarray(blotches).resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC))
    else:
        pattern = np.sin(_ramp(rng) * np.float32(rng.uniform(5, 50)))
    strength = (contrast * rng.uniform(0.3, 1, 3)).astype(np.float32)
    return (colour + pattern[:, :, None] * strength).clip(0, 1)


def _ramp(rng):
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-1, 1, IMAGE_PX, dtype=np.float32)
    return axis[None, :] * np.float32(math.cos(angle)) + axis[:, None] * np.float32(math.sin(angle))


def _clutter(rng):
    """A few random shapes that belong to no category."""
    parts = []
    for _ in range(int(rng.integers(2, 7))):
        x, y = rng.uniform(-1, 1, 2)
        w, h = rng.uniform(0.1, 0.6, 2)
        shapes = oval(x, y, w, h), box(x, y, w, h), line((x, y), (x + w, y + h), (x - h, y + w))
        parts.append(shapes[rng.integers(3)])
    return parts


def _pose(parts, rng, unsteadiness):
    """Turn, stretch, shift and bend a drawing as a whole. Edges are first cut into short steps that can bend."""
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
    return [tuple(point) for point in ((points + 1) / 2 * IMAGE_PX * OVERSAMPLING).tolist()]


# {category: (ImageNet classes of the same kind, ImageNet classes of related kinds)}
_IMAGENET = {
    "airplane": ((404, 895), (405, 908)),
    "apple": ((948,), (949, 950, 951)),
    "axe": ((596,), (587,)),
    "bottle": ((440, 720, 737, 898, 907), (504,)),
    "butterfly": ((321, 322, 323, 324, 325, 326), (319, 320)),
    "candle": ((470,), (607, 846)),
    "car": ((436, 511, 817), (609, 627, 656)),
    "castle": ((483,), (497, 663)),
    "chair": ((423, 559, 765), (831,)),
    "clock": ((409, 530, 892), (531, 604)),
    "crab": ((118, 119, 120, 121), (122, 123, 124, 125)),
    "cup": ((968,), (504, 647)),
    "envelope": ((549,), ()),
    "eyeglasses": ((837,), (836,)),
    "flower": ((985, 986), ()),
    "guitar": ((402, 546), (420, 889)),
    "hammer": ((587,), (596, 784)),
    "hourglass": ((604,), (409, 892)),
    "ice cream": ((928,), (929,)),
    "lamp": ((846,), (619, 818)),
    "rocket": ((657, 744), (812,)),
    "snail": ((113,), (114,)),
    "spider": ((72, 73, 74, 75, 76, 77), (70, 71, 78, 79)),
    "star": ((327,), (328, 329)),
    "table": ((532,), (526, 736)),
}
