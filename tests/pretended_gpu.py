"""A GPU that is none: tensors that say they are on `cuda`, are computed with by the CPU, and are as strict about
devices as CUDA is. So the GPU's path is run where there is no GPU: what is left on the other side fails as it would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# They copy from one device to the other, or take indices from there.
CROSSING = {"copy_", "index", "index_put_"}
# Until it is there: to look at it, or to know how much it is.
WAITING = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "isin", "masked_select", "_unique2"}


waited: list[str] = []  # what the CPU has waited for


class OnGpu(torch.Tensor):
    """Of the same shape as `held`, which lies on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        self.held = held
        return self

    # To torch's own C++ it is on the CPU: that would ask for a driver.
    device = property(lambda self: torch.device("cuda:0"))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; copy it to the host first")

    __array__ = numpy  # type: ignore[assignment]

    def cpu(self) -> torch.Tensor:
        waited.append("cpu")
        return self.held.clone()

    def to(self, *args: Any, **options: Any) -> torch.Tensor:
        to_cpu = any(str(x).startswith("cpu") for x in (*args, *options.values()))
        return super().to(*args, **options) if not to_cpu else self.held.to(*args, **{**options, "copy": True})

    def tolist(self) -> list:
        waited.append("tolist")
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            args = (args[0], args[1].device, args[1].dtype, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Gpu(TorchDispatchMode):
    """For what is made there from nothing, and what is moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    leaves = tree_leaves((args, kwargs))
    there = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
    here = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnGpu)]
    if name == "_has_compatible_shallow_copy_type":  # whether a module's weight may be exchanged in place
        return bool(there) != bool(here)
    if there and any(leaf.ndim for leaf in here) and not (name in CROSSING and _may_cross(name, args)):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")
    targets = [torch.device(leaf) for leaf in leaves if isinstance(leaf, torch.device)]
    on_gpu = targets[0].type == "cuda" if targets else bool(there)
    if there and (name in WAITING or (name in ("index", "index_put_") and _by_mask(args[1]))):
        waited.append(name)
    if name == "copy_":
        on_gpu = isinstance(args[0], OnGpu)
    inside = {id(leaf.held): leaf for leaf in there}

    def unwrapped(leaf: Any) -> Any:
        if isinstance(leaf, OnGpu):
            return leaf.held
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if on_gpu:
            return inside[id(leaf)] if id(leaf) in inside else OnGpu(leaf)
        return leaf.clone() if id(leaf) in inside else leaf

    found = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    return tree_map(wrapped, found)


def _may_cross(name: str, args: Any) -> bool:
    """A GPU takes indices from the CPU, but not the other way round."""
    return not name.startswith("index") or isinstance(args[0], OnGpu)


def _by_mask(indices: Any) -> bool:
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)


@contextmanager
def pretended(patch: pytest.MonkeyPatch) -> Iterator[None]:
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    with torch.inference_mode(), _Gpu():  # with autograd, moving a tensor there asks for a driver
        yield
