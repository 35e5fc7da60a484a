"""The certificate: it holds for every family of models, and each planted fault is refused by the property it breaks."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import certificate, hooks, sites
from ablation_sweeps.neurons.certificate import Certificate, certify

SITES = {"attn_pre_out": "attention", "mlp_pre_out": "mlp"}
PROJECTION = "model.layers.*.self_attn.o_proj"


def failed(found: Certificate) -> list[str]:
    return [verdict.name for verdict in found.verdicts if verdict.outcome == "failed"]


def evidence(found: Certificate, name: str) -> str:
    return {verdict.name: verdict.evidence for verdict in found.verdicts}[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_properties_hold_for_every_family(tiny, site, family):
    model = tiny(family)
    for name, layers in SITES.items():
        if getattr(FAMILIES[family], layers) is None:
            continue
        found = certify(model, sites.find(model, site(name), None), "all")
        open_questions = [] if name == "attn_pre_out" and FAMILIES[family].heads_apart else ["heads"]
        assert {verdict.name: verdict.evidence for verdict in found.verdicts if verdict.outcome == "failed"} == {}
        assert [verdict.name for verdict in found.verdicts if verdict.outcome == "not proven"] == open_questions
        assert len(found.verdicts) == 9


@pytest.mark.parametrize("family", ["llama", "bert", "opt"])
@pytest.mark.parametrize("scope", ["all", "not_first", "no_special", "last", "scored"])
def test_all_scopes_of_texts_hold(tiny, site, family, scope):
    model = tiny(family)
    found = certify(model, sites.find(model, site("mlp_pre_out"), None), scope)
    assert failed(found) == []
    outside = {"all": 3, "no_special": 3, "not_first": 5, "last": 14, "scored": 10}[scope]
    assert evidence(found, "scope").startswith(f"with scope={scope}, {outside} of 16 positions")


def test_heads_are_counted_with_more_than_one_pass_can_hold(fresh, site, monkeypatch):
    monkeypatch.setattr(certificate, "COPIES", 3)  # of four heads
    model = fresh("llama")
    found = certify(model, sites.find(model, site("attn_pre_out"), None), "all")
    assert failed(found) == [] and evidence(found, "heads").startswith("zeroing the slice of each of the 4 heads")


def test_a_model_without_weights_in_one_layer_is_no_fault(fresh, site):
    model = fresh("llama")
    projections = sites.find(model, site("attn_pre_out"), None)
    nn.init.zeros_(model.module.get_submodule(projections[1].path).weight)  # type: ignore[arg-type]
    assert failed(certify(model, projections, "all")) == []


def test_a_device_that_rounds_differently_each_time_is_no_fault(tiny, site):
    """Two passes differ in their last bits, as some kernels of a GPU do: no bits can be compared."""
    model = tiny("llama")
    logits = lambda batch: model.logits(batch) * (1 + 1e-7 * torch.randn(()))  # noqa: E731
    rounding = dataclasses.replace(model, logits=logits)
    found = certify(rounding, sites.find(model, site("attn_pre_out"), None), "all")
    assert [verdict.outcome for verdict in found.verdicts] == ["passed", "not proven"]
    found.require("head")


def test_texts_that_are_run_apart_say_so(sees_padding, fresh, site):
    model = fresh("bert", path=str(sees_padding))
    found = certify(model, sites.find(model, site("mlp_pre_out"), None), "all")
    assert model.texts == ("apart",) and failed(found) == []
    assert evidence(found, "neighbour").endswith("other lengths are run apart")


# Planted faults, in the model


class Wrapped(nn.Module):
    """A projection that is called in another way; its name within the wrapper is `inner`."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner


class AfterProjection(Wrapped):
    """A second linear layer, which is taken for the projection, gets the projected output."""

    def __init__(self, inner: nn.Linear):
        super().__init__(inner)
        self.after = nn.Linear(inner.out_features, inner.out_features, bias=False)
        self.after.weight.data = torch.eye(inner.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(x))


