"""The zero-shot test, end to end: features, codebooks, matching, metrics, report."""

import os
from concurrent.futures import as_completed
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from datasets.benchmark import Benchmark, FileList, check_images, open_benchmark
from datasets.errors import InputError, ends_in_one_line
from datasets.files import check_writable, digest, write_json
from datasets.protocols import PROTOCOLS, protocol_of
from datasets.zeroshot import evaluation_loader
from models import parallel
from models.checkpoints import BEST_AFTER_WARMUP, LAST
from models.eval.codebooks import fit_codebook
from models.eval.evaluation import METRICS, evaluate
from models.eval.features import (
    Features,
    Unfinished,
    extract,
    is_ours,
    read_features,
    record,
    why_stale,
    write_features,
)
from models.eval.metrics import class_means
from models.eval.mixture import CollapsedComponent
from models.eval.report import draw_precision_recall, draw_retrievals, pick_queries, print_classes, print_table
from models.eval.workers import workers
from models.options import note, resolve, run_record, test_parser
from models.weights import load_student

FEATURES = "features_zero.pickle"


@dataclass(frozen=True)
class UnseenImages:
    """The unseen-class part of a benchmark folder."""

    benchmark: Benchmark
    photos: FileList  # the gallery
    sketches: FileList  # the queries


@ends_in_one_line
def main(protocol_name, argv=None):
    """Command line of a test script. Returns the results as they are in results.json.

    Several processes share the extraction, the mixtures and the sketches to match; but for the first they return None.
    """
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
    parallel.connect(options.device)
    if features is None:
        features = compute_features(folder, checkpoint, source, images, options)
    try:
        features, names = name_classes(features, images)
        check_features(features, names, options)
    except InputError:
        if parallel.rank() == 0:  # all processes have the same features
            raise
        raise SystemExit(2) from None
    rows, shown = measure(features, options)
    parallel.disconnect()
    if parallel.rank() != 0:
        return None
    results = summarise(rows, features, names, protocol, options)
    path = folder / FEATURES  # which of them were measured, for whoever doubts a number
    results["features"] = {"file": str(path), "sha256": digest(path), "source": record(path).get("source")}
    print_table(results, protocol)
    if options.per_class:
        print_classes(results, protocol)
    write_json(folder / "results.json", results)
    print(f"results: {folder / 'results.json'}")
    draw(folder, results, shown, features, names, images, protocol)
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
    parts, unfinished = [], []
    for files, title in ((images.photos, "photos"), (images.sketches, "sketches")):
        of = f".{parallel.rank()}-of-{parallel.processes()}" if parallel.processes() > 1 else ""
        width = student.backbone.num_features
        part = Unfinished(folder / f".{title}{of}.unfinished", source, width, options.batch_size)
        share = parallel.share(len(files))
        if part.done:
            note(f"features: {part.done:,} of {share.stop - share.start:,} {title} are there already, going on")
        machine = options.workers, options.device
        loader = evaluation_loader(
            files, options.input_size, options.batch_size, *machine, share.start + part.done, share.stop
        )
        for rows in extract(student, loader, options.device, title, options.precision, part.done):
            part.add(rows)
        if not np.isfinite(part.read()).all():
            part.remove()
            raise InputError(f"{checkpoint}: its features are not finite; test another checkpoint, or train anew")
        unfinished.append(part)
        parts += [parallel.joined(part.read()), files.labels]
    if parallel.rank() == 0:
        _write_features(folder / FEATURES, Features(*parts), source)
    parallel.anyone(False)  # parts are kept until the whole is written
    for part in unfinished:
        part.remove()
    return Features(*parts) if parallel.rank() == 0 else read_features(folder / FEATURES)[0]


def _write_features(path, features, source):
    if os.path.isfile(path) and not is_ours(path):
        path.replace(f"{path}.old")
        note(f"features: the {FEATURES} that was there is now {FEATURES}.old")
    write_features(path, features, source)


