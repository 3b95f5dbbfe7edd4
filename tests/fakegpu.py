"""Four fake devices on the CPU, `fgpu:0` to `fgpu:3`, with real values and CUDA's errors across devices.

    with fake_gpus():
        model = model.to("fgpu:1")

A tensor there is a wrapper around a CPU tensor. An operation between two devices, or between one and the CPU,
raises the RuntimeError that CUDA would raise (copies and indexing by CPU indices are allowed, as there).
Importing this module registers the backend with PyTorch, once a process.
"""

import contextlib

import torch
import torch.utils._pytree as pytree
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyDeviceGuard,
    _setup_privateuseone_for_python_backend,
)

DEVICES = 4
aten = torch.ops.aten
KEPT = []  # what left the CPU: accelerate knows tied weights by address, so a freed one could be mistaken
CPU_INDICES_ALLOWED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class Backend(_DummyBackendModule):
    """What `torch.fgpu` answers."""

    __name__ = "fgpu_on_cpu"  # by its end transformers takes generate_batch to the CPU

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def device_count(self):
        return DEVICES

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def empty_cache(self):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class Guard(_DummyDeviceGuard):
    """The device guard that PyTorch asks a backend for."""


_setup_privateuseone_for_python_backend("fgpu", backend_module=Backend())


class FakeTensor(torch.Tensor):
    """A tensor on `fgpu:N`; `.raw` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, raw, device=None, requires_grad=False):
        if isinstance(raw, FakeTensor):
            device, raw = raw.device, raw.raw
        elif device is None:
            return torch.nn.Parameter(raw, requires_grad=requires_grad)
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=device, requires_grad=requires_grad)

    def __init__(self, raw, device=None, requires_grad=False):
        self.raw = unwrap(raw)

    def __repr__(self):
        return f"FakeTensor({self.raw!r}, {self.device})"

    __str__ = __repr__

    def item(self):
        return self.raw.item()

    def tolist(self):
        return self.raw.tolist()

    def data_ptr(self):
        return self.raw.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def unwrap(value):
    return value.raw if isinstance(value, FakeTensor) else value


def is_fake(device):
    return device is not None and torch.device(device).type == "fgpu"


def with_index(device):
    device = torch.device(device)
    return torch.device("fgpu", device.index or 0) if device.type == "fgpu" else device


def run(func, args, kwargs):
    """Run one operation on the CPU tensors behind its arguments; the result lies where CUDA would put it."""
    if func is aten._to_copy.default:
        return move(args[0], dict(kwargs))
    if func is aten.copy_.default:
        unwrap(args[0]).copy_(unwrap(args[1]))
        return args[0]
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    device = common_device(func, tensors)
    if kwargs.get("device") is not None:
        device = with_index(kwargs["device"])
    args, kwargs = pytree.tree_map(unwrap, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory", True) is None:
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    result = func(*args, **kwargs)
    return wrap(result, device, tensors) if device.type == "fgpu" else result


def move(source, kwargs):
    target = with_index(kwargs.get("device") or source.device)
    asked = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format") and v is not None}
    result = aten._to_copy.default(unwrap(source), **asked)
    if target.type == "fgpu" and source.device.type == "cpu":
        KEPT.append(source.detach())
    return FakeTensor(result, target) if target.type == "fgpu" else result.to(target)


def common_device(func, tensors):
    """The one device of `tensors`; scalars may lie anywhere. Raises RuntimeError if there are two."""
    devices = {t.device for t in tensors if t.device.type == "fgpu"}
    on_cpu = {t.device for t in tensors if t.device.type == "cpu" and t.dim() > 0}
    if len(devices) > 1 or (devices and on_cpu and func not in CPU_INDICES_ALLOWED):
        got = sorted(map(str, devices | on_cpu))
        raise RuntimeError(f"Expected all tensors to be on the same device, got {got} in {func}")
    return next(iter(devices), torch.device("cpu"))


def wrap(result, device, tensors):
    """Wrap what came out; what went in (in-place operations) comes out as the same object."""
    known = {id(t.raw): t for t in tensors if isinstance(t, FakeTensor)}

    def one(value):
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else FakeTensor(value, device)

    return pytree.tree_map(one, result)


class Dispatch(TorchDispatchMode):
    """Catches factories with device="fgpu:N" and copies from the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_fake(kwargs.get("device")) or any(issubclass(t, FakeTensor) for t in types):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


class Construct(TorchFunctionMode):
    """Catches torch.tensor(..., device="fgpu:N"), which never reaches the dispatcher as one operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and is_fake(kwargs.get("device")):
            rest = {name: value for name, value in kwargs.items() if name != "device"}
            return torch.tensor(*args, **rest).to(kwargs["device"])
        return func(*args, **kwargs)


@contextlib.contextmanager
def fake_gpus():
    """Inside the block, `fgpu:0` to `fgpu:3` work wherever PyTorch takes a device."""
    try:
        with Dispatch(), Construct():
            yield
    finally:
        KEPT.clear()
