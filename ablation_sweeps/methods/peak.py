"""Peak ablation: replace a neuron with its most frequent value, read off a histogram of its calibration activations."""

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
FINE = 100  # fine bins inside each bin, for coarse_to_fine, kde and half_sample_mode
POWER = 10  # exponent of the weights in grenander


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Peak:
    """The mode of each neuron's calibration activations.

    Attributes:
        estimator: how the mode is estimated. All but half_sample_mode, grenander and the details of kde follow the
            paper's code.
            histogram: centre of the fullest of `n_bins` bins.
            coarse_to_fine: the fullest of 100 bins inside the fullest of `n_bins`.
            averaged: the fullest bin after adding the counts of 10 n_bins bins, each repeated 10 times, to the counts
                of 100 n_bins bins.
            smoothed: the fullest of `n_bins` bins after convolution with a Gaussian, 5 bins wide, sigma 1 bin.
            global_range: the fullest of `n_bins` bins between the smallest and the largest activation of all neurons.
            kde: maximum of a Gaussian kernel density of width `bandwidth`, on 100 n_bins bins. If these are wider than
                the bandwidth, the fullest of them.
            half_sample_mode: the shortest interval with half of the values, then the shortest with half of those, and
                so on (Bickel & Fruehwirth 2006), on 100 n_bins bins.
            grenander: mean over the smoothed bins, weighted by a power of their counts; see `grenander`.
        n_bins: equal-width bins between a neuron's own minimum and maximum.
        bandwidth: kernel width of kde, in the activations' units.

    All but grenander are discontinuous: if two bins hold nearly as many values, a single count decides between them, so
    rounding (another batch size, padding or device) can move the estimate across the whole range. `fit` records how
    many neurons are affected.

    Source: arXiv:2408.17322 and its code. Departs from it in: the fine bins divide the neuron's whole range. They are
    the same bins, except for values within rounding of an edge.
    """

    label: str
    estimator: Estimator
    n_bins: Annotated[int, Field(ge=1, le=2**20)]
    bandwidth: Annotated[float, Field(gt=0)]

    @property
    def is_continuous(self) -> bool:
        """True if moving one value to another bin changes the estimate only a little."""
        return self.estimator == "grenander"

    def fit(self, fitting: Fitting) -> Constant:
        """Constants `[neurons]` per layer, float32, in the activations' units."""
        histograms, find = self._steps()
        statistics = fitting.statistics(*histograms)
        values, found = [], []
        for layer, own in enumerate(statistics.moments):
            low, high = statistics.bin_range(histograms[0], layer)
            found.append(find(*(statistics.counts[histogram][layer] for histogram in histograms), high - low))
            # With one range for all neurons, the centre of the bin is not the value of a constant neuron.
            value = _value(found[-1].place, low, high)
            values.append(torch.where(own.minimum == own.maximum, own.minimum, value))
        if not self.is_continuous:
            fitting.note(self._fragility(found))
        return Constant(values)

    def _steps(self) -> tuple[tuple[Histogram, ...], Callable[..., Found]]:
        """The histograms needed, and the function that finds the peak from their counts and the width of the range."""
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
        """Warning about the neurons whose peak depends on a few counts."""
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
    """The peaks of one layer's neurons.

    Attributes:
        place: position in the neuron's range, from 0 (minimum) to 1 (maximum).
        is_tied: True if the runner-up is lower by no more than counting noise.
        is_apart: True if it is tied with a runner-up that is more than one bin away.
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
    """Centre of the fullest bin, float32, in the activations' units: the value that `Peak` writes by default."""
    return _value(_place(counts), low, high)


