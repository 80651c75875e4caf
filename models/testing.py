"""The zero-shot test of SBKA (arXiv:2312.10320), end to end: features, codebooks, matching, metrics, report."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.lists import Benchmark, QueryGallery, open_benchmark
from datasets.loaders import LoaderOptions
from datasets.protocols import PROTOCOLS, protocol_of
from models.checkpoints import check_seen_classes, find_checkpoint, load_student
from models.eval.codebooks import fit_codebooks, mixture_device
from models.eval.evaluate import WeightedCodebook, evaluate_rows
from models.eval.features import FEATURES, compute_features, extract_all, features_record, source_of, stored_features
from models.eval.matching import CLUSTER_WEIGHT
from models.eval.metrics import DEFINED, STANDARD, by_definition, class_means
from models.eval.report import print_classes, print_definitions, print_table, summarise, write_report
from models.options import resolve, resolve_network, run_record, test_parser
from models.weights import check_size
from utils import distributed
from utils.cli import InputError, one_line_errors, sigterm_as_exception
from utils.distributed import log_rank0
from utils.files import check_writable
from utils.memory import keep_freed_memory


@one_line_errors(should_print=distributed.should_print)
def main(protocol_name, argv=None):
    """Command line of a test script. Returns the results as they are in results.json.

    Several processes share the extraction, the mixtures and the sketches to match; but for the first they return None.
    """
    protocol = PROTOCOLS[protocol_name]
    options = resolve(test_parser(protocol).parse_args(argv), protocol, "resume_dir")
    other = PROTOCOLS[protocol_of(protocol_name, options.zero_version)]
    if other is not protocol:
        log_rank0(f"note: {options.zero_version} is the folder of {other.title}; this is the test of {protocol.title}")
    eval_input = find_input(protocol, options.resume_dir, options.data_root, options.zero_version)
    if eval_input.benchmark:
        eval_input.benchmark.check_seen_classes(options.nb_classes)
    options = resolve_network(options, eval_input.checkpoint)
    with sigterm_as_exception(), distributed.folder_lock_and_group(eval_input.folder, "testing"):
        loading = LoaderOptions(options.input_size, options.batch_size, options.workers, options.device)
        network = Network(options.model, options.imagenet_classes, options.compile)
        features = features_of(eval_input, network, loading, options.precision, options.recompute)
        rows = [(m, k) for m in options.subspaces for k in options.clusters] if options.mode == 2 else []
        with distributed.same_error_on_all_ranks():  # all processes have the same features
            features = name_classes(features, eval_input.benchmark)
            check_features(features, rows)
        if rows and options.mixture == "torch" and options.mixture_device is None:
            fastest = mixture_device(options.device)
            options.mixture_device = "cpu" if distributed.any_rank(fastest == "cpu") else fastest
        grid = Grid(
            rows, options.mixture_seeds, options.mixture, options.mixture_device or "cpu", options.nearest,
            options.cluster_weight,
        )  # fmt: skip
        metrics = tuple(dict.fromkeys((*STANDARD, *protocol.metrics)))
        measured = measure(features, grid, metrics, options.device, getattr(torch, options.distances))
        distributed.destroy_process_group()
        if distributed.get_rank() != 0:
            return None
        title = eval_input.benchmark.title if eval_input.benchmark else protocol.title
        results = {"benchmark": title, "protocol": protocol.name, "metrics": list(protocol.metrics)}
        results |= summarise(features, metrics, measured.means, run_record(options)) | features_record(
            eval_input.folder
        )
        print_table(results)
        if options.definitions:
            print_definitions(results)
        if options.per_class:
            print_classes(results)
        write_report(eval_input.folder, results, features, measured, eval_input.images)
        return results


@dataclass(frozen=True)
class EvalInput:
    """What is tested: features_zero.pickle in `folder`, or what a checkpoint makes of a benchmark's images."""

    folder: Path  # takes the results
    checkpoint: Path | None
    benchmark: Benchmark | None  # None where it is not at hand
    images: QueryGallery | None
    no_images: InputError | None  # why there are none