class Interleaved(Wrapped):
    """The neurons of four heads take turns: the first of each head, then the second, ..."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2))


class Twice(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        return self.inner(x)


class InParts(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(part) for part in x.split(x.shape[1] // 2, 1)], 1)


class Never(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight)


class InSecondPassOnly(Wrapped):
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return F.linear(x, self.inner.weight) if self.passes % 2 else self.inner(x)


class Discarded(Wrapped):
    """What the projection gives is not used."""

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        return F.linear(x, self.inner.weight)


def with_wrapped(model: Transformer, wrapper: type[Wrapped]) -> Transformer:
    for layer in model.module.model.layers:  # type: ignore[union-attr]
        layer.self_attn.o_proj = wrapper(layer.self_attn.o_proj)
    return model


@pytest.mark.parametrize(
    ("wrapper", "path", "name", "reason"),
    [
        (AfterProjection, "after", "heads", "the site is after the output projection"),
        (Interleaved, "inner", "heads", "the neurons of head 0 are not a slice in order, but 0, 4, 8, 12"),
        (Twice, "inner", "hooks", "called twice with the same input in one layer"),
        (Discarded, "inner", "effect", "the logits do not depend on what is written"),
    ],
)
def test_a_projection_that_is_no_projection_of_heads_is_refused(fresh, site, wrapper, path, name, reason):
    model = with_wrapped(fresh("llama"), wrapper)
    found = certify(model, sites.find(model, site("attn_pre_out"), (f"{PROJECTION}.{path}",)), "all")
    assert failed(found) == [name] and reason in evidence(found, name)
    with pytest.raises(UserError, match=rf"^model: .* a property fails: {name}: .*site_paths"):
        found.require("neuron")


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [(Never, "a hook never fired"), (Twice, "called 2 times in one pass"), (InSecondPassOnly, "never fired")],
)
def test_a_hook_that_does_not_fire_once_is_refused(fresh, site, wrapper, reason):
    """The projections were found before the model was changed."""
    model = fresh("llama")
    projections = sites.find(model, site("attn_pre_out"), None)
    found = certify(with_wrapped(model, wrapper), projections, "all")
    assert failed(found) == ["hooks"] and reason in evidence(found, "hooks")


def test_a_projection_that_is_called_for_a_part_of_the_positions_is_refused(fresh, site):
    model = with_wrapped(fresh("llama"), InParts)
    found = certify(model, sites.find(model, site("attn_pre_out"), (f"{PROJECTION}.inner",)), "all")
    assert failed(found) == ["hooks"] and "2 times in one layer" in evidence(found, "hooks")


def test_a_model_that_keeps_its_first_input_is_refused(fresh, site):
    model = fresh("llama")
    kept: dict[torch.Size, dict] = {}

    def run(batch):
        first = kept.setdefault(batch.labels.shape, batch.inputs)
        return plain(dataclasses.replace(batch, inputs=first))

    plain = model.logits
    model = dataclasses.replace(model, logits=run)
    projections = sites.find(model, site("attn_pre_out"), None)
    assert failed(certify(model, projections, "all")) == ["input"]


def test_padding_that_is_attended_to_is_refused(fresh, site):
    model = fresh("bert")

    def without_mask(batch):
        inputs = {**batch.inputs, "attention_mask": torch.ones_like(batch.inputs["attention_mask"])}
        return plain(dataclasses.replace(batch, inputs=inputs))

    plain = model.logits
    found = certify(
        dataclasses.replace(model, logits=without_mask), sites.find(model, site("mlp_pre_out"), None), "all"
    )
    assert failed(found) == ["padding", "neighbour"]
    assert evidence(found, "padding") == "a text has other logits with 3 positions of padding"


def test_padding_that_counts_as_text_is_refused(fresh, site):
    model = dataclasses.replace(fresh("llama"), in_scope=lambda batch, scope: None)
    found = certify(model, sites.find(model, site("mlp_pre_out"), None), "all")
    assert failed(found) == ["scope", "padding"] and evidence(found, "padding") == "padding is in scope=all"


def test_a_scope_that_the_model_ignores_is_refused(fresh, site):
    model = fresh("llama")
    ignorant = dataclasses.replace(model, in_scope=lambda batch, scope: model.in_scope(batch, "all"))
    found = certify(ignorant, sites.find(model, site("mlp_pre_out"), None), "last")
    assert failed(found) == ["scope"]


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_examples_that_depend_on_their_neighbours_are_refused(fresh, site, family):
    model = fresh(family)

    def less_the_mean(batch):
        logits = plain(batch)
        return logits + 0.1 * logits.mean(0, keepdim=True) if len(logits) > 1 else logits

    plain = model.logits
    found = certify(
        dataclasses.replace(model, logits=less_the_mean, head=None), sites.find(model, site("mlp_pre_out"), None), "all"
    )
    assert "neighbour" in failed(found) and "padding" not in failed(found)


def test_an_output_that_is_changed_after_the_projection_is_refused(fresh, site):
    model = fresh("llama")
    projections = sites.find(model, site("attn_pre_out"), None)

    def louder(module: nn.Module, args: object, out: Tensor) -> Tensor:
        return out * 1.001

    handle = projections[1].module.register_forward_hook(louder)
    found = certify(model, projections, "all")
    handle.remove()
    assert failed(found) == ["written", "scope"] and "layers.1" in evidence(found, "written")


# Planted faults, in the way values are written


def nothing_is_written(projections, masks, values, batch, positions=None):
    return hooks.ablated(projections, [torch.zeros_like(mask) for mask in masks], values, batch, positions)


def in_bfloat16(projections, masks, values, batch, positions=None):
    return hooks.ablated(projections, masks, [x.bfloat16().to(x.dtype) for x in values], batch, positions)


def to_other_examples(projections, masks, values, batch, positions=None):
    swapped = [x.roll(1, 0) if x.ndim == 3 else x for x in values]
    return hooks.ablated(projections, masks, swapped, batch, positions)


def at_all_positions(projections, masks, values, batch, positions=None):
    return hooks.ablated(projections, masks, values, batch, None)


def to_the_next_neurons(projections, masks, values, batch, positions=None):
    return hooks.ablated(projections, [mask.roll(1) for mask in masks], values, batch, positions)


def in_the_first_layer(projections, masks, values, batch, positions=None):
    masks = [mask if number == 0 else torch.zeros_like(mask) for number, mask in enumerate(masks)]
    return hooks.ablated(projections, masks, values, batch, positions)


@contextmanager
def after_the_projection(projections, masks, values, batch, positions=None):
    """As published code does: the output of the projection is taken for the heads."""

    def zeroed(module, args, out):
        return torch.where(masks[0][: out.shape[-1]], values[0][..., : out.shape[-1]].to(out), out)

    handles = [projection.module.register_forward_hook(zeroed) for projection in projections]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("mutant", "names"),
    [
        (nothing_is_written, {"written", "effect"}),
        (in_bfloat16, {"clean values"}),
        (to_other_examples, {"clean values", "written"}),
        (at_all_positions, {"scope"}),
        (to_the_next_neurons, {"written"}),
        (in_the_first_layer, {"written", "effect"}),
        (after_the_projection, {"clean values", "written"}),
    ],
)
def test_values_that_are_written_wrongly_are_refused(tiny, site, monkeypatch, mutant, names):
    model = tiny("llama")
    projections = sites.find(model, site("attn_pre_out"), None)
    monkeypatch.setattr(certificate, "ablated", mutant)
    assert names <= {*failed(certify(model, projections, "last"))}


# What a job makes of it


def test_heads_that_are_not_proven_matter_to_units_of_heads_alone(tiny, site):
    model = tiny("timm_eva_norm")
    found = certify(model, sites.find(model, site("attn_pre_out"), None), "all")
    found.require("neuron")
    for unit in ("head", "kv_group"):
        with pytest.raises(UserError, match=rf"^unit={unit}: not proven .*a norm.*use unit=neuron$"):
            found.require(unit)
