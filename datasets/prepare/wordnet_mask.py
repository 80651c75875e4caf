"""Semantic masks: how each seen class relates to the 1000 classes of ImageNet, looked up in WordNet 3.0.

    a_c[j] = 1             if class c and ImageNet's class j are the same synset, or one is an ancestor of the other
             1/3 or 1/4    if that is their path similarity
             0             if their path similarity is 0.2 or less

The synset of a class is the one whose id stands in the names of its photos (`n02395406_3933.jpg`). If they have no id,
it is the synset that the name of the class means. For the photos of Sketchy Ext every entry equals the published mask.
"""

import functools
import io
import os
import re
import textwrap
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

from datasets.classes import SKETCHY_WORDNET_IDS
from utils.cli import InputError

INSTALL_WORDNET = (
    "install Debian's wordnet-base, or run python -m nltk.downloader wordnet, or name its folder with --wordnet DIR"
)
DEBIAN_FOLDER = "/usr/share/wordnet"
WORDNET_FILES = ("data.noun", "index.noun", "noun.exc")  # no other file is needed: every class is a noun

# WordNet's numbers (lexnames(5WN)) for kinds of things that a photo can show: animal, artifact, body, food, object,
# plant.
OBJECT_LEXNAMES = ("05", "06", "08", "13", "17", "20")

# Synsets of classes that `by_name` would not find: the first sense among OBJECT_LEXNAMES is not what people draw, or
# WordNet has another name for it. If several synsets are possible, this is the one of the published masks.
CLASS_SENSES = """
    angel.n.01 banana.n.02 bowl.n.03 cabin.n.02 cake.n.03 cannon.n.02 carrot.n.03 castle.n.02 chicken.n.02
    crown.n.04 diamond.n.01 dolphin.n.02 dragon.n.01 hammer.n.02 helmet.n.02 jellyfish.n.02 lobster.n.02
    mug.n.04 mushroom.n.05 octopus.n.02 pineapple.n.02 present.n.02 pumpkin.n.02 purse.n.03 radio.n.03 ray.n.07
    seal.n.09 turtle.n.02
""".split()
CLASS_SYNSETS = {sense.split(".")[0]: sense for sense in CLASS_SENSES} | {
    "bookshelf": "bookcase.n.01",
    "car (sedan)": "sedan.n.01",
    "crane (machine)": "crane.n.04",
    "flower with stem": "flower.n.01",
    "head phones": "earphone.n.01",
    "human skeleton": "skeletal_system.n.01",
    "jack o lantern": "jack-o'-lantern.n.02",
    "keyboard": "computer_keyboard.n.01",
    "motorbike": "motorcycle.n.01",
    "person sitting": "person.n.01",
    "person walking": "person.n.01",
    "potted plant": "pot_plant.n.01",
    "power outlet": "wall_socket.n.01",
    "satellite dish": "dish.n.05",
    "sponge bob": "fictional_character.n.01",
    "standing bird": "wading_bird.n.01",
    "van": "minivan.n.01",
}


def photo_ids(files, classes):
    """WordNet ids in the file names of FileList `files`: for each label a list, in the order in which they appear."""
    ids = [{} for _ in range(classes)]
    for path, label in zip(files.paths, files.labels, strict=True):
        if found := re.match(r"n\d{8}(?=_)", path.rsplit("/", 1)[-1]):
            ids[label][found.group()] = None
    return [list(found) for found in ids]


def compute_wordnet_mask(class_names, ids, wordnet=None):
    """Compute how each class relates to the classes of ImageNet.

    class_names: C names in the order of their labels. ids: for each class the WordNet ids of its photos, see photo_ids.
    wordnet: folder or zip of WordNet 3.0 as Debian, Princeton or NLTK distribute it; None searches the usual places.
    Returns (mask (C, 1000) float64, notes). A note names a class that was looked up by its name, or an unknown id.
    Raises InputError if NLTK is not installed, or if WordNet is missing, damaged or not version 3.0.
    Source: arXiv:2312.10320 and the published masks.
    """
    nouns = _open_wordnet(_find_wordnet(wordnet))
    mask, notes = np.zeros((len(class_names), len(nouns.imagenet))), []
    orders = [[f"n{number}" for number in order.split()] for order in SKETCHY_WORDNET_IDS]
    orders = {frozenset(order): order for order in orders}
    for row, name, class_ids in zip(mask, class_names, ids, strict=True):
        # A list may name the images of Sketchy in any order. The published order gives each class its published row.
        class_ids = orders.get(frozenset(class_ids), class_ids)
        synsets = {id_: nouns.by_id(id_) for id_ in class_ids}
        notes += [f"{name}: WordNet knows no {id_}, left out" for id_, synset in synsets.items() if synset is None]
        if not any(synsets.values()):
            synsets = {name: nouns.by_name(name)}
            notes.append(f"{name}: {_meaning(synsets[name])}")
        for synset in filter(None, synsets.values()):
            relation = nouns.relation(synset)
            # In the published masks a later id replaces the value of an earlier one, even if that one is greater.
            np.copyto(row, relation, where=relation > 0)
    return mask, notes


def imagenet_ids():
    """WordNet ids of ImageNet's 1000 classes in the order of their labels, as the published masks have them."""
    from timm.data import ImageNetInfo  # here, because it loads torch

    ids = ImageNetInfo("imagenet-1k").label_names()
    ids[134] = "n03126707"  # the bird crane; the published masks use the machine instead, which is class 517
    return ids


