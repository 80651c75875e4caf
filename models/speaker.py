"""Which of several processes that torchrun started this one is; the first speaks to the user. Needs no PyTorch."""

import os
import sys


def processes():
    """The number of processes that work together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Number of this process; 0 writes and prints."""
    return int(os.environ.get("RANK", 0))


def note(message):
    """Tell the user something worth a line; of several processes the first does."""
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)


def no_bar():
    """tqdm's `disable`: bars are process 0's, where its output is a terminal."""
    return None if rank() == 0 else True
