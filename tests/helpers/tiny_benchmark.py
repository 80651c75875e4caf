"""A benchmark of plain squares in the layout of Sketchy Ext."""

import numpy as np
from PIL import Image

from datasets.lists import write_list, write_mask


def write_tiny(root):
    """Write 2 seen and 2 unseen classes into `root`, and return that."""
    lists = root / "zeroshot1"
    for kind, list_name, splits in (
        ("sketch", "sketch_tx_000000000000_ready_filelist_{}.txt", ("train", "test", "zero")),
        ("photo", "all_photo_filelist_{}.txt", ("train", "zero")),
    ):
        for split in splits:
            names = [f"{kind} of {split}/{number}.png" for number in range(4)]
            for number, name in enumerate(names):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), (60 * number, 90, 120)).save(root / name)
            write_list(lists / list_name.format(split), zip(names, [0, 0, 1, 1], strict=True))
    write_list(lists / "cname_cid.txt", [("alarm clock", 0), ("cat", 1)])
    write_list(lists / "cname_cid_zero.txt", [("bell", 0), ("cow", 1)])
    write_mask(lists / "cid_mask.pickle", np.zeros((2, 1000)))
    return root
