"""A GPU for machines without one: tensors whose storage and arithmetic are the CPU's, which say that they are CUDA's.

As on a GPU, no operation takes tensors of both (but for CPU numbers without dimensions and CPU indices), and none of a
GPU's becomes an array. So a run that would fail on CUDA because something was left on the host fails here too. What it
does not show: kernels, streams, speed.
"""

import contextlib
import types
from collections.abc import Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_iter, tree_map

CUDA = torch.device("cuda", 0)
BOTH = ("copy_", "__getitem__", "__setitem__", "index_put_", "_foreach_copy_")  # may take the CPU's beside their own


class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    @property
    def grad(self):
        found = torch.Tensor.grad.__get__(self)
        return None if found is None else up(found)

    @grad.setter
    def grad(self, value):
        torch.Tensor.grad.__set__(self, value)


def up(x):
    return x if isinstance(x, OnGPU) or not isinstance(x, torch.Tensor) else x.as_subclass(OnGPU)


def down(x):
    return x.as_subclass(torch.Tensor) if isinstance(x, OnGPU) else x


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Pretend(TorchFunctionMode):
    """Sees every call of torch from Python."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), dict(kwargs or {})
        if name in ("__get__", "__set__"):  # attributes; device and grad are OnGPU's own
            return function(*args, **kwargs)
        if name in ("to", "cpu", "cuda"):
            return move(name, *args, **kwargs)
        if name == "_has_compatible_shallow_copy_type":  # else a module's parameters would keep their class
            return False
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = any(isinstance(x, OnGPU) for x in given)
        if ours and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        mixed = any(not isinstance(x, OnGPU) and x.dim() for x in given)
        if ours and mixed and not (name in BOTH and isinstance(args[0], (OnGPU, list, tuple))):
            raise RuntimeError(f"{resolve_name(function) or name} of tensors on cuda:0 and cpu")
        place, learns = is_gpu(kwargs.get("device", "cuda" if ours else "cpu")), kwargs.get("requires_grad", False)
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
            if place and learns:
                return up(function(*args, **kwargs | {"requires_grad": False})).requires_grad_()
        return tree_map(up if place else down, function(*args, **kwargs))


def move(name: str, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Tensor.to, cpu and cuda."""
    target, rest = None if name == "to" else name, []
    for value in args:
        if isinstance(value, (str, torch.device)):
            target = value
        elif isinstance(value, torch.Tensor):
            target, rest = value.device, [*rest, value.dtype]
        elif isinstance(value, torch.dtype):  # else whether to block or to copy
            rest.append(value)
    target = kwargs.pop("device", target)
    there = isinstance(x, OnGPU) if target is None else is_gpu(target)
    with torch._C.DisableTorchFunction():
        y = x.to(*rest, **kwargs) if name == "to" and (rest or kwargs) else x
        if y is x and there != isinstance(x, OnGPU):
            y = x.clone()
    return (up if there else down)(y)


class Event:
    def __init__(self, **_):
        pass

    def record(self, *_):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Inside, torch has one GPU."""
    properties = types.SimpleNamespace(name="Pretended GPU", total_memory=80 << 30)
    there = dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        set_device=lambda device: None,
        Event=Event,
        synchronize=lambda device=None: None,
        get_device_name=lambda device=None: properties.name,
        max_memory_allocated=lambda device=None: 1 << 30,
        max_memory_reserved=lambda device=None: 1 << 30,
        is_bf16_supported=lambda including_emulation=True: True,
        get_device_capability=lambda device=None: (9, 0),
        get_device_properties=lambda device=None: properties,
        is_current_stream_capturing=lambda: False,  # optimizers ask
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in there.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # a thread calls it, outside of the mode
        with Pretend():
            yield
