"""The command line of search_photos.py: `index`, `find` and `page`."""

import argparse
import contextlib
import functools
import json
import os
from pathlib import Path

from photo_search import update
from photo_search.clean_sketch import clean_up, looks_like_photo
from photo_search.encoder import (
    BACKENDS,
    STARTER,
    add_photos,
    backend_of,
    check_checkpoint,
    check_encoder_device,
    encoder_of,
    fit_index_codebook,
    load_encoder,
)
from photo_search.find_picture import draw_found
from photo_search.find_results import (
    OWN_JSON,
    OWN_PICTURE,
    notes_of,
    print_table,
    results_to_json,
    rows_to_draw,
)
from photo_search.index import is_index, open_index
from photo_search.partial_index import unfinished_options
from photo_search.photos import PICTURE
from photo_search.search import DEFAULT_CLUSTER_WEIGHT, MATCHINGS, ONE_TO_ONE, open_searcher, read_sketch
from utils.cli import (
    InputError,
    OneLineParser,
    existing_text,
    image_side,
    number_type,
    one_line_errors,
    path_type,
    positive_int,
    printable,
)
from utils.distributed import get_rank, get_world_size, log_rank0, should_print
from utils.files import STDOUT, check_output, write_json
from utils.memory import check_memory, keep_freed_memory
from utils.process_pool import available_cores

LOCAL, MILVUS = ENGINES = ("local", "milvus")


@one_line_errors(should_print=should_print)
def main(argv=None):
    """Command line of search_photos.py; returns the result of the command."""
    options = create_parser().parse_args(argv)
    return options.run(options)


