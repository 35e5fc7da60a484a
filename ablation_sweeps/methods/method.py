"""Interfaces of an ablation method: its inputs, and the replacement values that it returns."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch, Modality
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.statistics import Statistics

log = logging.getLogger(__name__)


@runtime_checkable
class Replacement(Protocol):
    """Computes the replacement values of a batch; called once for every batch.

    It returns one tensor per layer: `[neurons]`, or `[batch, rows, neurons]`, whose first two sizes may be 1.

    Attributes:
        reads_clean: True if the values depend on the batch's clean activations. Then `clean` holds them,
            `[batch, rows, neurons]` per layer; otherwise it is empty.
    """

    reads_clean: bool

    def __call__(self, batch: Batch, clean: list[torch.Tensor]) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class Fitting:
    """Inputs that a method may use to compute its replacement.

    Attributes:
        statistics: call it with the histograms and medians that are needed (none for the moments alone); it computes
            them or loads them from the cache.
        length: number of positions in the longest evaluation input.
        note: call it with a remark for readers of the results; it is saved with the run and shown in the report.
    """

    model: Transformer
    projections: list[Projection]
    statistics: Callable[..., Statistics]
    length: int
    seed: int
    note: Callable[[str], None] = log.debug


@runtime_checkable
class Method(Protocol):
    """A method's options, in a frozen dataclass. A class that leaves out a member with a value here has that value.

    Attributes:
        label: name in tables, figures and folders.
        is_continuous: True if rounding of the statistics cannot move the values far. None: true without histograms and
            medians.
        numbers: version of the values, part of the signature; raise it when they change. None: the first one.
    """

    label: str
    is_continuous: bool | None = None
    numbers: int | None = None

    @abstractmethod
    def fit(self, fitting: Fitting) -> Replacement:
        """Compute the replacement."""
        ...

    def check(self, modality: Modality) -> None:
        """Check what can be known before anything is loaded.

        Args:
            modality: what the model takes.

        Raises:
            UserError: one line that names the option and the remedy.
        """


@dataclass(frozen=True)
class Constant:
    """Replacement that is the same at every position of every example: `[neurons]` per layer."""

    values: list[Float[torch.Tensor, " _neurons"]]
    reads_clean = False

    def __call__(self, batch: Batch, clean: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.values


def values_of(replacement: Replacement, batch: Batch, clean: list[torch.Tensor], n_layers: int) -> list[torch.Tensor]:
    """The replacement values of a batch, one tensor per layer.

    Raises:
        UserError: the replacement does not return one tensor per layer.
    """
    values: Any = replacement(batch, clean)
    whole = isinstance(values, list | tuple) and all(isinstance(value, torch.Tensor) for value in values)
    if whole and len(values) == n_layers:
        return list(values)
    given = f"{len(values)} tensors" if whole else f"no list of tensors, but {values!r:.60}"
    raise UserError(f"method: gives {given} for {n_layers} layers; give one tensor a layer")
