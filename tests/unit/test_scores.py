"""Scores of units against brute force, plain autograd, and a model in which the important units are known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import NOT_SCORED, Batch
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.collect import collect
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.units import Unit
from ablation_sweeps.selections.attribution import Attribution, IntegratedGradients
from ablation_sweeps.selections.by_statistic import ByStatistic, squared_column_norms
from ablation_sweeps.selections.exact import Exact
from ablation_sweeps.selections.scored import Scored, rank_correlation
from ablation_sweeps.selections.selection import Selecting

D, CLASSES = 12, 7
COMMON: dict[str, Any] = {"label": "s", "within": None, "checked_units": 0, "checked_tokens": 1000}


class TwoLayers(nn.Module):
    """Two projections; the second one reads the hidden state that the first one has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"o_proj": nn.Linear(D, D)}) for _ in range(2))
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["o_proj"](torch.tanh(x))  # type: ignore[index]
        return self.head(x)


@pytest.fixture(scope="module")
def selecting(tmp_path_factory) -> Selecting:
    torch.manual_seed(0)
    module = TwoLayers().requires_grad_(False).eval()
    batches = []
    for n in (3, 5):
        x, labels = torch.randn(n, 6, D) + 0.5, torch.randint(0, CLASSES, (n, 6))
        keep = torch.arange(6) < torch.randint(2, 7, (n, 1))
        labels[~keep] = NOT_SCORED
        names = tuple(map(str, range(n)))
        inputs = {"x": x, "attention_mask": keep.long()}
        batches.append(Batch(inputs, labels, keep, names, tuple(range(n))))
    call = lambda batch: module(batch.inputs["x"])  # noqa: E731
    model = Transformer("two", "", "causal_lm", module, call, call, lambda *_: batches, lambda *_: batches[0], 4,
                        frozenset())  # fmt: skip
    projections = [
        Projection(f"layers.{i}.o_proj", layer["o_proj"], D, "s", i, i, 4, 2)  # type: ignore[index,arg-type]
        for i, layer in enumerate(module.layers)
    ]
    folder = tmp_path_factory.mktemp("statistics")
    return Selecting(
        model=model,
        projections=projections,
        units=Unit(name="head").partition(projections),
        statistics=lambda *wanted: collect(model, projections, batches, folder, *wanted),
        batches=batches,
        write="all",
        seed=0,
        cached=lambda compute: compute(),
        note=lambda text: None,
    )


def mean_loss(selecting: Selecting, write) -> float:
    """Mean cross entropy in float64, with `write(layer, x)` in place of each layer's activations; no code of ours."""
    total, n = 0.0, 0
    module: Any = selecting.model.module
    for batch in selecting.batches:
        x = batch.inputs["x"]
        for number, layer in enumerate(module.layers):
            x = x + layer["o_proj"](write(number, torch.tanh(x)))
        log_p = module.head(x).double().log_softmax(-1)
        for row, position in (batch.labels != NOT_SCORED).nonzero().tolist():
            total -= log_p[row, position, batch.labels[row, position]].item()
            n += 1
    return total / n


def means(selecting: Selecting) -> list[Tensor]:
    seen: list[list[Tensor]] = [[], []]
    module: Any = selecting.model.module
    for batch in selecting.batches:
        x = batch.inputs["x"]
        for number, layer in enumerate(module.layers):
            seen[number].append(torch.tanh(x)[batch.keep])
            x = x + layer["o_proj"](torch.tanh(x))
    return [torch.cat(of_layer).mean(0) for of_layer in seen]


def brute_force(selecting: Selecting, baseline: str) -> Tensor:
    """The increase of the loss when each head of three neurons is replaced, one at a time."""
    values = means(selecting) if baseline == "mean" else [torch.zeros(D)] * 2
    clean, found = mean_loss(selecting, lambda layer, x: x), []
    for unit in range(8):

        def write(layer: int, x: Tensor, unit=unit) -> Tensor:
            x = x.clone()
            if layer == unit // 4:
                own = slice(unit % 4 * 3, unit % 4 * 3 + 3)
                x[..., own] = values[layer][own]
            return x

        found.append(mean_loss(selecting, write) - clean)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("baseline", ["mean", "zero"])
