"""Search your own photos with your own sketch.

    python search_photos.py index ~/Pictures --checkpoint checkpoint/sketchy/zeroshot1/model_best.pth.tar
    python search_photos.py find bell.png -k 20

Writes the folder photo_index. `torchrun --nproc_per_node 2 search_photos.py index ...` shares the photos.
"""

from utils.cli import run_command


def main(argv=None):
    """Command line; returns what the command did."""
    return run_command("photo_search.cli", argv)


if __name__ == "__main__":
    main()
