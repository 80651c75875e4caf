"""The command of the zero-shot test scripts: features, codebooks, matching, metrics and the report of a benchmark."""

from dataclasses import replace

import numpy as np
import torch

from datasets.loaders import LoaderOptions
from datasets.protocols import PROTOCOLS, unseen_names_of
from models.eval.codebooks import mixture_device
from models.eval.evaluate import class_relevance, evaluate_grid, evaluate_rows
from models.eval.features import (
    FEATURES,
    extract_all,
    features_record,
)
from models.eval.generalised import evaluate_generalised, merge, print_generalised
from models.eval.image_order import UNKNOWN, in_order_of, same_lists
from models.eval.instances import evaluate_instances, find_photos, print_instances
from models.eval.metrics import STANDARD, SameClass, get_metric
from models.eval.report import print_results, summarise, write_report
from models.eval_input import find_input, find_seen_input, get_features
from models.options import grid_of, resolve, resolve_network, test_parser
from models.run_record import run_record
from utils import distributed
from utils.cli import InputError, one_line_errors, sigterm_as_exception
from utils.distributed import log_rank0
from utils.files import write_json


@one_line_errors(should_print=distributed.should_print)
def main(protocol_name, argv=None):
    """Command line of a test script. Returns the content of results.json.

    With torchrun, ranks share the extraction, the mixtures and the queries; ranks other than 0 return None.
    """
    protocol = PROTOCOLS[protocol_name]
    options = resolve(test_parser(protocol).parse_args(argv), protocol, "resume_dir")
    check_instances(options, protocol)
    untrained = options.finetune if options.features_only else None
    eval_input = find_input(protocol, options.resume_dir, options.data_root, options.zero_version, untrained)
    if eval_input.benchmark:
        eval_input.benchmark.check_seen_classes(options.nb_classes)
    seen_input = find_seen_input(eval_input) if options.generalised else None
    with sigterm_as_exception(), distributed.folder_lock_and_group(eval_input.folder, "testing"):
        options = resolve_network(options, eval_input.checkpoint)
        features, seen = (each and _features_of(each, options) for each in (eval_input, seen_input))
        rows = [(m, k) for m in options.subspaces for k in options.clusters] if options.mode == 2 else []
        with distributed.same_error_on_all_ranks():  # which have the same features
            features = name_classes(features, eval_input.benchmark, given=not eval_input.weights)
            features, images = ordered_images(features, eval_input, options.order)
            check_features(features, rows)
            photos = photos_of(images, protocol) if options.instances else None
            of_both = merge_seen(features, seen, seen_input) if seen else None
            rows_of_both = check_both(of_both, rows) if seen else []
        if rows and options.mixture == "torch" and options.mixture_device is None:
            options.mixture_device = _fastest_mixture_device(options.device)
        metrics = tuple(dict.fromkeys((*STANDARD, *options.metrics)))
        on = {"device": options.device, "dtype": getattr(torch, options.distances)}
        result = evaluate_grid(features, grid_of(options, rows), metrics, **on)
        if seen:
            grid = grid_of(options, rows_of_both)
            generalised = evaluate_generalised(of_both, len(features.names), grid, options.metrics, **on)
        distributed.destroy_process_group()
        if distributed.get_rank() != 0:
            return None
        results = _report(protocol, options, eval_input, features, images, result)
        if seen:
            print_generalised(generalised)
            _write_more(eval_input.folder / "generalised.json", generalised, results)
        if options.instances:
            instances = evaluate_instances(features, photos, **on)
            print_instances(instances)
            _write_more(eval_input.folder / "instances.json", instances, results)
        return results


def _features_of(eval_input, options):
    """`get_features` with the options of a test."""
    loading = LoaderOptions(options.input_size, options.batch_size, options.workers, options.device)
    network = {name: getattr(options, name) for name in ("model", "imagenet_classes", "precision", "recompute")}
    return get_features(eval_input, loading, compiled=options.compile, **network)


