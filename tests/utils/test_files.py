import os
import zipfile

import numpy as np
import pytest

from models import export
from models.eval.features import PartialFeatures
from models.logger import Log
from utils.cli import InputError
from utils.files import (
    atomic_write,
    check_writable,
    folder_lock,
    open_own,
    open_regular,
    read_bytes,
    read_npz,
    sha256_of,
    unused_name,
    write_json,
)


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


@pytest.fixture
def users_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("of the user")
    yield path
    assert path.read_text() == "of the user"


@pytest.mark.parametrize("mode", ["rb", "wb", "ab", "a+", "r+b"])
def test_own_files_are_not_opened_through_links_nor_as_fifos(tmp_path, users_file, mode):
    (tmp_path / "link").symlink_to(users_file)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(InputError, match=f"{name}: a link, a FIFO or a device"):
            open_own(tmp_path / name, mode)
    with pytest.raises(IsADirectoryError if mode == "rb" else OSError):
        open_own(tmp_path, mode)


def test_regular_files_are_opened_through_links_but_devices_are_not(tmp_path, users_file):
    (tmp_path / "link").symlink_to(users_file)
    os.mkfifo(tmp_path / "fifo")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"of the user"
    for path in (tmp_path / "fifo", "/dev/zero"):
        for read in (open_regular, sha256_of, lambda path: read_bytes(path, 10)):
            with pytest.raises(OSError, match="not a regular file"):
                read(path)
    assert read_bytes(users_file, 11) == b"of the user"
    with pytest.raises(InputError, match="larger than"):
        read_bytes(users_file, 10)


def test_a_lock_does_not_write_through_a_link(tmp_path, users_file):
    (tmp_path / ".training").symlink_to(users_file)
    with pytest.raises(InputError, match="a link"), folder_lock(tmp_path, "training"):
        pass


def test_a_fifo_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="FIFO or a device has this name"):
        write_json(tmp_path / "fifo", {})
    assert (tmp_path / "fifo").is_fifo() and [*tmp_path.iterdir()] == [tmp_path / "fifo"]


def test_features_and_logs_are_not_written_through_links(tmp_path, users_file):
    for name in ("partial", "log.jsonl"):
        (tmp_path / name).symlink_to(users_file)
    with pytest.raises(InputError, match="partial: a link"):
        PartialFeatures(tmp_path / "partial", "source", 2, 1)
    with pytest.raises(InputError, match=r"log\.jsonl: a link"):
        Log(tmp_path, 0, 0, 1)


def test_a_name_that_is_not_used_yet(tmp_path):
    path = tmp_path / "features.pickle.old"
    for name in ("features.pickle.old", "features.pickle.old.2", "features.pickle.old.3"):
        assert unused_name(path) == tmp_path / name
        (tmp_path / name).symlink_to(tmp_path / "none")


def test_an_export_does_not_replace_its_checkpoint(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"weights")
    with pytest.raises(SystemExit) as end:
        export.main([str(path), "--to", str(path)])
    assert end.value.code == 2 and "is the checkpoint itself" in capsys.readouterr().err
    assert path.read_bytes() == b"weights"


def test_arrays_larger_than_allowed_are_not_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", small=np.arange(3), large=np.zeros(10**6))
    assert (tmp_path / "a.npz").stat().st_size < 10_000
    assert read_npz(tmp_path / "a.npz", 1000, ("small",))["small"].tolist() == [0, 1, 2]
    assert read_npz(tmp_path / "a.npz", 9_000_000).keys() == {"small", "large"}
    with pytest.raises(ValueError, match="its arrays are larger than 7 MiB"):
        read_npz(tmp_path / "a.npz", 7 << 20)
    with pytest.raises(KeyError):
        read_npz(tmp_path / "a.npz", 1000, ("other",))
    np.save(tmp_path / "small.npy", np.arange(3))
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        content = (tmp_path / "small.npy").read_bytes()
        archive.writestr("small.npy", content.replace(b"'shape': (3,)", b"'shape': (9,)"))
    with pytest.raises(ValueError, match="holds another number of values than its header states"):
        read_npz(tmp_path / "b.npz", 1000, ("small",))
