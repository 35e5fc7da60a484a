"""`with ablated(...)`: a forward pass in which some neurons carry their replacement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float

from ablation_sweeps.activations import Statistics
from ablation_sweeps.data import Batch
from ablation_sweeps.lazy import torch
from ablation_sweeps.sites import Projection, as_rows, hooked
from ablation_sweeps.transformer import Transformer


@runtime_checkable
class Replacement(Protocol):
    """The values that are written, once for every batch; one tensor a layer, of any shape that broadcasts to
    `[batch, rows, neurons]`.

    Attributes:
        reads_clean: the values depend on the batch's own clean activations, so these must be kept.
    """

    reads_clean: bool

    def __call__(self, batch: Batch, clean: list[torch.Tensor]) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class Fitting:
    """What a method may use to compute its replacement.

    Attributes:
        statistics: called with the histograms that are needed (none, for the moments alone); computed or read then.
        length: positions of the longest input of the evaluation data.
    """

    model: Transformer
    projections: list[Projection]
    statistics: Callable[..., Statistics]
    length: int
    seed: int


@runtime_checkable
class Method(Protocol):
    """How the values are computed. `label` names it in tables, figures and folders."""

    label: str

    def fit(self, fitting: Fitting) -> Replacement: ...


@dataclass(frozen=True)
class Constant:
    """The same value at every position of every example: `[neurons]` a layer."""

    values: list[Float[torch.Tensor, " _neurons"]]
    reads_clean = False

    def __call__(self, batch: Batch, clean: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.values


@contextmanager
def ablated(
    projections: list[Projection], masks: list[Bool[torch.Tensor, " _neurons"]], values: list[torch.Tensor], batch: int
) -> Iterator[None]:
    """Writes `values` where the masks, one a layer, are True. No neuron masked: the logits are bit-equal to the clean
    ones."""

    def at(layer: int, x: torch.Tensor) -> torch.Tensor:
        # `where`, not a product with the mask: NaN times zero is NaN.
        rows = as_rows(x, batch)
        value = values[layer].to(rows, non_blocking=True)
        return torch.where(masks[layer].to(x.device, non_blocking=True), value, rows).reshape(x.shape)

    with hooked(projections, at):
        yield


@contextmanager
def reading(projections: list[Projection], batch: int) -> Iterator[list[torch.Tensor]]:
    """Gives a list that holds, after one forward pass, each layer's activations, `[batch, rows, neurons]`."""
    seen: list[torch.Tensor] = []

    def at(layer: int, x: torch.Tensor) -> None:
        seen.append(as_rows(x, batch).clone())

    with hooked(projections, at):
        yield seen