def _fastest_mixture_device(device):
    """`models.eval.codebooks.mixture_device`, the same on all ranks."""
    fastest = mixture_device(device)
    return "cpu" if distributed.any_rank(fastest == "cpu") else fastest


def _report(protocol, options, eval_input, features, images, result):
    """Print and write the EvalResult of named Features of `images`. Returns the content of results.json."""
    title = eval_input.benchmark.title if eval_input.benchmark else protocol.title
    results = {"benchmark": title, "protocol": protocol.name, "metrics": list(options.metrics)}
    results |= summarise(features, result.averages, run_record(options)) | features_record(eval_input.folder)
    print_results(results, definitions=options.definitions, per_class=options.per_class)
    write_report(eval_input.folder, results, features, result, images)
    return results


def _write_more(path, content, results):
    """Write results of another kind beside results.json, with what both have in common."""
    common = ("benchmark", "protocol", "options", "versions", "features")
    write_json(path, content | {name: results[name] for name in common})
    print(f"results: {path}")


def check_instances(options, protocol):
    """Raise InputError for --instances where sketches of the protocol were not drawn from photos."""
    if options.instances and protocol.pair_pattern is None:
        having = ", ".join(row.title for row in PROTOCOLS.values() if row.pair_pattern)
        raise InputError(
            f"--instances: the sketches of {protocol.title} were not drawn from photos; those of {having} were"
        )


def photos_of(images, protocol):
    """`find_photos` of a QueryGallery, or of None. Raises InputError where no sketch has its photo."""
    if images is None:
        raise InputError("--instances: the file names of these features are not known; see --order")
    photos = find_photos(protocol.pair_pattern, images)
    if not any(photos):
        example = f"{images.query.source}: no sketch, such as {images.query.paths[0]!r}, is named after its photo"
        raise InputError(f"{example}, as {protocol.title} has it; test without --instances")
    return photos


def check_both(features, rows):
    """The rows of generalised retrieval: (M, number of classes of the gallery) for each M of `rows`.

    features: see `merge_seen`. Raises InputError as `check_features` does.
    """
    classes = len(np.unique(features.gallery_labels))
    rows = list(dict.fromkeys((m, classes) for m, _ in rows))
    check_features(features, rows)
    return rows


def merge_seen(unseen, seen, seen_input):
    """`models.eval.generalised.merge` of named Features of unseen classes and those of seen ones."""
    names = seen_input.benchmark.seen_names if seen_input.benchmark else []
    highest = int(max(seen.gallery_labels.max(), seen.query_labels.max()))
    if names and highest >= len(names):
        raise InputError(f"{seen_input.path}: label {highest} is outside 0..{len(names) - 1}, the seen classes")
    if unseen.gallery.shape[1] != seen.gallery.shape[1]:
        raise InputError(
            f"{seen_input.path}: features have {seen.gallery.shape[1]} values, those of unseen classes "
            f"{unseen.gallery.shape[1]}; compute both with one checkpoint"
        )
    return merge(unseen, replace(seen, names=names or [f"seen {label}" for label in range(highest + 1)]))


def name_classes(features, benchmark=None, given=False):
    """Features with labels from 0 and class names: the benchmark's, or numbers without a benchmark.

    Labels beyond the number of classes, such as 100 to 124, are renumbered in ascending order, with a note.
    given: whether the features were given instead of computed from the benchmark. A split that was published in two
    orders of labels is then named by its numbers of sketches if they determine the order, with a note on the order.
    """
    values, sketches = np.unique(features.query_labels, return_counts=True)
    release, names = unseen_names_of(sketches)
    if given and release and values[-1] == len(values) - 1:
        log_rank0(f"note: class names follow {release}, as the numbers of sketches of the labels say")
        return replace(features, names=names)
    if given and benchmark and benchmark.release:
        log_rank0(
            f"note: class names follow {benchmark.release}, as {benchmark.lists} does; the features do not record them"
        )
    labels = np.union1d(features.gallery_labels, features.query_labels)
    unseen = benchmark.unseen_names if benchmark else []
    if labels[-1] < max(len(labels), len(unseen)):
        names = [unseen[label] if label < len(unseen) else str(label) for label in range(labels[-1] + 1)]
        return replace(features, names=names)
    named = len(unseen) == len(labels)
    log_rank0(
        f"note: the features' {len(labels)} labels, {labels[0]} to {labels[-1]}, are not 0 to {len(labels) - 1}: "
        f"taken as {'the unseen classes' if named else 'classes'} in ascending order"
    )
    return replace(
        features,
        gallery_labels=labels.searchsorted(features.gallery_labels),
        query_labels=labels.searchsorted(features.query_labels),
        names=unseen if named else [str(label) for label in labels],
    )


