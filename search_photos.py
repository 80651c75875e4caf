"""Search your own photos with your own sketch.

    python search_photos.py index ~/Pictures --checkpoint checkpoint/sketchy/zeroshot1/model_best.pth.tar
    python search_photos.py find bell.png -k 20

Writes the folder photo_index. `torchrun --nproc_per_node 2 search_photos.py index ...` shares the photos.
"""

import os

from datasets import errors


@errors.ends_in_one_line(speaks=lambda: os.environ.get("RANK", "0") == "0")
def main(argv=None):
    """Command line; returns what the command did."""
    from models.search.commands import create_parser

    options = create_parser().parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    main()
