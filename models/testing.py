"""The zero-shot test, end to end: features, codebooks, matching, metrics, report."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from datasets.errors import InputError, ends_in_one_line
from datasets.filelists import Benchmark, FileList, check_images, open_benchmark
from datasets.files import check_writable, digest, write_json
from datasets.protocols import PROTOCOLS, protocol_of
from datasets.zeroshot import evaluation_loader
from models.eval.codebooks import fit_codebook
from models.eval.features import Features, extract, is_ours, read_features, record, why_stale, write_features
from models.eval.matching import cluster_distances, euclidean_distances, fused_scores, nearest_codes
from models.eval.metrics import average_precision, class_means, precision_at, rank
from models.eval.report import draw_retrievals, pick_queries, print_table
from models.options import note, resolve, run_record, test_parser
from models.training import BEST_AFTER_WARMUP, LAST
from models.weights import load_student

FEATURES = "features_zero.pickle"
CHUNK_BYTES = 64 << 20  # of one float64 matrix of a chunk of queries × gallery; about six live at a time


@dataclass(frozen=True)
class UnseenImages:
    """The unseen-class part of a benchmark folder."""

    benchmark: Benchmark
    photos: FileList  # the gallery
    sketches: FileList  # the queries


@ends_in_one_line
def main(protocol_name, argv=None):
    """Command line of a test script. Returns the results as they are in results.json."""
    protocol = PROTOCOLS[protocol_name]
    options = resolve(test_parser(protocol).parse_args(argv), protocol, "resume_dir")
    other = PROTOCOLS[protocol_of(protocol_name, options.zero_version)]
    if other is not protocol:
        note(f"note: {options.zero_version} is the folder of {other.title}; this is the test of {protocol.title}")
    folder, checkpoint = find_checkpoint(options, protocol)
    check_writable(folder)
    try:
        images, no_images = open_images(protocol_name, options), None
    except InputError as error:  # which matters only if features_zero.pickle does not do
        images, no_images = None, error
    source = _source(checkpoint, images, options) if checkpoint else None
    features = stored_features(folder, checkpoint, source, no_images, options)
    if features is None:
        features = compute_features(folder, checkpoint, source, images, options)
    names = class_names(features, images)
    check_features(features, names, options)
    codebooks = fit_codebooks(features.gallery, options)
    measured = evaluate(features, codebooks, protocol, options.device)
    results = summarise(measured, features, names, protocol, options)
    path = folder / FEATURES  # which of them were measured, for whoever doubts a number
    results["features"] = {"file": str(path), "sha256": digest(path), "source": record(path).get("source")}
    print_table(results, protocol)
    write_json(folder / "results.json", results)
    print(f"results: {folder / 'results.json'}")
    _draw(folder / "retrievals.png", features, codebooks, measured, names, images, options)
    return results


def find_checkpoint(options, protocol):
    """(folder, checkpoint or None) for --resume_dir, which names either. Raises InputError where both are missing."""
    place = options.resume_dir
    if os.path.isfile(place):
        return place.parent, place if place.name != FEATURES else None
    for name in (protocol.kept_checkpoint, BEST_AFTER_WARMUP, LAST):
        if os.path.isfile(place / name):
            if name != protocol.kept_checkpoint:
                note(f"note: {place} has no {protocol.kept_checkpoint}, testing {name}")
            return place, place / name
    if os.path.isfile(place / FEATURES):
        if options.recompute:
            raise InputError(
                f"--recompute: {place} holds no checkpoint to compute features with; test them as they are"
            )
        return place, None
    raise InputError(
        f"{place}: neither {protocol.kept_checkpoint} nor {FEATURES} is there; train first, or set --resume_dir"
    )


def open_images(protocol_name, options):
    """UnseenImages of the data set. Raises InputError if its folder or lists are not there; images may be missing."""
    benchmark = open_benchmark(protocol_name, options.data_root, options.zero_version)
    return UnseenImages(benchmark, benchmark.read("photo", "zero"), benchmark.read("sketch", "zero"))


def stored_features(folder, checkpoint, source, no_images, options):
    """Features of features_zero.pickle, or None where they must be computed.

    source: what features of `checkpoint` depend on. Raises InputError where they must be computed and cannot:
    `no_images` is why there are no images.
    """
    path = folder / FEATURES
    if os.path.isfile(path) and not options.recompute:
        stale = why_stale(path, source, checkpoint) if checkpoint else None
        if stale is None:
            features, rescaled = read_features(path)
            note(f"features: {path}" + (", scaled to length 1" if rescaled else ""))
            return features
        note(f"features: {path} is {stale}, computing them anew")
    if no_images is not None:
        way_out = f", or move {checkpoint.name} away to test {FEATURES} as it is" if os.path.isfile(path) else ""
        raise InputError(f"{no_images}{way_out}")
    return None


def compute_features(folder, checkpoint, source, images, options):
    """Extract the Features of all unseen images with the student of `checkpoint`, and write features_zero.pickle."""
    seen_classes = len(images.benchmark.seen_names)
    student, trained_with = load_student(checkpoint, options.model, seen_classes, options.nb_classes)
    student.to(options.device)
    trained_size = trained_with.get("input_size", options.input_size)
    if trained_size != options.input_size:
        note(f"note: {checkpoint} was trained with --input_size {trained_size}, not {options.input_size}")
    for files in (images.photos, images.sketches):
        check_images(files)
    parts = []
    for files, title in ((images.photos, "photos"), (images.sketches, "sketches")):
        loader = evaluation_loader(files, options.input_size, options.batch_size, options.workers, options.device)
        parts += [extract(student, loader, options.device, title), files.labels]
        if not np.isfinite(parts[-2]).all():
            raise InputError(f"{checkpoint}: its features are not finite; test another checkpoint, or train anew")
    features, path = Features(*parts), folder / FEATURES
    if os.path.isfile(path) and not is_ours(path):
        path.replace(f"{path}.old")
        note(f"features: the {FEATURES} that was there is now {FEATURES}.old")
    write_features(path, features, source)
    return features


def class_names(features, images):
    """{label: class name}, or the number where the benchmark's class names are not at hand."""
    labels = np.union1d(features.gallery_labels, features.query_labels).tolist()
    unseen = images.benchmark.unseen_names if images else []
    return {label: unseen[label] if label < len(unseen) else str(label) for label in labels}


