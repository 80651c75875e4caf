"""Train SBKA on TU-Berlin Ext (220 seen classes).

    python train_tuberlin_ext.py

Reads datasets/TUBerlin, writes checkpoint/tuberlin, which test_tuberlin_ext_zeroshot.py reads.
"""

from utils.cli import run_command


def main(argv=None):
    return run_command("models.training", "tuberlin", argv)


if __name__ == "__main__":
    main()
