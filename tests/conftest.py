"""Small random models of many families, saved and loaded by the ordinary classes; a tokenizer of single characters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from families import CONTEXT, FAMILIES, VOCABULARY
from hydra import compose, initialize_config_dir

from ablation_sweeps.experiment.config import to_job
from ablation_sweeps.experiment.job import Job
from ablation_sweeps.models.causal_lm import CausalLM
from ablation_sweeps.models.image_classifier import ImageClassifier
from ablation_sweeps.models.masked_lm import MaskedLM
from ablation_sweeps.models.timm import Timm
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.sites import Site

ROOT = Path(__file__).resolve().parents[1]
TEXT_OPTIONS = {"max_tokens": CONTEXT, "pack": "documents"}
MASKED_OPTIONS = {**TEXT_OPTIONS, "masked": 0.15, "replaced_by_mask": 0.8, "replaced_at_random": 0.1}
PRETRAINED = {"name": None, "revision": None, "gguf_file": None, "dtype": "float32", "device": "cpu",
              "device_map": None, "quantize": None, "attn_implementation": None, "trust_remote_code": False,
              "use_safetensors": True, "site_paths": None, "tokens": "all"}  # fmt: skip
LOADERS = {"causal_lm": (CausalLM, TEXT_OPTIONS), "masked_lm": (MaskedLM, MASKED_OPTIONS),
           "image_classifier": (ImageClassifier, {}), "timm": (Timm, {})}  # fmt: skip


@pytest.fixture(scope="session")
def repo() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def job_of(repo):
    """`job_of("model=tiny_vit", "dataset=digits")`: the job that launch.py makes of these options."""

    def job_of(*overrides: str) -> Job:
        with initialize_config_dir(str(repo / "conf"), version_base="1.3"):
            return to_job(compose("config", list(overrides)))

    return job_of


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


def build(family: str) -> torch.nn.Module:
    """The family's small random model, as its own library makes it."""
    mine = FAMILIES[family]
    torch.manual_seed(0)
    if mine.kind == "timm":
        import timm

        return randomised(timm.create_model(mine.name, num_classes=5, **mine.options))
    import transformers

    module_class = getattr(transformers, mine.name)
    return randomised(module_class(module_class.config_class(**mine.options)))


def save_model(family: str, folder: Path) -> None:
    mine, module = FAMILIES[family], build(family)
    if mine.kind == "timm":
        from safetensors.torch import save_file

        size = (3, mine.options["img_size"], mine.options["img_size"])
        pretrained = {"input_size": size, "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}
        config = {"architecture": mine.name, "num_classes": 5, "model_args": mine.options, "pretrained_cfg": pretrained}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(module.state_dict(), folder / "model.safetensors")
        return
    module.save_pretrained(folder)  # type: ignore[operator]
    if mine.kind == "image_classifier":
        from transformers import ViTImageProcessor

        side = mine.options.get("image_size", 16)
        size = {"height": side, "width": side}
        ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)
    else:
        save_tokenizer(folder, "<s> $A </s>" if mine.kind == "masked_lm" else "<s> $A")


def backbone(family: str) -> Transformer:
    """A model without a head that could be scored, for which there is no loader: its features are its logits."""
    from ablation_sweeps.data.images import ImageEncoder

    module, side = build(family), FAMILIES[family].options["image_size"]

    def transform(image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.resize((side, side)))).permute(2, 0, 1) / 255

    encoder = ImageEncoder(transform, "pixel_values", "RGB", 5, 1)
    run = lambda batch: module(**batch.inputs).last_hidden_state  # noqa: E731
    return Transformer(family, "", "image_classifier", module, run, run, encoder, encoder.other_input, 4, frozenset())


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
def sees_padding(saved, tmp_path_factory) -> Path:
    """A folder with a model whose scores depend on the length of what is passed beside a text: a small ConvBERT."""
    from transformers import ConvBertConfig, ConvBertForMaskedLM

    folder = tmp_path_factory.mktemp("models") / "convbert"
    shutil.copytree(saved("bert"), folder)
    torch.manual_seed(0)
    config = ConvBertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=48, embedding_size=32)  # fmt: skip
    module = ConvBertForMaskedLM(config)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fresh(saved) -> Callable[..., Transformer]:
    """`fresh("llama", max_tokens=8)`: loaded anew, so that a test may break its weights."""

    def load(family: str, **changes) -> Transformer:
        if not FAMILIES[family].exists:
            pytest.skip(f"this version of transformers has no {FAMILIES[family].name}")
        if FAMILIES[family].kind == "backbone":
            return backbone(family)
        kind, options = LOADERS[FAMILIES[family].kind]
        return kind(**{"label": family, "path": str(saved(family)), **PRETRAINED, **options, **changes}).load()

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
