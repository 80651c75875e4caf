"""A fake GPU for tests: tensors whose device is `cuda`, with their values on the CPU.

    with FakeGpu() as gpu:
        network.to("cuda:1")
        ...
    gpu.kernels, gpu.copies, gpu.waits

An operation on tensors of different devices fails, as it does on a real GPU. `kernels` counts the operations that a GPU
would be given, `copies` those between host and GPU, and `waits` those for which the host would wait until the GPU has
done all it was given. `held()` is how many bytes its tensors take. Values are the CPU's. What it cannot show: memory
that runs out, what the C++ part of torch keeps for itself, speed, the rounding of a GPU, and libraries that are loaded
on first use.
"""

import collections
import contextlib
import functools
import gc
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Operations whose result has a size or a value that the host must know.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique2",
    "aten::unique_dim", "aten::equal", "aten::_linalg_eigh", "aten::linalg_eigh", "aten::_linalg_check_errors",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
WITHOUT_A_KERNEL = {
    "aten::detach",
    "aten::alias",
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
}


class OnGpu(torch.Tensor):
    """A tensor whose `device` is a GPU; `value` is on the CPU.

    For torch's C++ code it is a CPU tensor, so that autograd needs no GPU.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value, device):
        return torch.Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device="cpu",
        )  # fmt: skip

    def __init__(self, value, device):
        self.value, self.fake_device = value, device

    device = property(lambda self: self.fake_device)
    is_cuda = property(lambda self: True)

    def to(self, *args, **kwargs):
        """As Tensor.to, by the fake device of this tensor."""
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        device = _numbered(device or self.device)
        if device == self.device:
            form = {} if memory_format is None else {"memory_format": memory_format}
            return super().to(dtype or self.dtype, **form)
        if device.type == "cpu":
            FakeGpu.current.copies += 1
            FakeGpu.current.waits["a copy to the host"] += 1
            return self.value.to(dtype or self.dtype, copy=True)
        return torch.ops.aten._to_copy(self, device=device, dtype=dtype or self.dtype, non_blocking=non_blocking)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"OnGpu({self.value}, {self.fake_device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return FakeGpu.current.run(function, args, kwargs or {})


def _numbered(device):
    device = torch.device(device) if isinstance(device, str) else device
    return FIRST if device == ANY else device


ANY, FIRST = torch.device("cuda"), torch.device("cuda", 0)


class _Numbered(TorchFunctionMode):
    """Resolves device indices before dispatch, where torch would query a real GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def number(x):
            return _numbered(x) if isinstance(x, torch.device) or (isinstance(x, str) and x == "cuda") else x

        args, kwargs = tree_map(number, (args, kwargs or {}))
        if (
            function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], OnGpu)
        ):  # the device and type of another
            args = (args[0], args[1].device, args[1].dtype)
        if function is torch.tensor and kwargs.get("device") is not None:
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        return function(*args, **kwargs)


class Event:
    """Replaces torch.cuda.Event: synchronize() counts as a wait only if no kernel was launched since record()."""

    def record(self, stream=None):
        self.kernels = FakeGpu.current.kernels

    def synchronize(self):
        gpu = FakeGpu.current
        if gpu.kernels == self.kernels:  # the GPU is idle while the host waits
            gpu.waits["an event that nothing follows"] += 1


