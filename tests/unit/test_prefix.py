"""Passes that leave out the layers below the first ablated one give the numbers of passes through all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from examples import logits, n_hooks, two_examples
from families import FAMILIES
from torch import Tensor, nn

from ablation_sweeps.data.batch import NOT_SCORED, Batch, Document
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.experiment.clean_passes import CleanPasses
from ablation_sweeps.experiment.evaluate import evaluate
from ablation_sweeps.methods.method import Constant
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import sites
from ablation_sweeps.neurons.hooks import Projection, ablated
from ablation_sweeps.neurons.prefix import SharedPrefix
from ablation_sweeps.neurons.schedule import Each
from ablation_sweeps.neurons.units import Unit
from ablation_sweeps.selections.effects import exact_effects, loss
from ablation_sweeps.selections.selection import Selecting

# Number of layers that need not be computed where one projection alone is ablated. Others: those below its own.
DEPTHS = {
    "albert": [0, 0, 0],  # one module is all layers
    "gemma3n": [0, 1, 1],  # the last layer takes its keys and values from the one before
    "qwen3_next": [1, 3],  # layers without a projection are left out as well
    "swin": [0, 0, 1, 1],  # whole stages
    "timm_swin": [0, 0, 1, 1],
}


def alone(projections: list[Projection]) -> dict[int, list[Tensor]]:
    """For each projection, the masks that ablate a third of its neurons, and no others."""
    return {
        number: [torch.arange(p.width) < (p.width // 3 if i == number else 0) for i, p in enumerate(projections)]
        for number in range(len(projections))
    }


def plain(model: Transformer, projections: list[Projection], masks: list[Tensor], batch: Batch) -> Tensor:
    with ablated(projections, masks, values_for(projections), len(batch.names)):
        return logits(model, batch)


def values_for(projections: list[Projection]) -> list[Tensor]:
    return [torch.full((p.width,), 0.2) for p in projections]


@contextmanager
def calls(projections: list[Projection]) -> Iterator[list[int]]:
    """Gives a list with the number of each projection that is computed."""
    seen: list[int] = []
    handles = [p.module.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, p in enumerate(projections)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# Models


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_equal_and_lower_layers_compute_nothing(tiny, site, family):
    model = tiny(family)
    projections, batch, hooks = (
        sites.find(model, site("attn_pre_out"), None),
        two_examples(model),
        n_hooks(model.module),
    )
    prefix, points = SharedPrefix(model, projections), alone(projections)
    expected = {number: plain(model, projections, masks, batch) for number, masks in points.items()}
    depths = prefix.depths(points)
    assert [*depths.values()] == DEPTHS.get(family, [*range(len(projections))])
    for clean_first in (True, False):
        with torch.inference_mode(), prefix.over_batch({*depths.values()}):
            recorded = clean_first
            if clean_first:
                model.logits(batch)
            for number in reversed(points):
                with (
                    calls(projections) as computed,
                    prefix.ablated(depths[number], points[number], values_for(projections), 2),
                ):
                    assert torch.equal(model.logits(batch), expected[number])
                if recorded and depths[number] == number:
                    assert [*dict.fromkeys(computed)] == [*range(number, len(projections))]
                recorded = True
    assert n_hooks(model.module) == hooks
    assert not any("forward" in module.__dict__ for module in model.module.modules())


class Block(nn.Module):
    """A layer, which may write into its input, or leave something behind for a later one."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"proj": nn.Linear(8, 8)})
        self.residual, self.in_place, self.earlier = True, False, ()
        self.memory = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.memory = x.mean((1, 2), keepdim=True)
        out = self.attn["proj"](x + sum(layer.memory for layer in self.earlier)).tanh()
        if self.in_place:
            x += out
            return x
        return x + out if self.residual else out


