"""The file of thumbnails of an index while it is written: compacted, or made again where it is lost."""

from functools import partial

from PIL import Image

from photo_search.photos import read_photo, thumbnail
from utils.cli import InputError
from utils.distributed import bar_disabled
from utils.files import open_own
from utils.process_pool import parallel_map

MIN_UNUSED_BYTES = 1 << 20  # below which the file is not rewritten


def compact_thumbnails(folder, known, records):
    """The file of thumbnails; a new one if less than half of the old one is used. Changes `records`.

    known: update.KnownPhotos.
    """
    used, stored = int(records["thumbnail_size"].sum()), known.partial.end
    if stored - used < max(used, MIN_UNUSED_BYTES):
        return known.partial.thumbnails
    path = folder / f"thumbnails-{known.old.metadata['generation'] + 1 if known.old else 2}.bin"
    with open_own(known.partial.thumbnails) as source, open_own(path, "wb") as target:
        for record in records:
            source.seek(record["thumbnail"])
            record["thumbnail"] = target.tell()
            target.write(source.read(record["thumbnail_size"]))
    return path


def restore_thumbnails(paths, records, partial_index, side, workers):
    """Append thumbnails of photos to the file of a PartialIndex; grey ones where a photo cannot be read.

    Changes `records`, those of the photos. side: that of the network's input, with which photos are decoded.
    """
    made = parallel_map(partial(_thumbnail_of, side=side), paths, "thumbnails", workers, 16, bar_disabled())
    with open_own(partial_index.thumbnails, "ab") as file:
        file.truncate(partial_index.end)
        for number, content in enumerate(made):
            records["thumbnail"][number], records["thumbnail_size"][number] = partial_index.end, len(content)
            partial_index.end += file.write(content)


def _thumbnail_of(path, side):
    try:
        return thumbnail(read_photo(path, side, truncated=True))
    except InputError:
        return thumbnail(Image.new("RGB", (side, side), "lightgrey"))
