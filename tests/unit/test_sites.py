"""Projections are found, checked, hooked and let go; models that cannot be done right are refused."""

from __future__ import annotations

import dataclasses
import logging
import re

import pytest
import torch
from examples import logits, n_hooks, two_examples
from families import VIT_ATTENTION
from torch import nn

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import NOT_SCORED, Batch
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import hooks, sites
from ablation_sweeps.neurons.hooks import ablated

SITES = ("attn_pre_out", "mlp_pre_out")
every_site = pytest.mark.parametrize("name", SITES)


def all_false(projections):
    return [torch.zeros(p.width, dtype=torch.bool) for p in projections]


def only(projections, layer, neurons):
    masks = all_false(projections)
    masks[layer][neurons] = True
    return masks


def zeros(projections):
    return [torch.zeros(p.width) for p in projections]


def bare(module: nn.Module, run=None) -> Transformer:
    """A transformer of any module that takes `x`."""

    def other_input(source: str, length: int, seed: int) -> Batch:
        x = torch.randn((1, 4, 8), generator=torch.Generator().manual_seed(seed))
        return Batch({"x": x}, torch.full((1, 4), NOT_SCORED), None, ("other",), (0,))

    run = run or (lambda b: module(b.inputs["x"]))
    module.eval()
    return Transformer("bare", "", "causal_lm", module, run, run, lambda *_: [], other_input, 2, frozenset())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.out_proj(x)


class Layer(nn.Module):
    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        for part in self.children():
            x = x + part(x)
        return x


def paths_to_paste(error: Exception) -> list[str]:
    """As a refusal proposes them, for a shell."""
    return re.findall(r"'model\.site_paths=\[([^',]+)\]'", str(error))


# What is found


def test_the_order_is_that_of_the_calls_not_of_the_definition(site):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(self_attn=Attention()) for _ in range(3)])

        def forward(self, x):
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    found = sites.find(bare(Backwards()), site("attn_pre_out"), None)
    assert [p.path for p in found] == [f"layers.{i}.self_attn.out_proj" for i in (2, 1, 0)]


# Paths given by the user


def test_given_paths_take_patterns(tiny, site):
    model = tiny("llama")
    every = sites.find(model, site("attn_pre_out"), ("model.layers.*.self_attn.o_proj",))
    assert every == sites.find(model, site("attn_pre_out"), None)
    one = sites.find(model, site("attn_pre_out"), ("model.layers.1.self_attn.o_proj",))
    assert [p.module for p in one] == [every[1].module] and one[0].layer == 1
    two = sites.find(model, site("attn_pre_out"), ("model.layers.2.self_attn.o_proj", "model.layers.[02].*.o_proj"))
    assert [p.module for p in two] == [every[0].module, every[2].module]


def test_each_given_path_matches_something(tiny, site):
    """One that matches nothing is refused by name, with what resembles it, though others match."""
    model, right = tiny("llama"), "model.layers.0.self_attn.o_proj"
    for wrong, near in (
        ("model.layers.1.self_atn.o_proj", "model.layers.1.self_attn.o_proj"),
        ("model.layer.*.self_attn.o_proj", "model.layers.*.self_attn.o_proj"),
    ):
        for given in ((right, wrong), (wrong, right)):
            with pytest.raises(UserError, match=re.escape(f"no module has the path {wrong}; near it: {near}")):
                sites.find(model, site("attn_pre_out"), given)


def test_layers_that_given_paths_leave_alone_are_named(tiny, site, caplog):
    model = tiny("llama")
    with caplog.at_level(logging.WARNING):
        sites.find(model, site("attn_pre_out"), ("model.layers.*.self_attn.o_proj",))
        assert not caplog.messages
        sites.find(model, site("attn_pre_out"), ("model.layers.1.self_attn.o_proj",))
    (said,) = caplog.messages
    assert said.endswith("are left alone: model.layers.0, model.layers.2")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sites.find(tiny("swin"), site("attn_pre_out"), (f"swin.encoder.layers.1.blocks.0.{VIT_ATTENTION}",))
    assert caplog.messages[0].endswith("are left alone: swin.encoder.layers.0, swin.encoder.layers.1.blocks.1")


def test_given_paths_of_a_module_without_a_positional_input_are_refused_in_one_line(tiny, site):
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn"):
        sites.find(tiny("llama"), site("attn_pre_out"), ("model.layers.*.self_attn",))
    assert n_hooks(tiny("llama").module) == 0


# What is refused


def test_a_projection_whose_weight_is_used_without_a_call_is_refused(site):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x, need_weights=False)[0]

    model = bare(nn.Sequential(Block(), Block()))
    with pytest.raises(UserError, match=r"0\.attn\.out_proj never fires"):
        sites.find(model, site("attn_pre_out"), None)
    assert n_hooks(model.module) == 0


def test_two_towers_are_refused_and_both_are_named(site):
    from transformers import BartConfig, BartModel

    config = BartConfig(vocab_size=50, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12)  # fmt: skip
    module = BartModel(config)
    model = bare(module, lambda b: module(inputs_embeds=b.inputs["x"], decoder_inputs_embeds=b.inputs["x"]))
    with pytest.raises(UserError, match=r"encoder\.layers\.\*.*decoder\.layers\.\*") as error:
        sites.find(model, site("attn_pre_out"), None)
    assert [len(sites.find(model, site("attn_pre_out"), (path,))) for path in paths_to_paste(error.value)] == [2, 2]