class Toy(nn.Module):
    """Three layers in some order, and what else they may do."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embedding, self.head = kind, nn.Embedding(30, 8), nn.Linear(8, 30)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        for layer in self.layers:
            layer.residual, layer.in_place = kind != "residual outside", kind == "in place"
        self.layers[2].earlier = (self.layers[1],) if kind == "remembers" else ()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        orders = {"twice": [0, 1, 2, 0, 1, 2], "reversed": [2, 1, 0]}
        for number in orders.get(self.kind, [0, 1, 2]):
            out = self.layers[number](x)
            x = x + out if self.kind == "residual outside" else out
        return self.head(x)


def toy(kind: str) -> Transformer:
    module = Toy(kind).eval()
    call = lambda batch: module(**batch.inputs)  # noqa: E731

    def other_input(source: str, length: int, seed: int) -> Batch:
        ids = torch.randint(30, (1, length), generator=torch.Generator().manual_seed(seed))
        return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, None, ("x",), (0,))

    return Transformer("toy", "", "causal_lm", module, call, call, lambda *_: [], other_input, None, frozenset())


def projections_of(model: Transformer) -> list[Projection]:
    layers = enumerate(model.module.layers)
    return [Projection(f"layers.{i}.attn.proj", layer.attn["proj"], 8) for i, layer in layers]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("in order", [0, 1, 2]),
        ("in place", [0, 1, 2]),
        ("residual outside", [0, 1, 1]),
        ("remembers", [0, 1, 1]),
        ("twice", [0, 0, 0]),
        ("reversed", [0, 0, 0]),
    ],
)
def test_layers_are_left_out_only_where_that_is_exact(kind, expected):
    model = toy(kind)
    projections = projections_of(model)
    points, batch, another = alone(projections), model.other_input("", 6, 9), model.other_input("", 4, 5)
    prefix = SharedPrefix(model, projections)
    depths = prefix.depths(points)
    assert [*depths.values()] == expected
    for number, masks in points.items():
        plainly = plain(model, projections, masks, batch)
        for depth in {number, depths[number]}:
            with torch.inference_mode(), prefix.over_batch({depth}):
                model.logits(batch)
                model.logits(another)
                with prefix.ablated(depth, masks, values_for(projections), 1):
                    assert torch.equal(model.logits(batch), plainly) == (depth == depths[number])


def test_nothing_is_recorded_from_an_ablated_layer():
    """Without a clean pass, and from the smallest depth to the largest, no pass finds anything that it may use."""
    model = toy("in order")
    projections = projections_of(model)
    prefix, points, batch = SharedPrefix(model, projections), alone(projections), model.other_input("", 6, 9)
    expected = {number: plain(model, projections, masks, batch) for number, masks in points.items()}
    with torch.inference_mode(), prefix.over_batch({1, 2}):
        for number, masks in points.items():
            with prefix.ablated(number, masks, values_for(projections), 1):
                assert torch.equal(model.logits(batch), expected[number])


# Evaluation and exact effects


TEXTS = ["The quick brown fox jumps over the lazy dog", "of liquor!", "Pack my box", "with", "five dozen jugs"]


def documents_of(model: Transformer, batch_tokens: int) -> list[Batch]:
    documents = [Document(f"doc{i}", text) for i, text in enumerate(TEXTS)]
    return model.encode(documents, "evaluation", Budget(None, None), batch_tokens, 0)


def each_head(projections: list[Projection]) -> dict:
    units = Unit(name="head").partition(projections)
    points = Each().points([torch.arange(len(units))], len(units))
    return {point: units.masks(numbers) for point, numbers in points.items()}


def unshared(projections: list[Projection]) -> list[Projection]:
    """The same modules; their paths have no numbers, so that nothing is known about layers."""
    return [dataclasses.replace(projection, path="projection") for projection in projections]


def evaluated(model: Transformer, projections: list[Projection], **changes) -> pd.DataFrame:
    options = {"batches": documents_of(model, 60), "masks": each_head(projections), "top_k": 3, "done": [],
               "replacement": Constant(values_for(projections)), "common": torch.tensor([7, 8])}  # fmt: skip
    return evaluate(model, projections, save=lambda *_: None, **{**options, **changes})


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("write", ["all", "not_first"])
def test_evaluation_gives_the_same_table_and_computes_lower_layers_once_a_batch(tiny, site, family, write):
    model = tiny(family)
    projections = sites.find(model, site("attn_pre_out"), None)
    expected = evaluated(model, unshared(projections), write=write)
    n_batches, clean = len(documents_of(model, 60)), CleanPasses(model)
    assert n_batches > 1
    # The clean passes of the second job are cached: the first point of each batch is recorded instead.
    probe = [2, 3, 4]  # two whole passes, and one of each depth
    for n_passes in ([1 + 4, 1 + 8, 1 + 12], [1 + 4, 1 + 8, 12]):
        with calls(projections) as computed:
            found = evaluated(model, projections, clean=clean, write=write)
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
        assert [computed.count(layer) for layer in range(3)] == [
            n_batches * n + m for n, m in zip(n_passes, probe, strict=True)
        ]


def test_evaluation_with_values_from_the_clean_pass(tiny, site):
    model = tiny("llama")
    projections = sites.find(model, site("attn_pre_out"), None)
    found, expected = (evaluated(model, some, replacement=Shifted()) for some in (projections, unshared(projections)))
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


class Shifted:
    """Writes the clean activations of the example before."""

    reads_clean = True

    def __call__(self, batch: Batch, clean: list[Tensor]) -> list[Tensor]:
        return [x.roll(1, 0) for x in clean]


def test_evaluation_in_halves_where_memory_is_short(tiny, site):
    model = tiny("llama")

    def logits_of(batch: Batch) -> Tensor:
        out = model.logits(batch)  # fails late, when something is recorded already
        if len(batch.names) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    small = dataclasses.replace(model, logits=logits_of)
    projections = sites.find(model, site("attn_pre_out"), None)
    found, expected = (
        evaluated(small, some, batches=documents_of(model, 1000)) for some in (projections, unshared(projections))
    )
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_exact_effects_are_those_of_separate_passes(tiny, site):
    model = tiny("llama")
    projections, batches = sites.find(model, site("attn_pre_out"), None), documents_of(model, 60)
    units, chosen = Unit(name="head").partition(projections), torch.tensor([11, 0, 5])
    selecting = Selecting(
        model=model,
        projections=projections,
        units=units,
        statistics=lambda *_: pytest.fail("no statistics are needed"),
        batches=batches,
        write="all",
        seed=0,
        cached=lambda compute: compute(),
        note=print,
    )
    found = exact_effects(selecting, values_for(projections), chosen, None)
    n_scored = sum(int((batch.labels != NOT_SCORED).sum()) for batch in batches)
    for unit, effect in zip(chosen, found, strict=True):
        total = 0.0
        for batch in batches:
            with torch.inference_mode():
                clean = loss(model, batch)
                with ablated(projections, units.masks(unit[None]), values_for(projections), len(batch.names)):
                    total += float(loss(model, batch) - clean)
        assert float(effect) == pytest.approx(total / n_scored, abs=1e-12)
