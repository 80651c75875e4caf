import collections
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import fuzz, malicious_pickles

from utils.cli import InputError
from utils.safe_pickle import describe_pickle, read_pickled_dict, read_pickled_list

VALUES = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def read_list(tmp_path, content):
    (tmp_path / "p").write_bytes(content)
    return read_pickled_list(tmp_path / "p", 4)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "values",
    [
        VALUES,
        np.asfortranarray(VALUES),
        VALUES[:, ::2],
        VALUES.astype(">f8"),
        VALUES.astype(np.float16),
        VALUES > 0,
        np.arange(5, dtype=np.uint8),
        np.zeros((0, 8)),
        np.array(3),
        np.int64(-3),
        list(VALUES),
        VALUES.tolist(),
        list(np.arange(300)),
        [0, 1, 2**40, -1],
        [True, 2, 0.5],
        [np.array([1]), np.array([2])],
        (),
        7,
    ],
)
def test_arrays_of_every_protocol_are_read_as_numpy_reads_them(tmp_path, protocol, values):
    content = [values, VALUES, values, None]
    one, two, three, four = read_list(tmp_path, pickle.dumps(content, protocol))
    assert one.dtype == np.asarray(values).dtype and one.shape == np.asarray(values).shape
    assert np.array_equal(one, values) and np.array_equal(three, values)
    assert np.array_equal(two, VALUES) and four is None
    assert len(read_list(tmp_path, pickle.dumps(tuple(content[:2]), protocol))) == 2


@pytest.mark.parametrize("protocol", [0, 2])
def test_arrays_of_python_2_are_read(tmp_path, protocol):
    content = [VALUES, np.arange(4), VALUES.astype(">f8"), [0, 1, 300]]
    for one, two in zip(read_list(tmp_path, fuzz.pickle_as_python_2(content, protocol)), content, strict=True):
        assert one.dtype == np.asarray(two).dtype and np.array_equal(one, two)


def test_a_pickle_of_python_2_is_read(tmp_path):
    # {0: numpy.array([1.5])} and OrderedDict([(0, [1.5])]) as Python 2 with NumPy 1 wrote them.
    kind = b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    state = b"(I1\n(I1\nt" + kind + b"I00\nS'\\x00\\x00\\x00\\x00\\x00\\x00\\xf8?'\ntb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR" + state
    ordered = b"ccollections\nOrderedDict\np0\n((lp1\n(lp2\nI0\na(lp3\nF1.5\naaatp4\nRp5\n."
    for content in (b"(dI0\n" + array + b"s.", ordered):
        (tmp_path / "p").write_bytes(content)
        assert read_pickled_dict(tmp_path / "p")[0].tolist() == [1.5]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("label", [int, np.int64, np.float32])
def test_dicts_of_every_protocol_are_read(tmp_path, protocol, kind, label):
    content = kind((label(number), row) for number, row in enumerate([*VALUES.astype(np.float64), [1.0, 2.0], "a"]))
    (tmp_path / "p").write_bytes(pickle.dumps(content, protocol))
    back = read_pickled_dict(tmp_path / "p")
    assert list(back) == [0, 1, 2, 3, 4, 5] and all(type(number) is int for number in back)
    np.testing.assert_array_equal([back[number] for number in range(4)], VALUES)
    assert back[4].tolist() == [1.0, 2.0] and back[5] is None


@pytest.mark.parametrize("content", [[1], {"a": [1.0]}, {-1: [1.0]}, {0.5: [1.0]}, {2**31: [1.0]}, {(0,): [1.0]}, 3])
def test_a_pickle_without_labels_gives_an_empty_dict(tmp_path, content):
    (tmp_path / "p").write_bytes(pickle.dumps(content))
    assert read_pickled_dict(tmp_path / "p") == {}


@pytest.mark.parametrize("values", ["abc", [["a"]], [[[1]]], [None], [[1, 2], [3]], VALUES.astype(complex), [10**30]])
def test_anything_but_real_numbers_is_none(tmp_path, values):
    assert read_list(tmp_path, pickle.dumps([values, VALUES]))[0] is None
    assert read_list(tmp_path, pickle.dumps({"a": values})) == []


def test_bools_are_0_or_1_whatever_the_file_holds(tmp_path):
    content = pickle.dumps([np.array([True, False, True])]).replace(b"\1\0\1", b"\xff\0\2")
    assert read_list(tmp_path, content)[0].view(np.uint8).tolist() == [1, 0, 1]


def test_arrays_over_the_same_bytes_share_no_memory(tmp_path):
    for protocol in (0, 5):
        one, two = read_list(tmp_path, pickle.dumps([VALUES, VALUES[:]], protocol))
        one[:] = 0
        assert np.array_equal(two, VALUES)
    byte = malicious_pickles.BYTE
    content = malicious_pickles.array(byte, (4,), b"C\4abcdq\1") + malicious_pickles.array(byte, (4,), b"h\1")
    one, two = read_list(tmp_path, b"(" + content + b"l.")
    one[:] = 0
    assert two.tobytes() == b"abcd"


