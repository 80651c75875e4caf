"""The zero-shot test, end to end: features, codebooks, matching, metrics, report."""

import numpy as np
import torch
from tqdm import tqdm

from datasets.filelists import check_images, open_benchmark
from datasets.files import InputError, check_writable, ends_in_one_line
from datasets.protocols import PROTOCOLS
from datasets.zeroshot import evaluation_loader
from models.eval.codebooks import fit_codebook
from models.eval.features import Features, digest, extract, read_features, why_stale, write_features
from models.eval.matching import cluster_distances, euclidean_distances, fused_scores, nearest_codes
from models.eval.metrics import average_precision, class_means, precision_at, rank
from models.eval.report import draw_retrievals, pick_queries, print_table, write_results
from models.networks import Student, create_backbone
from models.options import note, resolve, run_record, test_parser
from models.training import BEST_AFTER_WARMUP, LAST
from models.weights import load_published, read_checkpoint, seen_classes

CHUNK_BYTES = 64 << 20  # of one float64 matrix of a chunk of queries × gallery; about six live at a time


@ends_in_one_line
def main(protocol_name, argv=None):
    """Command line of a test script. Returns the results as they are in results.json."""
    protocol = PROTOCOLS[protocol_name]
    options = resolve(test_parser(protocol).parse_args(argv), protocol, "resume_dir")
    folder, checkpoint = find_checkpoint(options.resume_dir, protocol)
    check_writable(folder)
    features, images = obtain_features(protocol_name, folder, checkpoint, options)
    names = _class_names(protocol_name, features, options)
    check_features(features, names, options)
    codebooks = fit_codebooks(features.gallery, options)
    measured = evaluate(features, codebooks, protocol, options.device)
    results = summarise(measured, features, names, protocol, options)
    print_table(results, protocol)
    write_results(folder / "results.json", results)
    print(f"results: {folder / 'results.json'}")
    _draw(folder / "retrievals.png", features, codebooks, measured, names, images, options)
    return results


def find_checkpoint(place, protocol):
    """(folder, checkpoint or None) for --resume_dir, which names either. Raises InputError where both are missing."""
    if place.is_file():
        return place.parent, place
    for name in (protocol.kept_checkpoint, BEST_AFTER_WARMUP, LAST):
        if (place / name).is_file():
            if name != protocol.kept_checkpoint:
                note(f"note: {place} has no {protocol.kept_checkpoint}, testing {name}")
            return place, place / name
    if (place / "features_zero.pickle").is_file():
        return place, None
    raise InputError(
        f"{place}: neither {protocol.kept_checkpoint} nor features_zero.pickle is there; "
        "train first, or set --resume_dir"
    )


def obtain_features(protocol_name, folder, checkpoint, options):
    """(Features, (gallery FileList, query FileList) or None): from features_zero.pickle where it is up to date, else
    extracted and written there."""
    path = folder / "features_zero.pickle"
    if path.is_file() and not (options.recompute and checkpoint):
        stale = why_stale(path, _source(protocol_name, checkpoint, options), checkpoint) if checkpoint else None
        if stale is None:
            features, rescaled = read_features(path)
            note(f"features: {path}" + (", scaled to length 1" if rescaled else ""))
            return features, _matching_lists(protocol_name, features, options)
        note(f"features: {path} is {stale}, computing them anew")
    benchmark, lists = _open_lists(protocol_name, options)
    student = load_student(checkpoint, len(benchmark.seen_names), options)
    for files in lists:
        check_images(files)
    machine = options.input_size, options.batch_size, options.workers, options.device
    gallery, query = (
        extract(student, evaluation_loader(files, *machine), options.device, title)
        for files, title in zip(lists, ("photos", "sketches"), strict=True)
    )
    features = Features(gallery, lists[0].labels, query, lists[1].labels)
    write_features(path, features, _source(protocol_name, checkpoint, options))
    return features, lists


def load_student(path, classes, options):
    """The student of a checkpoint, on the device. Raises InputError if it is of another model or number of classes."""
    checkpoint = read_checkpoint(path)
    trained_on = seen_classes(checkpoint)
    if trained_on != classes:
        raise InputError(
            f"{path}: trained on {trained_on} seen classes, but cname_cid.txt lists {classes}: "
            "they belong to different splits; see --zero_version and --resume_dir"
        )
    try:
        student = Student(create_backbone(options.model, options.nb_classes), classes)
    except ValueError as error:
        raise InputError(f"--model: {error}") from None
    load_published(student, checkpoint["state_dict"], path)
    return student.to(options.device)


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
    if images is None:
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
    photos, sketches = images
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
    print(f"picture: {path}")


def _codes(gallery, codebook):
    codebook = torch.from_numpy(codebook).to(gallery)
    return codebook, nearest_codes(gallery, codebook)


def _fused(query, euclidean, codes):
    return fused_scores(cluster_distances(query, *codes), euclidean)


def _open_lists(protocol_name, options):
    benchmark = open_benchmark(protocol_name, options.data_root, options.zero_version)
    return benchmark, (benchmark.read("photo", "zero"), benchmark.read("sketch", "zero"))


def _matching_lists(protocol_name, features, options):
    """The lists of the images that features were computed from, if they are here with all images, else None."""
    try:
        _, lists = _open_lists(protocol_name, options)
        for files, labels in zip(lists, (features.gallery_labels, features.query_labels), strict=True):
            check_images(files)
            if not np.array_equal(files.labels, labels):
                return None
    except InputError:
        return None
    return lists


def _source(protocol_name, checkpoint, options):
    """What features depend on, for the record beside them."""
    benchmark_lists = {}
    try:
        _, lists = _open_lists(protocol_name, options)
        benchmark_lists = {
            f"{kind} list": digest(files.source) for kind, files in zip(("photo", "sketch"), lists, strict=True)
        }
    except InputError:
        pass  # features can be tested where their images are not
    return {
        "checkpoint": digest(checkpoint),
        "model": options.model,
        "input_size": options.input_size,
        **benchmark_lists,
    }


def _class_names(protocol_name, features, options):
    """{label: class name}, or the number where the benchmark's class names are not at hand."""
    labels = np.union1d(features.gallery_labels, features.query_labels).tolist()
    try:
        unseen = open_benchmark(protocol_name, options.data_root, options.zero_version).unseen_names
    except InputError:
        unseen = []
    return {label: unseen[label] if label < len(unseen) else str(label) for label in labels}
