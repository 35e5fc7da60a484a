"""Every family there is a row for in tests/families.py passes the same tests, at both sites."""

from __future__ import annotations

import dataclasses
import logging
import re

import pytest
import torch
from examples import logits, n_hooks, two_examples
from families import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import Batch
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import sites
from ablation_sweeps.neurons.hooks import Projection, ablated, hooked, reading
from ablation_sweeps.neurons.units import Unit

every_family = pytest.mark.parametrize("family", FAMILIES)
SITES = {"attn_pre_out": "attention", "mlp_pre_out": "mlp"}
BOTH = [(family, name) for family in FAMILIES for name in SITES if getattr(FAMILIES[family], SITES[name])]
family_and_site = pytest.mark.parametrize(("family", "name"), BOTH)
# The second site is another one only where a model calls a layer again, or gives it rows that it has flattened or cut
# into windows.
REARRANGED = ("albert", "opt", "swin", "timm_swin", "modernbert", "mpt", "gpt2")
hooked_family = pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, name in BOTH if name == "attn_pre_out" or family in REARRANGED]
)


def with_zeros(model: Transformer, projections: list[Projection], masks: list[Tensor], batch: Batch) -> Tensor:
    with ablated(projections, masks, [torch.zeros(p.width) for p in projections], len(batch.names)):
        return logits(model, batch)


def said_by_sites(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == sites.__name__]


# What is found


@family_and_site
def test_found_without_being_named(tiny, site, caplog, family, name):
    mine, model = FAMILIES[family], tiny(family)
    with caplog.at_level(logging.WARNING):
        found = sites.find(model, site(name), None)
    assert [(p.path, p.width) for p in found] == getattr(mine, SITES[name])
    assert all(p.module is model.module.get_submodule(p.path) for p in found)
    assert len(said_by_sites(caplog)) == mine.hybrid


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family].mlp is None])
def test_experts_that_are_no_modules_are_refused(tiny, site, family):
    with pytest.raises(UserError, match=r"no projection.*site_paths"):
        sites.find(tiny(family), site("mlp_pre_out"), None)


@every_family
def test_the_number_of_heads_is_that_of_the_queries(tiny, family):
    """Under grouped-query attention too; None where the layers differ, since there is no one number."""
    heads = set(FAMILIES[family].heads)
    assert tiny(family).n_heads == (heads.pop() if len(heads) == 1 else None)


def test_layers_with_linear_attention_are_left_alone_and_named(tiny, site, caplog):
    model = tiny("qwen3_next")
    with caplog.at_level(logging.WARNING):
        sites.find(model, site("attn_pre_out"), None)
    (said,) = said_by_sites(caplog)
    assert said.endswith(": model.layers.0, model.layers.2")
    assert isinstance(model.module.model.layers[0].linear_attn.out_proj, nn.Linear)


# Hooks


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, name in BOTH if family in REARRANGED])
def test_every_hook_fires_once_a_layer(tiny, site, family, name):
    model = tiny(family)
    projections, fired = sites.find(model, site(name), None), []
    with torch.inference_mode(), hooked(projections, lambda layer, x: fired.append((layer, x.shape[-1]))):
        model.logits(two_examples(model))
        model.body(two_examples(model))
    assert fired == 2 * [(layer, width) for layer, (_, width) in enumerate(getattr(FAMILIES[family], SITES[name]))]


@hooked_family
def test_hooks_that_change_nothing_leave_the_logits_bit_equal_and_no_hook_behind(tiny, site, family, name):
    model = tiny(family)
    batch, before = two_examples(model), n_hooks(model.module)
    clean = logits(model, batch)
    projections = sites.find(model, site(name), None)
    assert n_hooks(model.module) == before
    nothing = [torch.zeros(p.width, dtype=torch.bool) for p in projections]
    with ablated(projections, nothing, [torch.full((p.width,), torch.nan) for p in projections], 2):
        assert n_hooks(model.module) == before + len({p.module for p in projections})
        assert torch.equal(logits(model, batch), clean)
    assert n_hooks(model.module) == before
    assert torch.equal(logits(model, batch), clean)


@hooked_family
def test_rows_belong_to_their_examples(tiny, site, family, name):
    """Each example alone has the same rows as in a batch, where some models flatten, window or pad them."""
    model = tiny(family)
    batch, projections = two_examples(model), sites.find(model, site(name), None)
    with torch.inference_mode(), reading(projections, 2) as together:
        model.body(batch)
    for row in range(2):
        n = None if batch.keep is None else int(batch.keep[row].sum())
        inputs = {key: x[row : row + 1] if n is None else x[row : row + 1, :n] for key, x in batch.inputs.items()}
        alone = dataclasses.replace(batch, inputs=inputs, names=batch.names[row : row + 1])
        with torch.inference_mode(), reading(projections, 1) as single:
            model.body(alone)
        for x, y in zip(together, single, strict=True):
            assert len(x) == 2 and len(y) == 1
            torch.testing.assert_close(x[row, :n], y[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family].kind.endswith("_lm")])
