"""Every method against a brute-force computation on the raw activations."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import NOT_SCORED, Batch, Document
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.experiment import identity
from ablation_sweeps.methods.mean import Mean
from ablation_sweeps.methods.median import Median
from ablation_sweeps.methods.method import Fitting
from ablation_sweeps.methods.peak import Peak, grenander, smooth
from ablation_sweeps.methods.resample import AnotherExample, Resample
from ablation_sweeps.methods.zero import Zero
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import collect, sites
from ablation_sweeps.neurons.hooks import ablated, reading

CONF = Path(__file__).resolve().parents[2] / "conf"
DISCONTINUOUS = ("histogram", "coarse_to_fine", "averaged", "smoothed", "global_range", "kde", "half_sample_mode")
ESTIMATORS = (*DISCONTINUOUS, "grenander")
TEXT_SOURCES = ("random_characters", "random_tokens", "generated")
TEXTS = ["The quick brown fox jumps over the lazy dog.", "of liquor!", "Pack my box with five dozen jugs"]


def peak(estimator: str, n_bins: int = 100, bandwidth: float = 0.1) -> Peak:
    return Peak(label="peak", estimator=estimator, n_bins=n_bins, bandwidth=bandwidth)


def resample(source: str, as_run: bool = False, length: int | None = None) -> Resample:
    return Resample(label="resample", source=source, as_run=as_run, length=length)


# A model whose activations are what it is given, so that the raw values are known


class Given(nn.Module):
    """Layer `i` of the input goes to the projection of layer `i` as it is."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"proj": nn.Linear(n, 1)})}) for n in widths])
        self.widths = widths

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer["attn"]["proj"](part) for layer, part in zip(self.layers, x.split(self.widths, -1), strict=True)]


