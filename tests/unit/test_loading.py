"""How a model is loaded: precision, devices, formats; and what is refused in one line."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONTEXT
from PIL.Image import fromarray
from safetensors.torch import load_file, save_file

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import Document, pad_and_stack
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.datasets.digits import Digits
from ablation_sweeps.experiment import chance as chance_module
from ablation_sweeps.experiment.evaluate import evaluate
from ablation_sweeps.experiment.session import Session
from ablation_sweeps.methods.method import Constant
from ablation_sweeps.methods.resample import AnotherExample
from ablation_sweeps.models import causal_lm, pretrained
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import sites
from ablation_sweeps.neurons.collect import collect
from ablation_sweeps.neurons.hooks import ablated, reading
from ablation_sweeps.neurons.schedule import Point
from ablation_sweeps.neurons.statistics import Histogram

TEXTS = [Document("a", "The quick brown fox"), Document("b", "jumps over"), Document("c", "the lazy dog")]
has_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture
def option(job_of):
    """`option("model=gpt2", "model.dtype=auto")`: as conf/ gives it."""
    return lambda *overrides: job_of(*overrides).model


def batch_of(model: Transformer):
    (batch,) = model.encode(TEXTS, "calibration", Budget(None, None), 1000, 0)
    return batch.to(model.device)


def logits(model: Transformer) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(batch_of(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_have_the_precision_that_was_asked_for(fresh, tiny, dtype):
    for family in ("llama", "bert", "vit", "timm_vit"):
        model = fresh(family, dtype=dtype)
        assert {p.dtype for p in model.module.parameters()} == {getattr(torch, dtype)}
    torch.testing.assert_close(
        logits(fresh("llama", dtype="bfloat16")).float(), logits(tiny("llama")), atol=0.3, rtol=0.1
    )


def test_auto_is_the_precision_of_the_file(fresh, saved, tmp_path):
    assert fresh("llama", dtype="auto").module.dtype is torch.float32
    half = tmp_path / "half"
    shutil.copytree(saved("llama"), half)
    fresh("llama").module.to(torch.bfloat16).save_pretrained(half)
    assert fresh("llama", path=str(half), dtype="auto").module.dtype is torch.bfloat16
    assert fresh("llama", path=str(half)).module.dtype is torch.float32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_is_the_one_asked_for(fresh, tiny, attention):
    model = fresh("llama", attn_implementation=attention)
    assert model.module.config._attn_implementation == attention
    torch.testing.assert_close(logits(model), logits(tiny("llama")), atol=1e-4, rtol=1e-4)


# Spread over devices


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_device_map_is_followed(fresh, tiny, device_map):
    model = fresh("llama", device_map=device_map)
    if not torch.cuda.is_available():
        assert model.device == torch.device("cpu")
    torch.testing.assert_close(logits(model).cpu(), logits(tiny("llama")), atol=1e-4, rtol=1e-4)


def test_weights_that_wait_on_disk_change_nothing(fresh, tiny, site, tmp_path):
    """The nearest to several devices that one CPU can do: layers' weights are `meta` until they are called."""
    from accelerate import cpu_offload

    spread, plain = fresh("llama"), tiny("llama")
    cpu_offload(spread.module, torch.device("cpu"))
    assert {p.device.type for p in spread.module.parameters()} == {"meta"}
    results = []
    for number, model in enumerate((spread, plain)):
        projections = sites.find(model, site("attn_pre_out"), None)
        statistics = collect(model, projections, [batch_of(model)], tmp_path / str(number), Histogram(10))
        values = [m.mean for m in statistics.moments]
        masks = [torch.arange(p.width) % 2 == 0 for p in projections]
        with ablated(projections, masks, values, len(TEXTS)):
            damaged = logits(model)
        results.append([*values, *statistics.counts[Histogram(10)], logits(model), damaged])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# Quantised weights