def test_the_body_leaves_out_the_language_model_head(tiny, family):
    model, calls = tiny(family), []
    head = model.module.get_output_embeddings()
    handle = head.register_forward_hook(lambda *_: calls.append("head"))
    with torch.inference_mode():
        model.logits(two_examples(model))
        assert calls == ["head"]
        model.body(two_examples(model))
    handle.remove()
    assert calls == ["head"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family].kind != "backbone"])
def test_logits_of_some_positions_are_those_among_all(tiny, family):
    """In any order; the head, which has not seen the others, is left as it was."""
    model = tiny(family)
    batch, shown, hooks = two_examples(model), [], n_hooks(model.module)
    whole = logits(model, batch).flatten(0, -2)
    rows = torch.arange(1, len(whole), 3 if model.modality == "text" else 1).flip(0)
    with torch.inference_mode():
        if model.head is not None:
            handle = model.head.register_forward_hook(lambda _, args, __: shown.append(args[0].shape[:-1]))
            some = model.logits_at(batch, rows)
            handle.remove()
            assert shown == [(1, len(rows))]
        else:
            assert model.modality == "image"
            some = model.logits_at(batch, rows)
        assert model.logits_at(batch, rows[:0]).shape == (0, whole.shape[-1])
    torch.testing.assert_close(some, whole[rows], atol=1e-5, rtol=1e-5)
    assert n_hooks(model.module) == hooks and torch.equal(logits(model, batch).flatten(0, -2), whole)


# Which neuron is which


class SilencedHead(TorchFunctionMode):
    """The attention of one layer, however the model computes it, with one query head that gives zeros.

    It changes the attention's own tensors, `[batch, heads, queries, ...]`, before the model puts the heads side by
    side: the weights after the softmax, or the result where both products are one operation.
    """

    def __init__(self, layer: int, head: int):
        super().__init__()
        self.layer, self.head, self.shapes = layer, head, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        softmaxes = (F.softmax, torch.softmax, Tensor.softmax)
        if func in (F.scaled_dot_product_attention, *softmaxes) and out.ndim == 4:  # a router's softmax has two axes
            if len(self.shapes) == self.layer:
                out = out.index_fill(1, torch.tensor([self.head]), 0)
            self.shapes.append(out.shape)
        return out


def implementations(family: str) -> list[str | None]:
    """What the model chooses, and the plain one of some."""
    return [None, "eager"] if family in ("llama", "gpt2", "opt", "bert", "vit") else [None]


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, which) for family in FAMILIES if FAMILIES[family].heads_apart for which in implementations(family)],
)
def test_ablating_a_head_is_zeroing_its_output_inside_the_attention(tiny, fresh, site, family, implementation):
    model = fresh(family, attn_implementation=implementation) if implementation else tiny(family)
    batch, projections = two_examples(model), sites.find(model, site("attn_pre_out"), None)
    units, clean = Unit(name="head").partition(projections), logits(model, batch)
    assert [projection.n_heads for projection in projections] == list(FAMILIES[family].heads)
    layer = len(projections) // 2
    for head in range(FAMILIES[family].heads[layer]):
        with SilencedHead(layer, head) as silenced:
            expected = logits(model, batch)
        assert [shape[1] for shape in silenced.shapes] == list(FAMILIES[family].heads)
        unit = units.number(projections[layer].layer, head)
        found = with_zeros(model, projections, units.masks(torch.tensor([unit])), batch)
        assert torch.equal(found, expected)
        assert not torch.allclose(found, clean, atol=1e-4)


KV_HEADS = {"gpt_bigcode": 1, "falcon": 1, "falcon_grouped": 2, "llava": 2, "phi3": 2}  # of four query heads


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family].kind != "backbone"])
def test_key_value_heads_are_counted(tiny, site, family):
    mine = FAMILIES[family]
    found = {projection.n_kv_heads for projection in sites.find(tiny(family), site("attn_pre_out"), None)}
    options = mine.options.get("text_config", mine.options)
    expected = KV_HEADS.get(family, options.get("num_key_value_heads"))
    assert found == ({expected} if expected else {*mine.heads})


# Phi-3 has no value projection of its own: it is one with those of queries and keys.
grouped = [name for name, mine in FAMILIES.items() if "num_key_value_heads" in mine.options and name != "phi3"]


