"""Bad input ends in one line with status 2, and leaves nothing half-written; the rows are those of bad_inputs.py."""

import bad_inputs
import pytest
from conftest import write_tiny


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "data")


@pytest.mark.parametrize(("name", "script", "arguments", "damage"), list(bad_inputs.rows()))
def test_bad_input_ends_in_one_line(name, script, arguments, damage, tmp_path, benchmark):
    ended = bad_inputs.run(script, arguments, damage, tmp_path, benchmark)
    assert bad_inputs.is_good(*ended), ended


def test_a_good_command_is_not_taken_for_a_bad_one(tmp_path, benchmark):
    arguments = "--data_root {data} -s {features} --device cpu --mode 1".split()
    assert not bad_inputs.is_good(*bad_inputs.run("test_tuberlin_ext_zeroshot", arguments, None, tmp_path, benchmark))
    assert not bad_inputs.is_good(2, ["error: a", "error: b"], []) and not bad_inputs.is_good("KeyError: a", [], [])
    assert not bad_inputs.is_good(2, ["error: a"], [".half written"])
