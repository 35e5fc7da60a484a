"""Statistics of activations: moments and histograms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Int, Num

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.neurons.streaming_histogram import (
    transpose_to_neurons,
)


class Histogram(NamedTuple):
    """Equal bins between each neuron's own minimum and maximum, or between those of all neurons of the model."""

    n_bins: int
    one_range: bool = False


@dataclass
class Moments:
    """Moments of one layer, each `[neurons]`. Sums are float64; minimum and maximum are the activations' own, as
    float32."""

    n: int
    total: Float[torch.Tensor, " neurons"]
    squares: Float[torch.Tensor, " neurons"]
    minimum: Float[torch.Tensor, " neurons"]
    maximum: Float[torch.Tensor, " neurons"]

    @property
    def mean(self) -> Float[torch.Tensor, " neurons"]:
        return (self.total / self.n).clamp(self.minimum.double(), self.maximum.double())

    @property
    def variance(self) -> Float[torch.Tensor, " neurons"]:
        """Variance of the population (divided by n)."""
        return (self.squares / self.n - self.mean**2).clamp(min=0)

    @classmethod
    def of(cls, x: Float[torch.Tensor, "tokens neurons"]) -> Moments:
        wide = x.to(torch.float64, copy=True)  # squared in place below, which x must not be
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
    """Statistics of one site, one entry a layer, over all positions of the calibration data that are not padding.

    Attributes:
        counts: for each histogram asked for, `[neurons, bins]` a layer: int32; after one pass, float64.
        medians: if asked for, `[neurons]` a layer, float32: of an even number of values, the mean of the middle two. To
            1e-3 of the distance between the neuron's quartiles, and mostly exact.
        too_large: examples that did not fit into the device's memory at once, where some of the statistics come from
            passes over halved batches: these round otherwise, so that counts of neighbouring bins may differ by a few.
    """

    moments: list[Moments]
    counts: dict[Histogram, list[Num[torch.Tensor, "_neurons bins"]]] = field(default_factory=dict)
    medians: list[Float[torch.Tensor, " _neurons"]] = field(default_factory=list)
    too_large: int | None = None

    def bin_range(self, histogram: Histogram, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends of the bins: `[neurons]` each, float32."""
        low, high = self.moments[layer].minimum, self.moments[layer].maximum
        if histogram.one_range:
            low = torch.stack([m.minimum.min() for m in self.moments]).min().expand_as(low)
            high = torch.stack([m.maximum.max() for m in self.moments]).max().expand_as(high)
        return low, high


def bin_index(
    x: Float[torch.Tensor, "tokens neurons"],
    low: Float[torch.Tensor, " neurons"],
    high: Float[torch.Tensor, " neurons"],
    n_bins: int,
) -> Int[torch.Tensor, "neurons tokens"]:
    """The bin of each value, in float32: `trunc((x - low) * n_bins / (high - low))`, the maximum in the last one.

    A neuron that never changes has all its values in bin 0.
    """
    width = high - low
    scaled = (x.float() - low).mul_(n_bins).div_(torch.where(width > 0, width, 1))
    return transpose_to_neurons(scaled).clamp_(0, n_bins - 1)