@has_bitsandbytes
@pytest.mark.parametrize(("bits", "close"), [("8bit", 0.05), ("4bit", 0.3)])
def test_quantised_weights_are_near_the_whole_ones_and_can_be_ablated(fresh, saved, site, tmp_path, bits, close):
    import bitsandbytes
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(saved("llama"), tmp_path / "wide")
    config = LlamaConfig.from_pretrained(
        tmp_path / "wide", hidden_size=128, head_dim=32, intermediate_size=128
    )  # blocks of 64
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    model, whole = (fresh("llama", path=str(tmp_path / "wide"), quantize=q) for q in (bits, None))
    projections = sites.find(model, site("attn_pre_out"), None)
    kind = bitsandbytes.nn.Linear8bitLt if bits == "8bit" else bitsandbytes.nn.Linear4bit
    assert [type(p.module) for p in projections] == [kind] * 3 and [p.width for p in projections] == [128] * 3
    clean, whole = logits(model).float().cpu(), logits(whole).cpu()
    assert not torch.equal(clean, whole) and (clean - whole).abs().mean() < close * whole.std()
    everything = [torch.ones(p.width, dtype=torch.bool) for p in projections]
    with ablated(projections, everything, [torch.zeros(p.width) for p in projections], len(TEXTS)):
        assert not torch.allclose(logits(model).float().cpu(), clean, atol=1e-3)


def test_quantising_without_the_library_says_how_to_get_it(option, monkeypatch):
    model = option("model=gpt2", "model.quantize=4bit")
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.quantize=4bit: needs bitsandbytes; install it"):
        model.check("text")


# Formats


