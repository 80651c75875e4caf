"""torch.distributed under torchrun; a process without torchrun is rank 0 of 1.

Functions that need no PyTorch come first. None waits for a GPU: objects are exchanged between CPUs.
"""

import os
import sys
import threading
from contextlib import contextmanager, nullcontext

from utils.cli import InputError, RankError, exit_quietly, printable
from utils.files import folder_lock

WAITING_NOTE_S = 15  # after which a process says that it waits for the others
_UNSET = "unset these variables, or start the command with torchrun, which sets them"


def get_world_size():
    """Number of processes in the group. Raises InputError for variables that torchrun did not set."""
    return _torchrun_ranks()[1]


def get_rank():
    """Rank of this process; rank 0 writes and prints. Raises InputError as `get_world_size` does."""
    return _torchrun_ranks()[0]


def local_world_size():
    """Number of processes of the group on this machine, between 1 and all."""
    local = _environment_number("LOCAL_WORLD_SIZE")
    return max(1, min(get_world_size() if local is None else local, get_world_size()))


def _torchrun_ranks():
    """(rank, world size); a lone RANK has no meaning without WORLD_SIZE."""
    size = _environment_number("WORLD_SIZE")
    rank = _environment_number("RANK") or 0
    if size is None:
        return 0, 1
    if not 0 <= rank < size:
        raise RankError(f"RANK={rank} WORLD_SIZE={size}: {_UNSET}")
    return rank, size


def _environment_number(name):
    """The value of an environment variable as an int; None if it is not set. Raises InputError."""
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise RankError(f"{name}={text}: not a whole number; {_UNSET}") from None


def log_rank0(message):
    """Print a line to standard error on rank 0."""
    if get_rank() == 0:
        print(printable(message), file=sys.stderr, flush=True)


def bar_disabled():
    """tqdm's `disable`: None (off without a terminal) on rank 0, True on the others."""
    return None if get_rank() == 0 else True


def rank_slice(count):
    """This rank's share of `count` items, as a slice of consecutive ones; shares differ by one at most."""
    size, rank = get_world_size(), get_rank()
    return slice(count * rank // size, count * (rank + 1) // size)


def local_device(device):
    """The device of this process: the GPU of its LOCAL_RANK where `device` is "cuda"."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def should_print():
    """Whether this process prints its errors.

    Before the process group is initialised all ranks raise the same errors, and rank 0 prints them. Later an error can
    occur on one rank only (see `same_error_on_all_ranks` for the others).
    """
    try:
        return get_rank() == 0 or is_initialized()
    except InputError:  # variables that torchrun did not set: every process is alone
        return True


@contextmanager
def same_error_on_all_ranks():
    """Every rank raises the same InputError in this block; only rank 0 prints it."""
    try:
        yield
    except InputError:
        if get_rank() == 0:
            raise
        exit_quietly()


@contextmanager
def folder_lock_and_group(folder, work):
    """Within this block rank 0 locks `folder` (utils.files.folder_lock); at its end the process group is destroyed."""
    with folder_lock(folder, work) if get_rank() == 0 else nullcontext():
        try:
            yield
        finally:
            destroy_process_group()


# From here on PyTorch is imported where it is needed, so that commands without it start at once.


def is_initialized():
    """Whether the process group is initialised, see `init_process_group`."""
    if "torch" not in sys.modules:
        return False
    from torch import distributed

    return distributed.is_initialized()


def init_process_group(device):
    """Join the process group. Call it after the input has been checked, so that its errors are printed only once.

    device: that of this process; with a GPU, gradients go through NCCL. Raises InputError if the group cannot form.
    """
    if get_world_size() == 1 or is_initialized():
        return
    # At its import, this module binds an existing process group as a default argument. Imported later (timm does so),
    # it would keep the group and its threads alive after `destroy_process_group`, and the process could abort at exit.
    import torch.distributed.nn.functional
    from torch import distributed

    waiting = threading.Timer(WAITING_NOTE_S, _note_waiting)
    waiting.daemon = True
    waiting.start()
    try:
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
            distributed.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device(device))
        else:
            distributed.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{get_world_size()} processes cannot form a group ({reason}); start them with torchrun"
        ) from error
    finally:
        waiting.cancel()


def _note_waiting():
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    text = f"note: rank {get_rank()} waits for the other {get_world_size() - 1} of WORLD_SIZE at {address}; {_UNSET}"
    print(printable(text), file=sys.stderr, flush=True)


def destroy_process_group():
    """Destroy the process group, if there is one."""
    if is_initialized():
        import gc

        from torch import distributed

        distributed.destroy_process_group()
        gc.collect()  # reference cycles of DistributedDataParallel keep the group and its threads alive


def all_reduce_sum(values):
    """Sum of tensors `values` over all ranks, in place, on their device."""
    if is_initialized():
        from torch import distributed

        distributed.all_reduce(values)
    return values


def any_rank(flag):
    """Whether `flag` is true on any rank."""
    if not is_initialized():
        return flag
    import torch

    return bool(all_reduce_sum(torch.tensor(int(flag))))


def gather_objects(value):
    """The values of all ranks, as a list on rank 0; None elsewhere."""
    if not is_initialized():
        return [value]
    from torch import distributed

    gathered = [None] * get_world_size() if get_rank() == 0 else None
    distributed.gather_object(value, gathered)
    return gathered


def broadcast_object(value):
    """The value of rank 0, on all ranks."""
    if not is_initialized():
        return value
    from torch import distributed

    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def gather_concat(rows):
    """Arrays or tensors `rows` (n, ...) of all ranks, one after the other, on rank 0; None elsewhere."""
    if not is_initialized():
        return rows
    import numpy as np
    import torch

    gathered = gather_objects(rows)
    if gathered is None:
        return None
    return torch.cat(gathered) if isinstance(rows, torch.Tensor) else np.concatenate(gathered)


def all_gather_dict(values):
    """The union of all ranks' dicts, on each of them."""
    if not is_initialized():
        return values
    from torch import distributed

    gathered = [None] * get_world_size()
    distributed.all_gather_object(gathered, values)
    return {key: value for each in gathered for key, value in each.items()}


def wrap_ddp(network):
    """`network` in DistributedDataParallel where there is a process group; call `backward_sum` for its gradients."""
    if not is_initialized():
        return network
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(network)


def backward_sum(loss):
    """Backward pass of this rank's share of a loss; parameters then have the gradient of the sum over all ranks."""
    # DistributedDataParallel averages gradients over the ranks.
    (loss * get_world_size()).backward()


def no_sync(network):
    """DistributedDataParallel.no_sync(): accumulate gradients locally, skip the all-reduce."""
    from torch.nn.parallel import DistributedDataParallel

    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()
