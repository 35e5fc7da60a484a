"""Median: half of the neuron's calibration activations lie below it."""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Float, Num
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.ablation import Constant, Fitting
from ablation_sweeps.activations import Histogram
from ablation_sweeps.lazy import torch


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Median:
    """Attributes:
    n_bins: of the histogram that it is read from; the error is below one bin's width.
    """

    label: str
    n_bins: Annotated[int, Field(ge=1)]

    def fit(self, fitting: Fitting) -> Constant:
        histogram = Histogram(self.n_bins)
        statistics = fitting.statistics(histogram)
        return Constant(
            [median(counts, *statistics.range(histogram, i)) for i, counts in enumerate(statistics.counts[histogram])]
        )


def median(
    counts: Num[torch.Tensor, "neurons bins"],
    low: Float[torch.Tensor, " neurons"],
    high: Float[torch.Tensor, " neurons"],
) -> Float[torch.Tensor, " neurons"]:
    """Read off the cumulated counts, linearly inside the bin. Same units as the activations, float32."""
    cumulated = counts.cumsum(-1).double()
    half = cumulated[:, -1:] / 2
    bin = (cumulated < half).sum(-1, keepdim=True)
    inside = counts.gather(-1, bin).double()
    below = cumulated.gather(-1, bin) - inside
    place = (bin + (half - below) / inside)[:, 0] / counts.shape[-1]
    return (low.double() + place * (high.double() - low.double())).float()