def test_torchs_own_format_is_read_where_it_is_allowed(fresh, tiny, saved, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(saved("llama"), old)
    (old / "model.safetensors").unlink()
    torch.save(tiny("llama").module.state_dict(), old / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        fresh("llama", path=str(old))
    assert torch.equal(logits(fresh("llama", path=str(old), use_safetensors=None)), logits(tiny("llama")))


# What is missing


@pytest.mark.parametrize("model", ["gpt2", "vit_small_timm"])
def test_offline_and_missing_says_which_and_how(option, model, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"^model\.name=\S+: cannot be loaded: .*prefetch=true.*model\.path=") as error:
        option(f"model={model}").load()
    assert "\n" not in str(error.value)


def test_prefetch_gets_the_files_that_loading_needs_and_no_others(option, monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
             "tf_model.h5", "flax_model.msgpack", "tokenizer.model", "merges.txt", "chat_template.jinja", "modeling.py",
             "onnx/model.onnx", "onnx/config.json", "README.md"]  # fmt: skip
    asked = []

    def snapshot_download(repo, revision, allow_patterns, ignore_patterns):
        found = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        asked.append((repo, revision, set(found)))
        return tmp_path

    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    option("model=gpt2", "model.revision=v1").prefetch()
    option("model=opt_125m").prefetch()
    option("model=vit_small_timm", "model.trust_remote_code=true").prefetch()
    option("model=tiny_causal").prefetch()
    needed = {"config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
              "merges.txt", "chat_template.jinja"}  # fmt: skip
    assert asked == [
        ("openai-community/gpt2", "v1", needed),
        ("facebook/opt-125m", "main", needed | {"pytorch_model.bin"}),
        ("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "main", needed | {"modeling.py"}),
    ]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        UserError,
        match=r"model\.name=openai-community/gpt2: has no weights in safetensors format; .*use_safetensors=null",
    ):
        option("model=gpt2").prefetch()


def test_all_of_a_model_is_of_the_commit_in_its_signature(option, monkeypatch):
    """A branch may move between the submission of a sweep and its last job."""
    import timm
    import transformers

    asked = []

    def from_pretrained(*arguments, **options):
        asked.append(options["revision"])
        raise OSError("not here")

    monkeypatch.setattr(pretrained, "commit", lambda *arguments: "f" * 40)
    for part in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig", "AutoImageProcessor"):
        monkeypatch.setattr(getattr(transformers, part), "from_pretrained", from_pretrained)
    monkeypatch.setattr(timm, "create_model", lambda name, **options: from_pretrained(revision=name.split("@")[1]))
    gpt2, vit = option("model=gpt2", "model.revision=v1"), option("model=vit_base_patch16_224")
    assert gpt2.identity()["files"] == "f" * 40 and gpt2.identity() == option("model=gpt2").identity()
    for load in (
        lambda: pretrained.load_tokenizer(gpt2),
        lambda: pretrained.context_length(gpt2),
        lambda: gpt2.from_pretrained(transformers.AutoModelForCausalLM),
        vit.load,
        option("model=vit_small_timm").load,
    ):
        with pytest.raises(UserError, match="cannot be loaded: not here"):
            load()
    assert asked == ["f" * 40] * 5


def test_a_model_that_cannot_be_fetched_is_named(option, monkeypatch):
    import huggingface_hub

    def gated(*arguments, **options):
        raise OSError("403\nAccess is restricted")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(
        UserError, match=r"model\.name=google/gemma-2b: cannot be downloaded: 403 Access.*hf auth login"
    ):
        option("model=gemma_2b").prefetch()


def test_feed_forward_in_chunks_is_refused(option, saved, tmp_path):
    """A projection is then called more often than there are layers."""
    shutil.copytree(saved("bert"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"chunk_size_feed_forward": 8}))
    with pytest.raises(UserError, match=r"chunk_size_feed_forward\), so that calls and layers are not told apart"):
        option("model=masked_lm", f"model.path={tmp_path}").load()


def test_shares_of_what_is_replaced_fit(option):
    with pytest.raises(UserError, match=r"must not be more than 1 together"):
        option("model=tiny_masked", "model.replaced_by_mask=0.8", "model.replaced_at_random=0.5")


def test_an_encoder_that_sees_padding_is_shown_none(option, saved, sees_padding, caplog):
    caplog.set_level("INFO")
    plain = option("model=masked_lm", f"model.path={saved('bert')}").load()
    assert "runs separately" not in caplog.text and not plain.encode.apart
    model = option("model=masked_lm", f"model.path={sees_padding}").load()
    assert "each length runs separately" in caplog.text and model.encode.apart and model.texts == ("apart",)
    assert option("model=masked_lm", f"model.path={sees_padding}", "model.max_tokens=6").load().encode.apart


def test_an_encoder_is_no_causal_model(option, saved):
    with pytest.raises(UserError, match=r"its logits depend on later tokens.*model=masked_lm"):
        option("model=causal_lm", f"model.path={saved('bert')}").load()


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_an_encoder_decoder_without_such_a_head_is_refused(option, saved, tmp_path, kind):
    from transformers import T5Config, T5ForConditionalGeneration

    shutil.copytree(saved("bert"), tmp_path, dirs_exist_ok=True)
    T5ForConditionalGeneration(T5Config(vocab_size=100, d_model=8, num_layers=1, num_heads=2, d_kv=4, d_ff=8)
                               ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(UserError, match=r"model\.path=.*T5Config is an encoder-decoder.*model=masked_lm"):
        option(f"model={kind}", f"model.path={tmp_path}").load()


def test_attention_that_becomes_another_one_is_refused(option, saved, tmp_path):
    from transformers import BigBirdConfig, BigBirdForMaskedLM

    shutil.copytree(saved("bert"), tmp_path, dirs_exist_ok=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    for kind in ("block_sparse", "original_full"):
        config = BigBirdConfig(vocab_size=100, **sizes, attention_type=kind)
        BigBirdForMaskedLM(config).save_pretrained(tmp_path)
        model = option("model=masked_lm", f"model.path={tmp_path}")
        if kind == "original_full":
            assert torch.isfinite(logits(model.load())).all()
            break
        with pytest.raises(UserError, match=r"model\.path=.*block-sparse attention.*\"original_full\" in its config"):
            model.load()


def test_a_folder_of_timm_says_how_pictures_are_shown(option, tmp_path):
    """Where model.name gives the architecture as well."""
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "model.safetensors")
    white = fromarray(np.full((16, 16, 3), 255, np.uint8))
    for own in ({}, {"mean": [0.1, 0.2, 0.3], "std": [0.7, 0.7, 0.7]}):
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": own}))
        model = option("model=timm", f"model.path={tmp_path}", "model.name=test_vit").load()
        mean, std = own.get("mean", [0.5] * 3), own.get("std", [0.5] * 3)
        expected = (1 - np.array(mean)) / np.array(std)
        np.testing.assert_allclose(model.encode.transform(white)[:, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(("pack", "ends"), [("documents", False), ("concatenate", True)])
def test_the_end_of_a_text_is_guessed_where_it_is_scored(job_of, pack, ends):
    some = ["statistics.tokens=2000", "eval.tokens=2000", "model.max_tokens=64"]
    made = job_of("model=tiny_causal", "dataset=python_docs", f"model.pack={pack}", *some)
    session = Session()
    model = session.model(made)
    evaluation, calibration = (session.batches(made, split) for split in ("evaluation", "calibration"))
    end = model.encode.tokenizer.eos_token_id
    ids = torch.cat([batch.inputs["input_ids"][batch.keep] for batch in calibration])
    counted = torch.isin(ids, torch.tensor(sorted(model.special_ids - ({end} if ends else set()))), invert=True)
    probability = chance_module.chance_model(made, model, evaluation, calibration).probability
    assert (probability[end] * (counted.sum() + len(probability))).round() == 1 + ends * (ids == end).sum() > ends


def test_a_model_of_several_feature_maps_is_refused(option, tmp_path):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("crossvit_tiny_240").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"gives several feature maps"):
        option("model=timm", f"model.path={tmp_path}", "model.name=crossvit_tiny_240").load()


def test_classes_in_another_order_than_the_models_are_refused(job_of, tiny):
    digits = job_of("model=tiny_vit", "dataset=digits")

    def chance(*names: str) -> None:
        class Mine(Digits):
            def class_names(self) -> list[str]:
                return list(names)

        chance_module.chance_model(dataclasses.replace(digits, dataset=Mine(label="mine")), model, [], [])

    model = dataclasses.replace(tiny("vit"), class_names=("ant", "bee", "cat", "dog", "eel"))
    chance("ant", "bee", "cat", "dog", "eel")
    chance("1", "2", "3", "4", "5")  # other names for them, it seems
    chance("Ant", "bee", "cat", "dogs", "eel")
    with pytest.raises(UserError, match=r"dataset=mine: its class 0 is bee, but the model's is ant.*dataset\.classes"):
        chance("bee", "Ant", "cat", "dog", "eel")


# What is loaded, and what is left out


@pytest.fixture
def with_adapter(saved, tmp_path):
    """A folder with an adapter on the queries and the output projection of the Llama, far from doing nothing."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    module = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved("llama")), config).eval()
    module.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", module


def test_an_adapter_is_merged_and_part_of_the_identity(option, saved, with_adapter, site, tiny):
    folder, adapted = with_adapter
    plain = option("model=causal_lm", f"model.path={saved('llama')}")
    asked = option("model=causal_lm", f"model.path={saved('llama')}", f"model.adapter={folder}")
    asked.check("text")
    model = asked.load()
    with torch.inference_mode():
        expected = adapted(**batch_of(model).inputs).logits
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model), logits(tiny("llama")), atol=1e-2)
    assert sites.find(model, site("attn_pre_out"), None)[1].path == "model.layers.1.self_attn.o_proj"
    assert "adapter" not in plain.identity()
    assert {key: value for key, value in asked.identity().items() if key != "adapter"} == plain.identity()
    before = asked.identity()["adapter"]
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: 2 * x for key, x in tensors.items()}, folder / "adapter_model.safetensors")
    assert asked.identity()["adapter"] != before


def test_an_adapter_beside_the_weights_is_left_out_and_that_is_said(
    option, saved, with_adapter, tmp_path, tiny, caplog
):
    folder, _ = with_adapter
    shutil.copytree(saved("llama"), tmp_path / "both")
    shutil.copytree(folder, tmp_path / "both", dirs_exist_ok=True)
    model = option("model=causal_lm", f"model.path={tmp_path / 'both'}").load()
    assert torch.equal(logits(model), logits(tiny("llama")))
    assert model.left_out == (f"model.path={tmp_path / 'both'}: the adapter beside its weights is left out; "
                              f"model.adapter={tmp_path / 'both'} applies it",)  # fmt: skip
    assert model.left_out[0] in caplog.messages
    same = option("model=causal_lm", f"model.path={tmp_path / 'both'}", f"model.adapter={tmp_path / 'both'}").load()
    assert not same.left_out and not torch.allclose(logits(same), logits(model), atol=1e-2)


def test_an_adapter_of_the_hub_beside_the_weights_is_left_out_and_that_is_said(
    option, saved, with_adapter, tmp_path, tiny, caplog, monkeypatch
):
    import huggingface_hub

    snapshot = tmp_path / "hub" / "models--me--both" / "snapshots" / ("f" * 40)
    shutil.copytree(saved("llama"), snapshot)
    shutil.copytree(with_adapter[0], snapshot, dirs_exist_ok=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = option("model=gpt2", "model.name=me/both", f"model.revision={'f' * 40}").load()
    assert torch.equal(logits(model), logits(tiny("llama")))
    said = "model.name=me/both: the adapter beside its weights is left out; model.adapter=me/both applies it"
    assert model.left_out == (said,) and said in caplog.messages


def test_an_adapter_that_does_not_fit_is_refused(option, saved, with_adapter, tmp_path, monkeypatch):
    folder, _ = with_adapter
    given = ["model=causal_lm", f"model.path={saved('gpt2')}", f"model.adapter={folder}"]
    with pytest.raises(UserError, match=rf"^model\.adapter={folder}: cannot be loaded: .*") as error:
        option(*given).load()
    assert "\n" not in str(error.value)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(sorted(tensors.items())[2:]), folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"^model\.adapter=.*has no weights for .*trained on this model"):
        option("model=causal_lm", f"model.path={saved('llama')}", f"model.adapter={folder}").load()
    with pytest.raises(UserError, match=r"model\.path=.*holds an adapter alone.*model\.adapter="):
        option("model=causal_lm", f"model.path={folder}").check("text")
    with pytest.raises(UserError, match=r"model\.adapter=\./nowhere: there is no such folder"):
        option("model=causal_lm", f"model.path={saved('llama')}", "model.adapter=./nowhere").check("text")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs peft; install it: pip install peft"):
        option("model=causal_lm", f"model.path={saved('llama')}", f"model.adapter={folder}").check("text")


def test_weights_that_are_not_used_are_said(option, saved, tmp_path, caplog):
    """Such as a layer that the configuration does not count."""
    shutil.copytree(saved("llama"), tmp_path / "deeper")
    tensors = load_file(tmp_path / "deeper" / "model.safetensors")
    more = {key.replace("layers.2", "layers.3"): x.clone() for key, x in tensors.items() if "layers.2" in key}
    save_file({**tensors, **more}, tmp_path / "deeper" / "model.safetensors", metadata={"format": "pt"})
    save_file(more, tmp_path / "deeper" / "consolidated.safetensors")
    model = option("model=causal_lm", f"model.path={tmp_path / 'deeper'}").load()
    unused, file = model.left_out
    assert f"{len(more)} of its weights are left out, since LlamaForCausalLM has no such: model.layers.*." in unused
    assert file.endswith("so these are left out: consolidated.safetensors")
    assert [unused, file] == [said for said in caplog.messages if "left out" in said]
    caplog.clear()
    assert not option("model=causal_lm", f"model.path={saved('llama')}").load().left_out


def test_a_classifier_of_timm_that_would_be_random_is_refused(option, saved, tmp_path):
    shutil.copytree(saved("timm_vit"), tmp_path / "vit")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    config["model_args"] = {**config["model_args"], "num_classes": 7}
    config["pretrained_cfg"]["classifier"] = "head"
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.path=.*its classifier head\.weight would be random"):
        option("model=timm", f"model.path={tmp_path / 'vit'}").load()


# What a text scores is what it scores alone


ROPE = {
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
                 "factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}  # fmt: skip


@pytest.fixture
def with_rope(saved, tmp_path):
    """A Llama whose position scheme follows the longest text of a batch, and in one case remembers it."""

    def make(kind: str) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        shutil.copytree(saved("llama"), tmp_path / kind)
        sizes = LlamaConfig.from_pretrained(saved("llama")).to_dict()
        sizes.pop("rope_parameters", None)
        given = {"rope_parameters" if "rope_scaling" not in sizes else "rope_scaling": ROPE[kind]}
        if kind == "dynamic":
            sizes["max_position_embeddings"] = 16  # beyond which it stretches
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**{**sizes, **given, "initializer_range": 0.4})).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind", ROPE)
def test_a_text_scores_what_it_scores_alone(option, with_rope, site, tmp_path, monkeypatch, kind):
    """Whatever is passed beside it or before, in evaluation as in calibration; for resampling, too."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(causal_lm, "context_length", lambda _: 64)
    model = option("model=causal_lm", f"model.path={with_rope(kind)}").load()
    assert model.texts == ("state restored", "apart")
    texts = [Document(str(n), "abcdefgh"[n % 5 :] * 9) for n in range(4)]
    texts = [Document(d.name, d.text[: 6 + 17 * i]) for i, d in enumerate(texts)]
    (batch,) = model.encode(texts, "evaluation", Budget(None, None), 10_000, 0)
    plain = AutoModelForCausalLM.from_pretrained(model.module.name_or_path).eval()  # type: ignore
    projections = sites.find(model, site("attn_pre_out"), None)
    everything = {Point(1.0): [torch.ones(p.width, dtype=torch.bool) for p in projections]}
    for method in (Constant([torch.zeros(p.width) for p in projections]), AnotherExample()):
        for _ in range(2):  # a second time, after the longest
            found = evaluate(model, projections, [batch], everything, method, torch.empty(0, dtype=torch.long), 5, [],
                             lambda *_: None)  # fmt: skip
            clean = found[found["fraction"] == 0].set_index("name")
            for row, name in enumerate(batch.names):
                n = int(batch.inputs["attention_mask"][row].sum())
                ids = batch.inputs["input_ids"][row : row + 1, :n]
                fresh = copy.deepcopy(plain)
                with torch.inference_mode():
                    z = fresh(input_ids=ids, use_cache=False).logits[0]
                expected = torch.nn.functional.cross_entropy(z[:-1], ids[0, 1:], reduction="sum").item()
                assert abs(clean.loc[name, "loss"] - expected) < 1e-3
    seen = []
    for row in range(len(batch.names)):
        n = int(batch.inputs["attention_mask"][row].sum())
        fresh = dataclasses.replace(model, module=copy.deepcopy(plain))
        own = [dataclasses.replace(p, module=fresh.module.get_submodule(p.path)) for p in projections]
        with torch.inference_mode(), reading(own, 1) as activations:
            fresh.module.model(batch.inputs["input_ids"][row : row + 1, :n], use_cache=False)
        seen.append([x[0] for x in activations])
    (calibration,) = model.encode(texts, "calibration", Budget(None, None), 10_000, 0)
    statistics = collect(model, projections, [calibration], tmp_path / "cache")
    for layer, moments in enumerate(statistics.moments):
        expected = torch.cat([layers[layer] for layers in seen]).double().mean(0)
        torch.testing.assert_close(moments.mean, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("rope", "max_tokens", "otherwise"),
    [
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 16}, 64, True),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 16}, 16, False),
        (
            {"text_config": {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 16}}},
            64,
            True,
        ),
        ({"rope_parameters": {"full": {"rope_type": "dynamic", "original_max_position_embeddings": 16}}}, 64, True),
        ({"rope_scaling": {"rope_type": "dynamic"}}, 64, False),  # it has no more positions
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16}}, 64, False),
    ],
)
def test_earlier_results_of_such_models_are_not_taken_for_new_ones(option, saved, tmp_path, rope, max_tokens,
                                                                   otherwise):  # fmt: skip
    shutil.copytree(saved("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64, **rope}))
    identity = option(
        "model=causal_lm", f"model.path={tmp_path / 'model'}", f"model.max_tokens={max_tokens}"
    ).identity()
    assert identity.get("texts") == ("apart" if otherwise else None)


def test_results_with_an_adapter_that_was_applied_are_not_taken_for_those_without(
    option, saved, with_adapter, tmp_path
):
    """The content of a folder counts, but a run of before may have had the adapter as well."""
    shutil.copytree(saved("llama"), tmp_path / "both")
    shutil.copytree(with_adapter[0], tmp_path / "both", dirs_exist_ok=True)
    assert option("model=causal_lm", f"model.path={tmp_path / 'both'}").identity()["adapter"] == "left out"


def test_unaffected_models_are_passed_as_ever(tiny):
    for family in ("llama", "gpt2", "opt", "bert", "roberta", "gemma2", "bloom"):
        assert not tiny(family).encode.apart and not tiny(family).texts


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_scheme_that_few_tokens_hardly_show_is_found_in_any_precision(option, saved, tmp_path, monkeypatch, dtype):
    """As that of Phi-3: of neighbours it tells the same, whatever the length of the longest text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(saved("llama"), tmp_path / "longrope")
    sizes = LlamaConfig.from_pretrained(saved("llama")).to_dict()
    sizes |= {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    sizes.pop("rope_parameters", None)
    name = "rope_parameters" if "rope_scaling" not in sizes else "rope_scaling"
    short, long = [1.05 + 0.07 * k for k in range(16)], [1.03, 1.05, 1.2, 1.5, 2.9, 5.5, 12, 16, 22, *[50.0] * 7]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long, "factor": 4.0,
            "original_max_position_embeddings": 150}  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(**{**sizes, name: rope, "max_position_embeddings": 600, "initializer_range": 0.2})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "longrope")
    monkeypatch.setattr(causal_lm, "context_length", lambda _: 220)
    given = ["model=causal_lm", f"model.path={tmp_path / 'longrope'}", f"model.dtype={dtype}"]
    model = option(*given).load()
    text, longer = (model.other_input("probe", n, n) for n in (140, 220))
    with torch.inference_mode():
        alone, beside = (model.logits(pad_and_stack(*given))[0, :140].double().log_softmax(-1)
                         for given in ((text,), (text, longer)))  # fmt: skip
    assert (alone - beside).abs().mean() > 0.05, "it does matter"
    assert model.encode.apart
    assert not option(*given, "model.max_tokens=150").load().encode.apart


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "bfloat16"), ("gpt_oss", "bfloat16"), ("opt", "float16"), ("bert", "float16")],
)
def test_rounding_is_not_taken_for_what_other_texts_do(fresh, family, dtype):
    assert not fresh(family, dtype=dtype).encode.apart


def test_a_model_that_gives_other_logits_each_time_is_refused(option, saved, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_, **__: x + 0.3 * torch.randn_like(x))
    with pytest.raises(UserError, match=r"model\.path=.*gives different logits when the same text is passed again"):
        option("model=masked_lm", f"model.path={saved('bert')}").load()


# Sizes that do not fit


@pytest.mark.parametrize(("family", "kind", "offset"), [("roberta", "masked_lm", 1), ("opt", "causal_lm", 0)])
def test_a_table_of_fewer_positions_than_the_configuration_says_is_found(option, saved, tmp_path, caplog, family, kind,
                                                                         offset):  # fmt: skip
    shutil.copytree(saved(family), tmp_path / family)
    tokenizer = json.loads((tmp_path / family / "tokenizer_config.json").read_text())
    (tmp_path / family / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 500}))
    model = option(f"model={kind}", f"model.path={tmp_path / family}", "model.max_tokens=500").load()
    (batch,) = model.encode([Document("a", "x" * 400), Document("b", "yz")], "evaluation", Budget(None, None), 10**4, 0)
    assert batch.labels.shape[1] == CONTEXT + (0 if family == "opt" else offset - 1)
    assert ("positions, not the" in caplog.text) == (family == "roberta")
    assert model.texts == (() if family == "opt" else (f"cut to {CONTEXT + offset - 1} tokens",))
    with torch.inference_mode():
        assert torch.isfinite(model.logits(batch)).all()


def test_an_error_at_a_long_text_that_has_another_cause_is_shown(option, saved, monkeypatch, caplog):
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(query, *others, **options):
        if query.shape[-2] > 40:
            raise RuntimeError("the kernel is not built for this device")
        return plain(query, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    expected = (
        rf"model\.path=.*fails on a text of {CONTEXT} tokens: RuntimeError: the kernel is not built for this device"
    )
    with pytest.raises(UserError, match=expected):
        option("model=causal_lm", f"model.path={saved('llama')}").load()
    assert "positions, not the" not in caplog.text


@pytest.mark.parametrize(("family", "kind"), [("llama", "causal_lm"), ("bert", "masked_lm")])
def test_a_tokenizer_with_more_tokens_than_the_model(option, saved, tmp_path, family, kind):
    """A padding token without an embedding changes nothing; text that has one is refused."""
    from transformers import AutoTokenizer

    plain = option(f"model={kind}", f"model.path={saved(family)}").load()
    shutil.copytree(saved(family), tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(saved(family))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["ab"])
    tokenizer.save_pretrained(tmp_path / "larger")
    model = option(f"model={kind}", f"model.path={tmp_path / 'larger'}").load()
    assert torch.equal(logits(model), logits(plain))
    with pytest.raises(UserError, match=rf"model\.path={tmp_path / 'larger'}: its tokenizer gives token .*\(ab\)"):
        model.encode([Document("a", "crab"), Document("b", "xyz")], "evaluation", Budget(None, None), 100, 0)


def test_two_tokens_for_the_beginning_are_said(tiny, caplog):
    texts = [Document("a", "<s>The quick"), Document("b", "jumps over")]
    tiny("llama").encode(texts[1:], "evaluation", Budget(None, None), 100, 0)
    assert not caplog.messages
    tiny("llama").encode(texts, "evaluation", Budget(None, None), 100, 0)
    assert (
        "1 of the evaluation texts begin or end with a token of their own" in caplog.text and "(a: <s>)" in caplog.text
    )
