"""Interface of a selection rule: its inputs, and the order in which it ablates units."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch
from ablation_sweeps.data.scope import Positions
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.statistics import Statistics
from ablation_sweeps.neurons.units import Units

Within = Literal["layer", "model"]


@dataclass(frozen=True)
class Selecting:
    """Inputs that a selection rule may use. None of them comes from the evaluation data.

    Attributes:
        projections: the modules whose inputs are the neurons.
        units: the units to order: their numbers, layers and neurons.
        statistics: call it with the histograms and medians that are needed (none for the moments alone); it computes
            them or loads them from the cache.
        batches: the calibration data, with labels to score.
        write: positions at which values will be written.
        seed: random seed of the job.
        cached: `cached(compute)` gives the tensors that `compute()` returns, computed once for all jobs that have the
            same model, calibration data, units and options of the rule.
        note: call it with a remark for readers of the results; it is logged, and shown in the report.
    """

    model: Transformer
    projections: list[Projection]
    units: Units
    statistics: Callable[..., Statistics]
    batches: Sequence[Batch]
    write: Positions
    seed: int
    cached: Callable[[Callable[[], dict[str, torch.Tensor]]], dict[str, torch.Tensor]]
    note: Callable[[str], None]


@runtime_checkable
class Selection(Protocol):
    """A rule that orders units. A class that leaves out a member with a value here has that value.

    Attributes:
        label: name in tables, figures and folders.
        depends_on_seed: False if every seed gives the same order. Then curves of several seeds are one curve, not a
            sample of them.
        numbers: version of the orders, part of the signature; raise it when they change. None: the first one.
    """

    label: str
    depends_on_seed: bool
    numbers: int | None = None

    @abstractmethod
    def orders(self, selecting: Selecting) -> list[Int[torch.Tensor, " _units"]]:
        """One or more lists of unit numbers. At each fraction, that share of each list is ablated, first ones first."""
        ...


def grouped(units: Units, within: Within | None) -> list[Int[torch.Tensor, " _units"]]:
    """The numbers of the units of each projection, or of all units in one list.

    Args:
        within: "layer" gives one list for each projection, so that each loses the same share. "model" gives one list.
            None is "layer", or "model" for units that are whole layers.

    Raises:
        UserError: the units are whole layers, of which no layer can lose a share.
    """
    if within == "layer" and units.kind == "layer":
        raise UserError("selection.within=layer: a layer that is one unit has no share to lose; use within=model")
    if within == "model" or units.kind == "layer":
        return [torch.arange(len(units))]
    return [(units.group == group).nonzero()[:, 0] for group in range(int(units.group.max()) + 1)]


def ranked(
    scores: Float[torch.Tensor, " units"], groups: list[Int[torch.Tensor, " _units"]], order: str
) -> list[Int[torch.Tensor, " _units"]]:
    """Each group in the order of the scores: "least_first" or "most_first". Of equal scores, the lower number first."""
    sign = 1 if order == "least_first" else -1
    return [group[torch.argsort(sign * scores[group], stable=True)] for group in groups]