def check_features(features, names, options):
    """Raise InputError for what matching cannot do with these features: classes, sub-spaces, clusters."""
    missing = np.setdiff1d(features.query_labels, features.gallery_labels)
    if len(missing):
        raise InputError(
            f"{len(missing)} query classes have no photo in the gallery, first {names[missing[0]]!r}: "
            "its sketches have no AP; add photos to the zero list or take its sketches out"
        )
    if options.mode == 1:
        return
    count, width = features.gallery.shape
    if count < 2:
        raise InputError("--mode 2: a mixture needs two gallery photos or more; use --mode 1")
    if max(options.clusters) > count:
        raise InputError(f"--clusters {max(options.clusters)}: the gallery has only {count} photos; use fewer")
    for subspaces in options.subspaces:
        if width % subspaces:
            raise InputError(
                f"--subspaces {subspaces}: features of {width} values cannot be cut into {subspaces} equal parts"
            )


def fit_codebooks(gallery, options):
    """{(M, K): codebook (M, K, D/M)} for the grid of --subspaces and --clusters; empty in mode 1."""
    grid = [(m, k) for m in options.subspaces for k in options.clusters] if options.mode == 2 else []
    codebooks = {}
    for subspaces, clusters in tqdm(grid, "mixtures", unit="row", leave=False, disable=None):
        codebooks[subspaces, clusters], unconverged = fit_codebook(gallery, subspaces, clusters, options.seed)
        if unconverged:
            note(f"note: M {subspaces}, K {clusters}: no convergence in 100 iterations in sub-space {unconverged}")
    return codebooks


