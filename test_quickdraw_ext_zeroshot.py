"""Zero-shot test on QuickDraw Ext (30 unseen classes): mAP@all and Prec@200.

    python test_quickdraw_ext_zeroshot.py

Reads checkpoint/quickdraw (checkpoint.pth.tar or features_zero.pickle), writes results.json there.
"""

from utils.cli import run_command


def main(argv=None):
    return run_command("models.testing", "quickdraw", argv)


if __name__ == "__main__":
    main()
