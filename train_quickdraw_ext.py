"""Train SBKA on QuickDraw Ext (80 seen classes).

    python train_quickdraw_ext.py

Reads datasets/QuickDraw, writes checkpoint/quickdraw, which test_quickdraw_ext_zeroshot.py reads.
"""

from utils.cli import run_command


def main(argv=None):
    return run_command("models.training", "quickdraw", argv)


if __name__ == "__main__":
    main()
