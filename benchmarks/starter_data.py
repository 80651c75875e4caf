"""Merges Sketchy, TU-Berlin and QuickDraw by class names into one benchmark in the layout of Sketchy Ext.

    .venv/bin/python benchmarks/starter_data.py DATA DIR

DATA holds Sketchy25, TUBerlin187 and QuickDraw107, samples of the three data sets in the layout of the release, and
SketchySplit, all images of 21 classes of Sketchy. They are copied into DIR, shrunk to 160 pixels, which decodes in a
third of the time, and three folders of lists are written, which train_sketchy_ext.py reads with
--data_root DIR --zero_version NAME:

    held_out    unseen: 20 of the classes that zeroshot2 trains on, drawn by a seed; for choosing a recipe
    twin        unseen: the 21 unseen classes of zeroshot2, as a link to the whole of SketchySplit
    starter     all classes are trained on; unseen: those of TUBerlin187's that no other data set has

What is, or resembles, an unseen class is not trained on: left_out.txt in each folder lists these classes. TU-Berlin's
unseen classes are never trained on, unless Sketchy has them, too.
"""

import argparse
import random
import sys
from collections import defaultdict
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.images import read_rgb
from datasets.lists import write_list

HELD_OUT, SEED = 20, 21
WHOLE = "whole"  # name of the link to SketchySplit
LONGER_SIDE = 160  # of an image, in pixels
PER_CLASS = 100  # images of a kind that a class gets from one source at most

# The name of a class here, and names of it in the other data sets.
NAMESAKES = {
    "car": ("car_(sedan)", "car (sedan)"),
    "bear": ("bear (animal)",),
    "chicken": ("rooster",),
    "crocodile": ("crocodilian",),
    "cup": ("mug", "teacup"),
    "flower": ("flower with stem",),
    "mouse": ("mouse (animal)",),
    "motorcycle": ("motorbike",),
    "pistol": ("revolver",),
    "racket": ("tennis-racket",),
    "ship": ("cruise ship",),
    "hotdog": ("hot-dog",),
}
# Classes of the other data sets that are not trained on where a class of Sketchy that they resemble is unseen.
RESEMBLING = {
    "alarm clock": ("wrist watch",),
    "ape": ("monkey",),
    "bear": ("panda",),
    "cabin": ("house", "barn"),
    "car": ("race car", "suv", "van"),
    "chair": ("armchair",),
    "cup": ("wineglass",),
    "jack o lantern": ("pumpkin",),
    "mouse": ("computer mouse",),
    "parrot": ("flying bird", "standing bird", "pigeon"),
    "pickup truck": ("truck",),
    "rocket": ("space shuttle",),
    "sailboat": ("ship", "speed boat"),
    "seagull": ("flying bird", "standing bird", "pigeon"),
    "skyscraper": ("eiffel tower", "lighthouse"),
    "songbird": ("flying bird", "standing bird", "pigeon"),
    "table": ("cabinet",),
    "tree": ("palm tree", "potted plant"),
    "wading bird": ("flying bird", "standing bird", "pigeon"),
    "window": ("cabinet", "bookshelf"),
}
_SAME = {other: name for name, others in NAMESAKES.items() for other in others}

# Data set: its folder of lists, the start of its lists of (sketches, photos), and which of its lists are trained on.
# TU-Berlin's unseen classes are left for a test of the starter.
SKETCHY = ("zeroshot2", "sketch_tx_000000000000_ready_filelist", "all_photo_filelist")
SOURCES = {
    "Sketchy25": (*SKETCHY, ("train", "zero")),
    "SketchySplit": (*SKETCHY, ("zero",)),
    "TUBerlin187": ("zeroshot", "png_ready_filelist", "ImageResized_ready_filelist", ("train", "test")),
    "QuickDraw107": ("zeroshot", "sketch_filelist", "all_photo_filelist", ("train", "zero")),
}


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that holds Sketchy25, SketchySplit, TUBerlin187, ...")
    parser.add_argument("to", type=Path, help="folder to make")
    options = parser.parse_args(argv)
    options.to.mkdir(parents=True, exist_ok=True)
    images = read_images(options.data)
    sketchy = sorted(name for name, found in images.items() if found["sketch"].get("Sketchy25"))
    published = {own_name(name) for name in class_names(options.data / "Sketchy25/zeroshot2/cname_cid_zero.txt")}
    held_out = set(random.Random(SEED).sample([name for name in sketchy if name not in published], HELD_OUT))
    new = {own_name(name) for name in class_names(options.data / "TUBerlin187/zeroshot/cname_cid_zero.txt")}
    never = new - set(sketchy)
    tests = {each: {kind: found[kind]["Sketchy25"] for kind in found} for each, found in images.items()}
    tests |= {each: {kind: found[kind]["TUBerlin187"] for kind in found} for each, found in
              read_images(options.data, {"TUBerlin187": (*SOURCES["TUBerlin187"][:3], ("zero",))}).items()
              if each in never}  # fmt: skip
    for name, unseen, tested in (
        ("held_out", held_out | published, held_out), ("twin", published, published), ("starter", set(), never),
    ):  # fmt: skip
        resembling = {other for each in unseen for other in RESEMBLING.get(each, ())} - set(sketchy)
        left_out = (unseen | resembling | never) & set(images)
        write_lists(options.to / name, images, left_out, {each: tests[each] for each in sorted(tested)})
    link_test_half(options.data / "SketchySplit", options.to)
    paths = {line.rpartition(" ")[0] for path in options.to.glob("*/*filelist*.txt") for line in path.open()}
    for path in sorted(path for path in paths if not path.startswith(WHOLE)):
        copy_shrunk(options.data / path, options.to / path)