def given(raw: list[np.ndarray], site, tmp_path, passes: collect.NPasses = 2) -> Fitting:
    """`raw`: `[tokens, neurons]` a layer. Spread over batches, the last one with padding."""
    tokens = len(raw[0])
    x = torch.from_numpy(np.concatenate(raw, 1, dtype=np.float32))
    module = Given([part.shape[1] for part in raw])
    call = lambda batch: module(batch.inputs["x"])  # noqa: E731
    keep = torch.arange(-(-tokens // 10) * 10) < tokens
    rows = torch.cat([x, torch.full((len(keep) - tokens, x.shape[1]), 1e6)]).view(-1, 10, x.shape[1])
    batches = [
        Batch({"x": part}, torch.full(part.shape[:2], NOT_SCORED), kept, tuple(map(str, range(len(part)))),
              tuple(range(len(part))))
        for part, kept in zip(rows.split(7), keep.view(-1, 10).split(7), strict=True)
    ]  # fmt: skip
    model = Transformer("given", "", "causal_lm", module, call, call, lambda *_: [],
                        lambda *_: batches[0], None, frozenset())  # fmt: skip
    projections = sites.find(model, site("attn_pre_out"), None)
    statistics = functools.partial(collect.collect, model, projections, batches, tmp_path, passes=passes)
    return Fitting(model, projections, statistics, 10, 0)


@pytest.fixture(scope="module")
def raw() -> list[np.ndarray]:
    """Two layers of unequal width, of shapes that tell the estimators apart."""
    rng = np.random.default_rng(0)
    n = 3001
    columns = [
        rng.normal(0, 1, n),
        rng.normal(3, 0.05, n),
        rng.laplace(-1, 0.5, n),
        rng.gamma(2.0, 1.0, n),
        rng.lognormal(0, 1, n),
        np.where(rng.random(n) < 0.3, rng.normal(-2, 0.1, n), rng.normal(2, 1, n)),
        rng.standard_t(2, n),
        np.maximum(rng.normal(-0.5, 1, n), 0),  # most of it is exactly zero
        rng.uniform(-1, 1, n),
        -rng.gamma(3.0, 0.01, n),
    ]
    x = np.stack(columns, 1).astype(np.float32)
    return [x[:, :6], x[:, 6:]]


def float32_counts(x: np.ndarray, n_bins: int, low=None, high=None) -> np.ndarray:
    """Of one neuron: the rule of METHOD.md, in float32."""
    low, high = x.min() if low is None else low, x.max() if high is None else high
    index = np.trunc((x - low) * np.float32(n_bins) / (high - low)).astype(int)
    return np.bincount(np.minimum(index, n_bins - 1), minlength=n_bins)


def centre(x: np.ndarray, k: int, n_bins: int) -> float:
    low, high = float(x.min()), float(x.max())
    return low + (k + 0.5) / n_bins * (high - low)


def brute_histogram(x, everything):
    return centre(x, float32_counts(x, 100).argmax(), 100)


def brute_coarse_to_fine(x, everything):
    k = float32_counts(x, 100).argmax()
    low, step = float(x.min()), (float(x.max()) - float(x.min())) / 100
    index = np.minimum(np.trunc((x - x.min()) * np.float32(100) / (x.max() - x.min())), 99)
    inside = x[index == k].astype(np.float64)
    fine = np.clip(np.floor((inside - (low + k * step)) / step * 100), 0, 99).astype(int)
    return low + step * (k + (np.bincount(fine, minlength=100).argmax() + 0.5) / 100)


def brute_averaged(x, everything):
    both = (np.repeat(float32_counts(x, 1000), 10) + float32_counts(x, 10000)) / 2
    return centre(x, both.argmax(), 10000)


def brute_smoothed(x, everything):
    kernel = np.exp([-2, -0.5, 0, -0.5, -2])
    return centre(x, np.convolve(float32_counts(x, 100), kernel / kernel.sum(), mode="same").argmax(), 100)


def brute_global_range(x, everything):
    low, high = everything.min(), everything.max()
    counts = float32_counts(x, 100, low, high)
    return float(low) + (counts.argmax() + 0.5) / 100 * (float(high) - float(low))


def brute_grenander(x, everything):
    kernel = np.exp([-2, -0.5, 0, -0.5, -2])
    height = np.convolve(float32_counts(x, 100), kernel / kernel.sum(), mode="same")
    return centre(x, (np.arange(100) * height**10).sum() / (height**10).sum(), 100)


BRUTE = {
    "grenander": brute_grenander,
    "histogram": brute_histogram,
    "coarse_to_fine": brute_coarse_to_fine,
    "averaged": brute_averaged,
    "smoothed": brute_smoothed,
    "global_range": brute_global_range,
}


def columns_with_values(raw: list[np.ndarray], values: list[Tensor]):
    for x, value in zip(raw, values, strict=True):
        assert value.dtype == torch.float32 and value.shape == (x.shape[1],)
        yield from zip(x.T, value.tolist(), strict=True)


@pytest.mark.parametrize("estimator", BRUTE)
def test_peak_is_that_of_a_brute_force_histogram(raw, site, tmp_path, estimator):
    everything = np.concatenate(raw, 1)
    values = peak(estimator).fit(given(raw, site, tmp_path)).values
    for x, value in columns_with_values(raw, values):
        assert value == pytest.approx(BRUTE[estimator](x, everything), rel=1e-6, abs=1e-7)


def test_estimators_tell_different_peaks_on_these_data(raw, site, tmp_path):
    """Else the comparisons above would show little."""
    fitting = given(raw, site, tmp_path)
    found = {estimator: tuple(torch.cat(peak(estimator).fit(fitting).values).tolist()) for estimator in ESTIMATORS}
    assert len(set(found.values())) == len(ESTIMATORS)


@pytest.mark.parametrize("bandwidth", [0.1, 0.02])
def test_kde_peak_is_the_maximum_of_the_density_of_the_raw_values(raw, site, tmp_path, bandwidth):
    values = peak("kde", bandwidth=bandwidth).fit(given(raw, site, tmp_path)).values
    for x, value in columns_with_values(raw, values):
        wide = x.astype(np.float64)

        def density(at, wide=wide):
            return np.exp(-0.5 * ((at[:, None] - wide) / bandwidth) ** 2).mean(1)

        best = density(np.linspace(wide.min(), wide.max(), 2001)).max()
        found = density(np.array([value]))[0]
        bin_width = np.ptp(wide) / 10000
        assert found >= best * (1 - 1e-3) - 0.05 * bin_width / bandwidth


def textbook_half_sample_mode(x: np.ndarray) -> float:
    """Bickel & Fruehwirth (2006), on the sorted sample."""
    x = np.sort(x.astype(np.float64))
    while len(x) > 3:
        half = -(-len(x) // 2)
        start = (x[half - 1 :] - x[: len(x) - half + 1]).argmin()
        x = x[start : start + half]
    if len(x) == 3:
        x = x[:2] if x[1] - x[0] <= x[2] - x[1] else x[1:]
    return float(x.mean())


def test_half_sample_mode_is_that_of_the_sorted_sample(raw, site, tmp_path):
    values = peak("half_sample_mode").fit(given(raw, site, tmp_path)).values
    for x, value in columns_with_values(raw, values):
        assert value == pytest.approx(textbook_half_sample_mode(x), abs=2 * float(np.ptp(x)) / 100)


# What one value may change


def one_value_apart(estimator: str) -> tuple[np.ndarray, np.ndarray]:
    """Two samples that differ in one value of 3,001, and have two modes that are equally high but for it."""
    if estimator == "half_sample_mode":  # two halves that are equally long but for it
        first, last = np.linspace(0, 0.1, 1501), np.linspace(0.9, 1, 1501)
        return np.concatenate([first, last]), np.concatenate([first, last - 0.002 * (last == 0.9)])
    at = lambda n: np.concatenate([[0, 1], np.full(n, 0.2051), np.full(2999 - n, 0.7051)])  # noqa: E731
    return at(1500), at(1499)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_value_moves_every_estimator_but_grenander_across_the_range(site, tmp_path, estimator):
    found = []
    for i, x in enumerate(one_value_apart(estimator)):
        fitting = given([x[:, None].astype(np.float32)], site, tmp_path / str(i))
        found.append(peak(estimator, bandwidth=0.01).fit(fitting).values[0].item())
    moved = abs(found[0] - found[1])
    if estimator == "grenander":
        assert moved < 0.005  # half of a bin
    else:
        assert moved > 0.4


def test_one_count_moves_grenander_by_no_more_than_is_promised():
    """By p shares of the range over the height of the highest bin, wherever it is added."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.rand(40, 100, generator=generator).pow(4).mul(torch.logspace(1, 4, 40)[:, None]).round()
    before, bound = grenander(counts), 10 / smooth(counts).amax(1)
    moved = torch.stack([(grenander(counts + torch.eye(100)[i]) - before).abs() for i in range(100)])
    assert (moved <= bound).all()
    assert moved.amax() > 0.001  # it does depend on them


def test_grenander_is_near_the_mode(raw, site, tmp_path):
    rng = np.random.default_rng(1)
    n = 20001
    x = np.stack([
        rng.normal(3, 0.5, n),  # 3
        rng.gamma(2.0, 1.0, n),  # 1
        np.where(rng.random(n) < 0.6, rng.normal(-2, 0.2, n), rng.normal(2, 0.2, n)),  # -2
        np.maximum(rng.normal(-0.5, 1, n), 0),  # 0
        rng.choice([-1.0, 0.5, 1.0], n, p=[0.3, 0.5, 0.2]),  # 0.5
    ], 1).astype(np.float32)  # fmt: skip
    (values,) = peak("grenander").fit(given([x], site, tmp_path)).values
    within = np.array([0.1, 0.15, 0.1, 0.05, 0.03])
    assert (np.abs(values.numpy() - [3, 1, -2, 0, 0.5]) < within).all(), values


def test_neurons_that_are_tied_and_that_are_not(site, tmp_path):
    """Counts of 60 and 50 lie within noise (their difference has a standard deviation of 10.5), 60 and 40 do not."""
    places = np.repeat([0.0, 0.305, 0.705, 1.0], [1, 60, 50, 9]), np.repeat([0.0, 0.305, 0.705, 1.0], [1, 60, 40, 19])
    x = np.stack(places, 1).astype(np.float32)
    for estimator in ("histogram", "coarse_to_fine", "kde"):
        notes: list[str] = []
        fitting = dataclasses.replace(given([x], site, tmp_path), note=notes.append)
        peak(estimator, bandwidth=0.01).fit(fitting)
        assert re.findall(r"in (\d+) %", notes[0]) == ["50", "50"], estimator


def test_mean_is_that_of_float64(raw, site, tmp_path):
    values = Mean(label="mean").fit(given(raw, site, tmp_path)).values
    for x, value in columns_with_values(raw, values):
        assert value == np.float32(x.astype(np.float64).mean())


def wide(n: int) -> np.ndarray:
    """Shapes of which a histogram between minimum and maximum shows little: far outliers, and values that repeat."""
    rng = np.random.default_rng(3)
    outliers = rng.normal(0, 1, (n, 2))
    outliers[0, 0], outliers[0, 1] = 1e6, -1e4
    repeated = np.where(rng.random(n) < 0.6, 0.25, rng.normal(0, 1, n))
    halves = np.where(np.arange(n) < n // 2, rng.normal(-5, 0.1, n), rng.normal(5, 0.1, n))  # nothing in the middle
    relu = np.maximum(rng.normal(-1, 1, n), 0)
    far = 1000 + rng.normal(0, 0.01, n)
    return np.column_stack([outliers, repeated, halves, relu, far, rng.standard_t(1, n)]).astype(np.float32)


def assert_are_medians(x: np.ndarray, values: Tensor) -> None:
    expected = np.median(x.astype(np.float64), 0)
    quartiles = np.subtract(*np.quantile(x.astype(np.float64), [0.75, 0.25], axis=0))
    rounding = 2 * np.spacing(np.abs(expected).astype(np.float32))
    assert (np.abs(values.numpy() - expected) <= 1e-3 * quartiles + rounding).all()


@pytest.mark.parametrize(("n", "passes"), [(3000, 1), (3001, 2), (2, 2)])
def test_median_is_that_of_numpy(raw, site, tmp_path, n, passes):
    given_ = [*(x[:n] for x in raw), wide(n)]
    fitting = given(given_, site, tmp_path, passes)
    for n_bins in (10, 1000):
        for x, values in zip(given_, Median(label="median", n_bins=n_bins).fit(fitting).values, strict=True):
            assert values.dtype == torch.float32
            assert_are_medians(x, values)


@pytest.mark.parametrize(("name", "passes"), [("attn_pre_out", 1), ("mlp_pre_out", 2)])
def test_median_of_real_weights_is_that_of_numpy(assets, job_of, site, tmp_path, name, passes):
    model = job_of("model=causal_lm", f"model.path={assets / 'stories260K_llama'}", "model.max_tokens=200").model.load()
    text = (assets / "text" / "tinystories_sample.txt").read_text()
    documents = [Document(str(i), part) for i, part in enumerate(text.split("\n\n")[:60])]
    batches = model.encode(documents, "calibration", Budget(4000, None), 1000, 0)
    projections, raw = sites.find(model, site(name), None), []
    for batch in batches:
        for part in batch.split_to(model.max_positions_per_pass):  # as they are passed on a CPU, and so rounded
            seen = plain_run(model, projections, dict(part.inputs))
            raw.append([x[part.keep.flatten()] for x in seen])
    statistics = functools.partial(collect.collect, model, projections, batches, tmp_path, passes=passes)
    values = Median(label="median", n_bins=1000).fit(Fitting(model, projections, statistics, 10, 0)).values
    for layer, of_layer in enumerate(values):
        assert_are_medians(torch.cat([x[layer] for x in raw]).numpy(), of_layer)


def test_a_median_of_before_is_not_taken_for_the_new_one(job_of):
    """Its values have changed, and those of no other method."""
    options = {
        method: identity.options_of(job_of(f"method={method}").method) for method in ("mean", "median", "peak", "zero")
    }
    assert [method for method, found in options.items() if "numbers" in found] == ["median"]


def test_zero_is_zero(raw, site, tmp_path):
    for _, value in columns_with_values(raw, Zero(label="zero").fit(given(raw, site, tmp_path)).values):
        assert value == 0


def test_number_of_bins_is_an_option(raw, site, tmp_path):
    values = peak("histogram", n_bins=13).fit(given(raw, site, tmp_path)).values
    for x, value in columns_with_values(raw, values):
        assert value == pytest.approx(centre(x, float32_counts(x, 13).argmax(), 13), rel=1e-6, abs=1e-7)


CONSTANT_METHODS = [Mean(label="mean"), Median(label="median", n_bins=1000), *map(peak, ESTIMATORS)]
each_constant_method = pytest.mark.parametrize(
    "method", CONSTANT_METHODS, ids=lambda method: getattr(method, "estimator", method.label)
)


@each_constant_method
def test_a_neuron_that_never_changes_gets_its_value(site, tmp_path, method):
    """Beside others that do change: one range for all must not move it."""
    x = np.random.default_rng(0).normal(0, 2, (203, 4)).astype(np.float32)
    x[:, :3] = constants = np.float32([0.1, -3.3, 0.0])
    (values,) = method.fit(given([x], site, tmp_path)).values
    assert values[:3].tolist() == constants.tolist()


@pytest.mark.parametrize("estimator", DISCONTINUOUS)
def test_ties_go_to_the_lower_bin(site, tmp_path, estimator):
    two, three = np.tile([0.0, 1.0], 150), np.tile([0.0, 0.5, 1.0], 100)
    x = np.stack([two, 1 - two, three, three[::-1]], 1)
    if estimator == "half_sample_mode":  # its intervals of three values are not equally long in whole bins
        x = x[:, :2]
    (values,) = peak(estimator, bandwidth=0.01).fit(given([x], site, tmp_path)).values
    assert values.abs().max() <= 0.01


# Resampling


def batches_of(model: Transformer, batch_tokens: int = 1000) -> list[Batch]:
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    return model.encode(documents, "evaluation", Budget(None, None), batch_tokens, 0)


def pictures_of(model: Transformer, n: int = 3) -> list[Batch]:
    pixels = [model.other_input("random_pixels", 1, 100 + i).inputs for i in range(n)]
    inputs = {key: torch.cat([p[key] for p in pixels]) for key in pixels[0]}
    return [Batch(inputs, torch.arange(n), None, tuple(map(str, range(n))), tuple(range(n)))]


def fitting_of(model: Transformer, site, tmp_path, name: str = "attn_pre_out", batches=None) -> Fitting:
    projections = sites.find(model, site(name), None)
    batches = batches or (pictures_of(model) if model.modality == "image" else batches_of(model))
    statistics = functools.partial(collect.collect, model, projections, batches, tmp_path)
    return Fitting(model, projections, statistics, max(b.labels.shape[-1] for b in batches), 7)


def plain_run(model: Transformer, projections, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Activations of a single input by hooks of our own: `[pos, neurons]` a layer."""
    seen: list[Tensor] = []
    modules = list(dict.fromkeys(p.module for p in projections))
    handles = [m.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone())) for m in modules]
    with torch.inference_mode():
        model.module(**inputs) if hasattr(model.module, "config") else model.module(inputs["x"])
    for handle in handles:
        handle.remove()
    return [x.reshape(-1, x.shape[-1]) for x in seen]


def written(fitting: Fitting, replacement, batch: Batch) -> list[Tensor]:
    """What the projections really get when all neurons are ablated: `[batch, rows, neurons]` a layer."""
    model, projections, size = fitting.model, fitting.projections, len(batch.names)
    seen: list[Tensor] = []
    with torch.inference_mode():
        with reading(projections, size) as clean:
            model.logits(batch)
        masks = [torch.ones(p.width, dtype=torch.bool) for p in projections]
        with ablated(projections, masks, replacement(batch, clean), size):
            modules = list(dict.fromkeys(p.module for p in projections))
            handles = [m.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for m in modules]
            model.logits(batch)
            for handle in handles:
                handle.remove()
    return [x.reshape(size, -1, x.shape[-1]) for x in seen]


def alone(batch: Batch, row: int) -> dict[str, Tensor]:
    n = None if batch.keep is None else int(batch.keep[row].sum())
    return {key: value[row : row + 1, :n] if n else value[row : row + 1] for key, value in batch.inputs.items()}


RESAMPLED = [("llama", "attn_pre_out"), ("opt", "mlp_pre_out"), ("bert", "attn_pre_out"), ("albert", "mlp_pre_out")]
each_resampled = pytest.mark.parametrize(("family", "name"), RESAMPLED)


@each_resampled
def test_dataset_gives_the_clean_activations_of_another_text_at_the_same_position(tiny, site, tmp_path, family, name):
    model = tiny(family)
    fitting = fitting_of(model, site, tmp_path, name)
    (batch,) = batches_of(model)
    runs = [plain_run(model, fitting.projections, alone(batch, row)) for row in range(3)]
    lengths = [len(run[0]) for run in runs]
    assert len(set(lengths)) == 3  # a donor is shorter, and another one longer
    found = written(fitting, resample("dataset").fit(fitting), batch)
    for row in range(3):
        donor = (row - 1) % 3
        for layer in range(3):
            for position in range(lengths[row]):
                expected = runs[donor][layer][position % lengths[donor]]
                torch.testing.assert_close(found[layer][row, position], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["vit", "timm_vit", "timm_swin"])
def test_dataset_gives_the_clean_activations_of_another_image(tiny, site, tmp_path, family):
    model = tiny(family)
    fitting = fitting_of(model, site, tmp_path)
    (batch,) = pictures_of(model)
    runs = [plain_run(model, fitting.projections, alone(batch, row)) for row in range(3)]
    found = written(fitting, resample("dataset").fit(fitting), batch)
    for row in range(3):
        for layer, x in enumerate(found):
            torch.testing.assert_close(x[row], runs[(row - 1) % 3][layer], atol=2e-4, rtol=1e-4)


def test_dataset_needs_another_example(tiny, site, tmp_path):
    model = tiny("llama")
    fitting = fitting_of(model, site, tmp_path)
    single = model.encode([Document("a", "hello")], "evaluation", Budget(None, None), 1000, 0)
    with pytest.raises(UserError, match="another example"):
        written(fitting, resample("dataset").fit(fitting), single[0])


@each_resampled
@pytest.mark.parametrize("source", TEXT_SOURCES)
def test_one_fixed_input_position_by_position(tiny, site, tmp_path, family, name, source):
    model = tiny(family)
    fitting = fitting_of(model, site, tmp_path, name)
    if source == "generated" and model.kind == "masked_lm":
        with pytest.raises(UserError, match="generated"):
            resample(source).fit(fitting)
        return
    other = model.other_input(source, fitting.length, fitting.seed)
    assert other.inputs["input_ids"].shape == (1, fitting.length)
    expected = plain_run(model, fitting.projections, other.inputs)
    replacement = resample(source).fit(fitting)
    for batch in batches_of(model, batch_tokens=30):
        n = batch.labels.shape[1]
        for x, y in zip(written(fitting, replacement, batch), expected, strict=True):
            torch.testing.assert_close(x, y[:n].expand_as(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["vit", "timm_swin"])
def test_random_pixels_position_by_position(tiny, site, tmp_path, family):
    model = tiny(family)
    fitting = fitting_of(model, site, tmp_path)
    expected = plain_run(model, fitting.projections, model.other_input("random_pixels", 1, fitting.seed).inputs)
    (batch,) = pictures_of(model)
    for x, y in zip(written(fitting, resample("random_pixels").fit(fitting), batch), expected, strict=True):
        torch.testing.assert_close(x, y.expand_as(x), atol=1e-6, rtol=1e-6)


def test_a_seed_fixes_the_other_input_and_another_seed_changes_it(tiny):
    for source in TEXT_SOURCES:
        ids = [model_input(tiny("llama"), source, seed) for seed in (0, 0, 1)]
        assert ids[0] == ids[1] != ids[2]
    pixels = [tiny("vit").other_input("random_pixels", 1, seed).inputs["pixel_values"] for seed in (0, 0, 1)]
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])


