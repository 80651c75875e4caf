"""Semantic masks: from a small WordNet in the database format, and from the real one if it is installed."""

import itertools
import re
import shutil
import sys
import zipfile

import numpy as np
import pytest

from datasets.classes import SKETCHY_WORDNET_IDS
from datasets.lists import FileList, read_mask, write_list
from datasets.prepare import __main__ as prepare
from datasets.prepare import wordnet_mask
from datasets.prepare.wordnet_mask import compute_wordnet_mask, imagenet_ids, photo_ids
from utils.cli import InputError

nltk = pytest.importorskip("nltk", reason="NLTK is not installed: pip install -r requirements-wordnet.txt")

# {name of a synset: (its lexicographer file, its words, its hypernyms)}
SYNSETS = {
    "entity": ("03", ["entity"], []),
    "animal": ("05", ["animal"], ["entity"]),
    "young": ("05", ["young"], ["animal"]),
    "cat": ("05", ["cat", "true_cat"], ["animal"]),
    "tabby": ("05", ["tabby"], ["cat"]),
    "siamese": ("05", ["siamese"], ["cat"]),
    "dog": ("05", ["dog"], ["animal"]),
    "corgi": ("05", ["corgi"], ["dog"]),
    "puppy": ("05", ["puppy"], ["corgi", "young"]),
    "felix": ("05", ["Felix"], ["@i cat"]),
    "artifact": ("06", ["artifact"], ["entity"]),
    "table of figures": ("14", ["table"], ["entity"]),
    "table": ("06", ["table", "board"], ["artifact"]),
    "board": ("14", ["board"], ["entity"]),
    "lamp": ("06", ["table_lamp"], ["artifact"]),
    "balloon": ("06", ["hot-air_balloon"], ["artifact"]),
    "fame": ("07", ["fame"], ["entity"]),
    "mouse": ("05", ["mouse"], ["animal"]),
    "sedan": ("06", ["sedan"], ["artifact"]),
}
IMAGENET = ["tabby", "siamese", "dog", "corgi", "table", "lamp", "felix", "mouse"]


def write_wordnet(folder, header="  1 A small WordNet in the format of wndb(5WN).  \n"):
    """Write data.noun, index.noun and noun.exc into `folder`, as Debian has them; returns {synset: id}."""

    def line(name, offsets):
        lexfile, words, above = SYNSETS[name]
        words = f"{len(words):02x} " + " ".join(f"{word} 0" for word in words)
        pointers = [hypernym.rpartition(" ")[::2] for hypernym in above]
        pointers = [f"{symbol or '@'} {offsets[hypernym]:08} n 0000" for symbol, hypernym in pointers]
        return f"{offsets[name]:08} {lexfile} n {words} {' '.join([f'{len(pointers):03}', *pointers])} | a {name}  \n"

    nowhere = dict.fromkeys(SYNSETS, 0)
    ends = list(itertools.accumulate((len(line(name, nowhere)) for name in SYNSETS), initial=len(header)))
    offsets = dict(zip(SYNSETS, ends, strict=False))
    senses = {}
    for name, (_, words, _) in SYNSETS.items():
        for word in words:
            senses.setdefault(word.lower(), []).append(f"{offsets[name]:08}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.noun").write_text(header + "".join(line(name, offsets) for name in SYNSETS))
    index = [f"{word} n {len(of)} 0 {len(of)} 0 {' '.join(of)}  \n" for word, of in sorted(senses.items())]
    (folder / "index.noun").write_text("  1 License.  \n" + "".join(index))
    (folder / "noun.exc").write_text("mice mouse\n")
    return {name: f"n{offset:08}" for name, offset in offsets.items()}


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """A folder of the small WordNet, with IMAGENET for the classes of ImageNet, and {synset: id}."""
    folder = tmp_path / "wordnet"
    ids = write_wordnet(folder)
    monkeypatch.setattr(wordnet_mask, "imagenet_ids", lambda: [ids[name] for name in IMAGENET])
    monkeypatch.setattr(wordnet_mask, "DEBIAN_FOLDER", str(tmp_path / "nowhere"))
    monkeypatch.setattr(nltk.data, "path", [])
    return folder, ids


