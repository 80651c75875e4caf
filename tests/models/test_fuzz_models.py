"""Broken .onnx and .safetensors files, a few of the thousands that `make fuzz` reads."""

from helpers import fuzz_models


def test_broken_exports_are_read_or_refused_in_one_line(tmp_path):
    counts = fuzz_models.fuzz(60, 1, tmp_path)
    assert counts["onnx", "refused"] > 20 and counts["safetensors", "refused"] > 20
    assert sum(counts.values()) == 120


def test_the_files_that_are_broken_are_valid_before(tmp_path):
    for with_digest in (False, True):
        (tmp_path / "a.onnx").write_bytes(fuzz_models.onnx_file(with_digest))
        assert fuzz_models.read("onnx", tmp_path / "a.onnx") is None
