"""The head of a language model is shown the scored positions alone, where that gives their logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from examples import two_examples
from torch import nn

from ablation_sweeps.transformer import Transformer, with_head


class PositionsFirst(nn.Module):
    """A head that is given `[pos, batch, d_model]`, as by models that keep positions outermost."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x)


def centred(model: Transformer) -> Transformer:
    """Logits depend on those of all other positions."""
    return dataclasses.replace(
        model, logits=lambda batch: (z := model.logits(batch)) - z.mean(-2, keepdim=True), head=None
    )


def shaped(model: Transformer) -> Transformer:
    """It expects as many logits as it has positions."""
    return dataclasses.replace(
        model, logits=lambda batch: model.logits(batch).view(*batch.inputs["input_ids"].shape, -1), head=None
    )


def positions_first(model: Transformer) -> tuple[Transformer, nn.Module]:
    head = PositionsFirst(model.module.get_output_embeddings())

    def logits(batch):
        x = model.module.base_model(**batch.inputs, use_cache=False).last_hidden_state
        return head(x.transpose(0, 1)).transpose(0, 1)

    return dataclasses.replace(model, logits=logits, head=None), head


@pytest.mark.parametrize("change", [centred, shaped])
def test_a_head_whose_logits_are_changed_by_other_positions_is_shown_them_all(tiny, change):
    model = tiny("llama")
    assert model.head is not None
    changed = with_head(change(model), model.head)
    assert changed.head is None
    agrees_with_all(changed)


def test_a_head_that_takes_positions_before_examples_is_shown_them_all(tiny):
    model, head = positions_first(tiny("llama"))
    assert with_head(model, head).head is None
    agrees_with_all(model)


def test_what_is_done_to_each_logit_alone_changes_nothing(tiny):
    model = tiny("llama")
    capped = dataclasses.replace(model, logits=lambda batch: 3 * torch.tanh(model.logits(batch) / 3), head=None)
    capped = with_head(capped, model.head)
    assert capped.head is model.head
    agrees_with_all(capped)


def test_a_model_that_gives_nan_keeps_its_head(tiny):
    """What is wrong with it is said when it is evaluated."""
    model = tiny("llama")
    broken = dataclasses.replace(model, logits=lambda batch: model.logits(batch) * torch.nan, head=None)
    assert with_head(broken, model.head).head is model.head


def agrees_with_all(model: Transformer) -> None:
    batch, rows = two_examples(model), torch.tensor([9, 1, 4])
    with torch.inference_mode():
        torch.testing.assert_close(
            model.logits_at(batch, rows), model.logits(batch).flatten(0, -2)[rows], atol=1e-5, rtol=1e-5
        )