def model_input(model: Transformer, source: str, seed: int, length: int = 40) -> list[int]:
    (ids,) = model.other_input(source, length, seed).inputs["input_ids"].tolist()
    assert len(ids) == length
    return ids


def test_what_the_other_inputs_are_made_of(tiny):
    model = tiny("llama")
    special = model.special_ids
    assert not special & set(model_input(model, "random_tokens", 0))
    characters = model_input(model, "random_characters", 0)
    assert characters[0] == 1 and not special & set(characters[1:])  # BOS, then text
    generated = model_input(model, "generated", 0)
    assert generated[0] == 1 and not special & set(generated[1:])


def test_generated_is_a_sample_of_the_model(fresh):
    """A model that knows but one continuation writes it."""
    model = fresh("llama")
    model.module.lm_head.weight.data.zero_()
    model.module.model.norm.weight.data.fill_(1)
    model.module.lm_head.weight.data[42] = 0
    handle = model.module.lm_head.register_forward_hook(
        lambda module, args, output: output + 100 * (torch.arange(output.shape[-1]) == 42)
    )
    assert model_input(model, "generated", 0)[1:] == [42] * 39
    handle.remove()


@each_resampled
def test_as_run_gives_text_i_the_activation_of_position_i_everywhere(tiny, site, tmp_path, family, name):
    model = tiny(family)
    fitting = fitting_of(model, site, tmp_path, name)
    expected = plain_run(model, fitting.projections, model.other_input("random_tokens", 2, fitting.seed).inputs)
    replacement = resample("random_tokens", as_run=True, length=2).fit(fitting)
    for batch_tokens in (1000, 100):  # of one batch, and of several
        seen = []
        for batch in batches_of(model, batch_tokens):
            for x, y in zip(written(fitting, replacement, batch), expected, strict=True):
                for row, text in enumerate(batch.index):
                    value = y[text] if text < 2 else torch.zeros_like(y[0])
                    torch.testing.assert_close(x[row], value.expand_as(x[row]), atol=1e-6, rtol=1e-6)
            seen += batch.index
        assert sorted(seen) == [0, 1, 2]


