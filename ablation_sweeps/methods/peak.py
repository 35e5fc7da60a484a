"""Peak: the value that the neuron takes most often, read off a histogram of its calibration activations."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Num
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.ablation import Constant, Fitting
from ablation_sweeps.activations import Histogram, Statistics
from ablation_sweeps.lazy import torch

Estimator = Literal[
    "histogram", "coarse_to_fine", "averaged", "smoothed", "global_range", "kde", "half_sample_mode"
]  # fmt: skip
FINE = 100  # coarse_to_fine, kde and half_sample_mode look inside each bin with this many


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Peak:
    """The modal value.

    Attributes:
        estimator: how the mode is found; all but half_sample_mode and the details of kde are those of the paper's code.
            histogram: centre of the fullest of `n_bins` bins.
            coarse_to_fine: the fullest of 100 bins inside the fullest of `n_bins`.
            averaged: counts of 10 n_bins bins, each repeated 10 times, and counts of 100 n_bins bins, added.
            smoothed: the counts of `n_bins` bins convolved with a Gaussian, 5 wide, sigma 1.
            global_range: `n_bins` bins between the smallest and the largest activation of all neurons.
            kde: maximum of a Gaussian kernel density of width `bandwidth`, on 100 n_bins bins.
            half_sample_mode: the shortest interval that holds half of the values, and so on inside it
                (Bickel & Fruehwirth 2006), on 100 n_bins bins.
        n_bins: equal bins between a neuron's own minimum and maximum.
        bandwidth: of kde, in the activations' own units.

    Source: arXiv:2408.17322 and its code. Departs from it in: the fine bins are those of the neuron's whole range,
    which are the same bins but for values that lie within rounding of an edge.
    """

    label: str
    estimator: Estimator
    n_bins: Annotated[int, Field(ge=1)]
    bandwidth: Annotated[float, Field(gt=0)]

    def fit(self, fitting: Fitting) -> Constant:
        n, h = self.n_bins, self.bandwidth
        find = {
            "histogram": lambda: _each(fitting, Histogram(n), _fullest),
            "global_range": lambda: _each(fitting, Histogram(n, one_range=True), _fullest),
            "smoothed": lambda: _each(fitting, Histogram(n), lambda counts, _: _place(smooth(counts))),
            "coarse_to_fine": lambda: _each(fitting, Histogram(n * FINE), lambda counts, _: coarse_to_fine(counts)),
            "averaged": lambda: self._averaged(fitting),
            "kde": lambda: _each(fitting, Histogram(n * FINE), lambda counts, width: kernel_density(counts, width, h)),
            "half_sample_mode": lambda: _each(fitting, Histogram(n * FINE), lambda counts, _: half_sample_mode(counts)),
        }
        return Constant(find[self.estimator]())

    def _averaged(self, fitting: Fitting) -> list[torch.Tensor]:
        coarse, fine = Histogram(10 * self.n_bins), Histogram(100 * self.n_bins)
        statistics = fitting.statistics(coarse, fine)
        return [
            _value(_place(a.repeat_interleave(10, -1) + b), *statistics.range(fine, layer))
            for layer, (a, b) in enumerate(zip(statistics.counts[coarse], statistics.counts[fine], strict=True))
        ]


def _each(fitting: Fitting, histogram: Histogram, place) -> list[torch.Tensor]:
    """`place(counts, width of the range)` gives, for each layer, where in the range the peak lies, from 0 to 1."""
    statistics: Statistics = fitting.statistics(histogram)
    values = []
    for layer, counts in enumerate(statistics.counts[histogram]):
        low, high = statistics.range(histogram, layer)
        own = statistics.moments[layer]  # with one range for all, the bin of a constant has another centre
        value = _value(place(counts, high - low), low, high)
        values.append(torch.where(own.minimum == own.maximum, own.minimum, value))
    return values


def _value(
    place: Float[torch.Tensor, " neurons"], low: Float[torch.Tensor, " neurons"], high: Float[torch.Tensor, " neurons"]
) -> Float[torch.Tensor, " neurons"]:
    return (low.double() + place.double() * (high.double() - low.double())).float()


def centre_of_fullest(
    counts: Num[torch.Tensor, "neurons bins"],
    low: Float[torch.Tensor, " neurons"],
    high: Float[torch.Tensor, " neurons"],
) -> Float[torch.Tensor, " neurons"]:
    """What `Peak` writes by default."""
    return _value(_place(counts), low, high)


def _place(density: Num[torch.Tensor, "neurons bins"]) -> Float[torch.Tensor, " neurons"]:
    """Centre of the first fullest bin, as a share of the range."""
    n_bins = density.shape[-1]
    index = torch.arange(n_bins)
    first = torch.where(density == density.amax(-1, keepdim=True), index, n_bins).amin(-1)  # argmax may take any
    return (first.double() + 0.5) / n_bins


def _fullest(
    counts: Num[torch.Tensor, "neurons bins"], width: Float[torch.Tensor, " neurons"]
) -> Float[torch.Tensor, " neurons"]:
    return _place(counts)


def smooth(counts: Num[torch.Tensor, "neurons bins"]) -> Float[torch.Tensor, "neurons bins"]:
    """Gaussian of 5 bins with sigma 1; outside of the range there is nothing."""
    kernel = torch.exp(-0.5 * torch.arange(-2.0, 3.0, dtype=torch.float64) ** 2)
    return torch.nn.functional.conv1d(counts.double()[:, None], (kernel / kernel.sum())[None, None], padding=2)[:, 0]


def coarse_to_fine(counts: Num[torch.Tensor, "neurons bins"]) -> Float[torch.Tensor, " neurons"]:
    blocks = counts.unflatten(-1, (-1, FINE))
    n_coarse = blocks.shape[1]
    fullest = ((_place(blocks.sum(-1)) * n_coarse).long())[:, None, None].expand(-1, 1, FINE)
    return (fullest[:, 0, 0] + _place(blocks.gather(1, fullest)[:, 0])) / n_coarse


def kernel_density(
    counts: Num[torch.Tensor, "neurons bins"], width: Float[torch.Tensor, " neurons"], bandwidth: float
) -> Float[torch.Tensor, " neurons"]:
    """The bin where the density is highest: every value counts as the centre of its bin.

    The convolution is done by FFT, and padded so that the two ends of the range do not meet.
    """
    n = counts.shape[-1]
    size = 2 * n
    offsets = torch.arange(size, dtype=torch.float64)
    offsets = torch.minimum(offsets, size - offsets)
    places = []
    for some, ranges in zip(counts.split(256), width.split(256), strict=True):
        kernel = torch.exp(-0.5 * (offsets * (ranges.double()[:, None] / n) / bandwidth) ** 2)
        density = torch.fft.irfft(torch.fft.rfft(some.double(), size) * torch.fft.rfft(kernel), size)[:, :n]
        # The transform leaves rounding; what differs by less is a tie, and ties go to the lower bin.
        places.append(_place((density / density.amax(-1, keepdim=True)).mul(1e9).round()))
    return torch.cat(places)


def half_sample_mode(counts: Num[torch.Tensor, "neurons bins"]) -> Float[torch.Tensor, " neurons"]:
    """Robust mode: halve the sample to its densest half until nothing more can be halved."""
    return torch.tensor([_half_sample_mode(row) for row in counts.numpy()], dtype=torch.float64)


def _half_sample_mode(row: np.ndarray) -> float:
    n_bins, low, high = len(row), 0, len(row)  # the bins [low, high) hold the sample
    cumulated = np.concatenate([[0], row.cumsum(dtype=np.int64)])
    while True:
        starts = np.arange(low, high)
        half = -(-(cumulated[high] - cumulated[low]) // 2)
        ends = np.searchsorted(cumulated, cumulated[starts] + half)  # the first bin that completes the half
        fits = ends <= high
        starts, ends = starts[fits], ends[fits]
        # The shortest; of these, the one that holds most; of these, the first.
        best = np.lexsort((starts, cumulated[starts] - cumulated[ends], ends - starts))[0]
        if (starts[best], ends[best]) == (low, high):
            break
        low, high = int(starts[best]), int(ends[best])
    fullest = low + int(row[low:high].argmax())
    return (fullest + 0.5) / n_bins
