"""Small random models of many families, saved and loaded by the ordinary classes; a tokenizer of single characters."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from ablation_sweeps.models.causal_lm import CausalLM
from ablation_sweeps.models.image_classifier import ImageClassifier
from ablation_sweeps.models.masked_lm import MaskedLM
from ablation_sweeps.models.timm import Timm
from ablation_sweeps.sites import Site
from ablation_sweeps.transformer import Transformer

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 64
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}

SMALL = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": CONTEXT}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PICTURES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
            "image_size": 16, "patch_size": 8, "num_labels": 5}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaForCausalLM", {**SMALL, **IDS, "num_key_value_heads": 2, "intermediate_size": 48}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": len(VOCABULARY), "n_embd": 32, "n_layer": 3, "n_head": 4, **IDS,
                                 "n_positions": CONTEXT}),
    "opt": ("OPTForCausalLM", {**SMALL, **IDS, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**SMALL, **IDS, "intermediate_size": 48}),
    "bert": ("BertForMaskedLM", {**SMALL, "pad_token_id": 0, "intermediate_size": 48}),
    "albert": ("AlbertForMaskedLM", {**SMALL, **IDS, "intermediate_size": 48, "embedding_size": 16}),
    "vit": ("ViTForImageClassification", PICTURES),
    "timm_vit": ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3,
                                          "num_heads": 4}),
    "timm_swin": ("swin_tiny_patch4_window7_224", {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16,
                                                   "depths": [2, 2], "num_heads": [2, 4]}),
}  # fmt: skip
TEXT_OPTIONS = {"max_tokens": CONTEXT}
MASKED_OPTIONS = {**TEXT_OPTIONS, "masked": 0.15, "replaced_by_mask": 0.8, "replaced_at_random": 0.1}
PRETRAINED = {"name": None, "revision": None, "gguf_file": None, "dtype": "float32", "device": "cpu",
              "attn_implementation": None, "trust_remote_code": False, "site_paths": None}  # fmt: skip


@pytest.fixture(scope="session")
def repo() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real trained weights and data, which lie beside the repository where there are any."""
    folder = ROOT.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("needs the real weights and data of ../shared/assets, which are not here")
    return folder


def save_tokenizer(folder: Path, sequence: str) -> None:
    """One token a character: what a text becomes can be said without the tokenizer."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(VOCABULARY, [], unk_token="<unk>"))
    around = [(token, VOCABULARY[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=sequence, special_tokens=around)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    names |= {"unk_token": "<unk>", "mask_token": "<mask>"}
    if "</s>" in sequence:
        names |= {"cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=CONTEXT, clean_up_tokenization_spaces=False, **names
    ).save_pretrained(folder)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """All parameters, biases too, far enough from their start that every neuron matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def save_model(family: str, folder: Path) -> None:
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    if family.startswith("timm"):
        import timm
        from safetensors.torch import save_file

        module = randomised(timm.create_model(name, num_classes=5, **options))
        size = (3, options["img_size"], options["img_size"])
        pretrained = {"input_size": size, "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}
        config = {"architecture": name, "num_classes": 5, "model_args": options, "pretrained_cfg": pretrained}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(module.state_dict(), folder / "model.safetensors")
        return
    import transformers

    module_class = getattr(transformers, name)
    randomised(module_class(module_class.config_class(**options))).save_pretrained(folder)
    if family == "vit":
        size = {"height": 16, "width": 16}
        transformers.ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    else:
        save_tokenizer(folder, "<s> $A </s>" if "MaskedLM" in name else "<s> $A")


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    """`saved("llama")`: a folder with a small random model of that family."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            made = tmp_path_factory.mktemp(family)
            save_model(family, made)
            folders[family] = made
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def fresh(saved) -> Callable[..., Transformer]:
    """`fresh("llama", max_tokens=8)`: loaded anew, so that a test may break its weights."""

    def load(family: str, **changes) -> Transformer:
        if family.startswith("timm"):
            kind, options = Timm, {}
        elif family == "vit":
            kind, options = ImageClassifier, {}
        elif family in ("bert", "albert"):
            kind, options = MaskedLM, MASKED_OPTIONS
        else:
            kind, options = CausalLM, TEXT_OPTIONS
        return kind(label=family, path=str(saved(family)), **{**PRETRAINED, **options, **changes}).load()

    return load


@pytest.fixture(scope="session")
def tiny(fresh) -> Callable[[str], Transformer]:
    """`tiny("llama")`: loaded once; leave it as it is."""
    models: dict[str, Transformer] = {}

    def load(family: str) -> Transformer:
        if family not in models:
            models[family] = fresh(family)
        return models[family]

    return load


@pytest.fixture(scope="session")
def site() -> Callable[[str], Site]:
    """`site("attn_pre_out")`: as conf/ gives it."""

    def read(name: str) -> Site:
        options = yaml.safe_load((ROOT / "conf" / "site" / f"{name}.yaml").read_text())
        return Site(**{key: value for key, value in options.items() if key != "_target_"})

    return read