def test_exact_is_brute_force(selecting, baseline):
    rule = Exact(**COMMON, order="least_first", baseline=baseline, tokens=None)
    expected = brute_force(selecting, baseline)
    np.testing.assert_allclose(rule.scores(selecting), expected, atol=1e-6)
    (order,) = [torch.cat(rule.orders(selecting))]
    assert order.tolist() == [*expected[:4].argsort().tolist(), *(4 + expected[4:].argsort()).tolist()]
    most = Exact(**{**COMMON, "within": "model"}, order="most_first", baseline=baseline, tokens=None)
    assert most.orders(selecting)[0].tolist() == expected.argsort(descending=True).tolist()


def test_attribution_is_the_derivative_of_the_loss_by_a_gate(selecting):
    """A small step of each gate, in float64 sums."""
    values, expected, step = means(selecting), [], 1e-2
    for unit in range(8):

        def gated(layer: int, x: Tensor, unit=unit, sign=1) -> Tensor:
            x = x.clone()
            if layer == unit // 4:
                own = slice(unit % 4 * 3, unit % 4 * 3 + 3)
                x[..., own] = x[..., own] + sign * step * (x[..., own] - values[layer][own])
            return x

        up, down = (mean_loss(selecting, lambda *a, sign=sign: gated(*a, sign=sign)) for sign in (1, -1))
        expected.append(-(up - down) / (2 * step))
    rule = Attribution(**COMMON, order="least_first", baseline="mean")
    np.testing.assert_allclose(rule.scores(selecting), expected, atol=2e-5)


def test_attribution_is_exact_where_the_loss_is_linear_in_the_activations(selecting, monkeypatch):
    monkeypatch.setattr(
        "ablation_sweeps.selections.effects.loss", lambda model, batch: model.logits(batch)[..., 0].sum()
    )
    linear = TwoLayers().requires_grad_(False)
    projection = Projection("last", linear.layers[1]["o_proj"], D, "s", 1, 1, 4)  # type: ignore[index,arg-type]
    call = lambda batch: linear(batch.inputs["x"])  # noqa: E731
    only_last = dataclasses.replace(
        selecting,
        projections=[projection],
        units=Unit(name="head").partition([projection]),
        model=dataclasses.replace(selecting.model, module=linear, logits=call, body=call),
    )
    options = {**COMMON, "order": "least_first", "baseline": "zero"}
    exact = Exact(**options, tokens=None).scores(only_last)
    assert exact.abs().min() > 1e-3
    np.testing.assert_allclose(Attribution(**options).scores(only_last), exact, rtol=1e-4)
    np.testing.assert_allclose(IntegratedGradients(**options, steps=3).scores(only_last), exact, rtol=1e-4)


def test_integrated_gradients_add_up_to_the_effect_of_ablating_everything(selecting):
    values = means(selecting)
    everything = mean_loss(selecting, lambda layer, x: values[layer].expand_as(x)) - mean_loss(
        selecting, lambda _, x: x
    )
    rule = IntegratedGradients(**COMMON, order="least_first", baseline="mean", steps=32)
    assert rule.scores(selecting).sum().item() == pytest.approx(everything, abs=1e-3)
    first_order = Attribution(**COMMON, order="least_first", baseline="mean").scores(selecting).sum().item()
    assert abs(first_order - everything) > 0.01  # the points between matter


@pytest.mark.parametrize("statistic", ["mean_abs", "variance", "wifv"])
def test_statistics_are_those_of_numpy(selecting, statistic):
    seen: list[list[Tensor]] = [[], []]
    mean_loss(selecting, lambda layer, x: seen[layer].append(x) or x)
    module: Any = selecting.model.module
    expected = []
    for layer in range(2):
        x = np.concatenate([
            part[batch.keep].numpy() for part, batch in zip(seen[layer], selecting.batches, strict=True)
        ]).astype(float)  # fmt: skip
        weight = module.layers[layer]["o_proj"].weight.double().numpy()
        of_neurons = {
            "mean_abs": np.abs(x).mean(0), "variance": x.var(0), "wifv": x.var(0) * (weight**2).sum(0),
        }[statistic]  # fmt: skip
        expected += list(of_neurons.reshape(4, 3).sum(1))
    rule = ByStatistic(**COMMON, order="least_first", baseline="mean", statistic=statistic)  # type: ignore[arg-type]
    np.testing.assert_allclose(rule.scores(selecting), expected, rtol=1e-5)


