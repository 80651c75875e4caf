"""Generalised zero-shot retrieval: a gallery of unseen and seen classes, and sketches of both.

Each metric is given for the sketches of unseen classes, for those of seen classes (the validation sketches), and as the
harmonic mean of the two.
"""

import numpy as np
import torch

from models.eval.evaluate import evaluate_grid
from models.eval.features import Features
from models.eval.figures import row_name
from models.eval.metrics import DEFINED, by_definition, get_metric
from models.eval.report import row_entry


def merge(unseen, seen):
    """The Features of both, both named: labels of seen classes follow those of the unseen ones."""
    offset = len(unseen.names)
    return Features(
        np.concatenate([unseen.gallery, seen.gallery]),
        np.concatenate([unseen.gallery_labels, seen.gallery_labels + offset]),
        np.concatenate([unseen.query, seen.query]),
        np.concatenate([unseen.query_labels, seen.query_labels + offset]),
        [*unseen.names, *seen.names],
    )


def evaluate_generalised(features, unseen_classes, grid, metrics, device="cpu", dtype=torch.float32):
    """Results as generalised.json has them, on all ranks together; None on ranks other than 0.

    features: see `merge`; unseen_classes: labels below are of unseen classes; grid: a Grid; metrics: names that
    models.eval.metrics.get_metric takes; device, dtype: of distances and scores.
    """
    needed = tuple(dict.fromkeys((*metrics, *DEFINED)))
    result = evaluate_grid(features, grid, needed, device=device, dtype=dtype)
    if result is None:
        return None
    is_unseen = {"unseen": features.query_labels < unseen_classes, "seen": features.query_labels >= unseen_classes}
    rows = []
    for row, seeds in result.averages.items():
        entry = row_entry(row)
        if failures := {seed: reason for seed, reason in seeds.items() if isinstance(reason, str)}:
            entry["failed"] = failures
        if row in result.per_query:
            entry |= _summarise(result.per_query[row], torch.from_numpy(features.query_labels), is_unseen, metrics)
        rows.append(entry)
    of_gallery = np.unique(features.gallery_labels)
    return {
        "metrics": list(metrics),
        "queries": {group: int(chosen.sum()) for group, chosen in is_unseen.items()},
        "gallery": {
            "unseen": int((features.gallery_labels < unseen_classes).sum()),
            "seen": int((features.gallery_labels >= unseen_classes).sum()),
        },
        "classes": {
            "unseen": int((of_gallery < unseen_classes).sum()),
            "seen": int((of_gallery >= unseen_classes).sum()),
        },
        "rows": rows,
    }


def _summarise(values, labels, is_unseen, metrics):
    """{group: {metric: mean}} of a row, the harmonic means, and the groups under each definition."""
    entry, definitions = {}, {}
    for group, chosen in is_unseen.items():
        own = {name: each[torch.from_numpy(chosen)] for name, each in values.items()}
        own_labels = labels[torch.from_numpy(chosen)]
        entry[group] = {name: get_metric(name).average(own[name], own_labels).mean().item() for name in metrics}
        definitions[group] = by_definition(own, own_labels)
    entry["harmonic_mean"] = harmonic_means(entry["unseen"], entry["seen"])
    definitions["harmonic_mean"] = {
        name: harmonic_means(definitions["unseen"][name], definitions["seen"][name]) for name in definitions["unseen"]
    }
    return entry | {"definitions": definitions}


def harmonic_means(one, two):
    """2ab/(a+b) of the values of two dicts with the same names; 0 where both are 0."""
    return {name: 2 * one[name] * two[name] / ((one[name] + two[name]) or 1) for name in one}


def print_generalised(results):
    """Print the results of `evaluate_generalised`: a line for each row, with the three values of each metric."""
    queries, gallery, classes = (results[name] for name in ("queries", "gallery", "classes"))
    print(
        f"\ngeneralised: {queries['unseen']:,} + {queries['seen']:,} sketches, {gallery['unseen']:,} + "
        f"{gallery['seen']:,} photos, {classes['unseen']} unseen + {classes['seen']} seen classes"
    )
    groups, metrics = ("unseen", "seen", "harmonic_mean"), results["metrics"]
    heads = [f"{metric} {group.replace('_', ' ')}" for metric in metrics for group in groups]
    print(f"{'':16}" + "".join(f"  {head}" for head in heads))
    for row in results["rows"]:
        if "unseen" not in row:
            print(f"{row_name(row):16}  left out, a mixture collapsed")
            continue
        values = [row[group][metric] for metric in metrics for group in groups]
        cells = (f"  {value:{len(head)}.4f}" for value, head in zip(values, heads, strict=True))
        print(f"{row_name(row):16}" + "".join(cells))
