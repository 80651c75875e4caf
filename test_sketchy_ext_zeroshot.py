"""Zero-shot test on Sketchy Ext (25 unseen classes): mAP@all and Prec@100.

    python test_sketchy_ext_zeroshot.py

Reads checkpoint/sketchy/zeroshot1 (model_best.pth.tar or features_zero.pickle), writes results.json there.
"""

from utils.cli import run_command


def main(argv=None):
    return run_command("models.testing", "sketchy", argv)


if __name__ == "__main__":
    main()
