"""Examples for any model, what can be seen of it from outside, and short cuts to what is computed on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ablation_sweeps.data.batch import Batch, Document
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.experiment import evaluate
from ablation_sweeps.methods.method import Constant
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import sites
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.schedule import Fractions, Point
from ablation_sweeps.neurons.units import Unit, Units
from ablation_sweeps.selections.random import Random
from ablation_sweeps.selections.selection import Selecting


def two_examples(model: Transformer) -> Batch:
    """Two unequal texts, one of them padded, or two pictures."""
    if model.modality == "image":
        one, two = (model.other_input("random_pixels", 1, seed) for seed in (1, 2))
        inputs = {key: torch.cat([one.inputs[key], two.inputs[key]]) for key in one.inputs}
        return Batch(inputs, torch.tensor([0, 1]), None, ("a", "b"), (0, 1))
    texts = [Document("a", "The quick brown fox"), Document("b", "jumps over")]
    (batch,) = model.encode(texts, "calibration", Budget(None, None), 1000, 0)
    return batch


def logits(model: Transformer, batch: Batch) -> Tensor:
    with torch.inference_mode():
        return model.logits(batch)


def selecting_of(projections: Sequence[Projection], units: Units, seed: int = 0) -> Selecting:
    """The inputs of a rule that looks at neither the model nor the data: it would find that they are not there."""
    selecting = object.__new__(Selecting)
    for name, value in {"units": units, "projections": projections, "seed": seed}.items():
        object.__setattr__(selecting, name, value)
    return selecting


def random_masks(
    projections: Sequence[Projection], fractions: Sequence[float], seed: int = 0
) -> dict[Point, list[Tensor]]:
    """The masks of random neurons, as a job with the default options has them."""
    units = Unit(name="neuron").partition(projections)
    orders = Random(label="random").orders(selecting_of(projections, units, seed))
    points = Fractions(values=tuple(fractions)).points(orders, len(units))
    return {point: units.masks(numbers) for point, numbers in points.items()}


def n_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


# Calibration


TEXTS = ["The quick brown fox jumps over the lazy dog.", "A", "Pack my box with five dozen jugs", "of liquor!", "x y"]


def batches_of(model: Transformer, batch_tokens: int = 80) -> list[Batch]:
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    return model.encode(documents, "calibration", Budget(None, None), batch_tokens, 0)


def plain_activations(model: Transformer, projections, inputs: list[dict[str, torch.Tensor]]) -> list[np.ndarray]:
    """All activations that are not padding, `[tokens, neurons]` a layer, by hooks of our own."""
    calls: list[torch.Tensor] = []
    modules = list(dict.fromkeys(p.module for p in projections))
    handles = [m.register_forward_pre_hook(lambda module, args: calls.append(args[0].clone())) for m in modules]
    layers: list[list[torch.Tensor]] = [[] for _ in projections]
    with torch.inference_mode():
        for given in inputs:
            calls.clear()
            model.module(**given)
            real = given["attention_mask"].bool().flatten()
            for layer, x in enumerate(calls):
                layers[layer].append(x.reshape(-1, x.shape[-1])[real])
    for handle in handles:
        handle.remove()
    return [torch.cat(x).numpy() for x in layers]


class CountingBody:
    def __init__(self, body):
        self.body, self.calls = body, 0

    def __call__(self, batch):
        self.calls += 1
        return self.body(batch)


def assert_equal(a, b, *histograms):
    """Statistics, bit by bit."""
    for x, y in zip(a.moments, b.moments, strict=True):
        assert x.n == y.n
        for what in ("total", "squares", "minimum", "maximum"):
            assert torch.equal(getattr(x, what), getattr(y, what))
    for histogram in histograms:
        assert all(map(torch.equal, a.counts[histogram], b.counts[histogram]))


# Evaluation


COMMON, TOP_K = torch.tensor([3, 7, 8]), 3  # tokens that are left out of some metrics


def evaluated(study, common=COMMON, top_k=TOP_K, done=(), save=lambda number, table: None, **changes) -> pd.DataFrame:
    return evaluate.evaluate(**{**study, **changes}, common=common, top_k=top_k, done=done, save=save)


def study_of(model: Transformer, site, batch_tokens: int, batches: list[Batch] | None = None) -> dict:
    """What `evaluated` takes: half of the neurons are set to 0.3."""
    texts = ["The quick brown fox jumps over the lazy dog", "of liquor!", "Pack my box", "a", "five dozen jugs"]
    documents = [Document(f"doc{i}", text) for i, text in enumerate(texts)]
    projections = sites.find(model, site("attn_pre_out"), None)
    return {
        "model": model,
        "projections": projections,
        "batches": batches or model.encode(documents, "evaluation", Budget(None, None), batch_tokens, 0),
        "masks": random_masks(projections, (0.5,)),
        "replacement": Constant([torch.full((p.width,), 0.3) for p in projections]),
    }


def short_of_memory(model: Transformer, most: int) -> Transformer:
    """A device with too little memory for more than `most` examples."""

    def limited(forward):
        def run(batch):
            if len(batch.names) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(batch)

        return run

    return dataclasses.replace(model, logits=limited(model.logits), body=limited(model.body))
