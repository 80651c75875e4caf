"""Damaged .onnx and .safetensors files, a few of the thousands that `make fuzz` reads."""

import pytest
import torch
from helpers import fuzz_models

from models.checkpoints import load_student
from utils.cli import InputError


def test_damaged_exports_are_read_or_refused_in_one_line(tmp_path):
    counts = fuzz_models.fuzz(60, 1, tmp_path)
    for kind in ("onnx", "safetensors"):
        refused, same, other = (sum(counts[kind, by, end] for by in ("bytes", "fields")) for end in fuzz_models.ENDS)
        assert refused > 20 and same > 3 and refused + same + other == 60


def test_an_export_with_another_header_or_more_behind_its_end_is_refused(tmp_path):
    """Each is still a valid file of its format, and of the same weights."""
    file, path = fuzz_models.safetensors_files()[0], tmp_path / "a.safetensors"
    end = 8 + int.from_bytes(file[:8], "little")
    for old, new in ((b'"input_size": "32"', b'"input_size": "36"'), (b"sbka student 1", b"sbka student 2"),
                     (b"stages.0.0.norm", b"stages.1.0.norm"), (b'"content_sha256"', b'"content_sha257"')):  # fmt: skip
        swapped = file[:end].replace(old, b"<old>").replace(new, old).replace(b"<old>", new)
        assert swapped != file[:end]
        path.write_bytes(swapped + file[end:])
        assert fuzz_models.read("safetensors", path) is None
    file, path = fuzz_models.onnx_file(with_digest=True), tmp_path / "a.onnx"
    size = b"\x72\x10\x0a\x0ainput_size\x12\x0264"  # an entry of the metadata
    for damaged in (file + size, file + file, file.replace(b"content_sha256", b"content_sha257")):
        path.write_bytes(damaged)
        assert fuzz_models.read("onnx", path) is None


def test_a_recorded_input_size_that_the_network_does_not_take_is_refused(tmp_path):
    student = fuzz_models.safetensors_files()[3]  # without a digest
    (tmp_path / "a.safetensors").write_bytes(student.replace(b'"input_size":"32"', b'"input_size":"16"'))
    with fuzz_models.networks_built_once(), pytest.raises(InputError, match=r"a.safetensors: .* 16: .* no images of"):
        load_student(tmp_path / "a.safetensors")


def test_long_names_of_a_file_are_cut_in_messages(tmp_path):
    path, state = tmp_path / "a.pt", {"linear.weight": torch.ones(3, 8)}
    for content in (state | {"x" * 5000: torch.ones(2)}, {"state_dict": state, "options": {"model": "x" * 5000}}):
        torch.save(content, path)
        with pytest.raises(InputError) as error:
            load_student(path, None if "options" in content else fuzz_models.MODEL)
        assert len(str(error.value)) < 500


def test_a_dimension_whose_name_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.onnx").write_bytes(fuzz_models.onnx_file().replace(b"\x12\x01n", b"\x12\x01\xee"))
    assert fuzz_models.read("onnx", tmp_path / "a.onnx") is None


def test_onnx_runtime_prints_nothing_beside_the_message(tmp_path, capfd):
    import onnx

    model = onnx.load_from_string(fuzz_models.onnx_file())
    next(each for each in model.graph.initializer if each.name == "axes").dims[:] = [2**63 - 1]
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    assert fuzz_models.read("onnx", tmp_path / "a.onnx") is None
    assert capfd.readouterr() == ("", "")


def test_the_files_that_are_damaged_are_whole_before(tmp_path):
    for with_digest in (False, True):
        (tmp_path / "a.onnx").write_bytes(fuzz_models.onnx_file(with_digest))
        assert fuzz_models.read("onnx", tmp_path / "a.onnx") is not None
    with fuzz_models.networks_built_once():
        for content in fuzz_models.safetensors_files():
            (tmp_path / "a.safetensors").write_bytes(content)
            assert fuzz_models.read("safetensors", tmp_path / "a.safetensors") is not None
