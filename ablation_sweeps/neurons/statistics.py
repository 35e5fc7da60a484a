"""Statistics of each neuron's activations: moments, histograms and medians."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Int, Num

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.neurons.streaming_histogram import (
    transpose_to_neurons,
)


class Histogram(NamedTuple):
    """Equal-width bins between each neuron's minimum and maximum; with `one_range`, between those of all neurons."""

    n_bins: int
    one_range: bool = False


@dataclass
class Moments:
    """Moments of one layer's activations, each `[neurons]`.

    Attributes:
        n: number of positions.
        total: sum over positions, float64.
        squares: sum of squares, float64.
        minimum, maximum: float32.
    """

    n: int
    total: Float[torch.Tensor, " neurons"]
    squares: Float[torch.Tensor, " neurons"]
    minimum: Float[torch.Tensor, " neurons"]
    maximum: Float[torch.Tensor, " neurons"]

    @property
    def mean(self) -> Float[torch.Tensor, " neurons"]:
        """Mean over positions, float64, within the observed range whatever the rounding."""
        return (self.total / self.n).clamp(self.minimum.double(), self.maximum.double())

    @property
    def variance(self) -> Float[torch.Tensor, " neurons"]:
        """Population variance (divided by n)."""
        return (self.squares / self.n - self.mean**2).clamp(min=0)

    @classmethod
    def of(cls, x: Float[torch.Tensor, "tokens neurons"]) -> Moments:
        """Moments of the activations of one layer."""
        wide = x.to(torch.float64, copy=True)  # a copy: it is squared in place below
        total = wide.sum(0)
        return cls(len(x), total, wide.square_().sum(0), x.amin(0).float(), x.amax(0).float())

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.n + other.n,
            self.total + other.total,
            self.squares + other.squares,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
        )


@dataclass
class Statistics:
    """Statistics at one site, one entry per layer, over all calibration positions that are not padding.

    Attributes:
        counts: `[neurons, bins]` per layer for each requested histogram: int32, or float64 after a single pass.
        medians: if requested, `[neurons]` per layer, float32; the mean of the middle two for an even number of values.
            Mostly exact; the error is at most 1e-3 of the neuron's interquartile range.
        mean_abs: if requested, the mean of the absolute value, `[neurons]` per layer, float64.
        shared_range: smallest and largest activation of all neurons at the site, for histograms with `one_range`. None:
            those of the moments here.
        too_large: number of examples that did not fit into memory at once, if some statistics come from halved
            batches. These round differently, so counts of adjacent bins may differ by a few.
    """

    moments: list[Moments]
    counts: dict[Histogram, list[Num[torch.Tensor, "_neurons bins"]]] = field(default_factory=dict)
    medians: list[Float[torch.Tensor, " _neurons"]] = field(default_factory=list)
    mean_abs: list[Float[torch.Tensor, " _neurons"]] = field(default_factory=list)
    too_large: int | None = None
    shared_range: tuple[float, float] | None = None

    def of_layers(self, orders: Sequence[int]) -> Statistics:
        """The statistics of some layers, by their place among all of them."""
        return Statistics(
            moments=[self.moments[order] for order in orders],
            counts={histogram: [layers[order] for order in orders] for histogram, layers in self.counts.items()},
            medians=[self.medians[order] for order in orders] if self.medians else [],
            mean_abs=[self.mean_abs[order] for order in orders] if self.mean_abs else [],
            too_large=self.too_large,
            shared_range=self._shared_range(),
        )

    def bin_range(self, histogram: Histogram, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper end of the histogram's range, `[neurons]` each, float32."""
        low, high = self.moments[layer].minimum, self.moments[layer].maximum
        if histogram.one_range:
            lowest, highest = self._shared_range()
            low, high = torch.full_like(low, lowest), torch.full_like(high, highest)
        return low, high

    def _shared_range(self) -> tuple[float, float]:
        if self.shared_range is not None:
            return self.shared_range
        lowest = min(moments.minimum.min().item() for moments in self.moments)
        return lowest, max(moments.maximum.max().item() for moments in self.moments)


def bin_index(
    x: Float[torch.Tensor, "tokens neurons"],
    low: Float[torch.Tensor, " neurons"],
    high: Float[torch.Tensor, " neurons"],
    n_bins: int,
) -> Int[torch.Tensor, "neurons tokens"]:
    """Bin of each value, in float32: `trunc((x - low) * n_bins / (high - low))`; the maximum is in the last one.

    All values of a constant neuron are in bin 0.
    """
    width = high - low
    scaled = (x.float() - low).mul_(n_bins).div_(torch.where(width > 0, width, 1))
    return transpose_to_neurons(scaled).clamp_(0, n_bins - 1)
