"""Selects the neurons to ablate: one fixed order per layer, of which each fraction ablates a prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Int
from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.lazy import torch


@runtime_checkable
class Selection(Protocol):
    """A rule that orders the neurons of each layer. `label` names it in tables, figures and folders."""

    label: str

    def orders(self, widths: list[int], seed: int) -> list[Int[torch.Tensor, " _neurons"]]: ...


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Random:
    """Random selection: the same number of neurons in each layer, and the same neurons for every method."""

    label: str

    def orders(self, widths: list[int], seed: int) -> list[Int[torch.Tensor, " _neurons"]]:
        """One permutation of the neurons per layer. It depends only on the seed, the layer and its width."""
        return [_permutation(width, f"{seed}/{layer}") for layer, width in enumerate(widths)]


def _permutation(width: int, key: str) -> Int[torch.Tensor, " neurons"]:
    digest = hashlib.sha256(key.encode()).digest()  # neighbouring seeds must not give related orders
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(width, generator=generator)


def masks(orders: list[Int[torch.Tensor, " _neurons"]], fraction: float) -> list[Bool[torch.Tensor, " _neurons"]]:
    """Masks of the first `round(fraction * n)` neurons of each order; masks of growing fractions are nested."""
    chosen = []
    for order in orders:
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[: round(fraction * len(order))]] = True
        chosen.append(mask)
    return chosen


def granularity(
    orders: list[Int[torch.Tensor, " _neurons"]], fractions: Sequence[float], n_heads: int | None
) -> Literal["neuron", "head"]:
    """Unit of ablation: "head" if the orders list whole heads one after another and no fraction ends inside a head.

    Args:
        n_heads: heads per layer; None if the neurons do not belong to heads.
    """
    for order in orders:
        size = len(order) // (n_heads or len(order))
        if n_heads is None or size < 2 or len(order) % n_heads:
            return "neuron"
        heads = order.view(n_heads, size) // size
        if (heads != heads[:, :1]).any() or any(round(fraction * len(order)) % size for fraction in fractions):
            return "neuron"
    return "head"


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Schedule:
    """The points of a curve: fractions of each layer's neurons. 0, the clean pass, is always evaluated."""

    values: Annotated[tuple[float, ...], Field(min_length=1)]

    @field_validator("values")
    @classmethod
    def _shares(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if not 0 <= value <= 1:
                raise ValueError(f"{value} is outside [0, 1]; a fraction is a share of the neurons, 0.5 for half")
        return tuple(sorted(set(values) - {0.0}))
