"""Scopes: where values are written, and over which positions statistics are collected."""

from __future__ import annotations

import pytest
import torch
from examples import logits, two_examples

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import NOT_SCORED, Document
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.data.scope import positions
from ablation_sweeps.neurons import sites
from ablation_sweeps.neurons.hooks import ablated, hooked

SCOPES = ("all", "not_first", "no_special", "last", "scored")


def expected(batch, scope: str, special: frozenset[int]) -> list[list[bool]]:
    """By a loop over single positions."""
    found = []
    for ids, mask, labels in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.labels, strict=True):
        n = int(mask.sum())
        is_in = {
            "all": lambda at, n=n: at < n,
            "not_first": lambda at, n=n: 0 < at < n,
            "no_special": lambda at, n=n, ids=ids: at < n and int(ids[at]) not in special,
            "last": lambda at, n=n: at == n - 1,
            "scored": lambda at, labels=labels: int(labels[at]) != NOT_SCORED,
        }[scope]
        found.append([is_in(at) for at in range(len(ids))])
    return found


@pytest.mark.parametrize("family", ["llama", "bert", "opt"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_value_is_written_in_scope_and_nowhere_else(tiny, site, family, scope):
    """`opt` joins examples and positions in its MLP. Padding is never in scope."""
    model = tiny(family)
    batch = two_examples(model)
    if model.kind == "masked_lm":
        texts = [Document("a", "The quick brown fox"), Document("b", "jumps over")]
        (batch,) = model.encode(texts, "evaluation", Budget(None, None), 1000, 0)
    projections = sites.find(model, site("mlp_pre_out"), None)
    in_scope = model.in_scope(batch, scope)
    assert in_scope is not None and in_scope.tolist() == expected(batch, scope, model.encode.special_ids())
    seen: list[torch.Tensor] = []
    everything = [torch.ones(p.width, dtype=torch.bool) for p in projections]
    sevens = [torch.full((p.width,), 7.0) for p in projections]
    see = hooked(projections, lambda layer, x: seen.append(x.reshape(2, -1, x.shape[-1])))
    with ablated(projections, everything, sevens, 2, in_scope), see:
        logits(model, batch)
    for x in seen:
        assert torch.equal((x == 7).all(-1), in_scope) and torch.equal((x == 7).any(-1), in_scope)


def test_outside_of_the_scope_a_causal_model_changes_only_later(tiny, site):
    """The last position is written: all others, which come before it, are as clean."""
    model = tiny("llama")
    batch, projections = two_examples(model), sites.find(tiny("llama"), site("attn_pre_out"), None)
    everything = [torch.ones(p.width, dtype=torch.bool) for p in projections]
    last = model.in_scope(batch, "last")
    with ablated(projections, everything, [torch.zeros(p.width) for p in projections], 2, last):
        found = logits(model, batch)
    clean, text = logits(model, batch), batch.inputs["attention_mask"].bool()
    assert torch.equal(found[text & ~last], clean[text & ~last])
    assert not torch.allclose(found[last], clean[last], atol=1e-3)


@pytest.mark.parametrize("scope", ["not_first", "no_special", "last"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_statistics_of_a_scope_use_up_the_budget_with_its_positions_alone(tiny, family, scope):
    model = tiny(family)
    texts = [Document(str(i), "abcdefghijklm"[: 5 + i]) for i in range(8)]
    batches = model.encode(texts, "calibration", Budget(20 if scope != "last" else 6, None, scope=scope), 100, 0)
    assert sum(int(batch.keep.sum()) for batch in batches) == (20 if scope != "last" else 6)
    for batch in batches:
        assert batch.keep.tolist() == expected(batch, scope, model.encode.special_ids())


@pytest.mark.parametrize(("family", "n_special"), [("vit", 1), ("timm_vit", 1), ("dinov2_registers", 5)])
def test_images_have_their_first_position_and_their_special_ones(tiny, site, family, n_special):
    model = tiny(family)
    batch, projections = two_examples(model), sites.find(model, site("attn_pre_out"), None)
    rows: list[int] = []
    with hooked(projections, lambda layer, x: rows.append(x.shape[1])):
        logits(model, batch)
    assert model.in_scope(batch, "all") is None
    for scope, n in (("not_first", 1), ("no_special", n_special)):
        found = model.in_scope(batch, scope)
        assert found.tolist() == [[False] * n + [True] * (rows[0] - n)] * 2
    with pytest.raises(UserError, match="scope=last"):
        model.in_scope(batch, "last")


def test_a_site_without_the_positions_of_the_input_is_refused(tiny, site):
    model = tiny("swin")
    batch, projections = two_examples(model), sites.find(model, site("attn_pre_out"), None)
    nothing = [torch.zeros(p.width, dtype=torch.bool) for p in projections]
    writing = ablated(projections, nothing, [torch.zeros(p.width) for p in projections], 2, torch.ones(2, 3) > 0)
    with pytest.raises(UserError, match=r"scope: .* rows where the input has .* use scope=all"), writing:
        logits(model, batch)


def test_without_padding_all_positions_need_no_mask(tiny):
    model = tiny("llama")
    (batch,) = model.encode([Document("a", "abc"), Document("b", "def")], "evaluation", Budget(None, None), 100, 0)
    assert positions(batch, "all") is None
