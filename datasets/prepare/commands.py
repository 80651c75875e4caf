"""The commands of `python -m datasets.prepare` and their options."""

import json
import os
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from datasets.lists import (
    LIST_DESCRIPTIONS,
    MASK_FILE,
    TITLE_FILE,
    check_root,
    find_layout,
    format_list,
    open_benchmark,
    read_names,
    write_mask,
)
from datasets.prepare.check import check_benchmark, check_result_to_json, print_check_result
from datasets.prepare.hold_out import derive_lists
from datasets.prepare.make_lists import lists_from_class_folders, lists_from_images, lists_from_lists
from datasets.prepare.miniature import SEEN_CATEGORIES, UNSEEN_CATEGORIES, write_miniature
from datasets.protocols import PROTOCOLS
from utils import cli
from utils.cli import InputError, path_type, printable, signals_blocked
from utils.files import STDOUT, atomic_write, check_output, check_writable, write_json

_FINDINGS = rb'\A\s*\{\s*"(title|rows)":'  # how the JSON of `check` begins


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
        added.add_argument("root", type=path_type, help="folder of the data set")
        return added

    _add_lists_options(command("lists", make_lists, "write the lists of a benchmark from its image folders, from the "
        "lists of another release, or with seen classes held out"))  # fmt: skip

    mask = command("mask", make_mask, "compute the semantic mask of the seen classes from WordNet 3.0")
    _add_protocol(mask)
    _add_zero_version(mask, "that of the protocol")
    mask.add_argument("--wordnet", type=path_type, metavar="DIR", help="folder with the database files of WordNet 3.0, "
        "or NLTK's data folder (default: the places where Debian's wordnet-base and NLTK install them)")  # fmt: skip
    mask.add_argument("--force", action="store_true", help="replace an existing mask")

    checked = command("check", check, "check whether a benchmark folder is ready; report faults with file and line")
    either = checked.add_mutually_exclusive_group(required=True)
    _add_protocol(either, required=False)
    either.add_argument("--custom", action="store_true", help="a benchmark of your own, in any known layout")
    _add_zero_version(checked, "that of the protocol; with --custom, the first one found")
    checked.add_argument("--test_only", action="store_true", help="check only what a zero-shot test reads: class names "
        "and the lists of unseen classes")  # fmt: skip
    checked.add_argument("--images", action="store_true", help="also decode every image, on all cores")
    checked.add_argument("--json", type=path_type, metavar="FILE", help="write findings to FILE; a link is followed; "
        "- prints them, and nothing else")  # fmt: skip

    summary = command("summary", make_summary, "write a page: classes, counts, sample images, oddities")
    _add_zero_version(summary, "the first one found")
    summary.add_argument(
        "--out",
        type=path_type,
        metavar="DIR",
        help="folder for summary.html and summary.png (default: the folder of lists)",
    )

    miniature = command("miniature", make_miniature, "draw the built-in miniature benchmark into a new or empty folder")
    miniature.add_argument("--seed", type=cli.seed_type, default=0, help="another seed draws other images")
    return parser


