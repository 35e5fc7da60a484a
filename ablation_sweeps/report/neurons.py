"""Summarises the calibration activations of each neuron, for report.html."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from ablation_sweeps.methods.median import median
from ablation_sweeps.methods.peak import centre_of_fullest
from ablation_sweeps.neurons.statistics import Histogram, Statistics
from ablation_sweeps.report.plots import LAYOUT, add_line
from ablation_sweeps.results.display import method_styles

COLOURS = {method: look["color"] for method, look in method_styles(("zero", "mean", "median", "peak")).items()}
N_BINS = 100  # as in the histograms that the peak method caches
MAX_HISTOGRAM_BYTES = 16_000_000  # in report.html; of a larger model, it has only the most asymmetric neurons
SIZES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # calibration data relative to the present, for the peak's stability


def neuron_summary(statistics: Statistics, n_heads: int | None) -> dict[str, Any]:
    """Summary of each neuron on the calibration data: moments, median, peak and histogram, for the page to draw."""
    histogram = Histogram(N_BINS)
    counts = [layer.double().numpy() for layer in statistics.counts[histogram]]
    moments = statistics.moments
    ends = [statistics.bin_range(histogram, layer) for layer in range(len(moments))]
    low, high = (np.concatenate([pair[i].numpy() for pair in ends]) for i in (0, 1))
    all_counts = np.concatenate(counts)
    mean = np.concatenate([m.mean.numpy() for m in moments])
    spread = np.sqrt(np.concatenate([m.variance.numpy() for m in moments]))
    medians, peak = (
        np.concatenate([neuron_summary(c, *e).numpy() for c, e in zip(statistics.counts[histogram], ends, strict=True)])
        for neuron_summary in (median, centre_of_fullest)
    )
    if statistics.medians:
        medians = np.concatenate([of_layer.numpy() for of_layer in statistics.medians])
    widths = [len(m.total) for m in moments]
    layer = np.repeat(np.arange(len(widths)), widths)
    index = np.concatenate([np.arange(width) for width in widths])
    centres = low[:, None] + (np.arange(N_BINS) + 0.5) * ((high - low) / N_BINS)[:, None]
    safe = np.where(spread > 0, spread, 1)
    skew = (all_counts * ((centres - mean[:, None]) / safe[:, None]) ** 3).sum(1) / all_counts.sum(1)
    order = np.argsort(-np.abs(skew), kind="stable")
    shown = np.sort(order[: max(1, MAX_HISTOGRAM_BYTES // N_BINS)])
    heights = all_counts[shown] / all_counts[shown].max(1, keepdims=True)
    return {
        "widths": widths, "heads": n_heads, "tokens": moments[0].n, "bins": N_BINS, "all": len(shown) == len(mean),
        "median_to_a_bin": not statistics.medians,
        "layer": layer[shown].tolist() if len(shown) < len(mean) else None,
        "index": index[shown].tolist() if len(shown) < len(mean) else None,
        "colours": COLOURS,
        "least": [[int(layer[i]), int(index[i]), round(float(skew[i]), 2)] for i in order[:100]],
        **{name: _packed(values[shown].astype("<f4")) for name, values in
           (("low", low), ("high", high), ("mean", mean), ("median", medians), ("peak", peak))},
        "heights": _packed((heights * 255).round().astype("u1")),
        "layers": _per_layer(layer, np.abs(peak - mean), spread),
        "stability": _stability(all_counts, moments[0].n),
    }  # fmt: skip


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _per_layer(layer: np.ndarray, apart: np.ndarray, spread: np.ndarray) -> Any:
    """Plot the medians over the neurons of each layer, with their quartiles."""
    import plotly.graph_objects as go

    figure = go.Figure()
    x = [float(i) for i in range(int(layer[-1]) + 1)]
    for name, values, colour in (
        ("|peak - mean|", apart, COLOURS["peak"]),
        ("spread (standard deviation)", spread, COLOURS["zero"]),
    ):
        low, middle, high = ([float(np.quantile(values[layer == i], share)) for i in x] for share in (0.25, 0.5, 0.75))
        add_line(figure, name, x, middle, low, high, colour, "")
    figure.update_layout(**LAYOUT, xaxis_title="Layer", yaxis_title="Activation")
    figure.update_xaxes(dtick=max(1, len(x) // 8))  # layer numbers are integers
    return figure.to_plotly_json()


def _stability(counts: np.ndarray, n: int) -> Any:
    """Plot how often other calibration data of some size would have the same fullest bin.

    This is simulated by sampling from the histograms, as if positions were independent.
    """
    import plotly.graph_objects as go

    rng = np.random.default_rng(0)
    some = counts[rng.permutation(len(counts))[:2000]]
    share = some / some.sum(1, keepdims=True)
    fullest = some.argmax(1)
    sizes = [max(1, round(n * size)) for size in SIZES]
    again = [rng.multinomial(size, share).argmax(1) for size in sizes]
    figure = go.Figure()
    for name, within, colour in (("the same bin", 0, COLOURS["peak"]), ("within one bin", 1, COLOURS["zero"])):
        y = [100 * float((np.abs(peak - fullest) <= within).mean()) for peak in again]
        figure.add_scatter(x=sizes, y=y, name=name, mode="lines+markers", line={"color": colour},
                           hovertemplate=f"%{{x:,}} positions: %{{y:.0f}} %<extra>{name}</extra>")  # fmt: skip
    ticks = {"tickvals": sizes[::2], "ticktext": [f"{size:,}" for size in sizes[::2]]}
    figure.update_layout(**LAYOUT, xaxis={"title": "Positions of calibration data", "type": "log", **ticks},
                         yaxis={"title": "Neurons (%)", "range": [0, 102]})  # fmt: skip
    return figure.to_plotly_json()
