"""One pass: bins that grow, against all values at once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from examples import CountingBody, batches_of, plain_activations

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.neurons import sites, streaming_histogram
from ablation_sweeps.neurons.collect import collect
from ablation_sweeps.neurons.statistics import Histogram
from ablation_sweeps.neurons.streaming_histogram import N_STREAMING_BINS, StreamingHistogram


def grown(x: torch.Tensor, size: int) -> StreamingHistogram:
    counts = None
    for some in x.split(size):
        low, high = some.amin(0), some.amax(0)
        counts = counts or StreamingHistogram.between(
            low, high, torch.zeros(len(low), N_STREAMING_BINS, dtype=torch.int32)
        )
        counts.add(some, low, high)
    assert counts is not None
    return counts


@pytest.fixture
def values() -> torch.Tensor:
    """`[tokens, neurons]`: about zero, far from it, ever larger, ever smaller, skewed, late to move, never moving."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 7, generator=generator)
    time = torch.linspace(0, 1, 4000)
    x[:, 1] += 300
    x[:, 2] += 1000 * time
    x[:, 3] -= 1000 * time
    x[:, 4] = x[:, 4].exp()
    x[:, 5] = torch.where(time < 0.5, 2.5, x[:, 5])
    x[:, 6] = -1.25
    return x


def test_every_value_is_in_its_bin(values):
    """All of them are counted, and each one in the bin that holds it: to a bin's width, the cumulated counts agree."""
    counts = grown(values, 64)
    assert (counts.counts.sum(1) == len(values)).all()
    ends = counts.low[:, None] + counts.width[:, None] * torch.arange(1, N_STREAMING_BINS + 1)
    for neuron in range(6):
        x = np.sort(values[:, neuron].double().numpy())
        slack = float(counts.width[neuron]) * 1e-3 + 2e-7 * abs(x).max()  # values within rounding of an edge
        cumulated, edges = counts.counts[neuron].cumsum(0).numpy(), ends[neuron].numpy()
        assert (np.searchsorted(x, edges - slack) <= cumulated).all()
        assert (cumulated <= np.searchsorted(x, edges + slack, side="right")).all()


def test_a_range_covers_a_quarter_of_the_bins_and_more(values):
    counts = grown(values, 64)
    span = values.amax(0) - values.amin(0)
    assert (span / (N_STREAMING_BINS * counts.width))[:6].min() > 0.25


@pytest.mark.parametrize("size", [64, 4000])
def test_coarse_bins_hold_what_they_should(values, size):
    low, high = values.amin(0), values.amax(0)
    found = grown(values, size).in_bins(low, high, 20)
    torch.testing.assert_close(found.sum(1), torch.full((7,), 4000.0, dtype=torch.float64))
    for neuron in range(6):
        expected, _ = np.histogram(values[:, neuron].numpy(), 20)
        np.testing.assert_allclose(found[neuron].numpy(), expected, atol=25)  # of 4000: a fine bin is cut by an edge
    assert found[6].tolist() == [4000.0] + [0.0] * 19


def test_a_fine_bin_that_an_edge_cuts_is_shared_out():
    """Else a flat histogram gets teeth, and the fullest bin is one of them."""
    flat = torch.rand(100_000, 3, generator=torch.Generator().manual_seed(0))
    found = grown(flat, 5000).in_bins(flat.amin(0), flat.amax(0), 400)
    np.testing.assert_allclose(found.numpy(), 250, atol=80)  # five standard deviations


def test_one_pass_through_the_model_gives_exact_moments_and_close_counts(tiny, site, tmp_path):
    model = tiny("llama")
    projections, batches = sites.find(model, site("attn_pre_out"), None), batches_of(model)
    body = CountingBody(model.body)
    model = dataclasses.replace(model, body=body)
    exact = collect(model, projections, batches, tmp_path / "exact", Histogram(10))
    assert body.calls == 2 * len(batches)
    found = collect(model, projections, batches, tmp_path / "one", Histogram(10), passes=1)
    assert body.calls == 3 * len(batches)
    for a, b in zip(found.moments, exact.moments, strict=True):
        assert torch.equal(a.total, b.total) and torch.equal(a.minimum, b.minimum) and torch.equal(a.maximum, b.maximum)
    for a, b in zip(found.counts[Histogram(10)], exact.counts[Histogram(10)], strict=True):
        torch.testing.assert_close(a, b.double(), atol=3, rtol=0)

    again = collect(model, projections, batches, tmp_path / "one", Histogram(10), Histogram(7), passes=1)
    assert body.calls == 3 * len(batches)  # other bins are made of the same fine ones
    assert torch.equal(again.counts[Histogram(10)][0], found.counts[Histogram(10)][0])
    x = plain_activations(model, projections, [batch.inputs for batch in batches])[0]
    assert again.counts[Histogram(7)][0].sum(1).tolist() == pytest.approx([len(x)] * x.shape[1])


def test_more_bins_than_are_counted_are_refused(tiny, site, tmp_path):
    model = tiny("llama")
    projections = sites.find(model, site("attn_pre_out"), None)
    with pytest.raises(UserError, match=r"statistics\.passes=1.*10,000 bins.*statistics\.passes=2"):
        collect(model, projections, batches_of(model), tmp_path, Histogram(10_000), passes=1)
    assert streaming_histogram.N_STREAMING_BINS < 10_000