def fullest(
    height: Num[torch.Tensor, "neurons bins"], variance: Num[torch.Tensor, "neurons bins"], n_bins: int
) -> Found:
    """The highest bin, and whether the runner-up might really be the highest.

    The two are tied if their heights differ by at most one standard deviation of the difference. Counts are assumed to
    be independent and Poisson distributed; for a plain histogram the criterion is `c1 - c2 <= sqrt(c1 + c2)`.

    Args:
        variance: variance of each height.
        n_bins: two bins are neighbours if they are at most 1/n_bins of the range apart.
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
    first = torch.where(density == density.amax(-1, keepdim=True), index, n_bins).amin(-1)  # argmax may return any
    return (first.double() + 0.5) / n_bins


def smooth(counts: Num[torch.Tensor, "neurons bins"], power: int = 1) -> Float[torch.Tensor, "neurons bins"]:
    """Counts convolved with a Gaussian of 5 bins, sigma 1 bin, and zeros outside of the range.

    Args:
        power: exponent of the weights; 2 gives the variance of the smoothed counts.
    """
    kernel = torch.exp(-0.5 * torch.arange(-2.0, 3.0, dtype=torch.float64) ** 2)
    kernel = (kernel / kernel.sum()) ** power
    return torch.nn.functional.conv1d(counts.double()[:, None], kernel[None, None], padding=2)[:, 0]


def averaged(
    coarse: Num[torch.Tensor, "neurons bins"], fine: Num[torch.Tensor, "neurons fine_bins"], n_bins: int
) -> Found:
    """The fullest fine bin after the count of its coarse bin is added to its own.

    The coarse bin counts the fine bin's values a second time, so the variance is `(coarse - fine) + 4 fine`.
    """
    around = coarse.repeat_interleave(fine.shape[-1] // coarse.shape[-1], -1)
    return fullest(around + fine, around + 3 * fine, n_bins)


def coarse_to_fine(counts: Num[torch.Tensor, "neurons bins"]) -> Found:
    """The fullest fine bin inside the fullest coarse bin; tied if the coarse bins are tied."""
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
    """The bin with the highest kernel density, where every value counts as the centre of its bin.

    The convolution uses an FFT, padded so that the ends of the range do not wrap around. The runner-up is another local
    maximum: the bin beside the highest one is always nearly as high.
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
        # The FFT leaves rounding noise: smaller differences are ties, which go to the lower bin.
        rounded = (density / density.amax(-1, keepdim=True)).mul(1e9).round()
        before, after = (torch.nn.functional.pad(rounded, pad, value=-1.0) for pad in ((1, 0), (0, 1)))
        is_maximum = (rounded > before[:, :-1]) & (rounded >= after[:, 1:])
        of_some = fullest(density.where(is_maximum, -torch.inf), variance.clamp(min=0), n_bins)
        found.append(of_some._replace(place=_place(rounded)))
    return Found(*(torch.cat(of_all) for of_all in zip(*found, strict=True)))


def grenander(counts: Num[torch.Tensor, "neurons bins"]) -> Float[torch.Tensor, " neurons"]:
    """Grenander's direct estimate of the mode: the mean of the values, weighted by a power of the density.

    With `h` the counts smoothed by `smooth`, it is `sum(h^p x) / sum(h^p)` over the bin centres `x`, p = 10. p = 1
    gives the mean; a higher p comes closer to the fullest bin, but lets a single count move it further. The estimate is
    continuous in the counts: a value that moves to another bin changes it by at most about `p / m` of the range, with
    `m` the number of values near the peak.

    A single peak is found as it is; if it is skewed, the estimate lies a little towards its heavier side (for an
    exponential density, 1/p of its mean from the end). Of two peaks it finds the higher one if that is clearly higher
    (by a third: weights of 18 to 1). Between two equal peaks it lies at a value that the neuron may seldom take. If the
    activation takes only a few values, it is the most frequent one, to half a bin.

    Source: Grenander, Some direct estimates of the mode, Ann. Math. Stat. 36 (1965). Departs from it in: the density is
    a smoothed histogram instead of the distances between adjacent values.
    """
    n_bins = counts.shape[-1]
    height = smooth(counts)
    weights = (height / height.amax(-1, keepdim=True)) ** POWER
    return (weights * (torch.arange(n_bins) + 0.5)).sum(-1) / weights.sum(-1) / n_bins


def half_sample_mode(counts: Num[torch.Tensor, "neurons bins"]) -> Float[torch.Tensor, " neurons"]:
    """Half-sample mode, a robust mode: narrow the sample to its densest half until it cannot be halved."""
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
        # The shortest interval; then the one with most values; then the first.
        best = np.lexsort((starts, cumulated[starts] - cumulated[ends], ends - starts))[0]
        if (starts[best], ends[best]) == (low, high):
            break
        low, high = int(starts[best]), int(ends[best])
    fullest = low + int(row[low:high].argmax())
    return (fullest + 0.5) / n_bins
