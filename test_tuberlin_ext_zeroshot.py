"""Zero-shot test on TU-Berlin Ext (30 unseen classes): mAP@all and Prec@100.

    python test_tuberlin_ext_zeroshot.py

Reads checkpoint/tuberlin (model_best.pth.tar or features_zero.pickle), writes results.json there.
"""

from utils.cli import run_command


def main(argv=None):
    return run_command("models.testing", "tuberlin", argv)


if __name__ == "__main__":
    main()
