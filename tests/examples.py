"""Two examples for any model, and what can be seen of it from outside."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn

from ablation_sweeps.data.batch import Batch, Document
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.experiment.evaluate import Masks
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.schedule import Fractions
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
    """The inputs of a rule that looks at neither the model nor the data."""
    return cast(Selecting, SimpleNamespace(units=units, projections=projections, seed=seed))


def random_masks(projections: Sequence[Projection], fractions: Sequence[float], seed: int = 0) -> Masks:
    """The masks of random neurons, as a job with the default options has them."""
    units = Unit(name="neuron").partition(projections)
    orders = Random(label="random").orders(selecting_of(projections, units, seed))
    points = Fractions(values=tuple(fractions)).points(orders, len(units))
    return {point: units.masks(numbers) for point, numbers in points.items()}


def n_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())
