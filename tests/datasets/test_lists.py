import pickle

import numpy as np
import pytest

from datasets import classes
from datasets.lists import (
    CLASS_NAME_FILES,
    check_images,
    normalise_class_name,
    open_benchmark,
    read_class_names,
    read_list,
    read_mask,
    write_list,
    write_mask,
)
from datasets.protocols import LABEL_ORDERS, PROTOCOLS, unseen_names_of
from utils.cli import InputError


def test_names_with_spaces_windows_line_ends_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffphoto/alarm clock/n 1.jpg 0\r\n\r\nskizze/übung.png 12\r\n".encode())
    files = read_list(path, tmp_path, classes=13)
    assert files.paths == ["photo/alarm clock/n 1.jpg", "skizze/übung.png"]
    assert files.labels.tolist() == [0, 12]


def test_a_label_after_a_tab(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("photo/alarm clock/n 1.jpg\t0\nphoto/cat/n\t2.jpg 12\nphoto/cat/3.jpg \t 4\n")
    files = read_list(path, tmp_path, classes=13)
    assert files.paths == ["photo/alarm clock/n 1.jpg", "photo/cat/n\t2.jpg", "photo/cat/3.jpg"]
    assert files.labels.tolist() == [0, 12, 4]


def test_backslashes_in_paths_are_named_windows_paths(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("photo\\cat\\1.jpg 0\n")
    with pytest.raises(InputError, match=r"list\.txt:1: no image .*; Windows paths: replace each \\ in the list by /"):
        check_images(read_list(path, tmp_path, classes=1))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("a.png 0\nb.png\n", r"list\.txt:2: expected 'path label'"),
        ("a.png 0\nb.png x\n", r"list\.txt:2: expected 'path label'"),
        ("a.png -1\n", r"list\.txt:1: expected 'path label'"),
        ("a.png ²\n", r"list\.txt:1: expected 'path label'"),
        ("a.png 0\n\nb.png 2\n", r"list\.txt:3: label 2 is outside 0\.\.1"),
        ("../a.png 0\n", r"list\.txt:1: '\.\./a\.png' leaves the data folder"),
        ("photo/../../a.png 0\n", r"list\.txt:1: .* leaves the data folder"),
        ("/etc/a.png 0\n", r"list\.txt:1: '/etc/a\.png' leaves the data folder"),
        (f"a.png {'9' * 5000}\n", r"list\.txt:1: expected 'path label'"),
        ("\n", r"list\.txt: the list is empty"),
        (None, r"list\.txt: no such list"),
    ],
)
def test_a_bad_list_is_named_with_its_line(tmp_path, lines, words):
    path = tmp_path / "list.txt"
    if lines is not None:
        path.write_text(lines)
    with pytest.raises(InputError, match=words):
        read_list(path, tmp_path, classes=2)


def test_spellings_of_one_class_are_the_same_and_those_of_two_are_not():
    classes = [
        ("hot-air balloon", "Hot Air Balloon", "hot_air_balloon", "hotairballoon"),
        ("car_(sedan)", "car (sedan)", "Car Sedan"),
        ("jack-o'-lantern", "jack o lantern"),
        ("\u00fcbung", "U\u0308bung"),  # ü as one sign and as two
        ("C", "c"),
        ("C++", "c++"),
        ("C#", "c #"),
        ("\u0926\u093f\u0928",),  # two Hindi words that differ only in a vowel sign
        ("\u0926\u0940\u0928",),
        ("?",),
        ("!",),
    ]
    spellings = [set(map(normalise_class_name, names)) for names in classes]
    assert all(len(of_one) == 1 for of_one in spellings)
    assert len(set.union(*spellings)) == len(classes)


def test_class_names_stand_in_the_order_of_their_labels(tmp_path):
    path = tmp_path / "cname_cid.txt"
    write_list(path, [("hot air balloon", 1), ("cat", 0), ("axe", 2)])
    assert read_class_names(path) == ["cat", "hot air balloon", "axe"]


@pytest.mark.parametrize(
    ("labels", "words"), [([0, 2, 3], "but 1 is missing"), ([0, 1, 1], ":3: label 1 is already that")]
)
def test_class_labels_must_be_complete(tmp_path, labels, words):
    write_list(tmp_path / "c.txt", zip("abc", labels, strict=True))
    with pytest.raises(InputError, match=words):
        read_class_names(tmp_path / "c.txt")


def test_a_class_has_one_label(tmp_path):
    write_list(tmp_path / "c.txt", [("bell", 0), ("bell", 1)])
    with pytest.raises(InputError, match=r"c\.txt:2: the class 'bell' already has a label"):
        read_class_names(tmp_path / "c.txt")


def test_a_class_is_seen_or_unseen(tiny):
    write_list(tiny / "zeroshot1/cname_cid_zero.txt", [("cat", 0), ("cow", 1)])
    with pytest.raises(InputError, match=r"'cat' is in cname_cid\.txt and in cname_cid_zero\.txt"):
        open_benchmark("sketchy", tiny)


def test_a_mask_survives_the_round_trip(tmp_path):
    mask = np.zeros((3, 1000))
    mask[1, [5, 999]] = 1, 0.25
    write_mask(tmp_path / "m", mask)
    with open(tmp_path / "m", "rb") as file:  # as the authors' code reads it
        assert pickle.load(file)[1].dtype == np.float64
    np.testing.assert_array_equal(read_mask(tmp_path / "m", 3), mask.astype(np.float32))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({0: np.zeros(1000)}, "not a mask of the 2 classes"),
        ([np.zeros(1000)] * 2, "not a mask of the 2 classes"),
        ({0: np.zeros(1000), 1: np.zeros(999)}, "vector of 1000 finite numbers"),
        ({0: np.zeros(1000), 1: np.full(1000, np.nan)}, "vector of 1000 finite numbers"),
        ({label: np.zeros(1000) for label in range(3)}, "not a mask of the 2 classes"),
        ({0: np.zeros(1000), 1: np.full(1000, 1e300)}, "vector of 1000 finite numbers"),
        ({0: np.zeros(1000), 1: [10**400] * 1000}, "vector of 1000 finite numbers"),
        ({0: "a", 1: "b"}, "vector of 1000 finite numbers"),
    ],
)
def test_a_bad_mask_is_named(tmp_path, content, words):
    (tmp_path / "cid_mask.pickle").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=rf"cid_mask\.pickle: .*{words}"):
        read_mask(tmp_path / "cid_mask.pickle", 2)


