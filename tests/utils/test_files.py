import pytest

from utils.cli import InputError, one_line_errors
from utils.files import atomic_write, check_writable, write_json


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    write_json(tmp_path / "r.json", [1])
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "r.json") as file:
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
        "utils.files.InputError: a.txt:3: no label\n",
    ],
)
def test_input_errors_end_in_one_line(capsys, message):
    @one_line_errors()
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
            ConnectionResetError(104, "Connection reset by peer"),
            "error: a process that decodes images was killed, perhaps for memory; lower --workers\n",
        ),
        (BrokenPipeError(32, "Broken pipe"), "error: [Errno 32] Broken pipe\n"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "error: a process that decodes images was killed, perhaps for memory; lower --workers\n",
        ),
    ],
)
def test_limits_of_the_machine_end_in_one_line(capsys, error, line):
    @one_line_errors()
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
        one_line_errors()(lambda: 1 / 0)()
