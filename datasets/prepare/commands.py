"""The commands of `python -m datasets.prepare` and their options."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from datasets.lists import (
    LIST_DESCRIPTIONS,
    MASK_FILE,
    check_root,
    find_layout,
    format_list,
    open_benchmark,
    write_mask,
)
from datasets.prepare.check import check_benchmark, check_result_to_json, print_check_result
from datasets.prepare.make_lists import lists_from_images, lists_from_lists
from datasets.prepare.miniature import SEEN_CATEGORIES, UNSEEN_CATEGORIES, write_miniature
from datasets.protocols import PROTOCOLS, protocol_of
from utils import cli
from utils.cli import InputError, signals_blocked
from utils.files import atomic_write, check_writable, write_json


@cli.one_line_errors()
def main(argv=None):
    """Command line of `python -m datasets.prepare`."""
    with cli.sigterm_as_exception():
        options = create_parser().parse_args(argv)
        options.run(options)


def create_parser():
    """The commands and their options."""
    parser = cli.OneLineParser(
        prog="python -m datasets.prepare", description="From raw downloads to a checked benchmark."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name, run, text):
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        added.add_argument("root", type=Path, help="folder of the data set")
        return added

    lists = command("lists", make_lists, "write the lists of a benchmark from its image folders")
    _add_protocol(lists)
    _add_zero_version(lists, "that of the protocol")
    lists.add_argument("--held_back", type=cli.number_type(int, 0, 10**6, "a whole number, 0 or more"), metavar="N",
        help="number of sketches of each seen class in the validation list; 0 writes no such list (default: 50 for "
        "Sketchy, 10 for TU-Berlin Ext, 0 for QuickDraw Ext)")  # fmt: skip
    lists.add_argument("--seed", type=cli.seed_type, help="chooses the sketches that are held back (default: 0)")
    lists.add_argument("--convert", type=cli.folder_name, metavar="NAME", help="convert the "
        "lists of another release in this folder, such as zeroshot0, instead of reading the image folders")  # fmt: skip
    lists.add_argument("--force", action="store_true", help="replace existing lists")

    mask = command("mask", make_mask, "compute the semantic mask of the seen classes from WordNet 3.0")
    _add_protocol(mask)
    _add_zero_version(mask, "that of the protocol")
    mask.add_argument("--wordnet", type=Path, metavar="DIR", help="folder with the database files of WordNet 3.0, or "
        "NLTK's data folder (default: the places where Debian's wordnet-base and NLTK install them)")  # fmt: skip
    mask.add_argument("--force", action="store_true", help="replace an existing mask")

    checked = command("check", check, "check whether a benchmark folder is ready; report faults with file and line")
    either = checked.add_mutually_exclusive_group(required=True)
    _add_protocol(either, required=False)
    either.add_argument("--custom", action="store_true", help="a benchmark of your own, in any known layout")
    _add_zero_version(checked, "that of the protocol; with --custom, the first one found")
    checked.add_argument("--images", action="store_true", help="also decode every image, on all cores")
    checked.add_argument("--json", type=Path, metavar="FILE", help="write all findings to FILE; a link is followed")

    summary = command("summary", make_summary, "write a page: classes, counts, sample images, oddities")
    _add_zero_version(summary, "the first one found")
    summary.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for summary.html and summary.png (default: the folder of lists)"
    )

    miniature = command("miniature", make_miniature, "draw the built-in miniature benchmark into a new or empty folder")
    miniature.add_argument("--seed", type=cli.seed_type, default=0, help="another seed draws other images")
    return parser


def _add_protocol(parser, **kwargs):
    kwargs = {"required": True} | kwargs
    parser.add_argument("--protocol", choices=PROTOCOLS, metavar="|".join(PROTOCOLS), help="the benchmark", **kwargs)


def _add_zero_version(parser, default):
    text = f"name of the folder of lists (default: {default})"
    parser.add_argument("--zero_version", type=cli.folder_name, metavar="NAME", help=text)


def make_lists(options):
    """Write the lists of a protocol: from its image folders, or from the lists of another release (--convert).

    All lists are made before the first one is written, and they are written together.
    """
    protocol = PROTOCOLS[options.protocol]
    check_root(options.root)
    if options.convert:
        if options.held_back is not None or options.seed is not None:
            raise InputError("--convert keeps the validation list of the release; leave out --held_back and --seed")
        lists, notes = lists_from_lists(protocol, options.root, options.convert)
    else:
        held_back = protocol.held_back if options.held_back is None else options.held_back
        lists, notes = lists_from_images(protocol, options.root, held_back, options.seed or 0)
    folder = options.root / (options.zero_version or protocol.zero_version)
    new = {name: rows for name, rows in lists.items() if _content(folder / name) != format_list(rows)}
    _check_old_lists(folder, protocol, lists, new, options)
    for line in notes:
        print(line, file=sys.stderr)
    _write_together(folder, new)
    for name, rows in lists.items():
        published = _published(protocol, name)
        beside = f" (published: {published:,})" if published else ""
        print(f"{folder / name}: {len(rows):,}{beside}{'' if name in new else ', unchanged'}")


def _check_old_lists(folder, protocol, lists, new, options):
    """Raise InputError if a list in `folder` would be replaced without --force, or would not fit the new lists."""
    for name in new:
        if os.path.isdir(folder / name):
            raise InputError(f"{folder / name}: is a folder where a list belongs; move it away")
        if os.path.lexists(folder / name) and not options.force:
            raise InputError(f"{folder / name}: is there and says something else; replace it with --force")
    for key in LIST_DESCRIPTIONS if options.convert is None and not options.force else ():
        for other in protocol.list_names(*key)[1:]:
            if (folder / other).exists():
                raise InputError(f"{folder / other}: is there and would no longer be read; see --convert and --force")
    held_back = folder / protocol.list_names("sketch", "test")[0]
    if held_back.exists() and held_back.name not in lists:
        raise InputError(f"{held_back}: is there, but nothing is held back; move it away, or see --held_back")


def _write_together(folder, lists):
    """Write {name: rows} into `folder`. No list changes before all new ones are on the disk under temporary names."""
    with signals_blocked(), ExitStack() as renames:
        for name, rows in lists.items():
            file = renames.enter_context(atomic_write(folder / name))
            file.write(format_list(rows))
            file.flush()
            os.fsync(file.fileno())


def _content(path):
    return path.read_bytes() if path.is_file() else None


def _published(protocol, name):
    """Number of rows of the published list called `name`, or None if it is not known."""
    return next((count for key, count in protocol.published.items() if protocol.list_names(*key)[0] == name), None)


def check(options):
    """Print a table of the lists and all findings; raise InputError if there is a fault."""
    target = _findings_file(options.json) if options.json else None
    checked = check_benchmark(options.root, options.protocol, options.zero_version, options.images)
    print_check_result(checked)
    if target:
        write_json(target, check_result_to_json(checked))
        print(f"findings: {options.json}")
    if count := sum(map(len, checked.findings.faults.values())):
        faults = "a fault" if count == 1 else f"{count:,} faults"
        raise InputError(f"{options.root}: not ready, {faults} (see above); correct this, and check again")
    print("ready" if options.images else "ready, but no image was decoded; --images decodes them all")


def _findings_file(path):
    """The file that --json `path` writes. If `path` is a link, that is the file it leads to.

    Raises InputError if that file is a folder or a device, has other content than findings, or cannot be written.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target):
        if not target.is_file():
            raise InputError(f"--json {path}: is not a file (a folder, a device or a broken link); choose a file")
        with open(target, "rb") as file:
            if file.read(1) not in (b"", b"{"):
                raise InputError(f"--json {path}: holds something other than findings; choose another file")
    check_writable(target.parent)
    return target


