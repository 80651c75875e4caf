"""From raw downloads to a checked benchmark:

python -m datasets.prepare lists <root> --protocol sketchy      write the lists from the image folders
python -m datasets.prepare mask <root> --protocol sketchy       compute the semantic mask from WordNet
python -m datasets.prepare check <root> --protocol sketchy      report every fault with file and line
python -m datasets.prepare summary <root>                       write a page: classes, counts, sample images, oddities
python -m datasets.prepare miniature <root>                     draw the built-in miniature benchmark
"""

from utils.cli import run_command


def main(argv=None):
    """Command line. The commands are a module of their own, which run_command imports with signals blocked."""
    run_command("datasets.prepare.commands", argv)


if __name__ == "__main__":
    main()
