"""Median: half of the neuron's calibration activations lie below it."""

from __future__ import annotations

from typing import Annotated, ClassVar

from jaxtyping import Float, Num
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.methods.method import Constant, Fitting
from ablation_sweeps.neurons.collect import Medians


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Median:
    """Attributes:
    n_bins: in which each pass over the calibration data closes in on it; it does not change the value by more than 1e-3
        of the distance between the neuron's quartiles.
    """

    label: str
    n_bins: Annotated[int, Field(ge=2, le=2**20)]

    is_continuous: ClassVar[bool] = True
    numbers: ClassVar[int] = 2  # raise it when its values change; 1 was read off one histogram, to a bin's width

    def fit(self, fitting: Fitting) -> Constant:
        return Constant(fitting.statistics(Medians(self.n_bins)).medians)


def median(
    counts: Num[torch.Tensor, "neurons bins"],
    low: Float[torch.Tensor, " neurons"],
    high: Float[torch.Tensor, " neurons"],
) -> Float[torch.Tensor, " neurons"]:
    """Read off the cumulated counts, linearly inside the bin, and so to a bin's width: for figures. Same units as the
    activations, float32."""
    cumulated = counts.cumsum(-1).double()
    half = cumulated[:, -1:] / 2
    bin = (cumulated < half).sum(-1, keepdim=True)
    inside = counts.gather(-1, bin).double()
    below = cumulated.gather(-1, bin) - inside
    place = (bin + (half - below) / inside)[:, 0] / counts.shape[-1]
    return (low.double() + place * (high.double() - low.double())).float()
