"""Median ablation: replace a neuron with its median over the calibration data."""

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
    """The median of each neuron's calibration activations.

    Attributes:
        n_bins: bins per neuron in each pass that narrows the median down. It changes the value by at most 1e-3 of the
            neuron's interquartile range.
    """

    label: str
    n_bins: Annotated[int, Field(ge=2, le=2**20)]

    is_continuous: ClassVar[bool] = True
    numbers: ClassVar[int] = 2  # raise it when the values change; version 1 read the median off one histogram

    def fit(self, fitting: Fitting) -> Constant:
        """Constants `[neurons]` per layer, float32, in the activations' units."""
        return Constant(fitting.statistics(Medians(self.n_bins)).medians)


def median(
    counts: Num[torch.Tensor, "neurons bins"],
    low: Float[torch.Tensor, " neurons"],
    high: Float[torch.Tensor, " neurons"],
) -> Float[torch.Tensor, " neurons"]:
    """Median read off a histogram, interpolated linearly inside the bin. It is accurate to a bin's width: for figures.

    Returns:
        float32, in the activations' units.
    """
    cumulated = counts.cumsum(-1).double()
    half = cumulated[:, -1:] / 2
    bin = (cumulated < half).sum(-1, keepdim=True)
    inside = counts.gather(-1, bin).double()
    below = cumulated.gather(-1, bin) - inside
    place = (bin + (half - below) / inside)[:, 0] / counts.shape[-1]
    return (low.double() + place * (high.double() - low.double())).float()