def link_test_half(split, to):
    """Make the unseen lists of `to`/twin those of SketchySplit, whose images, linked, are tested as they are."""
    (to / WHOLE).unlink(missing_ok=True)
    (to / WHOLE).symlink_to(split.resolve())
    for path in (split / "zeroshot2").glob("*_zero.txt"):
        prefix = "" if path.name.startswith("cname") else f"{WHOLE}/"
        lines = path.read_text().splitlines()
        (to / "twin" / path.name).write_text("".join(f"{prefix}{line}\n" for line in lines))


def copy_shrunk(path, copy):
    """Write an image as `copy`, its longer side LONGER_SIDE pixels at most."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    image = read_rgb(path)
    image.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.BICUBIC)
    image.save(copy, **({"quality": 92} if copy.suffix.lower() in (".jpg", ".jpeg") else {}))


def own_name(name):
    """The name of a class here, of its name in one of the data sets."""
    return _SAME.get(name.lower(), _SAME.get(plain(name), plain(name)))


def plain(name):
    """A class name in small letters, with spaces between words."""
    return name.lower().replace("_", " ").replace("-", " ")


def class_names(path):
    """The class names of a cname_cid file, by label."""
    return [line.rpartition(" ")[0] for line in path.read_text().splitlines()]


def read_images(data, sources=SOURCES):
    """{class: {"sketch" or "photo": {source: paths from the merged folder}}} of all images of some of SOURCES."""
    images = defaultdict(lambda: {"sketch": defaultdict(list), "photo": defaultdict(list)})
    for source, (lists, sketch, photo, splits) in sources.items():
        for kind, start in (("sketch", sketch), ("photo", photo)):
            for split in splits:
                path = data / source / lists / f"{start}_{split}.txt"
                if not path.exists():  # there are no held-back photos
                    continue
                names = class_names(data / source / lists / f"cname_cid{'_zero' * (split == 'zero')}.txt")
                for line in path.read_text().splitlines():
                    image, _, label = line.rpartition(" ")
                    images[own_name(names[int(label)])][kind][source].append(f"{source}/{image}")
    return dict(images)


def write_lists(folder, images, left_out, tested):
    """The lists of a benchmark: of all classes of `images` but `left_out`, and of `tested`, {class: {kind: paths}}."""
    folder.mkdir(exist_ok=True)
    seen = sorted(set(images) - left_out)
    sketches, photos = "sketch_tx_000000000000_ready_filelist", "all_photo_filelist"
    for split, names in (("train", seen), ("zero", list(tested))):
        suffix = "_zero" if split == "zero" else ""
        (folder / f"cname_cid{suffix}.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))
        for kind, start in (("sketch", sketches), ("photo", photos)):
            entries = []
            for label, name in enumerate(names):
                paths = tested[name][kind] if split == "zero" else chosen(images[name][kind])
                entries += [(path, label) for path in paths]
            write_list(folder / f"{start}_{split}.txt", entries)
            print(f"{folder.name}: {len(entries):,} {kind}s of {len(names)} classes in {split}")
    (folder / "left_out.txt").write_text("".join(f"{name}\n" for name in sorted(left_out)))


def chosen(found):
    """Paths of a class, of each source PER_CLASS at most, a file that two data sets share once."""
    paths = {}
    for all_paths in found.values():
        drawn = random.Random(SEED).sample(sorted(all_paths), min(PER_CLASS, len(all_paths)))
        for path in drawn:
            paths.setdefault(Path(path).stem, path)
    return sorted(paths.values())


if __name__ == "__main__":
    main()
