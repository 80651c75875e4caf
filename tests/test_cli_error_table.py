"""Bad input ends in one line with status 2 and leaves nothing half-written; rows: helpers/cli_error_table.py."""

import pytest
from helpers import cli_error_table
from helpers.tiny_benchmark import write_tiny


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "data")


@pytest.mark.parametrize(("name", "script", "arguments", "damage"), list(cli_error_table.rows()))
def test_bad_input_ends_in_one_line(name, script, arguments, damage, tmp_path, benchmark):
    ended = cli_error_table.run(script, arguments, damage, tmp_path, benchmark)
    assert cli_error_table.is_good(*ended), ended


def test_a_good_command_is_not_taken_for_a_bad_one(tmp_path, benchmark):
    arguments = "--data_root {data} -s {features} --device cpu --mode 1".split()
    assert not cli_error_table.is_good(
        *cli_error_table.run("test_tuberlin_ext_zeroshot", arguments, None, tmp_path, benchmark)
    )
    assert not cli_error_table.is_good(2, ["error: a", "error: b"], []) and not cli_error_table.is_good(
        "KeyError: a", [], []
    )
    assert not cli_error_table.is_good(2, ["error: a"], [".half written"])
