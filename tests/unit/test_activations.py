"""Streaming statistics against numpy on all activations at once."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import CountingBody, assert_equal, batches_of, plain_activations

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import Batch
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import collect as collect_module
from ablation_sweeps.neurons import sites
from ablation_sweeps.neurons.collect import collect
from ablation_sweeps.neurons.statistics import Histogram, Moments, bin_index

CASES = [("llama", "attn_pre_out"), ("opt", "mlp_pre_out"), ("albert", "attn_pre_out"), ("bert", "mlp_pre_out"),
         ("gpt2", "attn_pre_out")]  # fmt: skip
every_case = pytest.mark.parametrize(("family", "name"), CASES)


def one_at_a_time(batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
    found = {}
    for batch in batches:
        for row, index in enumerate(batch.index):
            n = int(batch.keep[row].sum())
            found[index] = {key: value[row : row + 1, :n] for key, value in batch.inputs.items()}
    return [found[index] for index in sorted(found)]


def numpy_counts(x: np.ndarray, n_bins: int) -> np.ndarray:
    low, high = x.min(0), x.max(0)
    assert x.dtype == low.dtype == np.float32
    width = np.where(high > low, high - low, np.float32(1))  # ReLU's dead neurons never change: all in bin 0
    index = np.trunc((x - low) * np.float32(n_bins) / width).astype(int)
    index[index == n_bins] = n_bins - 1
    return np.stack([np.bincount(column, minlength=n_bins) for column in index.T])


@pytest.mark.parametrize(
    ("family", "name", "at_a_time"), [*((*case, None) for case in CASES), ("llama", "attn_pre_out", 7)]
)
def test_moments_and_counts_are_those_of_all_activations_at_once(
    tiny, site, tmp_path, monkeypatch, family, name, at_a_time
):
    if at_a_time:
        monkeypatch.setattr(collect_module, "_part_size", lambda x: at_a_time)
    model = tiny(family)
    projections, batches = sites.find(model, site(name), None), batches_of(model)
    assert len(batches) > 1 and not all(batch.keep.all() for batch in batches)  # there is padding
    expected = plain_activations(model, projections, [batch.inputs for batch in batches])
    found = collect(model, projections, batches, tmp_path, Histogram(100), Histogram(7))
    assert len(found.moments) == len(expected) == 3
    for layer, x in enumerate(expected):
        moments, wide = found.moments[layer], x.astype(np.float64)
        assert moments.n == len(x) == sum(int(batch.keep.sum()) for batch in batches)
        np.testing.assert_allclose(moments.mean, wide.mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(moments.variance, wide.var(0), rtol=1e-9)
        np.testing.assert_array_equal(moments.minimum, x.min(0))
        np.testing.assert_array_equal(moments.maximum, x.max(0))
        for n_bins in (100, 7):
            counts = found.counts[Histogram(n_bins)][layer]
            np.testing.assert_array_equal(counts, numpy_counts(x, n_bins))
            assert (counts.sum(1) == len(x)).all()


@every_case
def test_padding_never_enters(tiny, site, tmp_path, family, name):
    """Each document alone, with nothing to pad, gives the same numbers but for rounding."""
    model = tiny(family)
    projections, batches = sites.find(model, site(name), None), batches_of(model, batch_tokens=1000)
    assert len(batches) == 1
    expected = plain_activations(model, projections, one_at_a_time(batches))
    found = collect(model, projections, batches, tmp_path)
    for moments, x in zip(found.moments, expected, strict=True):
        assert moments.n == len(x)
        np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(0), atol=1e-5)
        np.testing.assert_allclose(moments.minimum, x.min(0), atol=1e-4)
        np.testing.assert_allclose(moments.maximum, x.max(0), atol=1e-4)


def test_a_model_that_pads_by_itself_is_refused(tiny, site, tmp_path):
    """Longformer, say, pads to a multiple of its window: nobody knows here which of its rows are padding."""
    model = tiny("llama")
    projections, batches = sites.find(model, site("attn_pre_out"), None), batches_of(model)
    fewer = [dataclasses.replace(batch, keep=batch.keep[:, :-1]) for batch in batches]
    for passes in (1, 2):
        with pytest.raises(UserError, match="not known which of them are padding"):
            collect(model, projections, fewer, tmp_path, Histogram(7), passes=passes)


def test_one_range_is_that_of_all_neurons_of_the_model(tiny, site, tmp_path):
    model = tiny("llama")
    projections, batches = sites.find(model, site("attn_pre_out"), None), batches_of(model)
    histogram = Histogram(50, one_range=True)
    found = collect(model, projections, batches, tmp_path, histogram, Histogram(50))
    raw = plain_activations(model, projections, [batch.inputs for batch in batches])
    low, high = min(x.min() for x in raw), max(x.max() for x in raw)
    for layer, x in enumerate(raw):
        index = np.minimum(np.trunc((x - low) * np.float32(50) / (high - low)).astype(int), 49)
        expected = np.stack([np.bincount(column, minlength=50) for column in index.T])
        np.testing.assert_array_equal(found.counts[histogram][layer], expected)
        assert not np.array_equal(found.counts[Histogram(50)][layer], expected)


# Numbers


def test_bins_hold_their_lower_edge_and_the_last_one_the_maximum():
    x = torch.tensor([0.0, 0.25, 0.2499999, 0.5, 0.75, 0.999999, 1.0])[:, None]
    assert bin_index(x, x.amin(0), x.amax(0), 4)[0].tolist() == [0, 1, 0, 2, 3, 3, 3]


@pytest.mark.parametrize("value", [0.1, -3.3, 1e-30, 7e4])
def test_a_neuron_that_never_changes_has_its_value_as_mean_and_all_counts_in_one_bin(value):
    x = torch.full((1237, 1), value)
    moments = Moments.of(x[:500]) + Moments.of(x[500:])
    assert torch.equal(moments.mean.float(), x[0])
    assert moments.variance.item() <= 1e-9 * value**2
    assert bin_index(x, moments.minimum, moments.maximum, 100).unique().tolist() == [0]


def test_variance_survives_a_large_mean_and_half_precision():
    x = 1000 + torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = x.to(dtype)
        moments = Moments.of(given[:7]) + Moments.of(given[7:])
        wide = given.double().numpy()
        np.testing.assert_allclose(moments.mean, wide.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance, wide.var(0), rtol=1e-7)
        assert moments.minimum.dtype == torch.float32


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_names_layer_and_neuron(fresh, site, tmp_path, value, passes):
    model = fresh("opt")
    projections, batches = sites.find(model, site("attn_pre_out"), None), batches_of(model)
    model.module.model.decoder.layers[1].self_attn.v_proj.bias.data[13] = value
    with pytest.raises(UserError, match=r"neuron 13 in layer 1"):
        collect(model, projections, batches, tmp_path, passes=passes)
    assert not list(tmp_path.glob("*.safetensors"))


def test_no_calibration_data_is_an_error(tiny, site, tmp_path):
    with pytest.raises(UserError, match="calibration"):
        collect(tiny("llama"), sites.find(tiny("llama"), site("attn_pre_out"), None), [], tmp_path)


# The cache


@pytest.fixture
def collected(tiny, site, tmp_path):
    """A filled cache, the numbers in it, and a way to read it with a model whose passes are counted."""
    model = tiny("gpt2")
    projections, batches = sites.find(model, site("attn_pre_out"), None), batches_of(model)
    first = collect(model, projections, batches, tmp_path, Histogram(100))

    def again(*histograms):
        body = CountingBody(model.body)
        found = collect(dataclasses.replace(model, body=body), projections, batches, tmp_path, *histograms)
        return found, body.calls / len(batches)

    return first, again, tmp_path


def test_the_second_time_the_model_is_not_called(collected):
    first, again, _ = collected
    second, passes = again(Histogram(100))
    assert passes == 0
    assert_equal(first, second, Histogram(100))


def test_a_new_histogram_takes_one_more_pass(collected):
    first, again, _ = collected
    assert again(Histogram(100), Histogram(10))[1] == 1
    second, passes = again(Histogram(10), Histogram(100))
    assert passes == 0
    assert_equal(first, second, Histogram(100))
    folded = [c.unflatten(1, (10, 10)).sum(2) for c in first.counts[Histogram(100)]]
    off = sum(int((a - b).abs().sum()) for a, b in zip(folded, second.counts[Histogram(10)], strict=True))
    assert off <= 4  # values that lie within rounding of an edge


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("how", "name"), [("truncated", "moments"), ("altered", "counts-100")])
def test_a_damaged_cache_is_noticed_and_computed_again(collected, caplog, how, name):
    first, again, folder = collected
    damage(folder / f"{name}.safetensors", how)
    with caplog.at_level(logging.WARNING):
        second, passes = again(Histogram(100))
    assert passes == 1
    assert name in caplog.text and "damaged" in caplog.text
    assert_equal(first, second, Histogram(100))
    assert again(Histogram(100))[1] == 0


@pytest.mark.parametrize("passes", [1, 2])
def test_what_a_cpu_takes_longer_for_at_once_is_passed_in_parts(tiny, site, tmp_path, monkeypatch, passes):
    model = tiny("llama")
    projections, batches = sites.find(model, site("attn_pre_out"), None), batches_of(model, 1000)
    assert len(batches) == 1
    whole = collect(model, projections, batches, tmp_path / "whole", Histogram(20), passes=passes)
    monkeypatch.setattr(Transformer, "max_positions_per_pass", 100)
    body = CountingBody(model.body)
    model = dataclasses.replace(model, body=body)
    parts = collect(model, projections, batches, tmp_path / "parts", Histogram(20), passes=passes)
    assert body.calls == passes * len(list(batches[0].split_to(100))) > 2 * passes
    for counts in parts.counts[Histogram(20)]:
        assert (counts.sum(1) == batches[0].keep.sum()).all()
    for a, b in zip(parts.moments, whole.moments, strict=True):
        assert a.n == b.n == batches[0].keep.sum()
        torch.testing.assert_close(a.mean, b.mean, atol=1e-6, rtol=1e-6)


def test_batches_that_do_not_fit_are_halved_from_the_start(tiny, site, tmp_path):
    """Memory runs out in the middle of the pass, with some batches seen: nothing is counted twice."""
    model = tiny("llama")
    projections, batches = sites.find(model, site("attn_pre_out"), None), batches_of(model)
    most = max(len(batch.names) for batch in batches) - 1
    assert len(batches[0].names) <= most  # the first one is seen
    notes: list[str] = []

    def body(batch):
        model.body(batch)
        if len(batch.names) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    small = dataclasses.replace(model, body=body)
    found = collect(small, projections, batches, tmp_path / "halves", Histogram(20), note=notes.append)
    expected = collect(model, projections, batches, tmp_path / "whole", Histogram(20))
    for a, b in zip(found.moments, expected.moments, strict=True):
        assert a.n == b.n
        torch.testing.assert_close(a.mean, b.mean, atol=1e-6, rtol=1e-6)
    assert all((layer.sum(1) == found.moments[0].n).all() for layer in found.counts[Histogram(20)])
    assert len(notes) == 1 and f"for {most + 1} examples" in notes[0]
    read = collect(model, projections, batches, tmp_path / "halves", Histogram(20), note=notes.append)
    assert notes[1] == notes[0] and found.too_large == read.too_large == most + 1
    assert expected.too_large is None
    with pytest.raises(UserError, match="too little memory for one example"):
        most = 0
        collect(small, projections, batches, tmp_path / "none", note=notes.append)


@pytest.mark.parametrize("passes", [1, 2])
def test_only_what_was_read_from_halved_batches_is_marked(tiny, site, tmp_path, passes):
    """Of two files of one cache, the one that was written before memory was short is as good as ever."""
    model = tiny("llama")
    projections, batches = sites.find(model, site("attn_pre_out"), None), batches_of(model)
    most = max(len(batch.names) for batch in batches) - 1

    def body(batch):
        if len(batch.names) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        model.body(batch)

    small = dataclasses.replace(model, body=body)
    ask = lambda model, *histograms: collect(model, projections, batches, tmp_path, *histograms, passes=passes)  # noqa: E731
    whole = ask(model, Histogram(20))
    found = ask(small, Histogram(30))  # after one pass, made of the same fine counts
    assert whole.too_large is None and found.too_large == (None if passes == 1 else most + 1)
    assert ask(model, Histogram(20)).too_large is None
    assert ask(model, Histogram(30)).too_large == ask(model, Histogram(20), Histogram(30)).too_large == found.too_large
