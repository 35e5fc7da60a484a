"""Two examples for any model, and what can be seen of it from outside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ablation_sweeps.data.batch import Batch, Document
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.models.transformer import Transformer


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


def n_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())
