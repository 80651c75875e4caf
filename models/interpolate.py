"""Interpolates between the weights of a trained student and the ImageNet weights that its training started from.

    python -m models.interpolate CHECKPOINT --finetune FILE --share 0.2 --to between/model_best.pth.tar

Each weight becomes 0.8 · trained + 0.2 · pretrained; the classifier of the seen classes stays as trained. The result
often ranks classes better that were not trained on (Wortsman et al., arXiv:2109.01903).
"""

import argparse
from pathlib import Path

from models.checkpoints import load_student, read_checkpoint, save_checkpoint, trained_with
from models.weights import create_pair
from utils.cli import OneLineParser, number_type, one_line_errors, run_command
from utils.files import check_writable


def create_parser():
    """The options."""
    parser = OneLineParser(prog="python -m models.interpolate", description="Mix trained with pretrained weights.")
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint of a train script")
    add("--finetune", required=True, metavar="FILE|lite0|timm", help="ImageNet weights that the training started from")
    add("--share", type=number_type(float, 0, 1, "a number from 0 to 1"), required=True,
        help="share of the ImageNet weights")  # fmt: skip
    add("--to", type=_target, required=True, metavar="FILE.pth.tar", help="checkpoint to write")
    return parser


@one_line_errors()
def main(argv=None):
    """Command line; returns the path that was written."""
    options = create_parser().parse_args(argv)
    checkpoint = read_checkpoint(options.checkpoint)
    student, metadata, _ = load_student(options.checkpoint)
    pretrained, _ = create_pair(
        metadata["model"], metadata["seen_classes"], options.finetune, metadata["imagenet_classes"]
    )
    interpolate(student, pretrained, options.share)
    check_writable(options.to.parent)
    names = ("protocol", "classes", "data", "versions", "pretrained_tag")
    record = {name: checkpoint[name] for name in names if name in checkpoint}
    record["options"] = trained_with(checkpoint) | {"pretrained_share": options.share}
    save_checkpoint(options.to, student, **record)
    print(f"{options.to}: {1 - options.share:g} trained, {options.share:g} pretrained")
    return options.to


def interpolate(student, pretrained, share):
    """Set a Student's backbone to (1 - share) · its weights + share · those of the Student `pretrained`."""
    state, start = student.backbone.state_dict(), pretrained.backbone.state_dict()
    mixed = {name: value.lerp(start[name], share) for name, value in state.items() if value.is_floating_point()}
    student.backbone.load_state_dict(state | mixed)


def _target(text):
    if not text.endswith(".pth.tar"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .pth.tar")
    return Path(text)


if __name__ == "__main__":
    run_command("models.interpolate")