def zero_shot(student, images, options):
    """One-to-one results of a student on UnseenImages: {metric of the protocol: value}, {} but in process 0."""
    parts = []
    for files, title in ((images.photos, "photos"), (images.sketches, "sketches")):
        share = parallel.share(len(files))
        loader = evaluation_loader(
            files, options.input_size, options.batch_size, options.workers, options.device, share.start, share.stop
        )
        rows = list(extract(student, loader, options.device, title, options.precision))
        rows.append(np.empty((0, student.backbone.num_features), np.float32))  # a share may be empty
        parts += [parallel.joined(np.concatenate(rows)), files.labels]
    if parallel.rank() != 0:
        return {}
    measured = evaluate(Features(*parts), {}, options.device)[None]
    labels = torch.from_numpy(images.sketches.labels)
    return {name: class_means(measured[name], labels)[1].mean().item() for name in images.benchmark.protocol.metrics}


def name_classes(features, images):
    """(Features with labels from 0, class names): names are those of the benchmark, or numbers where it is not at hand.

    Labels beyond the classes, 100 to 124, say, are taken in ascending order, and that is said.
    """
    labels = np.union1d(features.gallery_labels, features.query_labels)
    unseen = images.benchmark.unseen_names if images else []
    if labels[-1] < max(len(labels), len(unseen)):
        return features, [unseen[label] if label < len(unseen) else str(label) for label in range(labels[-1] + 1)]
    named = len(unseen) == len(labels)
    note(
        f"note: the features' {len(labels)} labels, {labels[0]} to {labels[-1]}, are not 0 to {len(labels) - 1}: "
        f"taken as {'the unseen classes' if named else 'classes'} in ascending order"
    )
    gallery_labels, query_labels = (
        labels.searchsorted(each) for each in (features.gallery_labels, features.query_labels)
    )
    features = replace(features, gallery_labels=gallery_labels, query_labels=query_labels)
    return features, unseen if named else [str(label) for label in labels]


def check_features(features, names, options):
    """Raise InputError for what matching cannot do with these features: classes, sub-spaces, clusters."""
    missing = np.setdiff1d(features.query_labels, features.gallery_labels)
    if len(missing):
        raise InputError(
            f"{len(missing)} query classes have no photo in the gallery, first {names[missing[0]]!r}: "
            "its sketches have no AP; add photos to the zero list or take its sketches out"
        )
    if (features.gallery == features.gallery[0]).all():
        note("note: all photos have the same features, so every ranking is the gallery's order")
    if len(features.query) < parallel.processes():
        raise InputError(f"{len(features.query)} sketches cannot be shared by {parallel.processes()} processes")
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


def measure(features, options):
    """(rows, shown), in process 0: rows {key: {seed: ClassMeans, or why there are none}}, and the one to draw, a Shown.

    The key of a row is None for one-to-one matching, else (M, K); one-to-one matching has the seed None.
    """
    # The row a reader looks at first: as many clusters as classes, else the last one of the grid.
    grid = [(m, k) for m in options.subspaces for k in options.clusters] if options.mode == 2 else []
    classes = len(np.unique(features.gallery_labels))
    key = next((key for key in grid if key[1] == classes), grid[-1] if grid else None)
    rows, shown = {None: {}} | {key: {} for key in grid}, None
    share = parallel.share(len(features.query))
    own = replace(features, query=features.query[share], query_labels=features.query_labels[share])
    for seed in options.mixture_seeds if grid else [None]:
        codebooks, failures = fit_codebooks(features.gallery, grid, seed, options)
        for failed, reason in failures.items():
            rows[failed][str(seed)] = reason
        first = shown is None
        if first and key not in codebooks:
            key = next(reversed(codebooks), None)
        measured = evaluate(
            own,
            codebooks,
            options.device,
            getattr(torch, options.distances),
            one_to_one=first,
            shown=key if first else (),
            nearest=options.nearest,
            say=note,
        )
        for row, values in measured.items():
            for name, of_own in values.items():
                values[name] = parallel.joined(of_own)
            if parallel.rank() == 0:
                rows[row][str(seed) if row else None] = {
                    name: class_means(values[name], torch.from_numpy(features.query_labels))[1].numpy()
                    for name in (*METRICS, "curve")
                }
        if first:
            shown = key, measured[key]
    return rows, shown