@pytest.mark.parametrize(
    "name, row",
    [
        #           tabby siamese dog corgi table lamp felix mouse
        ("tabby", [1, 1 / 3, 1 / 4, 0, 0, 0, 1 / 3, 1 / 4]),  # itself; through cat; through animal; 1/5 counts as 0
        ("cat", [1, 1, 1 / 3, 1 / 4, 0, 0, 1, 1 / 3]),  # three of them are below cat; one of these is an individual
        ("animal", [1, 1, 1, 1, 1 / 4, 1 / 4, 1, 1]),
        ("corgi", [0, 0, 1, 1, 0, 0, 0, 1 / 4]),  # below dog
        ("puppy", [0, 0, 1, 1, 0, 0, 0, 1 / 4]),  # below dog; the shorter of its two paths to animal counts
        ("young", [1 / 4, 1 / 4, 1 / 3, 1 / 4, 0, 0, 1 / 4, 1 / 3]),
        ("lamp", [0, 0, 0, 0, 1 / 3, 1, 0, 0]),
        ("fame", [0, 0, 1 / 4, 0, 1 / 4, 1 / 4, 0, 1 / 4]),
        ("entity", [1] * 8),
    ],
)
def test_relation(wordnet, name, row):
    folder, ids = wordnet
    mask, notes = compute_wordnet_mask(["a class"], [[ids[name]]], folder)
    assert mask.dtype == np.float64 and notes == []
    np.testing.assert_array_equal(mask, [row])


def test_relations_equal_path_similarity(wordnet):
    _check_against_nltk(wordnet_mask._open_wordnet(wordnet[0]), [int(id_[1:]) for id_ in wordnet[1].values()])


def _check_against_nltk(nouns, offsets):
    for offset in offsets:
        synset = nouns.reader.synset_from_pos_and_offset("n", offset)
        for value, other in zip(nouns.relation(synset), nouns.imagenet, strict=True):
            similarity = synset.path_similarity(other)
            related = synset == other or synset in _above(other) or other in _above(synset)
            assert value == (1 if related else similarity if similarity > 0.2 else 0), (synset, other)


def _above(synset):
    return set(synset.closure(lambda below: below.hypernyms() + below.instance_hypernyms()))


def test_of_several_ids_the_later_writes_over_the_earlier(wordnet):
    folder, ids = wordnet
    mask, _ = compute_wordnet_mask(["ab", "ba"], [[ids["cat"], ids["lamp"]], [ids["tabby"], ids["siamese"]]], folder)
    np.testing.assert_array_equal(mask[0], [1, 1, 1 / 3, 1 / 4, 1 / 3, 1, 1, 1 / 3])
    np.testing.assert_array_equal(mask[1], [1 / 3, 1, 1 / 4, 0, 0, 0, 1 / 3, 1 / 4])  # siamese replaced tabby's 1


def test_a_class_of_sketchy_has_its_published_row_whatever_the_order_of_a_list(wordnet, monkeypatch):
    folder, ids = wordnet
    published = [ids["tabby"], ids["siamese"]]
    expected, _ = compute_wordnet_mask(["cat"], [published], folder)
    assert (compute_wordnet_mask(["cat"], [published[::-1]], folder)[0] != expected).any()
    monkeypatch.setattr(
        wordnet_mask, "SKETCHY_WORDNET_IDS", [" ".join(id_[1:] for id_ in published), "00000001 00000002"]
    )
    np.testing.assert_array_equal(compute_wordnet_mask(["cat"], [published[::-1]], folder)[0], expected)
    assert len({frozenset(order.split()) for order in SKETCHY_WORDNET_IDS}) == 48
    assert all(len(number) == 8 and number.isdigit() for order in SKETCHY_WORDNET_IDS for number in order.split())


def test_ids_outrank_names_and_stay_without_a_note(wordnet):
    folder, ids = wordnet
    mask, notes = compute_wordnet_mask(["tabby", "tabby"], [[ids["lamp"]], []], folder)
    assert mask[0, 5] == 1 and mask[0, 0] == 0 and mask[1, 0] == 1
    assert notes == ["tabby: by its name, tabby.n.01 (a tabby)"]


@pytest.mark.parametrize(
    "name, synset",
    [
        ("table", "table.n.02"),  # a list of figures comes first, but nobody takes photos of one
        ("board", "table.n.02"),
        ("fame", "fame.n.01"),  # no sense is a thing
        ("Table (to sit at)", "table.n.02"),
        ("tables", "table.n.02"),
        ("mice", "mouse.n.01"),
        ("mouse_(animal)", "mouse.n.01"),
        ("true cat", "cat.n.01"),
        ("true-cat", "cat.n.01"),
        ("tablelamp", "table_lamp.n.01"),
        ("table-lamp", "table_lamp.n.01"),
        ("hot air balloon", "hot-air_balloon.n.01"),
        ("hot-air_balloon", "hot-air_balloon.n.01"),
        ("car (sedan)", "sedan.n.01"),  # from SYNSETS
        ("car_(sedan)", "sedan.n.01"),
        ("Car  (Sedan)", "sedan.n.01"),
    ],
)
def test_by_name(wordnet, name, synset):
    _, notes = compute_wordnet_mask([name], [[]], wordnet[0])
    assert notes[0].startswith(f"{name}: by its name, {synset} (")


