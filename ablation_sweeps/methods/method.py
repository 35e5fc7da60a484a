"""`with ablated(...)`: a forward pass in which some neurons carry their replacement."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.statistics import Statistics

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
