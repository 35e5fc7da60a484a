"""Watches the attention of a model while it is computed: how many heads it has, and what each head gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ablation_sweeps.base.lazy import torch


class Heads(NamedTuple):
    """The heads of one layer's attention.

    Attributes:
        n_heads: query heads.
        n_kv_heads: key/value heads, each shared by as many neighbouring query heads; None if unknown.
    """

    n_heads: int
    n_kv_heads: int | None


@contextmanager
def watching_heads() -> Iterator[list[Heads]]:
    """Context manager: gives a list, to which every attention that is computed adds its heads."""
    seen: list[Heads] = []

    def see(attention: torch.Tensor) -> None:
        seen.append(Heads(attention.shape[1], None))

    def see_values(values: torch.Tensor) -> None:
        seen[-1] = seen[-1]._replace(n_kv_heads=_n_distinct(values, seen[-1].n_heads))

    with changing_attention(see, see_values):
        yield seen


def _n_distinct(values: torch.Tensor, n_heads: int) -> int | None:
    """Number of key/value heads, of which each may have been repeated for its query heads."""
    if values.ndim == 3 and values.shape[0] % n_heads == 0:  # batch and heads on one axis
        values = values.unflatten(0, (-1, n_heads))
    if values.ndim != 4 or n_heads % values.shape[1]:
        return None
    given = values.shape[1]
    for n_distinct in range(1, given):
        if given % n_distinct == 0:
            groups = values.unflatten(1, (n_distinct, -1))
            if torch.equal(groups, groups[:, :, :1].expand_as(groups)):
                return n_distinct
    return given


@contextmanager
def changing_attention(
    change: Callable[[torch.Tensor], torch.Tensor | None],
    see_values: Callable[[torch.Tensor], object] = lambda values: None,
) -> Iterator[None]:
    """Context manager: call `change` with each attention as the model computes it, however it does.

    Args:
        change: called with `[batch, heads, queries, ...]`: the weights after the softmax or, where both products are
            one operation, the result, before the heads are put side by side. A returned tensor replaces it.
        see_values: called with the values that the weights are multiplied with, before or after `change`.
    """
    from torch.overrides import TorchFunctionMode

    weights: torch.Tensor | None = None

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            nonlocal weights
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            is_fused = func is torch.nn.functional.scaled_dot_product_attention
            # A router's softmax has fewer axes.
            if is_fused or (func in _softmaxes() and isinstance(out, torch.Tensor) and out.ndim == 4):
                changed = change(out)
                out = out if changed is None else changed
                weights = None if is_fused else out
                if is_fused:
                    see_values(args[2] if len(args) > 2 else kwargs["value"])
            elif weights is not None and func in _products() and args[0].shape[-2] == weights.shape[-2]:
                weights = None
                see_values(args[1])
            return out

    with Mode():
        yield


@functools.cache
def _softmaxes() -> tuple[Callable, ...]:
    return torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax


@functools.cache
def _products() -> tuple[Callable, ...]:
    return torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm
