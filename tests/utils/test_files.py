import pytest

from utils.cli import InputError
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


def test_a_writable_folder_stays_as_it_was(tmp_path):
    (tmp_path / "a file").write_text("precious")
    check_writable(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
