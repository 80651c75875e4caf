"""What cleaning up one's own drawing brings: Sketchy's sketches as they are and spoilt, with each step of clean_up.

    .venv/bin/python benchmarks/sketches.py --data_root DIR --checkpoint FILE > table.md
    .venv/bin/python benchmarks/sketches.py --data_root DIR --figure clean_up.png --sketches 1

The checkpoint was trained on the same benchmark folder. Photos and sketches are those of its unseen classes, matching
is one-to-one and one-to-many (M 2, K the number of classes). A cell is what a step changes, with its 95 % interval.
"""

import argparse
import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import numpy_sort  # noqa: E402

numpy_sort.choose_sort_kernel()  # before NumPy, as in the scripts
import numpy as np  # noqa: E402
from PIL import Image, ImageChops  # noqa: E402
from scipy import ndimage  # noqa: E402

from datasets.images import read_rgb  # noqa: E402
from datasets.lists import open_benchmark  # noqa: E402
from models.compare import bootstrap, class_mean  # noqa: E402
from models.eval.codebooks import fit_codebook  # noqa: E402
from models.eval.evaluate import evaluate_rows  # noqa: E402
from models.eval.features import Features  # noqa: E402
from photo_search import clean_sketch  # noqa: E402
from photo_search.encoder import load_encoder  # noqa: E402
from utils.files import atomic_write  # noqa: E402

METRICS, BATCH = ("mAP@all", "Prec@100"), 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_root", required=True, metavar="DIR", help="a benchmark folder with Sketchy's lists")
    add("--zero_version", default="zeroshot1")
    add("--checkpoint", metavar="FILE", help="its network; not needed with --figure")
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--sketches", type=int, metavar="N", help="of each class (default: all)")
    add("--figure", type=Path, metavar="FILE", help="draw sketches before and after instead")
    options = parser.parse_args()
    images = open_benchmark("sketchy", options.data_root, options.zero_version).read_query_gallery()
    chosen = first_of_each(images.query.labels, options.sketches)
    files = [images.query.root / images.query.paths[index] for index in chosen]
    if options.figure:
        draw_figure(options.figure, options.cases, files)
        return
    network = load_encoder(options.checkpoint)
    photos = features_of(network, (read_rgb(images.gallery.root / path) for path in images.gallery.paths))
    classes = len(np.unique(images.gallery.labels))
    codebooks = {"one-to-one": None, "one-to-many": fit_codebook(photos, 2, classes)[0]}
    print(f"{len(files)} sketches, {len(photos)} photos, {classes} classes, {options.checkpoint}\n")
    print("| drawing | matching | metric | as drawn | " + " | ".join(list(STEPS)[1:]) + " |")
    print("|" + "---|" * (len(STEPS) + 3))
    for case in options.cases:
        found = {}
        for step, rows in by_step(network, case, files).items():
            features = Features(photos, images.gallery.labels, rows, images.query.labels[chosen])
            found[step] = evaluate_rows(features, codebooks, METRICS)
        print_case(case, found, images.query.labels[chosen])


def first_of_each(labels, count):
    """The places of the first `count` of each class in labels, ascending."""
    places = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(places))


def features_of(network, images):
    """Features (n, D) of an iterable of images."""
    rows, batch = [], []
    for image in images:
        batch.append(image)
        if len(batch) == BATCH:
            rows.append(network.features(batch))
            batch = []
    return np.concatenate([*rows, network.features(batch)] if batch else rows)


def by_step(network, case, files):
    """{step: features of the sketches}."""
    rows = {step: [] for step in STEPS}
    for start in range(0, len(files), BATCH):
        spoilt = [
            CASES[case](np.random.default_rng(number), read_rgb(path))
            for number, path in enumerate(files[start : start + BATCH], start)
        ]
        for step, cleaned in zip(STEPS, zip(*map(steps_of, spoilt), strict=True), strict=True):
            rows[step].append(network.features(cleaned))
    return {step: np.concatenate(parts) for step, parts in rows.items()}


def steps_of(image):
    """A drawing after each of STEPS."""
    found, dark = clean_sketch.ink_of(image), 1 - np.asarray(image.convert("L"), np.float32) / 255
    return [image, *(after(*step, found, dark) if step else image for step in list(STEPS.values())[1:])]


def after(paper, size, lines, found, dark):
    """A drawing after those steps of clean_up that are asked for; without a line in it, blank."""
    ink = found if paper else dark
    if size and not (ink > 0.5).any():
        return Image.new("RGB", (clean_sketch.PAPER_SIDE, clean_sketch.PAPER_SIDE), "white")
    ink = clean_sketch.framed(ink) if size else whole(ink)
    return clean_sketch.picture_of(clean_sketch.thinned(ink) if lines else ink)


