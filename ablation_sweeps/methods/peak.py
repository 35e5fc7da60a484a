"""Peak: the value that the neuron takes most often, read off a histogram of its calibration activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.methods.method import Constant, Fitting
from ablation_sweeps.neurons.statistics import Histogram

Estimator = Literal[
    "histogram", "coarse_to_fine", "averaged", "smoothed", "global_range", "kde", "half_sample_mode", "grenander"
]  # fmt: skip
FINE = 100  # coarse_to_fine, kde and half_sample_mode look inside each bin with this many
POWER = 10  # of grenander


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Peak:
    """The modal value.

    Attributes:
        estimator: how the mode is found; all but half_sample_mode, grenander and the details of kde are those of the
            paper's code.
            histogram: centre of the fullest of `n_bins` bins.
            coarse_to_fine: the fullest of 100 bins inside the fullest of `n_bins`.
            averaged: counts of 10 n_bins bins, each repeated 10 times, and counts of 100 n_bins bins, added.
            smoothed: the counts of `n_bins` bins convolved with a Gaussian, 5 wide, sigma 1.
            global_range: `n_bins` bins between the smallest and the largest activation of all neurons.
            kde: maximum of a Gaussian kernel density of width `bandwidth`, on 100 n_bins bins. Where these are wider
                than the bandwidth, it is the fullest of them.
            half_sample_mode: the shortest interval that holds half of the values, and so on inside it
                (Bickel & Fruehwirth 2006), on 100 n_bins bins.
            grenander: mean over the smoothed bins, weighted by a power of their counts; see `grenander`.
        n_bins: equal bins between a neuron's own minimum and maximum.
        bandwidth: of kde, in the activations' own units.

    All but grenander are discontinuous: where two places hold nearly as many values, one count decides which of them is
    taken, so that rounding (another batch size, padding or device) can move the estimate across the whole range. `fit`
    notes how many neurons that concerns.

    Source: arXiv:2408.17322 and its code. Departs from it in: the fine bins are those of the neuron's whole range,
    which are the same bins but for values that lie within rounding of an edge.
    """

    label: str
    estimator: Estimator
    n_bins: Annotated[int, Field(ge=1, le=2**20)]
    bandwidth: Annotated[float, Field(gt=0)]

    @property
    def is_continuous(self) -> bool:
        """One value more or less in a bin moves the estimate by little."""
        return self.estimator == "grenander"

    def fit(self, fitting: Fitting) -> Constant:
        histograms, find = self._steps()
        statistics = fitting.statistics(*histograms)
        values, found = [], []
        for layer, own in enumerate(statistics.moments):
            low, high = statistics.bin_range(histograms[0], layer)
            found.append(find(*(statistics.counts[histogram][layer] for histogram in histograms), high - low))
            # With one range for all neurons, the centre of a constant's bin is another value.
            value = _value(found[-1].place, low, high)
            values.append(torch.where(own.minimum == own.maximum, own.minimum, value))
        if not self.is_continuous:
            fitting.note(self._fragility(found))
        return Constant(values)

    def _steps(self) -> tuple[tuple[Histogram, ...], Callable[..., Found]]:
        """The histograms, and what finds the peak in their counts and the width of the range."""
        n, h = self.n_bins, self.bandwidth
        bins, fine = Histogram(n), Histogram(n * FINE)
        steps: dict[Estimator, tuple[tuple[Histogram, ...], Callable[..., Found]]] = {
            "histogram": ((bins,), lambda counts, _: fullest(counts, counts, n)),
            "global_range": ((Histogram(n, one_range=True),), lambda counts, _: fullest(counts, counts, n)),
            "smoothed": ((bins,), lambda counts, _: fullest(smooth(counts), smooth(counts, power=2), n)),
            "coarse_to_fine": ((fine,), lambda counts, _: coarse_to_fine(counts)),
            "averaged": ((fine, Histogram(10 * n)), lambda fine, coarse, _: averaged(coarse, fine, n)),
            "kde": ((fine,), lambda counts, width: kernel_density(counts, width, h, n)),
            "half_sample_mode": ((fine,), lambda counts, _: Found(half_sample_mode(counts))),
            "grenander": ((bins,), lambda counts, _: Found(grenander(counts))),
        }
        return steps[self.estimator]

    def _fragility(self, found: list[Found]) -> str:
        """A note on the neurons whose peak a few counts decide."""
        stable = "method.estimator=grenander is continuous"
        if self.estimator == "half_sample_mode":
            return f"where two halves are about equally short, one count decides which is taken; {stable}"
        what = "the two fullest bins lie within counting noise, c1 - c2 <= sqrt(c1 + c2),"
        if self.estimator == "kde":
            what = "the two highest maxima of the density lie within counting noise"
        are_tied = torch.cat([of.is_tied for of in found if of.is_tied is not None])
        are_apart = torch.cat([of.is_apart for of in found if of.is_apart is not None])
        tied, apart = (f"{100 * found.double().mean().item():.0f} %" for found in (are_tied, are_apart))
        return (
            f"{what} in {tied} of the neurons, and more than one of {self.n_bins} bins apart in {apart}: "
            f"there, rounding (another batch size or device) can change which one is taken; {stable}"
        )


class Found(NamedTuple):
    """The peaks of a layer's neurons.

    Attributes:
        place: share of the range that lies below it, from 0 to 1.
        is_tied: the runner-up is lower by no more than counting noise.
        is_apart: it is tied, and with a runner-up that lies more than one bin away.
    """

    place: Float[torch.Tensor, " neurons"]
    is_tied: Bool[torch.Tensor, " neurons"] | None = None
    is_apart: Bool[torch.Tensor, " neurons"] | None = None


def _value(
    place: Float[torch.Tensor, " neurons"], low: Float[torch.Tensor, " neurons"], high: Float[torch.Tensor, " neurons"]
) -> Float[torch.Tensor, " neurons"]:
    return (low.double() + place.double() * (high.double() - low.double())).float()


def centre_of_fullest(
    counts: Num[torch.Tensor, "neurons bins"],
    low: Float[torch.Tensor, " neurons"],
    high: Float[torch.Tensor, " neurons"],
) -> Float[torch.Tensor, " neurons"]:
    """The value that `Peak` writes by default."""
    return _value(_place(counts), low, high)


def fullest(
    height: Num[torch.Tensor, "neurons bins"], variance: Num[torch.Tensor, "neurons bins"], n_bins: int
) -> Found:
    """The highest bin, and whether another one may be the highest in truth.

    The two are tied if their heights differ by at most one standard deviation of the difference. Counts are taken to be
    Poisson distributed and independent, so that for a plain histogram this is `c1 - c2 <= sqrt(c1 + c2)`.

    Args:
        variance: of each height.
        n_bins: bins are neighbours if they lie no further apart than one of so many.
    """
    if height.shape[-1] < 2:
        nowhere = torch.zeros(len(height), dtype=torch.bool)
        return Found(_place(height), nowhere, nowhere)
    two, index = height.double().topk(2)
    noise = variance.double().gather(-1, index).sum(-1).sqrt()
    tied = two[:, 0] - two[:, 1] <= noise
    return Found(_place(height), tied, tied & (index.diff()[:, 0].abs() * n_bins > height.shape[-1]))


def _place(density: Num[torch.Tensor, "neurons bins"]) -> Float[torch.Tensor, " neurons"]:
    """Centre of the first fullest bin, as a share of the range."""
    n_bins = density.shape[-1]
    index = torch.arange(n_bins)
    first = torch.where(density == density.amax(-1, keepdim=True), index, n_bins).amin(-1)  # argmax may take any
    return (first.double() + 0.5) / n_bins


def smooth(counts: Num[torch.Tensor, "neurons bins"], power: int = 1) -> Float[torch.Tensor, "neurons bins"]:
    """Gaussian of 5 bins with sigma 1; outside of the range there is nothing.

    Args:
        power: that the weights are raised to; 2 gives the variance of the smoothed counts.
    """
    kernel = torch.exp(-0.5 * torch.arange(-2.0, 3.0, dtype=torch.float64) ** 2)
    kernel = (kernel / kernel.sum()) ** power
    return torch.nn.functional.conv1d(counts.double()[:, None], kernel[None, None], padding=2)[:, 0]


def averaged(
    coarse: Num[torch.Tensor, "neurons bins"], fine: Num[torch.Tensor, "neurons fine_bins"], n_bins: int
) -> Found:
    """The fullest fine bin, to whose count that of its coarse bin is added. The coarse one holds the same values once
    more, which weighs in its variance: `(coarse - fine) + 4 fine`."""
    around = coarse.repeat_interleave(fine.shape[-1] // coarse.shape[-1], -1)
    return fullest(around + fine, around + 3 * fine, n_bins)


def coarse_to_fine(counts: Num[torch.Tensor, "neurons bins"]) -> Found:
    """The fullest of the fine bins inside the fullest coarse one; tied where the coarse ones are."""
    blocks = counts.unflatten(-1, (-1, FINE))
    n_coarse = blocks.shape[1]
    coarse = fullest(blocks.sum(-1), blocks.sum(-1), n_coarse)
    index = ((coarse.place * n_coarse).long())[:, None, None].expand(-1, 1, FINE)
    return coarse._replace(place=(index[:, 0, 0] + _place(blocks.gather(1, index)[:, 0])) / n_coarse)


def kernel_density(
    counts: Num[torch.Tensor, "neurons bins"],
    width: Float[torch.Tensor, " neurons"],
    bandwidth: float,
    n_bins: int,
) -> Found:
    """The bin where the density is highest: every value counts as the centre of its bin.

    The convolution is done by FFT, and padded so that the two ends of the range do not meet. The runner-up is another
    maximum of the density: beside the highest bin lies one that is nearly as high, and means nothing.
    """
    n = counts.shape[-1]
    size = 2 * n
    offsets = torch.arange(size, dtype=torch.float64)
    offsets = torch.minimum(offsets, size - offsets)
    found = []
    for some, ranges in zip(counts.split(256), width.split(256), strict=True):
        exponent = -0.5 * (offsets * (ranges.double()[:, None] / n) / bandwidth) ** 2
        transformed = torch.fft.rfft(some.double(), size)
        density, variance = (
            torch.fft.irfft(transformed * torch.fft.rfft(torch.exp(power * exponent)), size)[:, :n] for power in (1, 2)
        )
        # The transform leaves rounding; what differs by less is a tie, and ties go to the lower bin.
        rounded = (density / density.amax(-1, keepdim=True)).mul(1e9).round()
        before, after = (torch.nn.functional.pad(rounded, pad, value=-1.0) for pad in ((1, 0), (0, 1)))
        is_maximum = (rounded > before[:, :-1]) & (rounded >= after[:, 1:])
        of_some = fullest(density.where(is_maximum, -torch.inf), variance.clamp(min=0), n_bins)
        found.append(of_some._replace(place=_place(rounded)))
    return Found(*(torch.cat(of_all) for of_all in zip(*found, strict=True)))


def grenander(counts: Num[torch.Tensor, "neurons bins"]) -> Float[torch.Tensor, " neurons"]:
    """Grenander's direct estimate of the mode: the mean of the values, weighted by a power of the density.

    With `h` the counts smoothed as by `smooth`, it is `sum(h^p x) / sum(h^p)` over the bins' centres `x`, p = 10. For
    p = 1 it is the mean; the higher p is, the closer it comes to the fullest bin, and the more one count can move it.
    It is continuous in the counts: one value that goes to another bin moves it by at most some `p` shares of the range
    over the number of values near the peak.

    With one peak it is that peak, for a skewed one a little to its heavier side (an exponential density: 1/p of its
    mean from the end). Of two peaks it is the higher one, if that is clearly higher (by a third: 18 to 1); of two
    equal ones it lies between them, at a value that the neuron may seldom take. Where the activation is one of few
    values, it is the most frequent one, to half a bin.

    Source: Grenander, Some direct estimates of the mode, Ann. Math. Stat. 36 (1965). Departs from it in: its density is
    a smoothed histogram, and not the distances between neighbouring values.
    """
    n_bins = counts.shape[-1]
    height = smooth(counts)
    weights = (height / height.amax(-1, keepdim=True)) ** POWER
    return (weights * (torch.arange(n_bins) + 0.5)).sum(-1) / weights.sum(-1) / n_bins


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
