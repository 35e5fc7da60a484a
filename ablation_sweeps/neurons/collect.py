"""Passes over the calibration data that collect statistics of every neuron, batch by batch."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from tqdm import tqdm

from ablation_sweeps.base import files
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch, prefetch_batches
from ablation_sweeps.data.memory import TOO_LARGE, run_in_memory
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import tensor_cache
from ablation_sweeps.neurons.hooks import Projection, as_rows, hooked, rows_at_a_time
from ablation_sweeps.neurons.replay import ActivationSink, Replay
from ablation_sweeps.neurons.statistics import Histogram, Moments, Statistics, bin_index
from ablation_sweeps.neurons.streaming_histogram import (
    N_STREAMING_BINS,
    Bracket,
    StreamingHistogram,
)

log = logging.getLogger(__name__)


MOMENTS_FILE, BOTH = "moments.safetensors", "moments-and-fine-counts.safetensors"
MEAN_ABS_FILE = "mean-abs.safetensors"
MEDIANS = "medians-"  # start of a file name; the number of bins follows
TOO_LARGE_KEY = "too_large"  # key in a cache file whose statistics come from halved batches

NPasses = Literal[1, 2]

TOLERANCE = 1e-3  # accepted error of a median, as a fraction of the interquartile range
MOST_PASSES = 6  # limit for medians; by then even adjacent float32 values are told apart


class Medians(NamedTuple):
    """Request for the median of each neuron. It needs two more passes, or three if the values are very unevenly spread.

    Attributes:
        n_bins: bins per neuron and pass; memory is proportional to it.
    """

    n_bins: int


class MeanAbsolute(NamedTuple):
    """Request for the mean of each neuron's absolute value. It needs one more pass."""


def collect(
    model: Transformer,
    projections: list[Projection],
    batches: Sequence[Batch],
    cache: Path,
    *wanted: Histogram | Medians | MeanAbsolute,
    passes: NPasses = 2,
    note: Callable[[str], None] = log.warning,
    replay: Replay | None = None,
) -> Statistics:
    """Collect the statistics of every neuron over the calibration batches.

    With `passes=2`, the first pass computes moments and range, the second exact histogram counts. With `passes=1`, the
    moments are the same, and the counts are interpolated from a finer histogram whose range grows during the pass.

    Results are cached in the folder `cache`, whose name contains the signature of model, data and site. All jobs that
    need them share them; a lock ensures that they are computed once. A file records whether batches had to be halved.

    Args:
        wanted: statistics that are needed besides the moments.
        note: called with a warning if the device has too little memory for the batches, which are then halved.
        replay: recorder for the activations of these batches. Once it holds a whole pass, later ones are played back
            from it instead of running the model. None: every pass runs the model.

    Raises:
        UserError: an activation is not finite, the calibration data are empty, or one pass cannot resolve the
            requested number of bins.
    """
    if not batches:
        raise UserError("the dataset's calibration split is empty; give more documents, or dataset.calibration_path")
    batches = [part for batch in batches for part in batch.split_to(model.max_positions_per_pass)]
    histograms = [one for one in wanted if isinstance(one, Histogram)]
    medians = [one for one in wanted if isinstance(one, Medians)]

    def run(batches: Sequence[Batch], too_large: int | None) -> Statistics:
        data = CalibrationData(model, projections, batches, None if passes == 1 else replay, too_large)
        with files.locked(cache):
            found = _in_one_pass(data, cache, histograms) if passes == 1 else _in_two_passes(data, cache, histograms)
            for one in medians:
                _add_medians(found, data, cache, one)
            if any(isinstance(one, MeanAbsolute) for one in wanted):
                _add_mean_abs(found, data, cache)
        return found

    found = _run_with_smaller_batches(batches, run)
    found.too_large = found.too_large or _too_large_before(cache)
    if found.too_large:
        note(
            f"statistics: {TOO_LARGE.format(found.too_large)}, and where an estimator is not continuous, as most of "
            "peak's, another bin may be taken"
        )
    return found