def whole(ink):
    """Ink of a whole sheet as large as clean_sketch.framed has it."""
    side = clean_sketch.SUPERSAMPLING * clean_sketch.PAPER_SIDE
    return np.asarray(Image.fromarray(ink).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)


STEPS = {  # of clean_up: paper, size, lines
    "as drawn": None,
    "paper": (True, False, False),
    "size": (False, True, False),
    "lines": (False, False, True),
    "paper, size": (True, True, False),
    "all": (True, True, True),
}


def print_case(case, found, labels):
    for matching in ("one-to-one", "one-to-many"):
        for metric in METRICS:
            before = found["as drawn"][matching][metric].numpy()
            cells = [f"{float(class_mean(before, labels)):.3f}"]
            for step in list(STEPS)[1:]:
                change = found[step][matching][metric].numpy() - before
                low, high = bootstrap(change, labels, 2000)
                cells.append(f"{float(class_mean(change, labels)):+.3f} ({low:+.3f} to {high:+.3f})")
            print(f"| {case} | {matching} | {metric} | " + " | ".join(cells) + " |", flush=True)


def draw_figure(path, cases, files, side=112):
    """Draw sketches spoilt and cleaned up: a column each case, before above after."""
    sheet = Image.new("RGB", (len(cases) * side, 2 * side), "lightgrey")
    for column, case in enumerate(cases):
        spoilt = CASES[case](np.random.default_rng(column), read_rgb(files[column % len(files)]))
        for row, image in enumerate((spoilt, clean_sketch.clean_up(spoilt))):
            image.thumbnail((side - 4, side - 4))
            sheet.paste(image, (column * side + 2, row * side + 2))
    with atomic_write(path) as file:
        sheet.quantize(64).save(file, "PNG")


# How drawings are spoilt: functions of a NumPy generator and a Sketchy sketch.


def lines(image, wider):
    """Lines wider by so many pixels, at a quarter of a pixel."""
    side = 4 * image.width
    drawn = np.asarray(image.convert("L").resize((side, side), Image.Resampling.BICUBIC)) < 128
    near = ndimage.distance_transform_edt(~drawn if wider > 0 else drawn)
    drawn = near <= 2 * wider if wider > 0 else near > -2 * wider
    paper = Image.fromarray(~drawn).convert("L")
    return paper.resize(image.size, Image.Resampling.BOX).convert("RGB")


def thick(_, image):
    return lines(image, 7)


def thin(_, image):
    return lines(image, -1.6)


def small(random, image, share=0.35, size=(400, 300)):
    """Small and somewhere on a wide sheet."""
    side = round(share * size[0])
    sheet = Image.new("RGB", size, "white")
    place = [int(random.integers(each - side)) for each in size]
    sheet.paste(image.resize((side, side), Image.Resampling.BOX), place)
    return sheet


def grey(random, image):
    """Dark ink on yellowish paper in uneven light, with noise."""
    return photographed(random, image, (0.1, 0.1, 0.1), noise=6)


def photo(random, image):
    """Blue ink on ruled paper, the light uneven, half of it in a shadow, with noise, as a JPEG."""
    image = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    photographed(random, image, (0.12, 0.18, 0.5), noise=8, ruled=True, shadow=True).save(file, "JPEG", quality=75)
    return read_rgb(file)


def photographed(random, image, colour, noise, ruled=False, shadow=False):
    ink = 1 - np.asarray(image.convert("L"), np.float32)[:, :, None] / 255
    height, width = ink.shape[:2]
    paper = np.ones((height, width, 1)) * (0.8, 0.78, 0.72)
    if ruled:
        paper[height // 28 :: height // 14] *= (0.8, 0.86, 0.95)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angles = random.uniform(0, 2 * np.pi, 2)
    light = 0.725 + 0.275 * (np.cos(angles[0]) * x + np.sin(angles[0]) * y).clip(-1.5, 1.5) / 1.5
    if shadow:
        beyond = np.cos(angles[1]) * x + np.sin(angles[1]) * y - random.uniform(-0.4, 0.4)
        light *= 1 - 0.4 / (1 + np.exp(-40 * beyond))
    values = 255 * (paper * (1 - ink) + ink * colour) * light[:, :, None] + random.normal(0, noise, paper.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


CASES = {
    "as it is": lambda random, image: image,
    "small": small,
    "thick": thick,
    "thin": thin,
    "white on black": lambda random, image: ImageChops.invert(image),
    "grey": grey,
    "photo": photo,
    "thick, small": lambda random, image: small(random, thick(random, image)),
    "thin, small, grey": lambda random, image: grey(random, small(random, thin(random, image))),
    "thick, small, photo": lambda random, image: photo(random, small(random, thick(random, image))),
}

if __name__ == "__main__":
    main()