def test_a_distance_matrix_is_not_read(tmp_path):
    content = pickle.dumps([VALUES, np.arange(4)], 4)
    size = 1 << 36
    with open(tmp_path / "p", "wb") as file:
        file.write(content[:-2])  # without APPENDS and STOP
        file.write(b"\x8e" + size.to_bytes(8, "little"))
        file.seek(size, 1)  # a hole, which takes no disk space
        file.write(content[-2:])
    assert np.array_equal(read_pickled_list(tmp_path / "p", 2)[0], VALUES)


def test_frames_and_bytes_after_the_end_are_ignored(tmp_path):
    content = b"\x80\4\x95" + (2**62).to_bytes(8, "little") + b"(" + malicious_pickles.ARRAY + b"l."
    assert read_list(tmp_path, content + b"cos\nsystem\n")[0].tobytes() == b"abcd"


@pytest.mark.parametrize(
    "array", [np.array([None]), np.zeros(2, dtype=[("a", "f4")]), np.array(["2020"], dtype="M8[D]"), np.longdouble(1)]
)
def test_arrays_of_anything_but_numbers_and_strings_are_refused(tmp_path, array):
    with pytest.raises(InputError, match=r"p: .*only numbers and strings are read"):
        read_list(tmp_path, pickle.dumps([array]))


def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path, trap):
    content = pickle.dumps([np.zeros(3), trap])
    with pytest.raises(InputError, match=r"p: the pickle asks for \w+\.system"):
        read_list(tmp_path, content)
    assert not trap.sprung()
    pickle.loads(content)  # the trap works
    assert trap.sprung()


def test_a_damaged_or_missing_pickle_or_a_folder_is_named(tmp_path):
    whole = pickle.dumps([np.arange(3)])
    for size in range(len(whole)):
        with pytest.raises(InputError, match="p: not a readable pickle"):
            read_list(tmp_path, whole[:size])
    with pytest.raises(InputError, match="missing: no such file"):
        read_pickled_list(tmp_path / "missing", 4)
    with pytest.raises(InputError, match="cannot be read"):
        read_pickled_list(tmp_path, 4)


# A process of its own reads malicious files, so that a crash fails a test instead of ending pytest.


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """The ended process that read all malicious files, and then 2,000 files that are broken at random."""
    folder = tmp_path_factory.mktemp("malicious")
    malicious_pickles.write_malicious_files(folder)
    command = [sys.executable, fuzz.__file__, "--read", folder, "--files", "2000", "--seed", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=900)


@pytest.mark.parametrize("kind", ["features_zero", "cid_mask"])
@pytest.mark.parametrize("name", malicious_pickles.EXPECTED_ERRORS)
def test_a_malicious_file_is_refused_in_one_line(process, name, kind):
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("[")]
    messages = {(name, kind): line for name, kind, line in lines}
    assert (name, kind) in messages, f"the process ended with status {process.returncode}: {process.stderr[-2000:]}"
    assert messages[name, kind] is not None, "it was read"
    assert malicious_pickles.EXPECTED_ERRORS[name] in messages[name, kind]


def test_nothing_malicious_was_run(process, tmp_path, monkeypatch):
    assert not list(process.args[3].glob("**/sprung"))
    monkeypatch.chdir(tmp_path)
    pickle.loads(
        malicious_pickles.as_features(malicious_pickles.CALLS["REDUCE"][0])
    )  # the command works where a file is trusted
    assert Path("sprung").exists()


def test_broken_files_are_read_or_refused(process):
    assert process.returncode == 0, process.stderr[-2000:]
    read, refused = (int(part.split()[0].replace(",", "")) for part in process.stdout.splitlines()[-1].split(", "))
    assert read + refused == 2000 and read > 50 and refused > 500
    assert not list(process.args[3].glob("fuzz-*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ((VALUES, [1, 2]), "list of 2 (numbers (4, 3), numbers (2,))"),
        ([(VALUES, ["cat"] * 4), (VALUES, ["y", "z"])], "list of 2 (list of 2 (numbers (4, 3), list of 4), list of 2 "),
        (["x" * 2000, {"y": "z"}], "list of 2 (text, dict of 1, each 'y': text)"),
        (
            {"photo": VALUES, "label": [0], 3: None},
            "dict of 3 ('photo': numbers (4, 3), 'label': numbers (1,), a key: ",
        ),
        (
            {"sketch": {"features": VALUES, "path": {}}},
            "dict of 1, each 'sketch': dict of 2 ('features': numbers",
        ),
        ([[[["deep"]]], {}], "list of 2 (list of 1, each list of 1, another object)"),
        ([*"abcdefghij", VALUES], "list of 11, first text"),
        (None, "another object"),
    ],
)
def test_a_pickle_is_described(tmp_path, content, words):
    (tmp_path / "p").write_bytes(pickle.dumps(content))
    assert describe_pickle(tmp_path / "p").startswith(words)
