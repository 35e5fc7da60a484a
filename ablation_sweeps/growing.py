"""Counts of values whose range is not known before the last one: bins that grow when a value lies outside of them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int

from ablation_sweeps.lazy import torch

NUMBERS = 2  # as those of job.py, of what is counted here alone
FINE = 1024  # bins of a neuron; its own range covers a quarter of them at the least


@dataclass
class GrowingCounts:
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
    ) -> GrowingCounts:
        """The ends are those of the first values: there is more to come, so that room for a quarter more is left on
        either side, which often spares the coarser bins of a doubled range.

        Args:
            zeros: `[neurons, FINE]`, which become the counts.
        """
        low, high = low.double(), high.double()
        span = torch.maximum(high - low, low.abs().clamp(min=1e-6) * 2**-20)  # a neuron that has not changed so far
        low, span = low - span / 4, span * 1.5
        return cls(low, span / (FINE - 1), zeros)

    def add(
        self,
        x: Float[torch.Tensor, "tokens neurons"],
        low: Float[torch.Tensor, " neurons"],
        high: Float[torch.Tensor, " neurons"],
    ) -> None:
        """Counts `x`, whose smallest and largest values are given."""
        self._reach(low.double(), high.double())
        index = by_neuron((x.float() - self.low.float()).mul_((1 / self.width).float())).clamp_(0, FINE - 1)
        self.counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))

    def _reach(self, low: Float[torch.Tensor, " neurons"], high: Float[torch.Tensor, " neurons"]) -> None:
        finite = torch.isfinite(high - low)  # no range reaches what is not, which is refused after the pass
        while True:
            below, above = finite & (low < self.low), finite & (high > self.low + FINE * self.width)
            outside = below | above
            if not outside.any():
                return
            for rows, half in ((below, slice(FINE // 2, None)), (outside & ~below, slice(FINE // 2))):
                finer = self.counts[rows]
                self.counts[rows] = 0
                self.counts[rows, half] = finer[:, ::2] + finer[:, 1::2]
            self.low = torch.where(below, self.low - FINE * self.width, self.low)
            self.width = torch.where(outside, 2 * self.width, self.width)

    def in_bins(
        self, low: Float[torch.Tensor, " neurons"], high: Float[torch.Tensor, " neurons"], n_bins: int
    ) -> Float[torch.Tensor, "neurons n_bins"]:
        """What lies in each of `n_bins` equal bins between `low` and `high`, the smallest and the largest value: the
        values of a fine bin are taken to be spread evenly over it."""
        up_to = torch.nn.functional.pad(self.counts, (1, 0)).cumsum(1, dtype=torch.int32)
        shares = torch.arange(1, n_bins, device=self.low.device) / n_bins
        edges = low.double()[:, None] + (high - low).double()[:, None] * shares
        place = ((edges - self.low[:, None]) / self.width[:, None]).clamp(0, FINE)
        before = place.long().clamp_(max=FINE - 1)
        ends = up_to.gather(1, before).double(), up_to.gather(1, before + 1).double()
        inside, all_of_them = torch.lerp(*ends, place - before), up_to[:, -1:].double()
        counts = torch.cat([torch.zeros_like(all_of_them), inside, all_of_them], 1).diff(dim=1)
        constant = (high == low)[:, None]
        return torch.where(constant, torch.nn.functional.pad(all_of_them, (0, n_bins - 1)), counts)


def by_neuron(places: Float[torch.Tensor, "tokens neurons"]) -> Int[torch.Tensor, "neurons tokens"]:
    """Without their fractions, and transposed: the scattered writes of a neuron then stay in a few cache lines. Both at
    once takes a quarter less than one after the other."""
    return places.T.to(torch.int64, memory_format=torch.contiguous_format)