def _add_lists_options(parser):
    either = parser.add_mutually_exclusive_group(required=True)
    _add_protocol(either, required=False)
    either.add_argument("--custom", action="store_true", help="a benchmark of your own, from any folders of class "
        "folders")  # fmt: skip
    _add_zero_version(parser, "that of the protocol; with --custom zeroshot1, or the first one found")
    add, whole = parser.add_argument, cli.number_type(int, 0, 10**6, "a whole number, 0 or more")
    add("--held_back", type=whole, metavar="N",
        help="number of sketches of each seen class in the validation list; 0 writes no such list (default: 50 for "
        "Sketchy, 10 for TU-Berlin Ext, else 0)")  # fmt: skip
    add("--seed", type=cli.seed_type, help="chooses what is held back, and held-out and unseen classes (default: 0)")
    add("--convert", type=cli.folder_name, metavar="NAME", help="convert the "
        "lists of another release in this folder, such as zeroshot0, instead of reading the image folders")  # fmt: skip
    add("--force", action="store_true", help="replace existing lists")
    add = parser.add_argument_group("lists derived from the lists of --zero_version").add_argument
    add("--hold_out_classes", type=cli.number_type(int, 2, 10**6, "a whole number, 2 or more"), metavar="N",
        help="hold out N of the seen classes, which are the unseen ones of the new lists")  # fmt: skip
    add("--hold_out_photos", type=_photos_of_a_class, metavar="SHARE|N",
        help="hold back a share of the training photos of each seen class, such as 0.1, or N of each: the list "
        "'test' of photos, for generalised retrieval")  # fmt: skip
    add("--out", type=path_type, metavar="NAME|DIR/NAME",
        help="folder of the new lists; in another DIR, links to the image folders are made beside it (default: "
        "<zero_version>_held_out_<seed>, or _held_back_<seed> without held-out classes)")  # fmt: skip
    add = parser.add_argument_group("lists of a benchmark of your own (--custom)").add_argument
    add("--sketches", nargs="+", metavar="DIR", help="folders of class folders, inside the data set (default: sketch, "
        "or train/sketch and val/sketch)")  # fmt: skip
    add("--photos", nargs="+", metavar="DIR", help="the same for photos")
    add("--unseen", type=path_type, metavar="FILE", help="names of the unseen classes, one a line (default: the "
        "classes of val/)")  # fmt: skip
    add("--unseen_classes", type=cli.positive_int, metavar="N", help="or their number; --seed chooses them")


def _photos_of_a_class(text):
    value = cli.number_type(float, 1e-6, 10**6, "a share below 1, or a whole number of photos")(text)
    return cli.positive_int(text) if value >= 1 else value


def _add_protocol(parser, **kwargs):
    kwargs = {"required": True} | kwargs
    parser.add_argument("--protocol", choices=PROTOCOLS, metavar="|".join(PROTOCOLS), help="the benchmark", **kwargs)


def _add_zero_version(parser, default):
    text = f"name of the folder of lists (default: {default})"
    parser.add_argument("--zero_version", type=cli.folder_name, metavar="NAME", help=text)


def make_lists(options):
    """Write lists: of a protocol, from its image folders or the lists of another release (--convert); of a benchmark
    of the user's own, from any class folders (--custom); or derived from other lists (--hold_out_classes).

    All lists are made before the first one is written, and they are written together.
    """
    check_root(options.root)
    _check_lists_options(options)
    if options.hold_out_classes or options.hold_out_photos:
        return make_derived_lists(options)
    protocol = PROTOCOLS[options.protocol or "sketchy"]
    if options.convert:
        if options.held_back is not None or options.seed is not None:
            raise InputError("--convert keeps the validation list of the release; leave out --held_back and --seed")
        lists, notes = lists_from_lists(protocol, options.root, options.convert)
    elif options.custom:
        protocol = replace(protocol, published={})
        unseen = read_names(options.unseen) if options.unseen else options.unseen_classes
        folders = {"sketch": options.sketches, "photo": options.photos}
        lists, notes = lists_from_class_folders(
            protocol, options.root, folders, unseen, options.held_back or 0, options.seed or 0
        )
    else:
        held_back = protocol.held_back if options.held_back is None else options.held_back
        lists, notes = lists_from_images(protocol, options.root, held_back, options.seed or 0)
    folder = options.root / (options.zero_version or protocol.zero_version)
    new = {name: rows for name, rows in lists.items() if _content(folder / name) != format_list(rows)}
    _check_old_lists(folder, protocol, lists, new, options)
    for line in notes:
        print(line, file=sys.stderr)
    _write_together(folder, {name: format_list(rows) for name, rows in new.items()})
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
            raise InputError(f"{folder / name}: exists with other content; replace it with --force")
    for key in LIST_DESCRIPTIONS if options.convert is None and not options.force else ():
        for other in protocol.list_names(*key)[1:]:
            if (folder / other).exists():
                raise InputError(f"{folder / other}: exists and would no longer be read; see --convert and --force")
    held_back = folder / protocol.list_names("sketch", "test")[0]
    if held_back.exists() and held_back.name not in lists:
        way_out = "" if options.convert else ", or see --held_back"
        raise InputError(f"{held_back}: exists, but nothing is held back; move it away{way_out}")


