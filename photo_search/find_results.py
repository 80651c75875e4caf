"""What `search_photos.py` prints and writes: tables and JSON of `find`, and notes of `index`."""

import os

from photo_search.find_picture import MAX_DRAWN_PHOTOS
from photo_search.photos import UNREAD_SUFFIXES, suffixes_of
from utils.cli import printable
from utils.pictures import SOFTWARE

OWN_JSON = rb'\A\s*\[\s*\{\s*"sketch":'  # how the JSON begins
OWN_PICTURE = rb"(?s)\A\x89PNG.{1,200}?Software\0" + SOFTWARE.encode()


def results_to_json(sketches, matching, weight, found):
    """The results, ready for JSON; found: a list of SearchHits for each of the paths `sketches`."""
    return [
        {"sketch": path, "matching": matching, "cluster_weight": weight, "found": [_hit_to_json(hit) for hit in hits]}
        for path, hits in zip(sketches, found, strict=True)
    ]


def _hit_to_json(hit):
    copies = {"copies": [each.path for each in hit.copies]} if hit.copies else {}
    return {
        "photo": hit.path, "score": hit.score, "distance": hit.distance,
        "cluster_distance": hit.cluster_distance, **copies,
    }  # fmt: skip


def print_table(sketch, matching, hits):
    """Print the SearchHits of a sketch."""
    print(f"{printable(sketch)} ({matching})")
    print("       score  distance  cluster distance  photo")
    for place, hit in enumerate(hits, 1):
        cluster = "-" if hit.cluster_distance is None else f"{hit.cluster_distance:.4f}"
        count = len(hit.copies)
        copies = f"  and {count} {'copy' if count == 1 else 'copies'}" if count else ""
        print(f"{place:5d} {hit.score:6.4f}  {hit.distance:8.4f}  {cluster:>16}  {printable(hit.path)}{copies}")


def rows_to_draw(names, sketches, found, index):
    """The rows of find_picture.draw_found, of sketches (PIL.Image) and their SearchHits in an Index."""
    rows = []
    for name, sketch, hits in zip(names, sketches, found, strict=True):
        thumbnails = index.thumbnails_of([hit.row for hit in hits[:MAX_DRAWN_PHOTOS]])
        rows.append((os.path.basename(name), sketch, list(zip(thumbnails, (hit.score for hit in hits), strict=False))))
    return rows


def notes_of(stats, exclude, limit=10):
    """Lines about what update.UpdateStats say was not indexed; exclude: the patterns that the user gave.

    limit: how many unreadable files are named.
    """
    lines = [f"not indexed: {line}" for line in stats.unreadable[:limit]]
    if len(stats.unreadable) > limit:
        lines.append(f"not indexed: {len(stats.unreadable) - limit:,} more that cannot be read")
    if any("(cut off" in line for line in stats.unreadable):
        lines.append("files that are cut off are indexed with --truncated")
    for advice, suffixes in _unread_by_advice(stats.unread).items():
        lines.append(f"not indexed: {suffixes}; {advice}")
    if stats.hidden:
        lines.append(f"not indexed: {stats.hidden:,} hidden files and folders; --hidden takes them")
    lines += [f"--exclude {each}: fits nothing" for each in exclude or () if each not in stats.excluded]
    return lines


def _unread_by_advice(unread):
    """{advice: "12 .heic files, 1 .hif file"} of paths."""
    texts = {}
    for suffix, count in suffixes_of(unread).most_common():
        text = f"{count:,} {suffix} file{'s' if count > 1 else ''}"
        texts.setdefault(UNREAD_SUFFIXES[suffix], []).append(text)
    return {advice: ", ".join(parts) for advice, parts in texts.items()}