class _Nouns:
    """The nouns of WordNet, and the ancestors of each class of ImageNet."""

    def __init__(self, reader):
        self.reader = reader
        self.imagenet = [self.by_id(id_) for id_ in imagenet_ids()]
        # An id is a position in the file data.noun, so the ids differ in other versions of WordNet.
        if any(synset is None for synset in self.imagenet):
            raise InputError("not a whole WordNet 3.0, and ImageNet uses the ids of that version")
        self.above = [_steps_up(synset) for synset in self.imagenet]

    def by_id(self, id_):
        """The synset of an id such as n02395406, or None."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NLTK warns of an unknown id
            return self.reader.synset_from_pos_and_offset("n", int(id_[1:]))

    def by_name(self, name):
        """Synset of a class name: from CLASS_SYNSETS, else the first sense in OBJECT_LEXNAMES, else any, or None."""
        key = re.sub(r"[-_ ]+", " ", name).strip().lower()
        if key in CLASS_SYNSETS:
            return self.reader.synset(CLASS_SYNSETS[key])
        word = re.sub(r"\(.*?\)", "", key).strip().replace(" ", "_")
        senses = self.reader.synsets(word, "n") or self.reader.synsets(self.spellings.get(_compact(word), ""), "n")
        return next((sense for sense in senses if sense.lexname() in OBJECT_LEXNAMES), senses[0] if senses else None)

    @functools.cached_property
    def spellings(self):
        """How WordNet writes a word: {"tablelamp": "table_lamp", "hotairballoon": "hot-air_balloon"} and so on."""
        return {_compact(lemma): lemma for lemma in self.reader.all_lemma_names("n")}

    def relation(self, synset):
        """The row (1000,) of the mask for a synset."""
        own = _steps_up(synset)
        return np.array([_relation(own, other) for other in self.above])


def _meaning(synset):
    if synset is None:
        return "WordNet knows no such name, its row is zeros"
    return f"by its name, {synset.name()} ({textwrap.shorten(synset.definition(), 70, placeholder='...')})"


def _compact(word):
    return re.sub(r"[-_.']", "", word)


def _steps_up(synset):
    """{offset: number of steps up} for a synset and all its hypernyms; the synset itself comes first, with 0 steps."""
    steps = {}
    for above, distance in sorted(synset.hypernym_distances(), key=lambda pair: pair[1]):
        steps.setdefault(above.offset(), distance)
    return steps


def _relation(a, b):
    if next(iter(a)) in b or next(iter(b)) in a:
        return 1.0
    similarity = 1 / (1 + min((a[synset] + b[synset] for synset in a.keys() & b.keys()), default=np.inf))
    return similarity if similarity > 0.2 else 0.0


def _find_wordnet(place):
    """Path of a WordNet: a folder with data.noun, or NLTK's wordnet.zip."""
    roots = [place] if place else [*map(str, _nltk().data.path), DEBIAN_FOLDER]
    for root in map(Path, roots):
        for folder in (root, root / "dict", root / "wordnet", root / "corpora" / "wordnet"):
            if os.path.isfile(folder / "data.noun"):
                return folder
        for archive in (root, root / "wordnet.zip", root / "corpora" / "wordnet.zip"):
            if archive.suffix == ".zip" and os.path.isfile(archive):
                return archive
    raise InputError(
        f"{place}: no data.noun of WordNet there; {INSTALL_WORDNET}"
        if place
        else f"no WordNet found; {INSTALL_WORDNET}"
    )


def _open_wordnet(place):
    """_Nouns of the WordNet at `place`."""
    try:
        if os.path.isfile(place):
            with zipfile.ZipFile(place) as archive:
                files = {name: archive.read(f"wordnet/{name}") for name in WORDNET_FILES}
        else:
            files = {name: (place / name).read_bytes() for name in WORDNET_FILES}
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{place}: not a readable WordNet ({error}); {INSTALL_WORDNET}") from error
    reader = _reader_class()
    try:
        if cut := [name for name, content in files.items() if not content.endswith(b"\n")]:
            raise InputError(f"{cut[0]} of WordNet is torn")
        return _Nouns(reader(files))
    except InputError as error:
        raise InputError(f"{place}: {error}; {INSTALL_WORDNET}") from None
    except Exception as error:  # NLTK can fail on a torn file in any way
        raise InputError(f"{place}: WordNet is torn ({type(error).__name__}); {INSTALL_WORDNET}") from error


def _nltk():
    try:
        import nltk.corpus.reader.wordnet
    except ImportError:
        raise InputError("WordNet is read with NLTK: pip install -r requirements-wordnet.txt") from None
    return nltk


def _reader_class():
    """NLTK's reader, made to read bytes. NLTK itself needs files that Debian lacks, and reads only its own folders."""
    nltk = _nltk()

    class Nowhere(nltk.data.PathPointer):
        open = join = file_size = None

    class Reader(nltk.corpus.reader.wordnet.WordNetCorpusReader):
        def __init__(self, files):
            # In Latin-1 each byte is one character, so positions in a file stay the same.
            self.texts = {name: content.decode("latin-1") for name, content in files.items()}
            self.texts["lexnames"] = "".join(f"{number:02} {number:02} 0\n" for number in range(45))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NLTK warns that it has only one language
                super().__init__(Nowhere(), omw_reader=None)

        def open(self, file):
            return io.StringIO(self.texts.get(file, ""))  # the files of verbs, adjectives and adverbs are empty

        def map_wn(self, version="wordnet"):
            return None  # NLTK would look for a second WordNet in its own folders

    return Reader