def test_a_model_without_such_projections_is_refused(site):
    with pytest.raises(UserError, match=r"no projection.*site_paths"):
        sites.find(bare(nn.Sequential(nn.Linear(8, 8))), site("attn_pre_out"), None)


def test_projections_called_unequally_often_are_refused(site):
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(self_attn=Attention()) for _ in range(2)])

        def forward(self, x):
            return self.layers[1](self.layers[0](self.layers[0](x)))

    with pytest.raises(UserError, match="more often"):
        sites.find(bare(Uneven()), site("attn_pre_out"), None)


def test_a_width_that_does_not_fit_the_heads_is_refused(site):
    model = dataclasses.replace(bare(nn.Sequential(Layer(attn=Attention()))), n_heads=3)
    with pytest.raises(UserError, match="3 heads"):
        sites.find(model, site("attn_pre_out"), None)


class Rearranged(nn.Module):
    """Two layers between which the examples are no longer outermost."""

    def __init__(self, there, back):
        super().__init__()
        self.layers = nn.ModuleList([Layer(self_attn=Attention()) for _ in range(2)])
        self.there, self.back = there, back

    def forward(self, x):
        return self.back(self.layers[1](self.there(self.layers[0](x))))


REARRANGE = {
    "positions outermost": (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)),
    "positions before examples, flattened": (lambda x: x.transpose(0, 1).flatten(0, 1), lambda x: x),
    # As an expert does, to which some positions of one example are sent (here 3) and others of another (here 1).
    "some of the positions": (lambda x: x[x[..., 3] > 0], lambda x: x),
}


@pytest.mark.parametrize("how", REARRANGE)
def test_a_module_whose_rows_are_not_grouped_by_example_is_refused(site, how):
    model = bare(Rearranged(*REARRANGE[how]))
    if how == "some of the positions":
        for parameter in model.module.parameters():
            nn.init.zeros_(parameter)  # what is chosen depends on the probe alone
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.out_proj are not grouped by example"):
        sites.find(model, site("attn_pre_out"), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_examples_outermost_are_accepted_flattened_and_windowed_and_constant(site, dtype):
    for there in (
        lambda x: x,
        lambda x: x.flatten(0, 1),
        lambda x: x.reshape(4, 2, 8),
        torch.zeros_like,
        torch.ones_like,
    ):
        module = Rearranged(there, lambda x: x).to(dtype)
        model = bare(module, lambda batch, module=module, dtype=dtype: module(batch.inputs["x"].to(dtype)))
        assert len(sites.find(model, site("attn_pre_out"), None)) == 2


# Hooks


def test_no_hook_is_left_behind_by_an_exception(tiny, site):
    model = tiny("llama")
    projections = sites.find(model, site("attn_pre_out"), None)
    with pytest.raises(KeyError), ablated(projections, all_false(projections), zeros(projections), 2):
        raise KeyError
    assert n_hooks(model.module) == 0

    def breaks(layer: int, x: torch.Tensor) -> None:
        if layer == 1:
            raise KeyError

    with pytest.raises(KeyError), hooks.hooked(projections, breaks):
        logits(model, two_examples(model))
    assert n_hooks(model.module) == 0

    def no_body(batch: Batch) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        sites.find(dataclasses.replace(model, body=no_body), site("attn_pre_out"), None)
    assert n_hooks(model.module) == 0


def test_hooks_that_never_fire_are_an_error(tiny, site):
    projections = sites.find(tiny("llama"), site("attn_pre_out"), None)
    with pytest.raises(AssertionError, match="never fired"), hooks.hooked(projections, lambda layer, x: None):
        pass
    with pytest.raises(AssertionError, match="every forward pass"), hooks.hooked(projections, lambda layer, x: None):
        projections[0].module(torch.zeros(1, 32))


# Which neuron is which: silence a head by its value weights, in a copy of the model


@every_site
@pytest.mark.parametrize("family", ["opt", "bert", "timm_vit", "gpt2"])
def test_all_neurons_zeroed_leave_the_bias_of_the_projection_alone(tiny, site, family, name):
    model = tiny(family)
    batch, projections = two_examples(model), sites.find(model, site(name), None)
    projection = projections[2].module
    outputs = []
    with ablated(projections, only(projections, 2, slice(None)), zeros(projections), 2):
        handle = projection.register_forward_hook(lambda module, args, output: outputs.append(output))
        logits(model, batch)
        handle.remove()
    torch.testing.assert_close(outputs[0], projection.bias.expand_as(outputs[0]), atol=0, rtol=0)


def test_one_call_of_a_shared_layer_is_ablated_not_all_of_them(tiny, site):
    model = tiny("albert")
    batch, projections = two_examples(model), sites.find(model, site("attn_pre_out"), None)
    seen: list[torch.Tensor] = []
    with ablated(projections, only(projections, 1, slice(0, 8)), zeros(projections), 2):
        handle = projections[0].module.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        logits(model, batch)
        handle.remove()
    assert [bool((x[..., :8] == 0).all()) for x in seen] == [False, True, False]
