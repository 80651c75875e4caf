"""Search in folders of photos with a sketch: photos, the index on disk, exact search by cells."""


def open_index(folder="photo_index", checkpoint=None, device=None):
    """The Searcher of an index; its `find` takes a drawing, and returns the photos that look like it.

    folder: that `search_photos.py index` wrote; checkpoint: where the file of the network is now, if it was moved;
    device: "cpu", "cuda", ..., by default a GPU if there is one. Raises InputError if one of them cannot be used.
    """
    from photo_search.search import open_searcher  # loads the libraries

    return open_searcher(folder, checkpoint, device)