def test_column_norms_are_those_of_any_kind_of_projection():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    linear, conv = nn.Linear(5, 3), Conv1D(3, 5)
    for module, columns in ((linear, linear.weight.T), (conv, conv.weight)):
        norms = squared_column_norms(Projection("p", module, 5))
        torch.testing.assert_close(norms, (columns**2).sum(1).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["exact", "attribution", "integrated_gradients", "wifv"])
def test_planted_units_are_found(selecting, tmp_path, rule):
    """All heads but two write to a part of the hidden state that nothing reads; of these two, one matters more."""
    torch.manual_seed(1)
    module = TwoLayers().requires_grad_(False)
    with torch.no_grad():
        module.head.weight[:, 6:] = 0
        for layer in module.layers:
            layer["o_proj"].weight[:] = 0  # type: ignore[index]
            layer["o_proj"].weight[6:] = 0.01 * torch.randn(6, D)  # type: ignore[index]
        module.layers[1]["o_proj"].weight[:6, 3:6] = 3 * torch.randn(6, 3)  # type: ignore[index]  # unit 5
        module.layers[1]["o_proj"].weight[:6, 6:9] = 0.3 * torch.randn(6, 3)  # type: ignore[index]  # unit 6
    call = lambda batch: module(batch.inputs["x"])  # noqa: E731
    batches = []
    for batch in selecting.batches:  # labels that the model itself gives: each ablation of what matters is damage
        labels = call(batch).argmax(-1).masked_fill(batch.labels == NOT_SCORED, NOT_SCORED)
        batches.append(Batch(batch.inputs, labels, batch.keep, batch.names, batch.index))
    projections = [
        Projection(f"{i}", layer["o_proj"], D, "s", i, i, 4)  # type: ignore[index,arg-type]
        for i, layer in enumerate(module.layers)
    ]
    model = dataclasses.replace(selecting.model, module=module, logits=call, body=call)
    planted = dataclasses.replace(
        selecting,
        model=model,
        projections=projections,
        batches=batches,
        statistics=lambda *wanted: collect(model, projections, batches, tmp_path, *wanted),
    )
    options = {**COMMON, "within": "model", "order": "most_first", "baseline": "zero"}
    rules: dict[str, Scored] = {
        "exact": Exact(**options, tokens=None),
        "attribution": Attribution(**options),
        "integrated_gradients": IntegratedGradients(**options, steps=5),
        "wifv": ByStatistic(**options, statistic="wifv"),
    }
    (order,) = rules[rule].orders(planted)
    assert order[:2].tolist() == [5, 6]


def test_the_correlation_with_the_exact_effect_is_said_and_is_one_for_exact_itself(selecting):
    said: list[str] = []
    told = dataclasses.replace(selecting, note=said.append)
    checked = {**COMMON, "checked_units": 8, "order": "least_first", "baseline": "mean"}
    Exact(**checked, tokens=None).orders(told)
    Attribution(**checked).orders(told)
    expected = rank_correlation(Attribution(**checked).scores(selecting), brute_force(selecting, "mean"))
    assert [text.split("loss ")[1] for text in said] == [
        "1.00, on 8 of 8 units", f"{expected:.2f}, on 8 of 8 units"
    ]  # fmt: skip


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    a, b = torch.tensor([1.0, 5, 2, 2, 9]), torch.tensor([0.1, 0.4, 0.4, 0.2, 0.3])
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert math.isnan(rank_correlation(a, torch.ones(5)))


@pytest.mark.parametrize(
    ("scores", "message"), [(torch.zeros(3), r"shape \[3\] for 8 units"), (torch.full((8,), torch.nan), "not finite")]
)
def test_scores_that_are_none_are_refused(selecting, scores, message):
    class Broken(Scored):
        def scores(self, selecting: Selecting) -> Tensor:
            return scores

    with pytest.raises(UserError, match=message):
        Broken(**COMMON, order="least_first", baseline="mean").orders(selecting)
