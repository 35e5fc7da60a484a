"""The head of a language model is shown the scored positions alone, where that gives their logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from examples import two_examples
from families import VOCABULARY
from torch import Tensor, nn
from torch.nn import functional as F

from ablation_sweeps.data.batch import Batch
from ablation_sweeps.models.transformer import Transformer, with_head

Way = Callable[[nn.Module, Tensor, Tensor], Tensor]  # head, its input and the attention mask -> logits


class Head(nn.Module):
    """Whatever it is given."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x, *_):
        return self.linear(x)


def going(model: Transformer, way: Way) -> Transformer:
    """The model with logits of its own, and the head that they come from."""
    head = Head(model.module.get_output_embeddings())

    def logits(batch: Batch) -> Tensor:
        mask = batch.inputs["attention_mask"]
        x = model.module.base_model(batch.inputs["input_ids"], attention_mask=mask, use_cache=False)
        return way(head, x.last_hidden_state, mask)

    return with_head(dataclasses.replace(model, logits=logits, head=None), head)


def seen_in_chunks(head, x, mask):
    return torch.cat([head(x[:, i : i + 16]) for i in range(0, x.shape[1], 16)], 1)


def without_padding(head, x, mask):
    """Where there is some."""
    if mask.all():
        return head(x)
    whole = torch.zeros(*mask.shape, len(VOCABULARY))
    whole[mask.bool()] = head(x[mask.bool()])
    return whole


def by_length(head, x, mask):
    order = mask.sum(1).argsort()
    z = head(x[order])
    return z[order.argsort()] if len(z) == len(order) else z


def left_padded(head, x, mask):
    z = head(F.pad(x, (0, 0, -x.shape[1] % 8, 0)))
    return z[:, -x.shape[1] :] if len(z) == len(x) else z


def positions_first(head, x, mask):
    return head(x.transpose(0, 1)).transpose(0, 1)


def centred(head, x, mask):
    """A little of all the others is in every logit."""
    z = head(x)
    return z - 0.3 * z.mean(-2, keepdim=True)


def without_first_classes(z: Tensor, value: float = -torch.inf) -> Tensor:
    return z.index_fill(-1, torch.arange(5), value)


def with_offsets(head, x, mask):
    """All logits of a position may be moved: its probabilities are the same."""
    return centred(head, x, mask) + 100 * head(x)[..., :1].sign()


AS_A_WHOLE: dict[str, Way] = {
    "centred": centred,
    "shaped": lambda head, x, mask: head(x).view(*x.shape[:-1], -1),
    "never called": lambda head, x, mask: F.linear(x, head.linear.weight),
    "by keyword": lambda head, x, mask: head.forward(x=x),
    "in chunks": seen_in_chunks,
    "without padding": without_padding,
    "by length": by_length,
    "padded": left_padded,
    "positions first": positions_first,
    "and some classes ruled out": lambda *given: without_first_classes(centred(*given)),
    "or nearly": lambda *given: without_first_classes(centred(*given), torch.finfo(torch.float32).min),
    "in long texts": lambda head, x, mask: without_first_classes(z) if (z := head(x)).shape[-2] > 6 else z,
    "with offsets": with_offsets,
    "nan": lambda head, x, mask: head(x) * torch.nan,
}
BY_POSITION: dict[str, Way] = {
    "as it is": lambda head, x, mask: head(x),
    "capped": lambda head, x, mask: 3 * torch.tanh(head(x) / 3),
    "some classes ruled out": lambda head, x, mask: without_first_classes(head(x)),
    "or nearly": lambda head, x, mask: without_first_classes(head(x), torch.finfo(torch.float32).min),
    "moved": lambda head, x, mask: (z := head(x)) + 100 * z[..., :1].sign(),
}


@pytest.mark.parametrize("way", AS_A_WHOLE)
def test_a_head_is_shown_all_positions_where_they_matter(tiny, way):
    model = going(tiny("llama"), AS_A_WHOLE[way])
    if way != "in chunks":  # of so few positions, the first chunk is all
        assert model.head is None
    agrees_with_all(model)


@pytest.mark.parametrize("way", BY_POSITION)
def test_it_is_shown_some_where_they_do_not(tiny, way):
    model = going(tiny("llama"), BY_POSITION[way])
    assert model.head is not None
    agrees_with_all(model)


def test_what_is_seen_of_the_probe_is_looked_at_in_each_batch(tiny):
    """A head that is told later that it may get something else is shown all."""
    model = going(tiny("llama"), BY_POSITION["as it is"])
    through = model.logits
    doubled = dataclasses.replace(model, logits=lambda batch: through(batch)[:, ::2].repeat_interleave(2, 1))
    batch = two_examples(model)
    odd = dataclasses.replace(batch, labels=batch.labels[:, :-1])  # it does not fit what the head is given
    with torch.inference_mode():
        expected = doubled.logits(batch).flatten(0, -2)[[4, 1]]
        torch.testing.assert_close(doubled.logits_at(odd, torch.tensor([4, 1])), expected)


def agrees_with_all(model: Transformer) -> None:
    """Of two texts of unequal length, and of one that is longer than the probe."""
    long = model.other_input("probe", 20, 1)
    for batch, rows in ((two_examples(model), torch.tensor([9, 1, 4])), (long, torch.tensor([17, 3]))):
        with torch.inference_mode():
            expected = model.logits(batch).flatten(0, -2)[rows]
            torch.testing.assert_close(model.logits_at(batch, rows), expected, atol=1e-5, rtol=1e-5, equal_nan=True)