class _Dispatch(TorchDispatchMode):
    """Sends operations that make new tensors to the FakeGpu, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return FakeGpu.current.run(function, args, kwargs or {})


class FakeGpu:
    """A context in which "cuda" devices are there; see above."""

    current = None

    def __init__(self):
        self.kernels, self.copies, self.waits, self.pinned = 0, 0, collections.Counter(), set()
        self.names = collections.Counter()  # kernels by name

    def __enter__(self):
        FakeGpu.current = self
        self.stack, on_cpu = contextlib.ExitStack(), functools.partial(torch.autocast, "cpu")
        for owner, name, value in (
            (torch, "autocast", lambda device, *rest, **named: on_cpu(*rest, **named)),
            (torch.inference_mode, "__enter__", lambda mode: mode.__setattr__("kept", torch.set_grad_enabled(False))),
            (torch.inference_mode, "__exit__", lambda mode, *error: mode.kept.__exit__(*error)),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "Event", Event),
            (torch.cuda, "current_stream", lambda device=None: None),
            (torch.cuda, "empty_cache", lambda: None),
        ):
            self.stack.enter_context(mock.patch.object(owner, name, value))
        # Parameters that move become other objects of their class, so that they can be OnGpu.
        swapped = torch.__future__.get_swap_module_params_on_conversion()
        self.stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapped)
        torch.__future__.set_swap_module_params_on_conversion(True)
        self.stack.enter_context(_Numbered())
        self.stack.enter_context(_Dispatch())
        return self

    def __exit__(self, *error):
        self.stack.close()

    def reset(self):
        """Count from 0 again."""
        self.kernels = self.copies = 0
        self.waits.clear()
        self.names.clear()

    def held(self):
        """Bytes of all tensors that anything refers to; views of one memory count once."""
        values = [each.value for each in gc.get_objects() if issubclass(type(each), OnGpu) and hasattr(each, "value")]
        storages = [value.untyped_storage() for value in values]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def run(self, function, args, kwargs):
        """Run an operation on the CPU, and count what it would be on a GPU."""
        decomposed = self._decomposed(function, args, kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        name, tensors = function._schema.name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = self._device(function, name, args, kwargs, tensors)
        if device is None:
            return self._on_the_cpu(function, args, kwargs)
        if not function.is_view and name not in WITHOUT_A_KERNEL:
            self.kernels += 1
            self.names[name] += 1
        if name in WAITING:
            self.waits[name] += 1
        return self._wrapped(self._on_the_cpu(function, args, kwargs), device, tensors)

    def _decomposed(self, function, args, kwargs):
        if not function._can_decompose():
            return NotImplemented
        with _Dispatch():
            return function.decompose(*args, **kwargs)

    def _device(self, function, name, args, kwargs, tensors):
        """The GPU that an operation runs on, or None. Counts waiting copies; raises RuntimeError for mixed devices."""
        target = _numbered(kwargs["device"]) if kwargs.get("device") is not None else None
        if name == "aten::_to_copy":
            return self._copied(args[0], target, kwargs.get("non_blocking"))
        if name == "aten::copy_":
            to, source = args[:2]
            non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if to.device == source.device:
                return to.device if to.device.type == "cuda" else None
            self._count_copy(source, to, non_blocking)
            return to.device if to.device.type == "cuda" else source.device
        devices = {x.device for x in tensors if isinstance(x, OnGpu)}
        if not devices:
            return target if target is not None and target.type == "cuda" else None
        if len(devices) > 1:
            raise RuntimeError(f"{function}: tensors on {devices}")
        for x in tensors:
            if not isinstance(x, OnGpu) and x.ndim == 0:
                continue  # a scalar argument
            if not isinstance(x, OnGpu):
                if name in INDEXING and any(x is index for index in args[1]):
                    self.waits["an index on the CPU"] += 1
                    continue
                raise RuntimeError(f"{function}: tensors on {devices} and on the CPU, of shape {tuple(x.shape)}")
        if name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.waits["an index of truth values"] += 1
        return devices.pop()

    def _copied(self, source, to, non_blocking):
        if isinstance(source, OnGpu):  # "cpu" is what the C++ part takes it for
            return to if to is not None and to.type == "cuda" else source.device
        if to is None or to.type != "cuda":
            return None
        self.copies += 1
        if not (non_blocking and self._is_pinned(source)):
            self.waits["a copy from memory that is not pinned"] += 1
        return to

    def _count_copy(self, source, to, non_blocking):
        self.copies += 1
        on_host = source if source.device.type == "cpu" else to
        if not (non_blocking and self._is_pinned(on_host)):
            self.waits["a copy between host and GPU that is waited for"] += 1

    def _is_pinned(self, tensor):
        return tensor.untyped_storage().data_ptr() in self.pinned

    def pin(self, tensor):
        """Have `tensor` lie in pinned memory from now on, as a loader's batches do. Returns it."""
        self.pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def _on_the_cpu(self, function, args, kwargs):
        args, kwargs = tree_map(lambda x: x.value if isinstance(x, OnGpu) else x, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        pinned = kwargs.pop("pin_memory", False)
        result = function(*args, **kwargs)
        return self.pin(result) if pinned else result

    def _wrapped(self, result, device, tensors):
        known = {id(x.value): x for x in tensors if isinstance(x, OnGpu)} | {
            id(x): x for x in tensors if not isinstance(x, OnGpu)
        }

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            return known.get(id(x)) if id(x) in known else OnGpu(x, device)

        return tree_map(wrap, result)


def values(tensor):
    """The values of a tensor on either device, on the CPU."""
    tensor = tensor.detach()
    return tensor.value if isinstance(tensor, OnGpu) else tensor