@pytest.mark.parametrize("family", grouped)
def test_a_group_is_the_query_heads_of_one_value_head(tiny, site, family):
    model = tiny(family)
    batch, projections = two_examples(model), sites.find(model, site("attn_pre_out"), None)
    values = model.module.get_submodule(projections[0].path.rpartition(".")[0]).v_proj
    d_head = projections[0].width // 4
    assert values.out_features == 2 * d_head
    units = Unit(name="kv_group").partition(projections)
    second = units.number(projections[0].layer, 1)
    found = with_zeros(model, projections, units.masks(torch.tensor([second])), batch)
    before = {name: value.clone() for name, value in values.state_dict().items()}
    for parameter in values.parameters():
        parameter.data[d_head:] = 0
    expected = logits(model, batch)
    values.load_state_dict(before)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# What looks like a projection, or hides one


def read(model: Transformer, projections: list[Projection], batch: Batch) -> list[Tensor]:
    with torch.inference_mode(), reading(projections, 2) as seen:
        model.body(batch)
    return seen


def test_a_norm_between_heads_and_projection_mixes_the_heads(tiny, site):
    """The site is the input of the projection and says no more: here its neurons are not those of one head."""
    model = tiny("timm_eva_norm")
    batch, projections = two_examples(model), sites.find(model, site("attn_pre_out"), None)
    clean = read(model, projections, batch)[0]
    with SilencedHead(0, head=1):
        silenced = read(model, projections, batch)[0]
    assert not torch.allclose(silenced[..., :8], clean[..., :8], atol=1e-3)
    assert silenced[..., 8:16].abs().min() > 0