@pytest.mark.parametrize("name", ["gizmo", "(animal)", "-", ".n.01"])
def test_unknown_name_is_zeros_and_told(wordnet, name):
    mask, notes = compute_wordnet_mask(["cat", name], [[], []], wordnet[0])
    assert mask[0].any() and not mask[1].any()
    assert notes[1] == f"{name}: WordNet knows no such name, its row is zeros"


def test_unknown_ids_are_left_out_and_told(wordnet):
    folder, ids = wordnet
    inside = f"n{int(ids['cat'][1:]) + 3:08}"  # no synset begins there
    mask, notes = compute_wordnet_mask(["cat", "dog"], [[inside, ids["lamp"]], ["n99999999"]], folder)
    assert mask[0, 5] == 1 and mask[0, 0] == 0 and mask[1, 2] == 1
    assert notes[0] == f"cat: WordNet knows no {inside}, left out"
    assert notes[1:] == ["dog: WordNet knows no n99999999, left out", "dog: by its name, dog.n.01 (a dog)"]


def test_photo_ids():
    paths = ["256x256/pig/n02395406_3.jpg", "pig/n02395406_7.jpg", "ext/n01234567_1/ext_4.jpg", "n00000002_1.JPEG"]
    paths += ["n00000001_9.jpg", "n123456789_1.jpg", "n01234567.jpg"]
    files = FileList(None, None, paths, np.array([0, 0, 1, 2, 2, 1, 1]), list(range(1, 8)))
    assert photo_ids(files, 4) == [["n02395406"], [], ["n00000002", "n00000001"], []]


def _zipped(folder, place):
    place.parent.mkdir(parents=True)
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, f"wordnet/{file.name}")


@pytest.mark.parametrize("layout", ["dict", "wordnet", "corpora/wordnet", "wordnet.zip", "corpora/wordnet.zip"])
def test_layouts_by_name_and_found_by_themselves(wordnet, tmp_path, monkeypatch, layout):
    place = tmp_path / "elsewhere" / layout
    (_zipped if layout.endswith(".zip") else shutil.copytree)(wordnet[0], place)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nowhere"), str(tmp_path / "elsewhere")])
    for given in (place, str(place), tmp_path / "elsewhere", None):
        mask, _ = compute_wordnet_mask(["cat"], [[]], given)
        np.testing.assert_array_equal(mask, [[1, 1, 1 / 3, 1 / 4, 0, 0, 1, 1 / 3]])


def test_debians_is_found_by_itself(wordnet, monkeypatch):
    monkeypatch.setattr(wordnet_mask, "DEBIAN_FOLDER", str(wordnet[0]))
    assert compute_wordnet_mask(["cat"], [[]])[0].any()
    assert sorted(path.name for path in wordnet[0].iterdir()) == ["data.noun", "index.noun", "noun.exc"]


def _cut(name, keep):
    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return spoil


def _index_without_cat(folder):
    lines = (folder / "index.noun").read_text().splitlines(keepends=True)
    (folder / "index.noun").write_text("".join(line for line in lines if not line.startswith("cat ")))


def _drop(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, "no data.noun of WordNet there"),
        (_drop("data.noun"), "no data.noun of WordNet there"),
        (_drop("index.noun"), "index.noun"),
        (_drop("noun.exc"), "noun.exc"),
        (lambda folder: write_wordnet(folder, header="  1 One letter more, as in WordNet 3.1.  \n"), "not a whole"),
        (_cut("data.noun", 0.5), "data.noun of WordNet is torn"),
        (_cut("data.noun", 0), "data.noun of WordNet is torn"),
        (_cut("index.noun", 0.5), "index.noun of WordNet is torn"),
        (_index_without_cat, "WordNet is torn (KeyError)"),
        (lambda folder: (folder / "index.noun").write_text("cat n 1 0 x\n"), "WordNet is torn (WordNetError)"),
        (lambda folder: (folder / "data.noun").write_bytes(bytes(5000) + b"\n"), "not a whole WordNet 3.0"),
    ],
)
def test_spoiled_folders_name_the_way_out(wordnet, spoil, message):
    folder, _ = wordnet
    spoil(folder)
    _fails(folder, str(folder), message)


def _fails(place, *messages):
    with pytest.raises(InputError) as error:
        compute_wordnet_mask(["cat"], [[]], place)
    assert "\n" not in str(error.value)
    for message in (*messages, wordnet_mask.INSTALL_WORDNET):
        assert message in str(error.value)


