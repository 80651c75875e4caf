import pickle

import numpy as np
import pytest

from datasets.errors import InputError, ends_in_one_line
from datasets.files import check_writable, read_pickle, write_json, write_whole


def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path, trap):
    path = tmp_path / "evil.pickle"
    path.write_bytes(pickle.dumps([np.zeros(3), trap]))
    with pytest.raises(InputError, match=r"evil\.pickle: the pickle asks for \w+\.system"):
        read_pickle(path)
    assert not trap.sprung()
    pickle.loads(path.read_bytes())  # the trap works
    assert trap.sprung()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_containers_of_every_protocol_are_read(tmp_path, protocol):
    content = {0: np.arange(3.0), "a": [np.float64(2), (1, None)], b"b": np.array(["x"])}
    (tmp_path / "p").write_bytes(pickle.dumps(content, protocol=protocol))
    back = read_pickle(tmp_path / "p")
    np.testing.assert_array_equal(back[0], content[0])
    assert back["a"] == content["a"] and back[b"b"][0] == "x"


def test_a_pickle_of_python_2_is_read(tmp_path):
    # {0: numpy.array([1.5])} as Python 2 with NumPy 1 wrote it.
    kind = b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    state = b"(I1\n(I1\nt" + kind + b"I00\nS'\\x00\\x00\\x00\\x00\\x00\\x00\\xf8?'\ntb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR" + state
    (tmp_path / "p").write_bytes(b"(dI0\n" + array + b"s.")
    assert read_pickle(tmp_path / "p")[0].tolist() == [1.5]


class Forged:
    """Builds an array over bytes of the attacker's choice, through a type that says they are pointers."""

    def __init__(self, dtype_state, call_ndarray):
        self.dtype_state, self.call_ndarray = dtype_state, call_ndarray

    def __reduce__(self):
        kind = ForgedType(self.dtype_state)
        if self.call_ndarray:
            return np.ndarray, ((2,), kind, b"A" * 16)
        return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (2,), kind, False, b"A" * 16)


class ForgedType:
    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return np.dtype, ("V8", False, True), self.state


@pytest.mark.parametrize("call_ndarray", [False, True])
@pytest.mark.parametrize(
    "state",
    [
        (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0),
        (3, "|", None, None, None, 8, 1, 63),
    ],
)
def test_arrays_of_forged_types_are_refused(tmp_path, state, call_ndarray):
    (tmp_path / "p").write_bytes(pickle.dumps(Forged(state, call_ndarray)))
    with pytest.raises(InputError, match="p: "):
        read_pickle(tmp_path / "p")


@pytest.mark.parametrize(
    "array", [np.array([None]), np.zeros(2, dtype=[("a", "f4")]), np.array(["2020"], dtype="M8[D]")]
)
def test_arrays_of_anything_but_numbers_and_strings_are_refused(tmp_path, array):
    (tmp_path / "p").write_bytes(pickle.dumps(array))
    with pytest.raises(InputError, match="only numbers and strings are read"):
        read_pickle(tmp_path / "p")


def test_a_torn_or_missing_pickle_is_named(tmp_path):
    (tmp_path / "torn").write_bytes(pickle.dumps(np.arange(100))[:60])
    for name, words in (("torn", "not a readable pickle"), ("missing", "no such file")):
        with pytest.raises(InputError, match=f"{name}: {words}"):
            read_pickle(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    write_json(tmp_path / "r.json", [1])
    with pytest.raises(RuntimeError), write_whole(tmp_path / "r.json") as file:
        file.write(b"half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "[\n  1\n]\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder"):
        check_writable(tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    "message",
    [
        "a.txt:3: no label",
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
        "datasets.files.InputError: a.txt:3: no label\n",
    ],
)
def test_input_errors_end_in_one_line(capsys, message):
    @ends_in_one_line()
    def command():
        raise InputError(message)

    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: a.txt:3: no label\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(24, "Too many open files", "a.txt"), "error: [Errno 24] Too many open files: 'a.txt'\n"),
        (MemoryError(), "error: out of memory; lower --batch_size or --input_size\n"),
        (RuntimeError("CUDA out of memory.\nTried"), "error: out of memory; lower --batch_size or --input_size\n"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "error: a process that decodes images was killed, perhaps for memory; lower --workers\n",
        ),
    ],
)
def test_limits_of_the_machine_end_in_one_line(capsys, error, line):
    @ends_in_one_line()
    def command():
        raise error

    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 2
    assert capsys.readouterr().err == line


def test_a_writable_folder_stays_as_it_was(tmp_path):
    (tmp_path / "a file").write_text("precious")
    check_writable(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        ends_in_one_line()(lambda: 1 / 0)()
