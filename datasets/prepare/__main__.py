"""From raw downloads to a checked benchmark:

python -m datasets.prepare lists <root> --protocol sketchy      write the lists from the image folders
python -m datasets.prepare mask <root> --protocol sketchy       compute the semantic mask from WordNet
python -m datasets.prepare check <root> --protocol sketchy      report every fault with file and line
python -m datasets.prepare summary <root>                       write a page: classes, counts, sample images, oddities
python -m datasets.prepare miniature <root>                     draw the built-in miniature benchmark
"""

from utils import cli


@cli.one_line_errors()
def main(argv=None):
    """Command line."""
    with cli.sigterm_as_exception():
        with cli.signals_blocked():  # because an interrupted import can fail in any way
            from datasets.prepare.commands import create_parser
        options = create_parser().parse_args(argv)
        options.run(options)


if __name__ == "__main__":
    main()