def test_a_gate_between_heads_and_projection_has_acted_at_the_site(tiny, site):
    model = tiny("qwen3_next")
    batch, projections = two_examples(model), sites.find(model, site("attn_pre_out"), None)
    attention, gates, heads = model.module.model.layers[1].self_attn, [], []
    handle = attention.q_proj.register_forward_hook(lambda module, args, out: gates.append(out))

    class Heads(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            heads.extend([out] if func is F.scaled_dot_product_attention else [])
            return out

    with Heads():
        found = read(model, projections, batch)[0]
    handle.remove()
    gate = gates[0].unflatten(-1, (4, 2, 16))[..., 1, :].flatten(2)
    torch.testing.assert_close(found, heads[0].transpose(1, 2).flatten(2) * gate.sigmoid())
    assert not torch.allclose(found, heads[0].transpose(1, 2).flatten(2), atol=1e-3)


def given(module: nn.Module, **inputs: Tensor) -> Transformer:
    """A transformer around any module, which takes these inputs and another one like them."""
    inputs = inputs or {"x": torch.zeros(1, 3, 16, 16)}

    def other_input(source: str, length: int, seed: int) -> Batch:
        return Batch({key: x.roll(seed, -1) for key, x in inputs.items()}, torch.zeros(1), None, ("other",), (0,))

    run_it = lambda batch: module(**batch.inputs)  # noqa: E731
    module.eval()
    return Transformer("given", "", "causal_lm", module, run_it, run_it, lambda *_: [], other_input, 4, frozenset())


IDS = torch.arange(8)[None] + 5
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


@pytest.mark.parametrize("paths", [None, ("encoder.layers.*.self_attention.out_proj",)])
def test_torchvisions_vit_uses_its_projection_without_calling_it(site, paths):
    from torchvision.models import VisionTransformer

    model = given(VisionTransformer(16, 8, 2, 4, 32, 48, num_classes=5), x=PIXELS)
    with pytest.raises(UserError, match="never fires" if paths else "no projection"):
        sites.find(model, site("attn_pre_out"), paths)
    assert n_hooks(model.module) == 0


def test_torchvisions_mlp_is_there_for_who_names_it(site):
    from torchvision.models import VisionTransformer

    model = given(VisionTransformer(16, 8, 2, 4, 32, 48, num_classes=5), x=PIXELS)
    found = sites.find(model, site("mlp_pre_out"), ("encoder.layers.*.mlp.3",))
    assert [(p.path, p.width) for p in found] == [(f"encoder.layers.encoder_layer_{i}.mlp.3", 48) for i in (0, 1)]


def test_of_two_towers_the_user_names_one(site):
    """CLIP's text tower has projections of the same name, and this model calls both."""
    from transformers import CLIPConfig, CLIPModel

    options = FAMILIES["clip"].options
    config = CLIPConfig(vision_config=options["vision_config"], text_config=options["text_config"])
    model = given(CLIPModel(config), input_ids=IDS, pixel_values=PIXELS)
    with pytest.raises(UserError, match=r"text_model\.encoder\.layers\.\*.*vision_model\.encoder\.layers\.\*"):
        sites.find(model, site("attn_pre_out"), None)
    for tower in ("text", "vision"):
        found = sites.find(model, site("attn_pre_out"), (f"{tower}_model.encoder.layers.*.self_attn.out_proj",))
        assert [p.path for p in found] == [f"{tower}_model.encoder.layers.{i}.self_attn.out_proj" for i in range(3)]


def test_a_pooling_heads_attention_is_no_layer(site):
    """SigLIP pools with an attention of its own, whose projection has the very name of the layers' projections."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = given(
        SiglipVisionModel(SiglipVisionConfig(**FAMILIES["siglip"].options["vision_config"])), pixel_values=PIXELS
    )
    poolers = [path for path, _ in model.module.named_modules() if path.endswith("head.attention.out_proj")]
    found = sites.find(model, site("attn_pre_out"), None)
    assert len(poolers) == 1 and len(found) == 3
    assert all(p.path.endswith(f"encoder.layers.{i}.self_attn.out_proj") for i, p in enumerate(found))


def test_a_classifiers_dense_layer_is_no_layer(site):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    module = RobertaForSequenceClassification(RobertaConfig(**FAMILIES["roberta"].options))
    assert isinstance(module.classifier.dense, nn.Linear)
    for name, inside in (("attn_pre_out", "attention.output.dense"), ("mlp_pre_out", "output.dense")):
        found = sites.find(given(module, input_ids=IDS), site(name), None)
        assert [p.path for p in found] == [f"roberta.encoder.layer.{i}.{inside}" for i in range(3)]


SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "n_mamba_heads": 8}
SHORT = {
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "num_key_value_heads": 2,
}
# Layouts that the search by structure does not know, and the paths that a refusal proposes at each site, to be pasted.
UNFORESEEN = {
    "CTRLLMHeadModel": (
        {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 64},
        [("transformer.h.*.multi_head_attention.dense", 2, 32)], ("transformer.h.*.ffn.2", 2, 48)),
    "Zamba2ForCausalLM": (
        {**SMALL, **MAMBA, "hybrid_layer_ids": [1], "num_mem_blocks": 1,
         "layers_block_type": ["mamba", "hybrid", "mamba"]},
        [("model.layers.*.shared_transformer.self_attn.o_proj", 1, 64)],
        ("model.layers.*.shared_transformer.feed_forward.down_proj", 1, 48)),
    "NemotronHForCausalLM": (
        {**SMALL, **SHORT, "layers_block_type": ["mamba", "attention", "mlp"]},
        [("model.layers.*.mixer.o_proj", 1, 32)], ("model.layers.*.mixer.down_proj", 1, 48)),
    "RecurrentGemmaForCausalLM": (
        {**SMALL, "num_key_value_heads": 1, "lru_width": 32, "block_types": ["recurrent", "attention"]},
        [("model.layers.*.temporal_block.o_proj", 1, 32)], ("model.layers.*.mlp_block.down_proj", 3, 24)),
    "MiniMaxForCausalLM": (
        {**SMALL, "num_key_value_heads": 2, "num_local_experts": 2, "block_size": 8,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        [("model.layers.*.self_attn.out_proj", 2, 32), ("model.layers.*.self_attn.o_proj", 1, 32)], None),
}  # fmt: skip


def of_class(name: str, options: dict) -> Transformer:
    import transformers

    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    module_class = getattr(transformers, name)
    torch.manual_seed(0)
    return given(module_class(module_class.config_class(**options)), input_ids=IDS)


@pytest.mark.parametrize("name", UNFORESEEN)
def test_a_family_that_nobody_foresaw_is_refused_with_its_own_paths(site, name):
    options, attention, mlp = UNFORESEEN[name]
    model = of_class(name, options)
    for where, expected in (("attn_pre_out", attention), ("mlp_pre_out", [mlp] if mlp else [])):
        if not expected:
            continue
        with pytest.raises(UserError, match=r"no projection.*site_paths|has several.*site_paths") as error:
            sites.find(model, site(where), None)
        assert "\n" not in str(error.value)
        proposed = re.findall(r"'model\.site_paths=\[([^']+)\]'", str(error.value))
        assert [path for path, _, _ in expected] == proposed[: len(expected)]
        for path, n, width in expected:
            assert [p.width for p in sites.find(model, site(where), (path,))] == [width] * n


def test_a_model_without_attention_is_refused_with_the_reason(site):
    model = of_class("MambaForCausalLM", {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8})
    with pytest.raises(UserError, match=r"site=attn_pre_out: MambaForCausalLM has no attention.*use a model that has"):
        sites.find(model, site("attn_pre_out"), None)
    assert len(sites.find(model, site("attn_pre_out"), ("backbone.layers.*.mixer.out_proj",))) == 2