def find_input(protocol, place, data_root, zero_version):
    """The EvalInput of a test of `protocol`; place: a checkpoint, or a folder that holds one or features_zero.pickle.

    Raises InputError where neither is there, or the folder cannot be written.
    """
    if os.path.isfile(place):
        folder, checkpoint = place.parent, place if place.name != FEATURES else None
    else:
        folder, checkpoint = place, find_checkpoint(place, protocol.kept_checkpoint)
        if checkpoint is None and not os.path.isfile(place / FEATURES):
            raise InputError(
                f"{place}: neither {protocol.kept_checkpoint} nor {FEATURES} is there; train first, or set --resume_dir"
            )
    check_writable(folder)
    try:
        benchmark = open_benchmark(protocol.name, data_root, zero_version)
        return EvalInput(folder, checkpoint, benchmark, benchmark.read_query_gallery(), None)
    except InputError as error:  # which matters only if features_zero.pickle does not do
        return EvalInput(folder, checkpoint, None, None, error)


class Network(NamedTuple):
    """The network of a checkpoint."""

    model: str
    imagenet_classes: int = 1000
    compiled: bool = False  # by torch.compile, which changes features by rounding at most


def features_of(eval_input, network, loading, precision="fp32", recompute=False):
    """Features of a EvalInput: those of features_zero.pickle if they will do, else computed, by all processes together.

    network: the checkpoint's Network; loading: LoaderOptions; precision: see models.networks.arithmetic;
    recompute: compute them even so. Raises InputError where they must be computed and cannot.
    """
    folder, checkpoint, images = eval_input.folder, eval_input.checkpoint, eval_input.images
    if checkpoint is None and recompute:
        raise InputError(f"--recompute: {folder} holds no checkpoint to compute features with; test them as they are")
    source = checkpoint and source_of(checkpoint, network.model, loading.size, precision, eval_input.benchmark)
    features = None if recompute else stored_features(folder, checkpoint, source)
    if features is None and images is None:
        stored = os.path.isfile(folder / FEATURES)
        way_out = f", or move {checkpoint.name} away to test {FEATURES} as it is" if stored else ""
        raise InputError(f"{eval_input.no_images}{way_out}")
    if features is not None:
        distributed.init_process_group(loading.device)
        return features
    student, metadata, _ = load_student(checkpoint, network.model, imagenet_classes=network.imagenet_classes)
    check_seen_classes(checkpoint, metadata["seen_classes"], len(eval_input.benchmark.seen_names))
    check_size(student, network.model, loading.size)
    images.check()
    if network.compiled:
        student.compile_features()
    distributed.init_process_group(loading.device)
    try:
        with keep_freed_memory():
            return compute_features(folder, student.to(loading.device), images, loading, precision, source)
    except FloatingPointError:
        way_out = "test another checkpoint, or train anew"
        raise InputError(f"{checkpoint}: its features are not finite; {way_out}") from None


def name_classes(features, benchmark=None):
    """Features with labels from 0 and class names: the benchmark's, or numbers where it is not at hand.

    Labels beyond the classes, 100 to 124, say, are taken in ascending order, and that is said.
    """
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


def check_features(features, rows):
    """Raise InputError for what matching cannot do with named Features: their classes, or (M, K) of `rows`."""
    _check_classes(features.query_labels, features.gallery_labels, features.names)
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
                f"--subspaces {subspaces}: features of {width} values cannot be cut into {subspaces} equal parts"
            )


def _check_classes(query_labels, gallery_labels, names):
    missing = np.setdiff1d(query_labels, gallery_labels)
    if len(missing):
        raise InputError(
            f"{len(missing)} query classes have no photo in the gallery, first {names[missing[0]]!r}: "
            "its sketches have no AP; add photos to the zero list or take its sketches out"
        )


@dataclass(frozen=True)
class Grid:
    """The rows of one-to-many matching, how their mixtures are fitted, and what is shown of them."""

    rows: list[tuple[int, int]]  # (M, K); none: one-to-one matching alone
    seeds: tuple[int, ...] = (123,)
    mixture: str = "torch"  # see models.eval.codebooks.fit_codebook
    mixture_device: str = "cpu"
    nearest: int = 10  # photos beside each sketch of the row to show
    cluster_weights: tuple[float, ...] = (CLUSTER_WEIGHT,)

    def keys(self):
        """(M, K, cluster weight) of each row."""
        return [(*row, weight) for row in self.rows for weight in self.cluster_weights]


