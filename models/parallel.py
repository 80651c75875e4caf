"""Several processes as torchrun starts them, each with a share of every batch; a process alone is all of them.

Nothing here waits for a GPU: what processes tell each other about the run itself goes from CPU to CPU.
"""

import gc
import os
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from datasets.errors import InputError, let_another_tell
from datasets.files import sole_writer
from models.speaker import processes, rank


def speaks():
    """Whether this process prints its errors.

    Until the processes meet, all of them find the same errors, and the first one tells. Later an error can be that of
    one process alone (see `in_all` for those that are not).
    """
    return rank() == 0 or met()


def met():
    """Whether the processes have met, see `connect`."""
    return distributed.is_initialized()


@contextmanager
def in_all():
    """Errors in this block are the same in all processes, which have met: the first one tells."""
    try:
        yield
    except InputError:
        if rank() == 0:
            raise
        let_another_tell()


@contextmanager
def together(folder, work):
    """Within this block the first process holds `folder` (datasets.files.sole_writer); at its end all disconnect."""
    with sole_writer(folder, work) if rank() == 0 else nullcontext():
        try:
            yield
        finally:
            disconnect()


def own_device(device):
    """The device of this process: its own GPU of this machine where `device` is "cuda"."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def connect(device):
    """Meet the other processes. Call it after the input has been checked, so that its errors are told only once.

    Raises InputError if they cannot be met.
    """
    if processes() > 1 and not distributed.is_initialized():
        # Functions of this module have the process group as a default argument if there is one when it is imported.
        # Were it imported later (timm does so), the group and its threads would live longer than `disconnect`, and the
        # process could end with an abort. Now there is no group yet.
        import torch.distributed.nn.functional

        try:
            if torch.device(device).type == "cuda":
                torch.cuda.set_device(device)
                distributed.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device(device))
            else:
                distributed.init_process_group("gloo")
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{processes()} processes cannot meet ({reason}); start them with torchrun") from error


def disconnect():
    """Leave the others, at the end."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()  # of DistributedDataParallel, whose circular references would keep the group and its threads alive


def share(count):
    """This process's part of `count` things in a row, as a slice; parts differ by one at most."""
    each, number = processes(), rank()
    return slice(count * number // each, count * (number + 1) // each)


def total(values):
    """Sum of tensors `values` over all processes, on their device."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def anyone(flag):
    """Whether `flag` is true in any process."""
    return bool(total(torch.tensor(int(flag)))) if distributed.is_initialized() else flag


def gathered(value):
    """What all processes give, as a list in process 0; None elsewhere."""
    if not distributed.is_initialized():
        return [value]
    parts = [None] * processes() if rank() == 0 else None
    distributed.gather_object(value, parts)
    return parts


def told(value):
    """What process 0 gives, in all processes."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def joined(rows):
    """Arrays or tensors `rows` (n, ...) of all processes, one after the other, in process 0; None elsewhere."""
    if not distributed.is_initialized():
        return rows
    parts = gathered(rows)
    if parts is None:
        return None
    return torch.cat(parts) if isinstance(rows, torch.Tensor) else np.concatenate(parts)


def merged(values):
    """The union of all processes' dicts, in each of them."""
    if not distributed.is_initialized():
        return values
    parts = [None] * processes()
    distributed.all_gather_object(parts, values)
    return {key: value for part in parts for key, value in part.items()}


def synchronised(network):
    """`network` with its gradients shared by all processes; call `backward` for their sum."""
    return DistributedDataParallel(network) if distributed.is_initialized() else network


def backward(loss):
    """Backward pass of this process's part of a loss, after which parameters have the gradient of the whole loss."""
    # DistributedDataParallel takes the mean over the processes. The whole loss is the sum of their parts.
    (loss * processes()).backward()


def apart(network):
    """A context in which the gradients of a `synchronised` network add up in this process only, not yet in all."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()
