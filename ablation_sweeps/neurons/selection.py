"""Selection of the neurons that are ablated: one fixed order for each layer, of which a fraction takes a prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Literal

from jaxtyping import Bool, Int
from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.lazy import torch


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Random:
    """Uniformly random neurons, the same number in each layer, the same for every method."""

    label: str

    def orders(self, widths: list[int], seed: int) -> list[Int[torch.Tensor, " _neurons"]]:
        """One permutation of the neurons a layer. Depends on the seed, the layer and its width alone."""
        return [_permutation(width, f"{seed}/{layer}") for layer, width in enumerate(widths)]


def _permutation(width: int, key: str) -> Int[torch.Tensor, " neurons"]:
    digest = hashlib.sha256(key.encode()).digest()  # neighbouring seeds must not give related orders
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(width, generator=generator)


def masks(orders: list[Int[torch.Tensor, " _neurons"]], fraction: float) -> list[Bool[torch.Tensor, " _neurons"]]:
    """The first `round(fraction * n)` neurons of each order are ablated: masks of growing fractions are nested."""
    chosen = []
    for order in orders:
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[: round(fraction * len(order))]] = True
        chosen.append(mask)
    return chosen


def granularity(
    orders: list[Int[torch.Tensor, " _neurons"]], fractions: Sequence[float], n_heads: int | None
) -> Literal["neuron", "head"]:
    """The unit that is ablated as a whole: heads, if the orders take one after the other and no fraction ends inside of
    one.

    Args:
        n_heads: of each layer; None where the neurons belong to no head.
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
    """The fractions of one curve, each of all neurons of a layer. 0 is always measured: it is the clean pass."""

    values: Annotated[tuple[float, ...], Field(min_length=1)]

    @field_validator("values")
    @classmethod
    def _shares(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if not 0 <= value <= 1:
                raise ValueError(f"{value} is outside [0, 1]; a fraction is a share of the neurons, 0.5 for half")
        return tuple(sorted(set(values) - {0.0}))
