"""Options of the scripts that depend on others."""

from pathlib import Path

import pytest

from datasets.protocols import PROTOCOLS
from models import options as scripts


@pytest.mark.parametrize(
    ("name", "zero_version", "folder"),
    [
        ("sketchy", None, "sketchy/zeroshot1"),
        ("sketchy", "zeroshot2", "sketchy/zeroshot2"),
        ("sketchy", "zeroshot1_held_out_0", "sketchy/zeroshot1_held_out_0"),
        ("sketchy_split", "zeroshot2_held_out_0", "sketchy/zeroshot2_held_out_0"),
        ("tuberlin", None, "tuberlin"),
        ("tuberlin", "zeroshot_held_out_0", "tuberlin/zeroshot_held_out_0"),
        ("tuberlin", "mine", "tuberlin"),
        ("quickdraw", "zeroshot_held_back_0", "quickdraw/zeroshot_held_back_0"),
    ],
)
def test_train_and_test_scripts_use_one_checkpoint_folder_for_each_folder_of_lists(name, zero_version, folder):
    for parser, option in ((scripts.train_parser, "savedir"), (scripts.test_parser, "resume_dir")):
        arguments = ["--device", "cpu"] + (["--zero_version", zero_version] if zero_version else [])
        options = scripts.resolve(parser(PROTOCOLS[name]).parse_args(arguments), PROTOCOLS[name], option)
        assert getattr(options, option) == Path("checkpoint") / folder