def _check_lists_options(options):
    """Raise InputError for options of `lists` that do not go together."""
    derived = options.hold_out_classes or options.hold_out_photos
    own = {"--sketches": options.sketches, "--photos": options.photos, "--unseen": options.unseen,
           "--unseen_classes": options.unseen_classes}  # fmt: skip
    given = [name for name, value in own.items() if value]
    if given and (derived or not options.custom):
        raise InputError(f"{given[0]}: is for lists of a benchmark of your own from its class folders; see --custom")
    if options.unseen and options.unseen_classes:
        raise InputError("--unseen and --unseen_classes: use one of them")
    if options.unseen and not os.path.isfile(options.unseen):
        raise InputError(f"--unseen {options.unseen}: no file; name one of class names, one a line")
    if options.convert and (options.custom or derived):
        raise InputError("--convert: is for the lists of a release of --protocol; hold out classes of its result")
    if options.out and not derived:
        raise InputError("--out: is for --hold_out_classes and --hold_out_photos; see --zero_version")


def make_derived_lists(options):
    """Write lists derived from others: with seen classes held out, or photos of seen classes held back, or both."""
    name, zero_version = options.protocol, options.zero_version
    if options.custom:
        name, zero_version = find_layout(options.root, zero_version)
    benchmark, seed = open_benchmark(name, options.root, zero_version), options.seed or 0
    ending = "held_out" if options.hold_out_classes else "held_back"
    out = options.out or Path(f"{benchmark.lists.name}_{ending}_{seed}")
    if out.name in ("", ".."):
        raise InputError(f"--out {out}: does not end in the name of a new folder; give NAME or DIR/NAME")
    folder = out if len(out.parts) > 1 else options.root / out
    contents = derive_lists(
        benchmark, options.hold_out_classes or 0, options.hold_out_photos or 0, options.held_back or 0, seed
    )
    _check_derived_folder(folder, contents, benchmark, options.force)
    links = image_links(benchmark, folder.parent)
    check_writable(folder.parent)
    for link, target in links.items():  # before the lists: a folder with lists is complete
        with suppress(FileExistsError):
            link.symlink_to(target)
        print(f"{link}: a link to {target}")
    _write_together(folder, contents)
    for name, content in contents.items():
        lines = content.count(b"\n") if name.endswith(".txt") else None
        print(f"{folder / name}" + (f": {lines:,}" if lines and name != TITLE_FILE else ""))
    print(f"{contents[TITLE_FILE].decode().strip()}: --data_root {folder.parent} --zero_version {folder.name}")


def _check_derived_folder(folder, contents, benchmark, force):
    """Raise InputError if writing `contents` into `folder` would replace lists without --force, or leave old ones."""
    if os.path.realpath(folder) == os.path.realpath(benchmark.lists):
        raise InputError(f"--out {folder}: is the folder that the new lists are made from; choose another")
    if not os.path.lexists(folder):
        return
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: is no folder; choose another with --out")
    if not any(os.path.lexists(folder / name) for name in contents) and any(os.scandir(folder)):
        raise InputError(f"{folder}: holds something else than lists; choose another with --out")
    if not force:
        raise InputError(f"{folder}: is there already; choose another with --out, or replace its lists with --force")
    known = {name for key in LIST_DESCRIPTIONS for name in benchmark.protocol.list_names(*key)} | {MASK_FILE}
    if left := sorted(name for name in known - contents.keys() if os.path.lexists(folder / name)):
        raise InputError(f"{folder / left[0]}: would remain beside lists that it does not fit; move it away")


