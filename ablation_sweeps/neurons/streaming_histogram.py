"""Counts of values in bins that adapt: some grow when a value lies outside of them, others close in on a rank."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int

from ablation_sweeps.base.lazy import torch

COUNTS_VERSION = 2  # as those of job.py, of what is counted here alone
N_STREAMING_BINS = 1024  # bins of a neuron; its own range covers a quarter of them at the least


@dataclass
class StreamingHistogram:
    """Equal bins of each neuron of a layer. Where a value lies outside of them, two neighbours become one, and the
    place that this frees lies on that side: the range doubles, and no value is looked at again.

    Attributes:
        low: lower end of the first bin, `[neurons]`, float64.
        width: of a bin, likewise.
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
        """The ends are those of the first values: there is more to come, so that room for a quarter more is left on
        either side, which often spares the coarser bins of a doubled range.

        Args:
            zeros: `[neurons, FINE]`, which become the counts.
        """
        low, high = low.double(), high.double()
        span = torch.maximum(high - low, low.abs().clamp(min=1e-6) * 2**-20)  # a neuron that has not changed so far
        low, span = low - span / 4, span * 1.5
        return cls(low, span / (N_STREAMING_BINS - 1), zeros)

    def add(
        self,
        x: Float[torch.Tensor, "tokens neurons"],
        low: Float[torch.Tensor, " neurons"],
        high: Float[torch.Tensor, " neurons"],
    ) -> None:
        """Counts `x`, whose smallest and largest values are given."""
        self._reach(low.double(), high.double())
        index = transpose_to_neurons((x.float() - self.low.float()).mul_((1 / self.width).float())).clamp_(
            0, N_STREAMING_BINS - 1
        )
        self.counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))

    def _reach(self, low: Float[torch.Tensor, " neurons"], high: Float[torch.Tensor, " neurons"]) -> None:
        finite = torch.isfinite(high - low)  # no range reaches what is not, which is refused after the pass
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
        """Counts in each of `n_bins` equal bins between `low` and `high`, the smallest and the largest value: the
        values of a fine bin are taken to be spread evenly over it."""
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
    """Values without their fractions, and transposed: the scattered writes of a neuron then stay in a few cache lines.
    Both at once takes a quarter less than one after the other."""
    return places.T.to(torch.int64, memory_format=torch.contiguous_format)


@dataclass
class Bracket:
    """An interval of each neuron of a layer that holds its value of a given rank, and counts of values inside of it.

    All values are counted once (`add`); `narrowed` then gives the interval of the one bin in which the rank lies. Bins
    are monotone in the value, whatever the rounding, and a narrower interval is a little wider than its bin.

    Attributes:
        low, high: ends of the interval, float32; both belong to it.
        minimum, maximum: of all values.
        counts: values below the interval, those equal to `low`, those in each bin, and those above; None before the
            first value.
        least, greatest: of the values inside.
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
        """The interval of the bin that holds the value of this rank, 0 for the smallest."""
        assert self.least is not None and self.greatest is not None
        place, low, high = self._bin_of(rank)
        slack = (high - low) * 1e-3 + torch.maximum(self.low.abs(), self.high.abs()).double() * 2**-22  # two units
        low = torch.maximum((low - slack).float(), self.least)
        high = torch.minimum((high + slack).float(), self.greatest)
        low, high = (torch.where(place == 1, self.low, end) for end in (low, high))
        # Nothing of it lies inside: it was looked for in the wrong place.
        low = torch.where(place == 0, self.minimum, torch.where(place > self.n_bins + 1, self.high, low))
        high = torch.where(place == 0, self.low, torch.where(place > self.n_bins + 1, self.maximum, high))
        return Bracket(low, high, self.minimum, self.maximum, self.n_bins)

    def distance(self, rank: int, other: int) -> Float[torch.Tensor, " neurons"]:
        """Lower bound of the distance between the values of two ranks, of which `other` is the higher one."""
        return (self._bin_of(other)[1] - self._bin_of(rank)[2]).clamp(min=0)

    def _bin_of(
        self, rank: int
    ) -> tuple[Int[torch.Tensor, " neurons"], Float[torch.Tensor, " neurons"], Float[torch.Tensor, " neurons"]]:
        """Where in the counts the value of a rank lies, and the ends of its bin, cut to the interval."""
        assert self.counts is not None
        place = (self.counts.cumsum(1) <= rank).sum(1)
        low, high = self.low.double(), self.high.double()
        width = (high - low) / self.n_bins
        starts, ends = (torch.minimum(torch.maximum(low + (place - i) * width, low), high) for i in (2, 1))
        return place, starts, ends