def evaluate(features, codebooks, protocol, device="cpu"):
    """AP and Prec of every query, for one-to-one matching (key None) and each codebook (key (M, K)).

    Goes through the queries in chunks, so memory does not grow with their number; distances are float64.
    Returns {key: (AP (Q,), Prec (Q,))}, float64 on the CPU.
    """
    gallery, gallery_labels, query_labels = (
        torch.from_numpy(values).to(device)
        for values in (features.gallery.astype(np.float64), features.gallery_labels, features.query_labels)
    )
    codes = {key: _codes(gallery, codebook) for key, codebook in codebooks.items()}
    query = torch.from_numpy(features.query)
    rows = {key: ([], []) for key in (None, *codebooks)}
    chunk = max(1, CHUNK_BYTES // (8 * len(gallery)))
    with tqdm(total=len(query), desc="matching", unit="sketch", leave=False, disable=None) as progress:
        for part, labels in zip(query.split(chunk), query_labels.split(chunk), strict=True):
            part = part.to(device).double()
            euclidean = euclidean_distances(part, gallery)
            for key, (precisions, shares) in rows.items():
                scores = euclidean if key is None else _fused(part, euclidean, codes[key])
                relevant = rank(scores, labels, gallery_labels)
                precisions.append(average_precision(relevant, protocol.map_at).cpu())
                shares.append(precision_at(relevant, protocol.prec_at).cpu())
            progress.update(len(part))
    return {key: tuple(torch.cat(parts) for parts in row) for key, row in rows.items()}


def summarise(measured, features, names, protocol, options):
    """The content of results.json."""
    labels = torch.from_numpy(features.query_labels)
    rows = []
    for key, (precision, share) in measured.items():
        matching = {"matching": "one-to-one"} if key is None else {"matching": "one-to-many", "M": key[0], "K": key[1]}
        classes, mean_precision = class_means(precision, labels)
        _, mean_share = class_means(share, labels)
        by_class = zip(classes.tolist(), mean_precision.tolist(), mean_share.tolist(), strict=True)
        rows.append(
            matching
            | {"mAP": mean_precision.mean().item(), "Prec": mean_share.mean().item()}
            | {"per_class": {names[label]: {"mAP": ap, "Prec": prec} for label, ap, prec in by_class}}
        )
    return {
        "protocol": protocol.title,
        "queries": len(features.query),
        "gallery": len(features.gallery),
        "classes": len(np.unique(features.gallery_labels)),
        **run_record(options),
        "rows": rows,
    }


def _draw(path, features, codebooks, measured, names, images, options, count=4, nearest=10):
    """Write the picture of the best and worst retrievals, or say in one line why there is none."""
    if not _drawable(features, images):
        return note("note: no picture of retrievals, the images of these features are not at hand (see --data_root)")
    # The row a reader looks at first: as many clusters as classes, else the last one of the grid.
    classes = len(np.unique(features.gallery_labels))
    key = next((key for key in codebooks if key[1] == classes), next(reversed(codebooks), None))
    precision = measured[key][0].numpy()
    best, worst = pick_queries(precision, features.query_labels, count)
    picked = [*best, *worst]
    query, gallery = (torch.from_numpy(values).double() for values in (features.query[picked], features.gallery))
    scores = euclidean_distances(query, gallery)
    if key is not None:
        scores = _fused(query, scores, _codes(gallery, codebooks[key]))
    order = scores.sort(dim=1, stable=True).indices[:, :nearest].numpy()
    photos, sketches = images.photos, images.sketches
    queries = []
    for index, ranking in zip(picked, order, strict=True):
        label = features.query_labels[index]
        found = [(photos.root / photos.paths[i], features.gallery_labels[i] == label) for i in ranking]
        queries.append((f"{names[label]}\nAP {precision[index]:.2f}", sketches.root / sketches.paths[index], found))
    matching = "one-to-one matching" if key is None else f"one-to-many matching, M {key[0]}, K {key[1]}"
    try:
        draw_retrievals(path, queries, f"Best and worst retrievals, {matching}")
    except ImportError:
        return note("note: no picture of retrievals, matplotlib is not installed")
    except InputError as error:
        return note(f"note: no picture of retrievals, {error}")
    print(f"picture: {path}")


def _codes(gallery, codebook):
    codebook = torch.from_numpy(codebook).to(gallery)
    return codebook, nearest_codes(gallery, codebook)


def _fused(query, euclidean, codes):
    return fused_scores(cluster_distances(query, *codes), euclidean)


def _source(checkpoint, images, options):
    """What features depend on, for the record beside them; without its lists where those are not at hand."""
    if images:
        lists = {"photo list": digest(images.photos.source), "sketch list": digest(images.sketches.source)}
        lists["data_root"] = str(images.benchmark.root.resolve())
    else:
        lists = {}
    return {
        "checkpoint": digest(checkpoint),
        "model": options.model,
        "input_size": options.input_size,
        **lists,
    }


def _drawable(features, images):
    """Whether `images` are at hand and are those that `features` were computed from."""
    if images is None:
        return False
    pairs = ((images.photos, features.gallery_labels), (images.sketches, features.query_labels))
    try:
        for files, _ in pairs:
            check_images(files)
    except InputError:
        return False
    return all(np.array_equal(files.labels, labels) for files, labels in pairs)