def image_links(benchmark, root):
    """{link: target} of the image folders that the lists of `benchmark` need in another data folder `root`.

    Raises InputError where something else has the name of an image folder there.
    """
    links = {}
    if os.path.realpath(root) == os.path.realpath(benchmark.root):
        return links
    for key in LIST_DESCRIPTIONS:
        if not os.path.isfile(benchmark.path(*key)):
            continue
        for top in {path.split("/")[0] for path in benchmark.read(*key).paths}:
            link, target = root / top, Path(os.path.realpath(benchmark.root / top))
            if not os.path.lexists(link):
                links[link] = target
            elif os.path.realpath(link) != str(target):
                raise InputError(f"{link}: is not {target}, which the lists need there; choose another --out DIR/NAME")
    return links


def _write_together(folder, contents):
    """Write {name: bytes} into `folder`. No file changes before all new ones are on the disk under temporary names."""
    with signals_blocked(), ExitStack() as renames:
        for name, content in contents.items():
            file = renames.enter_context(atomic_write(folder / name))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _content(path):
    return path.read_bytes() if path.is_file() else None


def _published(protocol, name):
    """Number of rows of the published list called `name`, or None if it is not known."""
    return next((count for key, count in protocol.published.items() if protocol.list_names(*key)[0] == name), None)


def check(options):
    """Print a table of the lists and all findings; raise InputError if there is a fault."""
    target = check_output(options.json, "--json", _FINDINGS) if options.json not in (None, STDOUT) else None
    checked = check_benchmark(options.root, options.protocol, options.zero_version, options.images, options.test_only)
    if options.json == STDOUT:
        print(json.dumps(check_result_to_json(checked), indent=2))
    else:
        print_check_result(checked)
    if target:
        write_json(target, check_result_to_json(checked))
        print(f"findings: {printable(options.json)}")
    if count := sum(map(len, checked.findings.faults.values())):
        faults = "a fault" if count == 1 else f"{count:,} faults"
        raise InputError(f"{options.root}: not ready, {faults} (see above); correct this, and check again")
    ready = "ready for tests" if options.test_only else "ready"
    if options.json != STDOUT:
        print(ready if options.images else f"{ready}, but no image was decoded; --images decodes them all")


def make_mask(options):
    """Write cid_mask.pickle of the seen classes.

    A class is looked up in WordNet by the ids in the names of its training photos; without such ids, by its own name.
    """
    from datasets.prepare.wordnet_mask import (  # imports timm and torch, which takes seconds
        compute_wordnet_mask,
        photo_ids,
    )

    check_root(options.root)
    benchmark = open_benchmark(options.protocol, options.root, options.zero_version)
    path = benchmark.lists / MASK_FILE
    if path.exists() and not options.force:
        raise InputError(f"{path}: exists; replace it with --force")
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
    from datasets.prepare.summary import write_summary  # imports Pillow and NumPy

    name, zero_version = find_layout(options.root, options.zero_version)
    benchmark = open_benchmark(name, options.root, zero_version, on_error=lambda _: None)  # the check below reports it
    published = set(PROTOCOLS[name].unseen_names) == set(benchmark.unseen_names)
    checked = check_benchmark(options.root, name if published else None, zero_version)
    odd = list(checked.findings.lines())
    if not checked.lists:
        raise InputError(f"{checked.benchmark.lists}: no list holds an image; see python -m datasets.prepare check")
    for path in write_summary(checked.benchmark, checked.lists, options.out or benchmark.lists, odd):
        print(f"page: {path}")


def make_miniature(options):
    """Draw the miniature benchmark into a folder that is new or empty."""
    write_miniature(options.root, options.seed)
    print(f"{options.root}: {len(SEEN_CATEGORIES)} seen and {len(UNSEEN_CATEGORIES)} unseen classes")