def ordered_images(features, eval_input, order=None):
    """(named Features, the QueryGallery that they belong to, or None with a note where that is not known).

    order: a folder of lists in the order of the features, which also name the classes.
    """
    if order is not None:
        return in_order_of(features, order)
    if eval_input.images is not None and same_lists(eval_input.folder / FEATURES, eval_input.benchmark):
        return features, eval_input.images
    log_rank0(UNKNOWN)
    return features, None


def check_features(features, rows):
    """Raise InputError for named Features that cannot be evaluated: by their classes, or in `rows` of (M, K)."""
    check_relevance(class_relevance(features), features.query_labels, features.names)
    if (features.gallery == features.gallery[0]).all():
        log_rank0("note: all photos have the same features, so every ranking is the gallery's order")
    if len(features.query) < distributed.get_world_size():
        raise InputError(f"{len(features.query)} sketches cannot be shared by {distributed.get_world_size()} processes")
    count, width = features.gallery.shape
    if rows and count < 2:
        raise InputError("--mode 2: a mixture needs two gallery photos or more; use --mode 1")
    for subspaces, clusters in rows:
        if clusters > count:
            row = f"row M {subspaces}, K {clusters}"
            raise InputError(f"--clusters {clusters}: the gallery has only {count} photos ({row}); use fewer")
        if width % subspaces:
            raise InputError(
                f"--subspaces {subspaces}: features of {width} values cannot be cut into {subspaces} equal sub-spaces"
            )


def check_relevance(relevance, query_labels, names):
    """Raise InputError naming the class of a query that has no relevant photo, as it has no AP.

    relevance: a SameClass or ListedPhotos; query_labels: (Q,) array; names: of the classes, by label.
    """
    # Departs from the release: there such a query is a NaN in the mean.
    missing = np.unique(query_labels[(relevance.counts() == 0).numpy()])
    if len(missing):
        raise InputError(
            f"{len(missing)} query classes have no photo in the gallery, first {names[missing[0]]!r}: "
            "its sketches have no AP; add photos to the zero list or remove its sketches"
        )


def zero_shot(student, images, loading, precision="fp32", metrics=STANDARD):
    """One-to-one results of a student on a QueryGallery: {metric: float} on rank 0, {} on other ranks."""
    try:
        features = extract_all(student, images, loading, precision)
    except FloatingPointError as error:
        raise InputError(f"{error}; start anew with a lower --lr") from None
    if features is None:
        return {}
    values = evaluate_rows(features, {None: None}, metrics, device=loading.device)[None]
    labels = torch.from_numpy(features.query_labels)
    return {name: get_metric(name).average(values[name], labels).mean().item() for name in metrics}


def zero_shot_callback(benchmark, loading, precision, every):
    """A function of (student, epoch from 0) that returns `zero_shot` results after every `every` epochs; None for 0.

    Raises InputError where images of unseen classes are missing.
    """
    if not every:
        return None
    images = benchmark.read_query_gallery()
    relevance = SameClass(torch.from_numpy(images.query.labels), torch.from_numpy(images.gallery.labels))
    check_relevance(relevance, images.query.labels, benchmark.unseen_names)
    images.check()

    def after_epoch(student, epoch):
        return {} if (epoch + 1) % every else zero_shot(student, images, loading, precision, benchmark.protocol.metrics)

    return after_epoch
