"""Suggests module paths if the search by structure does not find a model's projections."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable
from typing import Literal

from ablation_sweeps.base.lazy import torch

Operation = Literal["attention", "activation"]

NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")  # a layer's number; one at the end of a path is a module inside a layer
MLP = re.compile(r"mlp|ffn|feed_?forward|\bff\b|\bfc|down", re.IGNORECASE)


def pattern_of(path: str) -> str:
    """The path with `*` in place of each layer number."""
    return NUMBER.sub("*", path)


def near_misses(wanted: str, module: torch.nn.Module) -> list[str]:
    """Up to three module paths, or patterns of them, that resemble `wanted`."""
    paths = [path for path, _ in module.named_modules() if path]
    known = dict.fromkeys(map(pattern_of, paths)) if "*" in wanted else dict.fromkeys(paths)
    return difflib.get_close_matches(wanted, known, 3)


def projections_after(operation: Operation, module: torch.nn.Module, run: Callable[[], object]) -> list[str] | None:
    """Patterns of the linear layers that end a block in which the operation is computed.

    Args:
        run: runs one forward pass of the module.

    Returns:
        None if the operation is never computed. For activation functions, layers named like an MLP come first.
    """
    from torch.overrides import TorchFunctionMode

    watch, handles = _Watch(operation), []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            watch.see(func, out)
            return out

    for path, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda m, _, path=path: watch.enter(path, m)))
        handles.append(part.register_forward_hook(lambda *_: watch.leave()))
    try:
        with torch.inference_mode(), Mode():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not watch.seen:
        return None
    patterns = dict.fromkeys(map(pattern_of, watch.found))
    if operation == "attention":
        return list(patterns)
    return sorted(patterns, key=lambda pattern: not MLP.search(pattern))


def natural_order(paths: Iterable[str]) -> list[str]:
    """Sort paths so that layer 2 comes before layer 10."""
    return sorted(paths, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)])


class _Watch:
    """Follows a forward pass through the blocks of a model.

    A block is marked if it computes the operation. Its projection is the last linear layer that it calls afterwards; if
    it calls none, its parent is marked instead, unless that is a whole layer.

    Attributes:
        found: paths of the projections.
        seen: True if the operation was computed anywhere.
    """

    def __init__(self, operation: Operation):
        self.operation = operation
        self.found: list[str] = []
        self.seen = False
        self._open: list[tuple[str, torch.nn.Module]] = []
        self._projections: dict[str, str | None] = {}  # the projection of each marked block

    def see(self, func: Callable, out: object) -> None:
        if self.operation == "activation":
            seen = func in _activations()
        else:  # 4 axes: the softmax of a router has fewer
            seen = func is torch.nn.functional.scaled_dot_product_attention
            seen |= func in _softmaxes() and isinstance(out, torch.Tensor) and out.ndim == 4
        block = next((path for path, part in reversed(self._open) if list(part.children())), None)
        self.seen |= seen
        if seen and block is not None:
            self._projections.setdefault(block, None)

    def enter(self, path: str, part: torch.nn.Module) -> None:
        self._open.append((path, part))
        weight = getattr(part, "weight", None)
        if weight is not None and weight.ndim == 2 and not isinstance(part, torch.nn.Embedding):
            for block in self._projections:
                if path.startswith(f"{block}."):
                    self._projections[block] = path

    def leave(self) -> None:
        path, _ = self._open.pop()
        if path not in self._projections:
            return
        projection = self._projections.pop(path)
        parent = path.rpartition(".")[0]
        if projection is not None:
            self.found.append(projection)
        elif parent and not parent.rpartition(".")[2].isdigit():
            self._projections.setdefault(parent, None)


@functools.cache
def _softmaxes() -> tuple[Callable, ...]:
    return torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax


@functools.cache
def _activations() -> tuple[Callable, ...]:
    names = ("gelu", "silu", "relu", "relu6", "mish", "leaky_relu", "elu", "hardswish", "sigmoid", "tanh", "erf")
    places = (torch.nn.functional, torch, torch.Tensor)
    return tuple(getattr(place, name) for place in places for name in names if hasattr(place, name))
