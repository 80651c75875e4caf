"""Train SBKA on Sketchy Ext (100 seen classes) or its 104-class split.

    python train_sketchy_ext.py
    python train_sketchy_ext.py --zero_version zeroshot2

Reads datasets/Sketchy, writes checkpoint/sketchy/<zero_version>; test_sketchy_ext_zeroshot.py and
test_sketchy_ext_split_zeroshot.py read that.
"""

from utils.cli import run_command


def main(argv=None):
    return run_command("models.training", "sketchy", argv)


if __name__ == "__main__":
    main()
