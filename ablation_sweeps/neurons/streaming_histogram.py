"""Adaptive histograms: bins that grow to cover new values, and intervals that narrow around a given rank."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int

from ablation_sweeps.base.lazy import torch

COUNTS_VERSION = 2  # raise it when these counts change; earlier ones are then computed again
N_STREAMING_BINS = 1024  # per neuron; the neuron's range covers at least a quarter of them


@dataclass
class StreamingHistogram:
    """Equal-width bins for each neuron of a layer, whose range grows with the values.

    If a value lies outside, pairs of adjacent bins are merged and the range doubles towards that side. Earlier values
    need not be seen again.

    Attributes:
        low: lower end of the first bin, float64.
        width: width of a bin, float64.
        counts: number of values in each bin, int32.
    """

    low: Float[torch.Tensor, " neurons"]
    width: Float[torch.Tensor, " neurons"]
    counts: Int[torch.Tensor, "neurons bins"]

    @classmethod
    def between(
        cls,
        low: Float[torch.Tensor, " neurons"],
        high: Float[torch.Tensor, " neurons"],
        zeros: Int[torch.Tensor, "neurons bins"],
    ) -> StreamingHistogram:
        """Empty bins over the range of the first values and half as much again, since later values may lie outside.

        A margin on either side often avoids doubling the range, which makes the bins coarser.

        Args:
            low, high: minimum and maximum of the first values.
            zeros: `[neurons, N_STREAMING_BINS]`; becomes the counts.
        """
        low, high = low.double(), high.double()
        span = torch.maximum(high - low, low.abs().clamp(min=1e-6) * 2**-20)  # a neuron that is constant so far
        low, span = low - span / 4, span * 1.5
        return cls(low, span / (N_STREAMING_BINS - 1), zeros)

    def add(
        self,
        x: Float[torch.Tensor, "tokens neurons"],
        low: Float[torch.Tensor, " neurons"],
        high: Float[torch.Tensor, " neurons"],
    ) -> None:
        """Count the values `x`, whose minimum and maximum are `low` and `high`."""
        self._reach(low.double(), high.double())
        index = transpose_to_neurons((x.float() - self.low.float()).mul_((1 / self.width).float())).clamp_(
            0, N_STREAMING_BINS - 1
        )
        self.counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))

    def _reach(self, low: Float[torch.Tensor, " neurons"], high: Float[torch.Tensor, " neurons"]) -> None:
        finite = torch.isfinite(high - low)  # no range can cover infinity, which is refused after the pass
        while True:
            below, above = finite & (low < self.low), finite & (high > self.low + N_STREAMING_BINS * self.width)
            outside = below | above
            if not outside.any():
                return
            for rows, half in (
                (below, slice(N_STREAMING_BINS // 2, None)),
                (outside & ~below, slice(N_STREAMING_BINS // 2)),
            ):
                finer = self.counts[rows]
                self.counts[rows] = 0
                self.counts[rows, half] = finer[:, ::2] + finer[:, 1::2]
            self.low = torch.where(below, self.low - N_STREAMING_BINS * self.width, self.low)
            self.width = torch.where(outside, 2 * self.width, self.width)

    def in_bins(
        self, low: Float[torch.Tensor, " neurons"], high: Float[torch.Tensor, " neurons"], n_bins: int
    ) -> Float[torch.Tensor, "neurons n_bins"]:
        """Counts in `n_bins` equal-width bins between `low` and `high`, the neuron's minimum and maximum. Values are
        assumed to be spread evenly inside a streaming bin."""
        up_to = torch.nn.functional.pad(self.counts, (1, 0)).cumsum(1, dtype=torch.int32)
        shares = torch.arange(1, n_bins, device=self.low.device) / n_bins
        edges = low.double()[:, None] + (high - low).double()[:, None] * shares
        place = ((edges - self.low[:, None]) / self.width[:, None]).clamp(0, N_STREAMING_BINS)
        before = place.long().clamp_(max=N_STREAMING_BINS - 1)
        ends = up_to.gather(1, before).double(), up_to.gather(1, before + 1).double()
        inside, all_of_them = torch.lerp(*ends, place - before), up_to[:, -1:].double()
        counts = torch.cat([torch.zeros_like(all_of_them), inside, all_of_them], 1).diff(dim=1)
        constant = (high == low)[:, None]
        return torch.where(constant, torch.nn.functional.pad(all_of_them, (0, n_bins - 1)), counts)


def transpose_to_neurons(places: Float[torch.Tensor, "tokens neurons"]) -> Int[torch.Tensor, "neurons tokens"]:
    """Truncate to int64 and transpose in one step, a quarter faster than in two.

    With one row per neuron, the scattered writes that follow stay in few cache lines.
    """
    return places.T.to(torch.int64, memory_format=torch.contiguous_format)


@dataclass
class Bracket:
    """Interval per neuron that contains its value of a given rank, with a histogram inside the interval.

    `add` counts all values once; `narrowed` then gives the interval of the bin that contains the rank. The bin index is
    monotone in the value whatever the rounding, and a narrowed interval is slightly wider than its bin.

    Attributes:
        low, high: ends of the interval, inclusive, float32.
        minimum, maximum: range of all values, float32.
        counts: number of values below the interval, equal to `low`, in each bin, and above the interval; None before
            the first value.
        least, greatest: smallest and largest value inside the interval.
    """

    low: Float[torch.Tensor, " neurons"]
    high: Float[torch.Tensor, " neurons"]
    minimum: Float[torch.Tensor, " neurons"]
    maximum: Float[torch.Tensor, " neurons"]
    n_bins: int
    counts: Int[torch.Tensor, "neurons places"] | None = None
    least: Float[torch.Tensor, " neurons"] | None = None
    greatest: Float[torch.Tensor, " neurons"] | None = None

    def add(self, x: Float[torch.Tensor, "tokens neurons"]) -> None:
        """Count the values `x`."""
        if self.counts is None or self.least is None or self.greatest is None:
            for end in ("low", "high", "minimum", "maximum"):
                setattr(self, end, getattr(self, end).to(x.device))
            self.counts = torch.zeros(x.shape[1], self.n_bins + 3, dtype=torch.int32, device=x.device)
            self.least, self.greatest = (torch.full_like(self.low, end) for end in (torch.inf, -torch.inf))
        x, width = x.float(), self.high - self.low
        place = (x - self.low) / torch.where(width > 0, width, 1) * self.n_bins
        place = place.clamp_(0, self.n_bins - 1).add_(2)
        place[x < self.low] = 0
        place[x == self.low] = 1
        place[x > self.high] = self.n_bins + 2
        index = transpose_to_neurons(place)
        self.counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))
        inside = (x >= self.low) & (x <= self.high)
        self.least = torch.minimum(self.least, x.where(inside, torch.inf).amin(0))
        self.greatest = torch.maximum(self.greatest, x.where(inside, -torch.inf).amax(0))

    def narrowed(self, rank: int) -> Bracket:
        """The narrower interval: the bin that contains the value of this rank, where 0 is the smallest value."""
        assert self.least is not None and self.greatest is not None
        place, low, high = self._bin_of(rank)
        slack = (high - low) * 1e-3 + torch.maximum(self.low.abs(), self.high.abs()).double() * 2**-22  # rounding
        low = torch.maximum((low - slack).float(), self.least)
        high = torch.minimum((high + slack).float(), self.greatest)
        low, high = (torch.where(place == 1, self.low, end) for end in (low, high))
        # The rank lies outside the interval: continue on that side.
        low = torch.where(place == 0, self.minimum, torch.where(place > self.n_bins + 1, self.high, low))
        high = torch.where(place == 0, self.low, torch.where(place > self.n_bins + 1, self.maximum, high))
        return Bracket(low, high, self.minimum, self.maximum, self.n_bins)

    def distance(self, rank: int, other: int) -> Float[torch.Tensor, " neurons"]:
        """Lower bound of the distance between the values of two ranks, where `other` is the higher one."""
        return (self._bin_of(other)[1] - self._bin_of(rank)[2]).clamp(min=0)

    def _bin_of(
        self, rank: int
    ) -> tuple[Int[torch.Tensor, " neurons"], Float[torch.Tensor, " neurons"], Float[torch.Tensor, " neurons"]]:
        """Index in `counts` of the value of a rank, and the ends of its bin, clipped to the interval."""
        assert self.counts is not None
        place = (self.counts.cumsum(1) <= rank).sum(1)
        low, high = self.low.double(), self.high.double()
        width = (high - low) / self.n_bins
        starts, ends = (torch.minimum(torch.maximum(low + (place - i) * width, low), high) for i in (2, 1))
        return place, starts, ends