def create_parser():
    """The commands and their options."""
    parser = OneLineParser(prog="search_photos.py", description="Find photos of your own with a sketch.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name, run, text):
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        added.add_argument(
            "--index", type=path_type, default=Path("photo_index"), metavar="DIR", help="folder of the index"
        )
        added.add_argument("--engine", choices=ENGINES, default=LOCAL,
            help="search in the index on disk, or in a copy of it in Milvus")  # fmt: skip
        added.add_argument(
            "--uri", metavar="ADDRESS", help="address of Milvus: http://HOST:PORT, or a path that ends in .db"
        )
        added.add_argument("--collection", metavar="NAME", help="collection in Milvus (default: photo_index)")
        added.add_argument("--checkpoint", type=path_type, metavar="FILE",
            help="checkpoint of a train script, ours or the authors', or .onnx of models.export (default: "
            "that of the index; for a new one, the network that comes with the project)")  # fmt: skip
        added.add_argument("--backend", choices=BACKENDS, help="torch for checkpoints, onnx for exported "
            "files, without loading PyTorch (default: by the suffix of the checkpoint)")  # fmt: skip
        added.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
        return added

    index = command("index", run_index, "index folders of photos, or bring their index up to date")
    add = index.add_argument
    add(
        "folders",
        nargs="*",
        type=existing_text,
        metavar="folder",
        help="folders of photos to add to those of the index",
    )
    add("--remove", action="append", type=existing_text, default=[], metavar="FOLDER",
        help="remove a folder from the index; may be given several times")  # fmt: skip
    add("--only", action="store_true", help="remove what is not found in the folders that are named (default: those "
        "of the index)")  # fmt: skip
    add("--exclude", action="append", metavar="GLOB", help="exclude files and folders with this name, or this path "
        "inside a folder; may be given several times")  # fmt: skip
    add("--hidden", action=argparse.BooleanOptionalAction, help="take hidden files and folders, and those of systems "
        "such as @eaDir and #recycle (default: as in the index; no in a new one)")  # fmt: skip
    add("--truncated", action="store_true", help="take files that are cut off, as far as they can be decoded")
    add("--model", help="timm model, for a checkpoint that does not record it (default: convnextv2_tiny)")
    add("--input_size", type=image_side,
        help="side of an input image, in pixels (default: what the checkpoint was trained with, else 224)")  # fmt: skip
    add(
        "--imagenet_classes",
        type=positive_int,
        help="outputs of the ImageNet head (default: what the checkpoint records, else 1000)",
    )
    add("--clusters", type=positive_int, metavar="K", help="number of clusters (default: a 25th of the photos, at "
        f"most {update.MAX_DEFAULT_CLUSTERS}; none below {update.MIN_PHOTOS_FOR_CLUSTERS} photos)")  # fmt: skip
    add("--subspaces", type=positive_int, metavar="M", help="number of subspaces of a feature (default: 2)")
    add("--refit", action="store_true", help="fit the clusters again, to the present photos; as many as "
        "--clusters says, or its default, whatever the index has now")  # fmt: skip
    add("--batch_size", type=positive_int, default=64, help="photos in a batch")
    add("--workers", type=number_type(int, 0, 1000, "a whole number from 0 to 1000"), default=min(4, available_cores()),
        help="processes that decode photos")  # fmt: skip

    find = command("find", run_find, "find the photos of an index that look like sketches")
    add = find.add_argument
    add("sketches", nargs="+", type=existing_text, metavar="sketch", help="image file of a sketch")
    add("-k", type=positive_int, default=20, help="how many photos to show")
    add("--as_drawn", action="store_true", help="do not clean up sketches (default: normalise paper, size and lines "
        "to those of the training sketches)")  # fmt: skip
    add("--matching", choices=MATCHINGS, help="(default: one-to-many if the index has clusters)")
    add("--cluster_weight", type=number_type(float, 0, 1, "a number from 0 to 1"), metavar="W",
        help="weight of the cluster distance in one-to-many matching, 0 to 1; the paper's is 0.8 "
        f"(default: {DEFAULT_CLUSTER_WEIGHT})")  # fmt: skip
    add("--json", type=path_type, metavar="FILE", help="write the results to FILE; - prints them, and nothing else")
    add("--picture", type=path_type, metavar="FILE", help="write the picture to FILE (default: found.png in the index "
        "where that can be written, or in the current folder with Milvus)")  # fmt: skip

    page = command("page", run_page, "serve a page for the browser: draw, and see the photos of an index")
    add = page.add_argument
    add("--port", type=number_type(int, 0, 65535, "a port from 0 to 65535"), default=8000, help="0 for any free port")
    add("--host", default="127.0.0.1", help="address to listen on; any but the loopback addresses needs --token")
    add("--token", metavar="TEXT", help="secret that clients must send, at the end of the address: /?token=TEXT; auto "
        "makes one and prints it (default: the environment variable PAGE_TOKEN, which the list of processes does not "
        "show)")  # fmt: skip
    add("--watch", nargs="?", const=10, type=number_type(int, 1, 86400, "a whole number of seconds up to a day"),
        metavar="SECONDS", help="index new and changed photos while the page runs; their folders are scanned every "
        "SECONDS (without a number: 10)")  # fmt: skip
    add("--open", action="store_true", help="open the page in the browser")
    return parser


def run_index(options):
    """Make or update an index; returns update.UpdateStats. Rank 0 writes; all ranks compute features."""
    old = open_index(options.index).metadata if is_index(options.index) else None
    recorded = _changed_meanwhile(options, old) if old else _unfinished(options)
    if options.folders and not options.checkpoint and not old:
        options.checkpoint = _starter()
    _check_backend(options)
    if get_rank():
        from photo_search import distributed_indexing

        return distributed_indexing.follow(options.checkpoint, options.device, options.workers)
    _check_index_options(options, old, recorded)
    publish = _publisher(options)
    checkpoint = str(options.checkpoint.absolute()) if options.checkpoint else None
    encoder = functools.cache(functools.partial(_load_encoder, options, old))
    fit = functools.partial(fit_index_codebook, checkpoint or old["checkpoint"])
    with keep_freed_memory(), _feature_computation() as add:
        stats = update.update_index(options.index, encoder, fit, _index_options(options, recorded, checkpoint), add)
    _print_stats(options.index, stats, options.exclude)
    if publish:
        publish()
    return stats


def _changed_meanwhile(options, old):
    """The metadata `old` of an index, with folders and patterns of an interrupted run that changed them.

    That run is not continued where folders are named.
    """
    unfinished = None if options.folders else unfinished_options(options.index)
    if not unfinished:
        return old
    log_rank0(f"note: continuing with {', '.join(unfinished['folders'])}")
    return old | {name: unfinished[name] for name in ("folders", "exclude", "hidden") if name in unfinished}


def _unfinished(options):
    """The unfinished_options of an index; sets what the command line leaves out of checkpoint and model."""
    if recorded := unfinished_options(options.index):
        if not options.checkpoint:
            log_rank0(f"note: continuing with {', '.join(recorded['folders'])} and {recorded['checkpoint']}")
            options.checkpoint = Path(recorded["checkpoint"])
        for name in ("model", "input_size", "imagenet_classes"):
            setattr(options, name, getattr(options, name) or recorded[name])
    return recorded


def _check_index_options(options, old, recorded):
    """Raise InputError if options contradict the metadata of an index, or do not suffice for a new one (old: None).

    recorded: that metadata, or those of an interrupted first run.
    """
    if old is None:
        if not options.folders and not recorded:
            raise InputError(f"{options.index}: there is no index yet, and a new one needs a folder of photos")
        return
    if options.device:  # an index that is up to date needs none, and a wrong one would be found out much later
        check_encoder_device(options.checkpoint or old["checkpoint"], options.device)
    if options.checkpoint:
        check_checkpoint(old, options.checkpoint)
    for name in ("model", "input_size", "imagenet_classes"):
        if getattr(options, name) not in (None, old[name]):
            raise InputError(
                f"--{name} {getattr(options, name)}: {options.index} was made with {old[name]}, and features of two do "
                "not mix; name another --index"
            )


def _starter():
    """The path of the network that comes with the project, which a line names. Raises InputError if it is missing."""
    if not STARTER.is_file():
        raise InputError(f"{STARTER}: the network of the project is missing; restore it, or name one with --checkpoint")
    log_rank0("note: features by the network in checkpoint/starter; --checkpoint takes another")
    return STARTER


def _load_encoder(options, old):
    own = options.model, options.input_size, options.imagenet_classes
    encoder = (
        encoder_of(old, options.checkpoint, options.device, threads=1)
        if old
        else load_encoder(options.checkpoint, *own, options.device, threads=1)
    )
    size = encoder.metadata["input_size"]
    needed = 2 * 3 * options.batch_size * size**2  # images of a batch, one by one and together
    check_memory(size, options.batch_size, needed)
    return encoder


def _index_options(options, old, checkpoint):
    """update.IndexOptions; what the command line leaves out stays as it is in an index with the metadata `old`."""
    exclude = old["exclude"] if old and options.exclude is None else options.exclude or []
    hidden = bool(old and old.get("hidden")) if options.hidden is None else options.hidden
    return update.IndexOptions(
        folders=_folders(options, old["folders"] if old else []),
        exclude=exclude,
        clusters=options.clusters,
        subspaces=options.subspaces,
        refit=options.refit,
        batch_size=options.batch_size,
        workers=options.workers,
        checkpoint=checkpoint,
        only=options.only,
        hidden=hidden,
        truncated=options.truncated,
    )


def _folders(options, old):
    """The folders of the index, `old` being those until now. Raises InputError for --remove of another, or of all."""
    named = [os.path.realpath(folder) for folder in options.folders]
    folders = list(dict.fromkeys(named if options.only and named else [*old, *named]))
    for folder in options.remove:
        absolute = os.path.realpath(folder)
        if absolute not in folders:
            raise InputError(f"--remove {folder}: not a folder of the index; its folders are {', '.join(folders)}")
        folders.remove(absolute)
    if not folders:
        raise InputError(f"--remove: no folder would be left; to delete the index, delete {options.index}")
    return folders


@contextlib.contextmanager
def _feature_computation():
    """Yields the add_photos function for update.update_index: of this process alone, or shared by all ranks."""
    if get_world_size() == 1:
        yield add_photos
        return
    from photo_search import distributed_indexing

    with distributed_indexing.leading():
        yield distributed_indexing.add_photos


def _publisher(options):
    """A function that copies the index to Milvus; None for the local engine. Raises InputError."""
    if not (milvus := _milvus(options)):
        return None
    from photo_search.milvus_publish import check_own, publish

    server = milvus.Server(options.uri, options.collection)
    check_own(server, options.index)

    def run():
        said = "now holds these photos" if publish(server, open_index(options.index)) else "held these photos already"
        print(f"{server.address}: {said}")

    return run


def _location(options):
    """The location of the index, see search.open_index_at. Raises InputError."""
    milvus = _milvus(options)
    return milvus.existing_server(options.uri, options.collection) if milvus else options.index


def _milvus(options):
    """The module photo_search.milvus for --engine milvus; None for the local engine. Raises InputError."""
    if options.engine == LOCAL:
        for name in ("uri", "collection"):
            if (asked := getattr(options, name)) is not None:
                raise InputError(f"--{name} {asked}: only for --engine {MILVUS}")
        return None
    if not options.uri:
        raise InputError(f"--engine {MILVUS}: needs --uri, the address of Milvus (see --help)")
    try:
        from photo_search import milvus
    except ImportError as error:
        raise InputError(f"--engine {MILVUS}: needs {error.name}; pip install -r requirements-milvus.txt") from None
    return milvus


def _print_stats(folder, stats, exclude):
    for line in notes_of(stats, exclude):
        log_rank0(f"note: {line}")
    index = open_index(folder)
    kinds = ("new", "changed", "moved", "removed")
    parts = [f"{getattr(stats, kind):,} {kind}" for kind in kinds] + [f"{len(stats.unreadable):,} unreadable"]
    rate = f", features of {stats.extracted / stats.extraction_seconds:.1f} photos a second" if stats.extracted else ""
    clusters = "M {}, K {}".format(*index.clusters) if index.clusters else "one-to-one matching alone"
    print(f"{printable(folder)}: {stats.photos:,} photos ({', '.join(parts)}), {clusters}; {stats.seconds:.1f} s{rate}")
    if not index.clusters:
        log_rank0(f"note: clusters are fitted from {update.MIN_PHOTOS_FOR_CLUSTERS} photos on, or with --clusters")
    if index.share_new > update.REFIT_SHARE:
        log_rank0(
            f"note: {index.share_new:.0%} of the photos are newer than the clusters; --refit fits the clusters again"
        )


def run_find(options):
    """Find photos; returns what --json writes."""
    _check_backend(options)
    json_path, picture = _outputs(options)
    sketches = [read_sketch(path) for path in options.sketches]
    if not options.as_drawn:
        for sketch, path in zip(sketches, options.sketches, strict=True):
            if looks_like_photo(sketch):
                log_rank0(f"note: {path}: looks like a photo, not like a drawing; --as_drawn compares it as it is")
        sketches = [clean_up(sketch, path) for sketch, path in zip(sketches, options.sketches, strict=True)]
    searcher = open_searcher(_location(options), options.checkpoint, options.device)
    matching, weight = (
        searcher.matching(options.matching),
        searcher.cluster_weight(options.matching, options.cluster_weight),
    )
    picture = picture or _default_picture(options)
    if matching != options.matching and matching == ONE_TO_ONE:
        log_rank0(f"note: {searcher.index.name} has no clusters, so matching is one-to-one")
    if options.k > len(searcher.index):
        log_rank0(f"note: the index has only {len(searcher.index):,} photos; all are shown")
    found, missing = [], set()
    for features in _features(searcher.encoder, sketches):
        hits, gone = searcher.find_present(features, options.k, matching, weight=weight)
        missing.update(gone)
        found.append(hits)
    result = results_to_json(options.sketches, matching, weight, found)
    if json_path:  # before the tables, whose reader may close their pipe
        write_json(json_path, result)
    if missing:
        photos = "1 photo that would be shown does" if len(missing) == 1 else f"{len(missing):,} photos found do"
        log_rank0(f"note: {photos} not exist now, or cannot be reached; index removes those that were deleted")
    if options.json == STDOUT:
        print(json.dumps(result, indent=2))
    else:
        for path, hits in zip(options.sketches, found, strict=True):
            print_table(path, matching, hits)
    rows = rows_to_draw(options.sketches, sketches, found, searcher.index) if picture else []
    if picture:
        draw_found(picture, rows)
    if picture and options.json != STDOUT:
        print(f"picture: {options.picture or picture}")
    return result


def _features(network, sketches, batch_size=64):
    for start in range(0, len(sketches), batch_size):
        yield from network.features(sketches[start : start + batch_size])


def _outputs(options):
    """(path of the JSON, path of the picture); None for those that the user does not name. Raises InputError."""
    json_path = None if options.json in (None, STDOUT) else check_output(options.json, "--json", OWN_JSON)
    picture = options.picture and check_output(options.picture, "--picture", OWN_PICTURE)
    if json_path and json_path == picture:
        raise InputError(f"--picture {options.picture}: is the file of --json; choose another")
    return json_path, picture


def _default_picture(options):
    """found.png in the index; None, with a note, where that cannot be written or holds another picture."""
    if options.json == STDOUT:
        return None
    path = (options.index if options.engine == LOCAL else Path()) / PICTURE
    try:
        return check_output(path, "", OWN_PICTURE)
    except InputError as error:
        log_rank0(f"note: {PICTURE} is not drawn: {str(error).rpartition('; ')[0]}; --picture FILE names another place")
        return None


def run_page(options):
    """Serve the page until Ctrl-C."""
    try:
        from photo_search.server import serve
    except ImportError as error:
        raise InputError(f"the page needs {error.name}; pip install -r requirements-search.txt") from None
    _check_backend(options)
    own = (options.host, options.port, options.token, options.open, options.watch)
    serve(_location(options), options.checkpoint, options.device, *own)


def _check_backend(options):
    """Raise InputError if --backend contradicts the suffix of the checkpoint."""
    if options.backend is None:
        return
    checkpoint = options.checkpoint
    if not checkpoint and options.engine == LOCAL and is_index(options.index):
        checkpoint = open_index(options.index).metadata["checkpoint"]
    if checkpoint and backend_of(checkpoint) != options.backend:
        wanted = {"onnx": "what models.export wrote from it, as .onnx", "torch": "what it was exported from"}
        raise InputError(
            f"--backend {options.backend}: does not compute with {checkpoint}; name with --checkpoint "
            f"{wanted[options.backend]}"
        )
