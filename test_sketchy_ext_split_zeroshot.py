"""Zero-shot test on Sketchy Ext Split (21 unseen classes): mAP@200 and Prec@200.

    python test_sketchy_ext_split_zeroshot.py

Reads checkpoint/sketchy/zeroshot2 (model_best.pth.tar or features_zero.pickle), writes results.json there.
"""

from utils.cli import run_command


def main(argv=None):
    return run_command("models.testing", "sketchy_split", argv)


if __name__ == "__main__":
    main()
