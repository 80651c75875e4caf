"""Make a benchmark folder:

python -m datasets.prepare miniature <root>    draw the built-in miniature benchmark, in the layout of Sketchy Ext
"""

from pathlib import Path

from datasets import errors
from datasets.miniature import SEEN, UNSEEN, write_miniature


@errors.ends_in_one_line
def main(argv=None):
    parser = errors.OneLineParser(prog="python -m datasets.prepare", description="Make a benchmark folder.")
    commands = parser.add_subparsers(required=True, metavar="command")
    miniature = commands.add_parser("miniature", help="draw the built-in miniature benchmark")
    miniature.add_argument("root", type=Path, help="a new or empty folder")
    miniature.add_argument("--seed", type=errors.seed, default=0, help="another seed draws other images")
    miniature.set_defaults(run=make_miniature)
    options = parser.parse_args(argv)
    options.run(options)


def make_miniature(options):
    """Draw the miniature benchmark into a folder that is new or empty."""
    write_miniature(options.root, options.seed)
    print(f"{options.root}: {len(SEEN)} seen and {len(UNSEEN)} unseen classes")


if __name__ == "__main__":
    main()