def test_sources_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"method\.source=random_pixels"):
        resample("random_pixels").check("text")
    with pytest.raises(UserError, match=r"method\.source=generated"):
        resample("generated").check("image")
    with pytest.raises(UserError, match=r"method\.as_run"):
        resample("dataset", as_run=True).check("text")
    for source in TEXT_SOURCES:
        resample(source, as_run=True).check("text")
    resample("random_pixels").check("image")
    with pytest.raises(UserError, match=r"method\.length=5: changes nothing without method\.as_run=true"):
        resample("random_tokens", length=5).check("text")
    resample("random_tokens", as_run=True, length=5).check("text")


# All methods there are


def options() -> list[str]:
    found = [f"method={file.stem}" for file in sorted((CONF / "method").glob("*.yaml"))]
    found += [f"method=peak method.estimator={estimator}" for estimator in ESTIMATORS]
    found += [f"method=resample method.source={source}" for source in (*TEXT_SOURCES, "random_pixels")]
    found += ["method=resample method.source=random_tokens method.as_run=true"]
    return found


@pytest.fixture(scope="module")
def method_of(job_of):
    return functools.cache(lambda option: job_of(*option.split()).method)


@pytest.mark.parametrize("option", options())
@pytest.mark.parametrize("family", ["llama", "timm_swin"])
def test_every_method_writes_finite_values_of_the_right_shape(method_of, tiny, site, tmp_path, family, option):
    method, model = method_of(option), tiny(family)
    assert method.label and "/" not in method.label
    try:
        getattr(method, "check", lambda modality: None)(model.modality)
    except UserError:
        return  # not for this modality; tested above
    fitting = fitting_of(model, site, tmp_path)
    replacement = method.fit(fitting)
    assert isinstance(replacement.reads_clean, bool)
    batch = (pictures_of(model) if model.modality == "image" else batches_of(model))[0]
    with torch.inference_mode(), reading(fitting.projections, len(batch.names)) as clean:
        model.logits(batch)
    values = replacement(batch, clean if replacement.reads_clean else [])
    for value, x, projection in zip(values, clean, fitting.projections, strict=True):
        assert x.shape[-1] == projection.width == value.shape[-1]
        assert torch.broadcast_shapes(value.shape, x.shape) == x.shape
        assert torch.isfinite(value).all()
    again = method.fit(fitting)(batch, clean if replacement.reads_clean else [])
    assert all(map(torch.equal, values, again))


def test_another_example_is_of_another_document_where_there_is_one():
    """Pieces of three documents, as model.pack=concatenate cuts them."""
    for documents, donors in (
        ((0, 0, 0, 1, 2, 2), [5, 5, 5, 2, 3, 3]),
        ((4, 2, 7), [2, 0, 1]),
        ((3, 3, 3), [2, 0, 1]),
    ):
        n = len(documents)
        batch = Batch({}, torch.zeros(n, 1), None, tuple(map(str, range(n))), tuple(range(n)), documents)
        (found,) = AnotherExample()(batch, [torch.arange(float(n))[:, None, None]])
        assert found.flatten().tolist() == donors
