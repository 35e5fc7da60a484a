"""A model whose logits are a linear map of its input, and a study on it: all can be computed again by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from examples import random_masks
from torch import nn

from ablation_sweeps.data.batch import NOT_SCORED, Batch
from ablation_sweeps.methods.method import Constant
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import sites

D, VOCABULARY = 16, 30  # neurons and tokens
FRACTIONS = (0.25, 0.5, 1.0)


class OneProjection(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        proj = nn.Linear(len(weight), len(bias))
        proj.weight.data, proj.bias.data = weight.T.contiguous(), bias
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"proj": proj})})])

    def forward(self, x):
        return self.layers[0]["attn"]["proj"](x)


@pytest.fixture(scope="module")
def study(site):
    """A model, batches of 11 documents with padding and positions that are not scored, masks and replacements."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(D, VOCABULARY, generator=generator), torch.randn(VOCABULARY, generator=generator)
    module = OneProjection(weight, bias).eval()
    call = lambda batch: module(batch.inputs["x"])  # noqa: E731
    rng = np.random.default_rng(0)
    batches, index = [], 0
    for n_documents in (4, 4, 3):
        x = torch.randn(n_documents, 12, D, generator=generator)
        clean = module(x).detach()
        labels = torch.where(torch.rand(n_documents, 12, generator=generator) < 0.5, clean.argmax(-1),
                             torch.randint(0, VOCABULARY, (n_documents, 12), generator=generator))  # fmt: skip
        keep = torch.arange(12) < torch.from_numpy(rng.integers(2, 13, n_documents))[:, None]
        labels[~keep] = NOT_SCORED
        labels[torch.rand(n_documents, 12, generator=generator) < 0.2] = NOT_SCORED
        place = tuple(range(index, index + n_documents))[::-1]
        batches.append(Batch({"x": x}, labels, keep, tuple(f"doc{i}" for i in place), place))
        index += n_documents
    model = Transformer("linear", "", "causal_lm", module, call, call, lambda *_: [], lambda *_: batches[0], None,
                        frozenset())  # fmt: skip
    projections = sites.find(model, site("attn_pre_out"), None)
    return {
        "model": model,
        "projections": projections,
        "batches": batches,
        "masks": random_masks(projections, FRACTIONS),
        "replacement": Constant([torch.randn(D, generator=generator)]),
    }


def scored_labels(study) -> torch.Tensor:
    return torch.cat([batch.labels[batch.labels != NOT_SCORED] for batch in study["batches"]])