def _run_with_smaller_batches(
    batches: Sequence[Batch], run: Callable[[Sequence[Batch], int | None], Statistics]
) -> Statistics:
    """Call `run` until no batch is too large for the device's memory, each time with all batches halved.

    A pass starts anew, rather than going on in halves (`run_in_halves`): when memory runs out, some layers have
    already counted the batch.

    Args:
        run: computes statistics from the batches, given the number of examples that did not fit before (None at first).
    """
    too_large = None
    while True:
        found = run_in_memory(functools.partial(run, batches, too_large))
        if found is not None:
            return found
        too_large = max(len(batch.names) for batch in batches)
        # A single example cannot be split: `split_in_two` raises if even that was too large.
        batches = [
            part for batch in batches
            for part in (batch.split_in_two() if len(batch.names) > 1 or too_large == 1 else (batch,))
        ]  # fmt: skip


def _too_large_before(cache: Path) -> int | None:
    """Number of examples that did not fit, as earlier versions recorded it for the whole folder; None if absent."""
    file = cache / "halved.txt"
    found = (
        re.search(r"for (\d+) examples", file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    )
    return int(found[1]) if found else None


def load_cached_statistics(cache: Path, histogram: Histogram) -> Statistics | None:
    """Load the statistics that earlier jobs cached under `cache`; None if the histogram is not among them."""
    both = tensor_cache.load_tensors(cache / BOTH)
    if both is not None:
        moments, fine = _from_tensors(both)
        found = _at_once_in_bins(moments, fine, [histogram])
    else:
        moments = tensor_cache.load_tensors(cache / MOMENTS_FILE)
        counts = tensor_cache.load_tensors(_counts_file(cache, histogram))
        if moments is None or counts is None:
            return None
        found = Statistics(_to_moments(moments), {histogram: _in_order(counts)})
    medians = (tensor_cache.load_tensors(file) for file in sorted(cache.glob(f"{MEDIANS}*.safetensors")))
    found.medians = next((_in_order(tensors) for tensors in medians if tensors is not None), [])
    return found


@dataclass(frozen=True)
class CalibrationData:
    """The calibration batches and the model to run on them.

    Attributes:
        replay: recorder for the activations; once it holds a whole pass, that is played back instead of running the
            model. None: always run the model.
        too_large: number of examples that did not fit into memory at once, if the batches had to be halved.
    """

    model: Transformer
    projections: list[Projection]
    batches: Sequence[Batch]
    replay: Replay | None = None
    too_large: int | None = None

    def run(self, see: ActivationSink, title: str) -> None:
        """Run one pass and call `see(layer, x)` with the activations that enter the statistics, in chunks."""
        if self.replay is None:
            self._pass(see, title)
        elif self.replay.whole:
            self.replay.play(see)
        else:
            with self.replay.record(see) as see_and_record:
                self._pass(see_and_record, title)

    def _pass(self, see: ActivationSink, title: str) -> None:
        batches = prefetch_batches(self.batches)
        for batch in tqdm(batches, desc=title, total=len(self.batches), delay=2, leave=False, disable=None):
            keep = batch.keep
            counted = None if keep is None or keep.all() else keep.flatten().nonzero()[:, 0].to(self.model.device)
            at = functools.partial(self._see_layer, see, batch, counted)
            with torch.inference_mode(), hooked(self.projections, at):
                self.model.body(batch.to(self.model.device))

    def _see_layer(
        self,
        see: ActivationSink,
        batch: Batch,
        counted: Int[torch.Tensor, " counted"] | None,
        layer: int,
        x: torch.Tensor,
    ) -> None:
        """Pass a layer's activations that enter the statistics to `see`, in chunks.

        Args:
            counted: indices of the positions that enter the statistics in the flattened batch; None for all positions.
        """
        rows, keep = as_rows(x, len(batch.names)), batch.keep
        if keep is not None and rows.shape[1] != keep.shape[1]:  # the model adds or removes padding itself
            raise UserError(
                f"model={self.model.label}: has {rows.shape[1]} rows in layer {layer} where its input has "
                f"{keep.shape[1]} positions, so that it is not known which of them are padding; use another model"
            )
        rows = rows.flatten(0, 1)
        if counted is not None:
            rows = rows[counted.to(x.device)]
        for some in rows.split(_part_size(rows)):
            see(layer, some)


def _part_size(rows: Float[torch.Tensor, "tokens neurons"]) -> int:
    return max(256, rows_at_a_time(rows.shape[1], rows.device))


def _in_two_passes(data: CalibrationData, cache: Path, histograms: Sequence[Histogram]) -> Statistics:
    tensors = _cached(
        cache / MOMENTS_FILE, data, lambda: _from_moments(moments_of(data, "statistics, pass 1"))
    )  # fmt: skip
    statistics = Statistics(_to_moments(tensors), too_large=_too_large(tensors))
    missing = []
    for histogram in dict.fromkeys(histograms):
        found = tensor_cache.load_tensors(_counts_file(cache, histogram))
        if found is None:
            missing.append(histogram)
        else:
            statistics.counts[histogram] = _in_order(found)
            statistics.too_large = statistics.too_large or _too_large(found)
    if missing:
        statistics.counts |= _counts(data, statistics, missing)
        statistics.too_large = statistics.too_large or data.too_large
        for histogram in missing:
            counts = _numbered(statistics.counts[histogram])
            tensor_cache.save_tensors(_counts_file(cache, histogram), counts | _mark(data))
    return statistics


def _in_one_pass(data: CalibrationData, cache: Path, histograms: Sequence[Histogram]) -> Statistics:
    for histogram in histograms:
        if histogram.n_bins > N_STREAMING_BINS:
            raise UserError(
                f"statistics.passes=1: cannot resolve the {histogram.n_bins:,} bins that this method needs; use "
                "statistics.passes=2"
            )
    tensors = _cached(cache / BOTH, data, lambda: _to_tensors(_at_once(data)))
    statistics = _at_once_in_bins(*_from_tensors(tensors), histograms)
    statistics.too_large = _too_large(tensors)
    return statistics


def _add_medians(statistics: Statistics, data: CalibrationData, cache: Path, wanted: Medians) -> None:
    moments = statistics.moments
    file = cache / f"{MEDIANS}{wanted.n_bins}.safetensors"
    tensors = _cached(file, data, lambda: _numbered(medians_of(data, moments, wanted.n_bins)))
    statistics.medians = _in_order(tensors)
    statistics.too_large = statistics.too_large or _too_large(tensors)


def _add_mean_abs(statistics: Statistics, data: CalibrationData, cache: Path) -> None:
    tensors = _cached(cache / MEAN_ABS_FILE, data, lambda: _numbered(mean_abs_of(data)))
    statistics.mean_abs = _in_order(tensors)
    statistics.too_large = statistics.too_large or _too_large(tensors)


def mean_abs_of(data: CalibrationData) -> list[Float[torch.Tensor, " _neurons"]]:
    """Mean of each neuron's absolute value over one pass, `[neurons]` per layer, float64."""
    totals = [torch.zeros(projection.width, dtype=torch.float64) for projection in data.projections]
    counts = [0] * len(totals)

    def see(layer: int, x: Float[torch.Tensor, "tokens neurons"]) -> None:
        totals[layer] = totals[layer].to(x.device) + x.abs().double().sum(0)
        counts[layer] += len(x)

    data.run(see, "mean absolute values")
    return [total / count for total, count in zip(totals, counts, strict=True)]


def _cached(
    path: Path, data: CalibrationData, compute: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Load the tensors at `path`, or compute and save them, with a mark if the batches had to be halved."""
    return tensor_cache.cached(path, dict, dict, lambda: compute() | _mark(data))


def _mark(data: CalibrationData) -> dict[str, torch.Tensor]:
    return {TOO_LARGE_KEY: torch.tensor(data.too_large)} if data.too_large else {}


def _too_large(tensors: dict[str, torch.Tensor]) -> int | None:
    return int(tensors[TOO_LARGE_KEY]) if TOO_LARGE_KEY in tensors else None


def _at_once_in_bins(
    moments: list[Moments], fine: list[StreamingHistogram], histograms: Sequence[Histogram]
) -> Statistics:
    statistics = Statistics(moments)
    for histogram in histograms:
        ranges = (statistics.bin_range(histogram, layer) for layer in range(len(fine)))
        statistics.counts[histogram] = [
            of_layer.in_bins(*ends, histogram.n_bins) for of_layer, ends in zip(fine, ranges, strict=True)
        ]
    return statistics


def moments_of(
    data: CalibrationData,
    title: str,
    also: Callable[[int, Float[torch.Tensor, "tokens neurons"], Moments], None] = lambda *_: None,
) -> list[Moments]:
    """Moments of each layer's activations over one pass.

    Args:
        also: called for each chunk with the layer, its activations `[tokens, neurons]`, and their moments.

    Raises:
        UserError: an activation is not finite.
    """
    moments: list[Moments | None] = [None] * len(data.projections)

    def see(layer: int, x: Float[torch.Tensor, "tokens neurons"]) -> None:
        new, old = Moments.of(x), moments[layer]
        if old is None:  # later chunks are checked at the end: checking each one would synchronise with the GPU
            _check_finite(data.model, layer, new)
        moments[layer] = new if old is None else old + new
        also(layer, x, new)

    data.run(see, title)
    found = [m for m in moments if m is not None]
    for layer, of_layer in enumerate(found):
        _check_finite(data.model, layer, of_layer)
    return found


def _check_finite(model: Transformer, layer: int, moments: Moments) -> None:
    finite = torch.isfinite(moments.minimum) & torch.isfinite(moments.maximum)  # NaN is in both
    if not finite.all():
        neuron = int((~finite).nonzero()[0])
        raise UserError(
            f"model={model.label}: the activation of neuron {neuron} in layer {layer} is not finite on the "
            "calibration data; try model.dtype=float32, and check the weights"
        )


def medians_of(data: CalibrationData, moments: list[Moments], n_bins: int) -> list[Float[torch.Tensor, " _neurons"]]:
    """Median of each neuron, `[neurons]` per layer; see `Statistics.medians`.

    Each pass narrows the interval that contains the median to one of its `n_bins` bins, until it is narrow enough. The
    first interval is one standard deviation on either side of the mean, which always contains the median.
    """
    brackets = [[_around_mean(of_layer, n_bins)] for of_layer in moments]
    spread = [torch.zeros(len(of_layer.total), dtype=torch.float64) for of_layer in moments]

    def see(layer: int, x: Float[torch.Tensor, "tokens neurons"]) -> None:
        for bracket in brackets[layer]:
            bracket.add(x)

    for number in range(MOST_PASSES):
        data.run(see, f"medians, pass {number + 1}")
        narrow_enough = True
        for layer, of_layer in enumerate(moments):
            n, counted = of_layer.n, brackets[layer]
            quartiles = torch.stack([bracket.distance(n // 4, 3 * n // 4).cpu() for bracket in counted]).amax(0)
            spread[layer] = torch.maximum(spread[layer], quartiles)
            ranks = dict.fromkeys([(n - 1) // 2, n // 2])  # an even number of values has two middle ones
            pairs = zip(counted * len(ranks) if len(counted) == 1 else counted, ranks, strict=True)
            brackets[layer] = [bracket.narrowed(rank) for bracket, rank in pairs]
            widths = torch.stack([(bracket.high - bracket.low).double().cpu() for bracket in brackets[layer]])
            narrow_enough &= bool((widths <= spread[layer] * TOLERANCE).all())
        if narrow_enough:
            break
    middles = [[(b.low.double() + b.high.double()).cpu() / 2 for b in of_layer] for of_layer in brackets]
    return [torch.stack(of_layer).mean(0).float() for of_layer in middles]


def _around_mean(moments: Moments, n_bins: int) -> Bracket:
    low, high, mean = moments.minimum.double(), moments.maximum.double(), moments.mean
    reach = (moments.variance + 1e-10 * moments.squares / moments.n).sqrt() * 1.01  # margin for rounding
    ends = torch.maximum(low, mean - reach).float(), torch.minimum(high, mean + reach).float()
    return Bracket(*ends, moments.minimum, moments.maximum, n_bins)


Both = tuple[list[Moments], list[StreamingHistogram]]


def _at_once(data: CalibrationData) -> Both:
    fine: dict[int, StreamingHistogram] = {}
    widths = [projection.width for projection in data.projections]
    # One allocation: many small ones between a pass's own would fragment memory and take half as much again.
    zeros = torch.zeros(sum(widths), N_STREAMING_BINS, dtype=torch.int32).split(widths)

    def count(layer: int, x: Float[torch.Tensor, "tokens neurons"], moments: Moments) -> None:
        if layer not in fine:
            fine[layer] = StreamingHistogram.between(moments.minimum, moments.maximum, zeros[layer].to(x.device))
        fine[layer].add(x, moments.minimum, moments.maximum)

    moments = moments_of(data, "statistics", count)
    return moments, [fine[layer] for layer in range(len(data.projections))]


def _counts(
    data: CalibrationData, statistics: Statistics, histograms: list[Histogram]
) -> dict[Histogram, list[torch.Tensor]]:
    widths = [projection.width for projection in data.projections]
    ranges = {h: [statistics.bin_range(h, layer) for layer in range(len(widths))] for h in histograms}
    counts = {h: [torch.zeros(width, h.n_bins, dtype=torch.int32) for width in widths] for h in histograms}

    def see(layer: int, x: Float[torch.Tensor, "tokens neurons"]) -> None:
        for h in histograms:
            # A model may be split across devices: keep each layer's tensors where its activations are.
            low, high = ranges[h][layer]
            low, high = ranges[h][layer] = low.to(x.device), high.to(x.device)
            here = counts[h][layer] = counts[h][layer].to(x.device)
            index = bin_index(x, low, high, h.n_bins)
            here.scatter_add_(1, index, torch.ones_like(index, dtype=torch.int32))

    data.run(see, "statistics, pass 2")
    return {h: [c.cpu() for c in layers] for h, layers in counts.items()}


def _counts_file(cache: Path, histogram: Histogram) -> Path:
    return cache / f"counts-{histogram.n_bins}{'-one-range' if histogram.one_range else ''}.safetensors"


def _numbered(tensors: Sequence[torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{layer:04d}": tensor.contiguous().cpu() for layer, tensor in enumerate(tensors)}


def _in_order(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[key] for key in sorted(tensors) if key != TOO_LARGE_KEY]


MOMENTS = ("total", "squares", "minimum", "maximum")


def _from_moments(moments: list[Moments]) -> dict[str, torch.Tensor]:
    named = {"n": torch.tensor([m.n for m in moments])}
    for what in MOMENTS:
        named |= _numbered([getattr(m, what) for m in moments], f"{what}.")
    return named


def _to_moments(tensors: dict[str, torch.Tensor]) -> list[Moments]:
    return [
        Moments(int(n), *(tensors[f"{what}.{layer:04d}"] for what in MOMENTS)) for layer, n in enumerate(tensors["n"])
    ]


FINE_COUNTS = ("low", "width", "counts")


def _to_tensors(both: Both) -> dict[str, torch.Tensor]:
    moments, fine = both
    named = _from_moments(moments)
    for what in FINE_COUNTS:
        named |= _numbered([getattr(of_layer, what) for of_layer in fine], f"{what}.")
    return named


def _from_tensors(tensors: dict[str, torch.Tensor]) -> Both:
    moments = _to_moments(tensors)
    fine = [
        StreamingHistogram(*(tensors[f"{what}.{layer:04d}"] for what in FINE_COUNTS)) for layer in range(len(moments))
    ]
    return moments, fine