def test_spoiled_zips_name_the_way_out(wordnet, tmp_path):
    folder, _ = wordnet
    place = tmp_path / "zips" / "wordnet.zip"
    _zipped(folder, place)
    whole = place.read_bytes()
    place.write_bytes(whole[: len(whole) // 2])
    _fails(place, str(place), "not a readable WordNet")
    middle = whole.index(b"data.noun") + 60
    place.write_bytes(whole[:middle] + bytes(40) + whole[middle + 40 :])
    _fails(place, str(place), "not a readable WordNet")
    (folder / "index.noun").unlink()
    shutil.rmtree(place.parent)
    _zipped(folder, place)
    _fails(place, "wordnet/index.noun")


def test_no_wordnet_and_no_nltk(wordnet, monkeypatch):
    _fails(None, "no WordNet found")
    monkeypatch.setitem(sys.modules, "nltk.corpus.reader.wordnet", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-wordnet\.txt"):
        compute_wordnet_mask(["cat"], [[]])
    with pytest.raises(InputError, match=r"pip install -r requirements-wordnet\.txt"):
        compute_wordnet_mask(["cat"], [[]], wordnet[0])


def test_imagenet_ids():
    ids = imagenet_ids()
    assert len(ids) == 1000 and all(re.fullmatch(r"n\d{8}", id_) for id_ in ids)
    assert ids[0] == "n01440764" and ids[999] == "n15075141"
    assert {label for label in range(1000) if ids.count(ids[label]) > 1} == {134, 517}  # the two cranes


def test_table_of_names_is_well_formed():
    assert len(wordnet_mask.CLASS_SENSES) == len(set(wordnet_mask.CLASS_SENSES))
    for name, synset in wordnet_mask.CLASS_SYNSETS.items():
        assert re.fullmatch(r"[a-z]+( [a-z]+)*( \([a-z]+\))?", name)
        assert re.fullmatch(r"[a-z_'-]+\.n\.\d\d", synset)


@pytest.fixture(scope="module")
def real():
    try:
        return wordnet_mask._open_wordnet(wordnet_mask._find_wordnet(None))
    except InputError as error:
        pytest.skip(f"no WordNet 3.0 on this machine: {error}")


def test_real_wordnet_has_every_name_of_the_table(real):
    for name, synset in wordnet_mask.CLASS_SYNSETS.items():
        assert real.by_name(name).name() == synset


def test_real_relations_equal_path_similarity(real):
    _check_against_nltk(real, [int(id_[1:]) for id_ in ("n02084071", "n04166281", "n07753592", "n02009912")])


def test_real_rows_known_without_wordnet(real):
    dog = real.relation(real.by_name("dog"))
    assert dog[151:269].all() and (dog[151:269] == 1).all()  # ImageNet's 118 breeds
    lion, tiger = 291, 292
    assert real.relation(real.by_name("lion"))[[lion, tiger]].tolist() == [1, 1 / 3]
    assert np.flatnonzero(real.relation(real.by_name("pig")) == 1).tolist() == [341]
    assert real.relation(real.by_name("banana"))[954] == 1


def test_the_command_writes_a_mask_and_replaces_one_only_by_force(wordnet, tiny, fails, capsys):
    folder, ids = wordnet
    write_list(tiny / "zeroshot1/cname_cid.txt", [("felines", 0), ("tabby", 1)])
    rows = [(f"photo/{ids['cat']}_1.jpg", 0), (f"photo/{ids['lamp']}_2.jpg", 0), ("photo/3.jpg", 1)]
    write_list(tiny / "zeroshot1/all_photo_filelist_train.txt", rows)
    path = tiny / "zeroshot1/cid_mask.pickle"
    command = "mask", tiny, "--protocol", "sketchy", "--wordnet", folder
    before = path.read_bytes()
    assert f"{path}: exists; replace it with --force" in fails(prepare.main, *command)
    assert "no data.noun of WordNet there" in fails(prepare.main, *command[:-1], tiny, "--force")
    assert path.read_bytes() == before
    capsys.readouterr()
    prepare.main([*map(str, command), "--force"])
    printed = capsys.readouterr()
    assert printed.err == "tabby: by its name, tabby.n.01 (a tabby)\n" and printed.out.startswith(f"{path}: 2 classes")
    expected, _ = compute_wordnet_mask(["felines", "tabby"], [[ids["cat"], ids["lamp"]], []], folder)
    np.testing.assert_array_equal(read_mask(path, 2, imagenet_classes=8), expected.astype(np.float32))


def test_the_command_takes_names_where_there_is_no_list_of_photos(wordnet, tiny, capsys):
    (tiny / "zeroshot1/all_photo_filelist_train.txt").unlink()
    (tiny / "zeroshot1/cid_mask.pickle").unlink()
    prepare.main(["mask", str(tiny), "--protocol", "sketchy", "--wordnet", str(wordnet[0])])
    errors = capsys.readouterr().err
    assert "alarm clock: WordNet knows no such name" in errors and "cat: by its name" in errors