def fit_codebooks(gallery, grid, seed, options):
    """({(M, K): codebook (M, K, D/M)}, {(M, K): why it could not be fitted}) for the grid, one core a row."""
    # Many sub-spaces take longest, as EM needs more iterations in narrow ones, and come first.
    own, fitted = sorted(grid, reverse=True)[parallel.rank() :: parallel.processes()], {}
    with (
        workers() as pool,
        tqdm(total=len(own), desc="mixtures", unit="row", leave=False, disable=parallel.bar()) as progress,
    ):
        jobs = {key: pool.submit(fit_codebook, gallery, *key, seed, options.mixture, options.device) for key in own}
        for _ in as_completed(jobs.values()):
            progress.update()
    for key, job in jobs.items():
        try:
            fitted[key] = job.result()
        except CollapsedComponent as error:
            fitted[key] = str(error)
    fitted = parallel.merged(fitted)
    codebooks, failures = {}, {}
    for key in grid:
        row = f"M {key[0]}, K {key[1]}, seed {seed}"
        if isinstance(fitted[key], str):
            failures[key] = fitted[key]
            note(f"note: {row}: {fitted[key]}; the row is left out, others are not affected")
            continue
        codebooks[key], unconverged = fitted[key]
        if unconverged:
            note(f"note: {row}: no convergence in 100 iterations in sub-space {unconverged}")
    return codebooks, failures


def summarise(rows, features, names, protocol, options):
    """The content of results.json."""
    present = [names[label] for label in np.unique(features.query_labels)]
    return {
        "protocol": protocol.title,
        "metrics": list(protocol.metrics),
        "queries": len(features.query),
        "gallery": len(features.gallery),
        "classes": len(np.unique(features.gallery_labels)),
        **run_record(options),
        "rows": [_summary(key, seeds, present) for key, seeds in rows.items()],
    }


def _summary(key, seeds, names):
    """A row of results.json from {seed: class means by name, or why there are none}."""
    row = {"matching": "one-to-one"} if key is None else {"matching": "one-to-many", "M": key[0], "K": key[1]}
    failures = {seed: reason for seed, reason in seeds.items() if isinstance(reason, str)}
    if failures:
        row["failed"] = failures
    fitted = {seed: means for seed, means in seeds.items() if seed not in failures}
    if not fitted:
        return row
    means = {name: np.mean([each[name] for each in fitted.values()], axis=0) for name in (*METRICS, "curve")}
    row |= {name: float(means[name].mean()) for name in METRICS}
    if len(seeds) > 1:
        row["seeds"] = {seed: {name: float(each[name].mean()) for name in METRICS} for seed, each in fitted.items()}
        for name in METRICS:
            values = [each[name] for each in row["seeds"].values()]
            spread = {"deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None}
            row.setdefault("spread", {})[name] = spread | {"range": [min(values), max(values)]}
    row["per_class"] = {
        label: {name: float(means[name][index]) for name in METRICS} for index, label in enumerate(names)
    }
    row["precision_at_recall"] = means["curve"].mean(axis=0).tolist()
    return row


def draw(folder, results, shown, features, names, images, protocol, count=4):
    """Write the figures, or say in one line why there are none: precision over recall, and retrievals."""
    key, measured = shown
    matching = "one-to-one matching" if key is None else f"one-to-many matching, M {key[0]}, K {key[1]}"
    try:
        path = folder / "precision_recall.png"
        draw_precision_recall(path, results)
        print(f"figure: {path}")
        if not _drawable(features, images):
            return note(
                "note: no picture of retrievals, the images of these features are not at hand (see --data_root)"
            )
        precision = measured[protocol.metrics[0]].numpy()
        groups = []
        for title, picked in pick_queries(precision, features.query_labels, count).items():
            queries = []
            for index in picked:
                label = features.query_labels[index]
                found = [
                    (images.photos.root / images.photos.paths[photo], features.gallery_labels[photo] == label)
                    for photo in measured["nearest"][index]
                ]
                sketch = images.sketches.root / images.sketches.paths[index]
                queries.append((f"{names[label]}\nAP {precision[index]:.2f}", sketch, found))
            groups.append((title, queries))
        path = folder / "retrievals.png"
        draw_retrievals(path, groups, f"{protocol.title}, {matching}")
        print(f"picture: {path}")
    except ImportError:
        note("note: no figures, matplotlib is not installed")
    except InputError as error:
        note(f"note: no picture of retrievals, {error}")


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
        "precision": options.precision,
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
