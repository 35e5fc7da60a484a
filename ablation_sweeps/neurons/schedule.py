"""Schedules: how many units are ablated at each point of a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Int
from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.lazy import torch


class Point(NamedTuple):
    """One point of a result, for which the model is evaluated once.

    Attributes:
        fraction: share of the units that is ablated.
        unit: number of the unit that is ablated alone; -1 at a point of a curve.
    """

    fraction: float
    unit: int = -1


CLEAN = Point(0.0)


@runtime_checkable
class Schedule(Protocol):
    """Says which units are ablated at each point. The clean pass is always evaluated, and is no point of a schedule.

    Attributes:
        content: part of the signature of a result.
    """

    @property
    def content(self) -> object: ...

    def points(
        self, orders: Sequence[Int[torch.Tensor, " _units"]], n_units: int
    ) -> dict[Point, Int[torch.Tensor, " ablated"]]: ...


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Fractions:
    """The points of a curve: shares of the units, from 0 to 1, of which each contains the one before it."""

    values: Annotated[tuple[float, ...], Field(min_length=1)]

    @field_validator("values")
    @classmethod
    def _shares(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if not 0 <= value <= 1:
                raise ValueError(f"{value} is outside [0, 1]; a fraction is a share of the units, 0.5 for half")
        return tuple(sorted(set(values) - {0.0}))

    @property
    def content(self) -> tuple[float, ...]:
        """The fractions."""
        return self.values

    def points(
        self, orders: Sequence[Int[torch.Tensor, " _units"]], n_units: int
    ) -> dict[Point, Int[torch.Tensor, " ablated"]]:
        """For each fraction, the first `round(fraction * n)` units of each order."""
        return {
            Point(fraction): torch.cat([order[: round(fraction * len(order))] for order in orders])
            for fraction in self.values
        }


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Each:
    """Leave-one-out: one point for each unit, at which it is ablated alone."""

    @property
    def content(self) -> str:
        """The name of this schedule."""
        return "each"

    def points(
        self, orders: Sequence[Int[torch.Tensor, " _units"]], n_units: int
    ) -> dict[Point, Int[torch.Tensor, " ablated"]]:
        """For each selected unit, in the order of the layers, that unit."""
        return {Point(1 / n_units, unit): torch.tensor([unit]) for unit in sorted(torch.cat([*orders]).tolist())}