def make_mask(options):
    """Write cid_mask.pickle of the seen classes.

    A class is looked up in WordNet by the ids in the names of its training photos; without such ids, by its own name.
    """
    from datasets.prepare.wordnet_mask import (  # loads timm and torch, which takes seconds
        compute_wordnet_mask,
        photo_ids,
    )

    check_root(options.root)
    benchmark = open_benchmark(options.protocol, options.root, options.zero_version)
    path = benchmark.lists / MASK_FILE
    if path.exists() and not options.force:
        raise InputError(f"{path}: is there already; replace it with --force")
    ids = [[] for _ in benchmark.seen_names]
    if os.path.isfile(benchmark.path("photo", "train")):
        ids = photo_ids(benchmark.read("photo", "train"), len(benchmark.seen_names))
    mask, notes = compute_wordnet_mask(benchmark.seen_names, ids, options.wordnet)
    for line in notes:
        print(line, file=sys.stderr)
    write_mask(path, mask)
    print(f"{path}: {len(mask)} classes, {(mask == 1).sum():,} relations of 1, {(mask > 0).sum():,} in all")


def make_summary(options):
    """Write summary.html and summary.png of a benchmark in any known layout."""
    from datasets.prepare.summary import write_summary  # loads torch, which takes seconds

    name, zero_version = find_layout(options.root, options.zero_version)
    name = protocol_of(name, zero_version)
    benchmark = open_benchmark(name, options.root, zero_version, on_error=lambda _: None)  # the check below reports it
    published = set(PROTOCOLS[name].unseen_names) == set(benchmark.unseen_names)
    checked = check_benchmark(options.root, name if published else None, zero_version)
    odd = list(checked.findings.lines())
    if not checked.lists:
        raise InputError(f"{checked.benchmark.lists}: no list holds an image; see python -m datasets.prepare check")
    pages = write_summary(checked.benchmark, checked.lists, options.out or benchmark.lists, odd)
    for path in pages:
        print(f"page: {path}")
    if len(pages) == 1:
        print("note: no summary.png, matplotlib is not installed", file=sys.stderr)


def make_miniature(options):
    """Draw the miniature benchmark into a folder that is new or empty."""
    write_miniature(options.root, options.seed)
    print(f"{options.root}: {len(SEEN_CATEGORIES)} seen and {len(UNSEEN_CATEGORIES)} unseen classes")