def test_lists_are_read_without_their_images_and_a_missing_image_is_named(tiny):
    benchmark = open_benchmark("sketchy", tiny)
    files = benchmark.read("photo", "zero")
    (tiny / files.paths[2]).unlink()
    assert len(benchmark.read("photo", "zero")) == 4
    with pytest.raises(InputError, match=r"all_photo_filelist_zero\.txt:3: no image .*2\.png"):
        check_images(files)


@pytest.mark.parametrize("name", ["sketch_filelist_train.txt", "sketch_train.txt"])
def test_quickdraw_lists_go_by_either_name(tmp_path, name):
    write_list(tmp_path / "zeroshot/cname_cid.txt", [("cat", 0)])
    write_list(tmp_path / "zeroshot/cname_cid_zero.txt", [("bat", 0)])
    write_list(tmp_path / "zeroshot" / name, [("sketches/cat/1.png", 0)])
    assert len(open_benchmark("quickdraw", tmp_path).read("sketch", "train")) == 1


def test_a_missing_folder_is_named_with_the_way_out(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such data folder; .* --data_root"):
        open_benchmark("sketchy", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"zeroshot7: no such folder of lists; .* --zero_version"):
        open_benchmark("sketchy", tmp_path, "zeroshot7")


@pytest.mark.parametrize(
    ("name", "default"), [("sketchy", (70, 140)), ("tuberlin", (21, 189)), ("quickdraw", (11, 99))]
)
def test_batches_split_as_published(name, default):
    protocol = PROTOCOLS[name]
    assert protocol.split_batch(protocol.batch_size) == default
    assert protocol.split_batch(2) == (0, 0)
    assert PROTOCOLS["sketchy"].split_batch(8) == (2, 4)


@pytest.fixture
def two_orders(tmp_path):
    """A folder for each release of the 104/21 split: one image of each class, labelled in its order."""
    protocol = PROTOCOLS["sketchy_split"]
    for number, orders in enumerate(LABEL_ORDERS.values()):
        for split, names in zip(("train", "zero"), orders, strict=True):
            labels = range(len(names))
            write_list(tmp_path / str(number) / CLASS_NAME_FILES[split == "zero"], zip(names, labels, strict=True))
            for kind in ("sketch", "photo"):
                rows = [(f"{kind}/{name}/1.png", label) for label, name in enumerate(names)]
                write_list(tmp_path / str(number) / protocol.list_names(kind, split)[0], rows)
    return tmp_path


def test_both_label_orders_of_the_split_are_read_and_named(two_orders):
    for number, (release, (seen, unseen)) in enumerate(LABEL_ORDERS.items()):
        benchmark = open_benchmark("sketchy_split", two_orders, str(number))
        assert benchmark.release == release and benchmark.title == "Sketchy Ext Split"
        assert (benchmark.seen_names, benchmark.unseen_names) == (list(seen), list(unseen))
        for split in ("train", "zero"):
            files = benchmark.read("sketch", split)
            assert [path.split("/")[1] for path in files.paths] == benchmark.names(split)
    orders = list(LABEL_ORDERS.values())
    assert all(sorted(orders[0][part]) == sorted(orders[1][part]) for part in (0, 1))
    protocol = PROTOCOLS["sketchy_split"]
    assert orders[0] == (protocol.seen_names, protocol.unseen_names) != orders[1]


@pytest.mark.parametrize("name", ["sketch_tx_000000000000_ready_filelist_train.txt", "all_photo_filelist_zero.txt"])
def test_lists_of_two_releases_in_one_folder_are_refused(two_orders, name):
    kind, split = name.split("_")[0].replace("all", "photo"), name[-9:-4].replace("_", "")
    (two_orders / "1" / name).replace(two_orders / "0" / name)
    benchmark = open_benchmark("sketchy_split", two_orders, "0")
    with pytest.raises(InputError, match=rf"{name}: its labels follow .*CMCA.*: lists of two releases in one folder"):
        benchmark.read(kind, split)


def test_class_names_of_two_releases_in_one_folder_are_refused(two_orders):
    (two_orders / "1/cname_cid_zero.txt").replace(two_orders / "0/cname_cid_zero.txt")
    with pytest.raises(InputError, match=r"cname_cid_zero.txt .*CMCA.*: lists of two releases in one folder"):
        open_benchmark("sketchy_split", two_orders, "0")


def test_sketches_of_each_label_tell_the_order():
    counts = {"bat": 635, "helicopter": 746, "cow": 728}
    for release, (_, unseen) in LABEL_ORDERS.items():
        sketches = [classes.SKETCHY_SPLIT_UNSEEN_SKETCHES[classes.SKETCHY_SPLIT_UNSEEN.index(name)] for name in unseen]
        assert all(sketches[unseen.index(name)] == count for name, count in counts.items())
        assert unseen_names_of(np.array(sketches)) == (release, list(unseen))
    assert len(set(sketches)) == 21 and sum(sketches) == 12_694
    assert unseen_names_of(sketches[:-1]) == unseen_names_of(sketches[::-1]) == (None, None)