class EvalResult(NamedTuple):
    """What a Grid gives. A row is (M, K, cluster weight), or None for one-to-one matching, which has the seed None."""

    means: dict  # {row: {seed: class means by name and "definitions", or why there are none}}
    queries: dict  # {row: {name: one value a sketch, the mean over seeds}}
    shown: tuple | None  # the row that a reader looks at first
    nearest: torch.Tensor  # (Q, k), its nearest photos for the first seed


def measure(features, grid, metrics=STANDARD, device="cpu", dtype=torch.float32):
    """One-to-one matching and all rows of a Grid, by all processes together.

    metrics, device, dtype: see models.eval.evaluate.evaluate_rows. Returns, in process 0, the EvalResult, else None.
    """
    keys, labels = grid.keys(), torch.from_numpy(features.query_labels)
    # As many clusters as classes, else the last row of the grid.
    classes = len(np.unique(features.gallery_labels))
    look = next((key for key in keys if key[1] == classes), keys[-1] if keys else None)
    means, queries, nearest = {None: {}} | {key: {} for key in keys}, {}, None
    share = distributed.rank_slice(len(features.query))
    own = replace(features, query=features.query[share], query_labels=features.query_labels[share])
    for number, seed in enumerate(grid.seeds if keys else [None]):
        fitted, failures = fit_codebooks(features.gallery, grid.rows, seed, grid.mixture, grid.mixture_device)
        codebooks = {key: WeightedCodebook(fitted[key[:2]], key[2]) for key in keys if key[:2] in fitted}
        for key in keys:
            if key[:2] in failures:
                means[key][str(seed)] = failures[key[:2]]
        if number == 0:  # one-to-one matching is the same for every seed
            look = look if look in codebooks else next(reversed(codebooks), None)
            codebooks = {None: None} | codebooks
        kept = {look: grid.nearest} if number == 0 else {}
        for key, values in evaluate_rows(own, codebooks, (*metrics, *DEFINED), kept, device, dtype).items():
            whole = {name: distributed.gather_concat(value) for name, value in values.items()}
            if distributed.get_rank() == 0:
                nearest = whole.pop("nearest", nearest)
                found = {name: class_means(whole[name], labels)[1].numpy() for name in (*metrics, "curve")}
                means[key][str(seed) if key else None] = found | {"definitions": by_definition(whole, labels)}
                queries.setdefault(key, []).append(torch.stack([whole[name] for name in metrics]))
    if distributed.get_rank() != 0:
        return None
    queries = {key: dict(zip(metrics, torch.stack(each).mean(dim=0), strict=True)) for key, each in queries.items()}
    return EvalResult(means, queries, look, nearest)


def zero_shot(student, images, loading, precision="fp32", metrics=STANDARD):
    """One-to-one results of a student on QueryGallery: {metric: value}, {} but in process 0."""
    try:
        features = extract_all(student, images, loading, precision)
    except FloatingPointError as error:
        raise InputError(f"{error}; start anew with a lower --lr") from None
    if features is None:
        return {}
    measured = evaluate_rows(features, {None: None}, metrics, device=loading.device)[None]
    labels = torch.from_numpy(features.query_labels)
    return {name: class_means(measured[name], labels)[1].mean().item() for name in metrics}


def watch_unseen(benchmark, loading, precision, every):
    """A function of (student, epoch from 0) that gives `zero_shot` results after every `every` epochs; 0: None.

    Raises InputError where unseen images are wanted and missing.
    """
    if not every:
        return None
    images = benchmark.read_query_gallery()
    _check_classes(images.query.labels, images.gallery.labels, benchmark.unseen_names)
    images.check()

    def measure_epoch(student, epoch):
        if (epoch + 1) % every:
            return {}
        return zero_shot(student, images, loading, precision, benchmark.protocol.metrics)

    return measure_epoch
