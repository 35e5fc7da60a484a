"""`with ablated(...)`: a forward pass in which some neurons carry their replacement."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float

from ablation_sweeps.activations import Statistics
from ablation_sweeps.data import Batch, UserError
from ablation_sweeps.lazy import torch
from ablation_sweeps.sites import Projection, as_rows, hooked
from ablation_sweeps.transformer import Transformer

log = logging.getLogger(__name__)


@runtime_checkable
class Replacement(Protocol):
    """The values that are written, once for every batch; one tensor a layer: `[neurons]`, or `[batch, rows, neurons]`,
    whose first two may be 1.

    Attributes:
        reads_clean: the values depend on the batch's own clean activations, which are kept for it; else `clean` is
            empty.
    """

    reads_clean: bool

    def __call__(self, batch: Batch, clean: list[torch.Tensor]) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class Fitting:
    """What a method may use to compute its replacement.

    Attributes:
        statistics: called with the histograms that are needed (none, for the moments alone); computed or read then.
        length: positions of the longest input of the evaluation data.
        note: told what a reader of the results should know of the replacement; kept in the run's record and shown in
            the report.
    """

    model: Transformer
    projections: list[Projection]
    statistics: Callable[..., Statistics]
    length: int
    seed: int
    note: Callable[[str], None] = log.debug


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


def values_of(replacement: Replacement, batch: Batch, clean: list[torch.Tensor], n_layers: int) -> list[torch.Tensor]:
    """Raises:
    UserError: it gives something else than one tensor a layer.
    """
    values: Any = replacement(batch, clean)
    whole = isinstance(values, list | tuple) and all(isinstance(value, torch.Tensor) for value in values)
    if whole and len(values) == n_layers:
        return list(values)
    given = f"{len(values)} tensors" if whole else f"no list of tensors, but {values!r:.60}"
    raise UserError(f"method: gives {given} for {n_layers} layers; give one tensor a layer")


@contextmanager
def ablated(
    projections: list[Projection], masks: list[Bool[torch.Tensor, " _neurons"]], values: list[torch.Tensor], batch: int
) -> Iterator[None]:
    """Writes `values` where the masks, one a layer, are True. No neuron masked: the logits are bit-equal to the clean
    ones.

    Raises:
        UserError: the values do not fit.
    """

    def at(layer: int, x: torch.Tensor) -> torch.Tensor:
        # `where`, not a product with the mask: NaN times zero is NaN.
        rows = as_rows(x, batch)
        _check_shape(values[layer], rows)
        value = values[layer].to(rows, non_blocking=True)
        return torch.where(masks[layer].to(x.device, non_blocking=True), value, rows).reshape(x.shape)

    with hooked(projections, at):
        yield


def _check_shape(value: torch.Tensor, rows: Float[torch.Tensor, "batch rows neurons"]) -> None:
    """Two axes would be taken for positions and neurons, also where examples are meant, if there are as many."""
    fits = all(size in (1, full) for size, full in zip(value.shape[:-1], rows.shape, strict=False))
    if value.ndim not in (1, 3) or value.shape[-1] != rows.shape[-1] or not fits:
        raise UserError(
            f"method: gives values of shape {list(value.shape)} where activations are {list(rows.shape)}, examples, "
            "positions and neurons; give these three, of which the first two may be 1, or the neurons alone"
        )


@contextmanager
def reading(projections: list[Projection], batch: int) -> Iterator[list[torch.Tensor]]:
    """Gives a list that holds, after one forward pass, each layer's activations, `[batch, rows, neurons]`."""
    seen: list[torch.Tensor] = []

    def at(layer: int, x: torch.Tensor) -> None:
        seen.append(as_rows(x, batch).clone())

    with hooked(projections, at):
        yield seen
