"""Instance-level retrieval: the one right answer to a sketch is the photo that it was drawn from.

One-to-one matching, among all photos and among those of the sketch's class. Which photo a sketch was drawn from is in
its file name, see `Protocol.pair_pattern`. Where several files of a gallery are that photo (Sketchy Ext has many in two
crops), the nearest of them counts.
"""

import re
from pathlib import PurePosixPath

import numpy as np
import torch

from models.eval.evaluate import CPU_CHUNK, GPU_CHUNK
from models.eval.matching import euclidean_distances
from models.networks import matmul_rules

CUTS = (1, 5, 10)


def find_photos(pattern, images):
    """The photos that each sketch was drawn from: Q lists of indices into the gallery, of a photo of the same class.

    pattern: a regular expression of sketch names without suffix, whose first group is the name of the photo; images: a
    QueryGallery.
    """
    photos = {}
    for index, (path, label) in enumerate(zip(images.gallery.paths, images.gallery.labels, strict=True)):
        photos.setdefault((PurePosixPath(path).stem, label), []).append(index)
    found = []
    for path, label in zip(images.query.paths, images.query.labels, strict=True):
        match = re.fullmatch(pattern, PurePosixPath(path).stem)
        found.append(photos.get((match[1], label), []) if match else [])
    return found


def instance_ranks(features, photos, device="cpu", dtype=torch.float32):
    """Ranks, from 1, of the right photo of each sketch that has one: ((n,) among all photos, (n,) within the class).

    features: Features; photos: see `find_photos`; dtype: of distances. Equal distances rank by gallery order.
    """
    chosen = [number for number, own in enumerate(photos) if own]
    if not chosen:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    most = max(len(own) for own in photos)
    right = torch.tensor([[*own, *own[:1] * (most - len(own))] for own in photos if own]).to(device)
    gallery, query = (torch.from_numpy(each).to(device, dtype) for each in (features.gallery, features.query[chosen]))
    gallery_labels = torch.from_numpy(features.gallery_labels).to(device)
    labels, index = torch.from_numpy(features.query_labels[chosen]).to(device), torch.arange(len(gallery)).to(device)
    size = CPU_CHUNK if gallery.device.type == "cpu" else GPU_CHUNK
    ranks = []
    with matmul_rules("fp32"):
        for part in torch.arange(len(chosen)).to(device).split(max(1, size // (len(gallery) * gallery.element_size()))):
            distances = euclidean_distances(query[part], gallery)
            to_right = distances.gather(1, right[part])
            nearest = to_right.min(dim=1, keepdim=True).values
            first = torch.where(to_right == nearest, right[part], len(gallery)).min(dim=1, keepdim=True).values
            before = (distances < nearest) | ((distances == nearest) & (index < first))
            of_class = before & (gallery_labels == labels[part, None])
            ranks.append(torch.stack([before.sum(dim=1), of_class.sum(dim=1)]).cpu() + 1)
    return tuple(torch.cat(ranks, dim=1).numpy())


def summarise_ranks(ranks):
    """acc@1, acc@5, acc@10, mean reciprocal rank and median rank of ranks (n,), each over all sketches."""
    values = {f"acc@{k}": float((ranks <= k).mean()) for k in CUTS}
    return values | {"mean reciprocal rank": float((1 / ranks).mean()), "median rank": float(np.median(ranks))}


def evaluate_instances(features, photos, device="cpu", dtype=torch.float32):
    """The results of instance-level retrieval as instances.json has them; arguments: see `instance_ranks`."""
    among_all, within_class = instance_ranks(features, photos, device, dtype)
    return {
        "matching": "one-to-one",
        "sketches": len(among_all),
        "sketches without their photo": len(photos) - len(among_all),
        "gallery": len(features.gallery),
        "all photos": summarise_ranks(among_all),
        "within the class": summarise_ranks(within_class),
    }


def print_instances(results):
    """Print the results of `evaluate_instances`."""
    print(f"\ninstance-level retrieval, one-to-one: {results['sketches']:,} sketches, {results['gallery']:,} photos")
    scopes = ("all photos", "within the class")
    print(f"{'':16}" + "".join(f" {name:>9}" for name in results[scopes[0]]))
    for scope in scopes:
        cells = (f" {value:{max(9, len(name))}.4g}" for name, value in results[scope].items())
        print(f"{scope:16}" + "".join(cells))
    if missing := results["sketches without their photo"]:
        print(f"{missing:,} sketches, whose photo is not in the gallery, are left out")
