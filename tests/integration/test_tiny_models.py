"""The shipped weights do what their cards say: ordinary loaders, plain hooks, held-out data."""

import importlib
import json
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from ablation_sweeps.datasets.python_docs import PythonDocs

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "ablation_sweeps" / "assets"
N_WINDOWS = 96  # the cards score all of them, which takes longer than a test should


@pytest.fixture(scope="module")
def score():
    """scripts/tiny_scores.py: the baselines and the metrics of the cards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("tiny_scores")
        sys.modules.pop("tiny_scores")


def some_windows(*tensors):
    """The same random windows of each: the long documents fill most of them, so the first would be one document."""
    rows = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(1))[:N_WINDOWS]
    return [tensor[rows] for tensor in tensors]


def test_causal_beats_a_bigram_and_needs_its_attention(score):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_causal", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_causal", **score.WHOLE)
    assert model.config.num_key_value_heads < model.config.num_attention_heads  # grouped-query attention

    ids, labels = some_windows(*score.causal_examples(tokenizer, score.texts("evaluation")))
    _, bigram = score.fit_ngrams(tokenizer)
    clean = score.causal_loss(model, ids, labels)
    zeroed = score.zeroed_score(model, lambda: score.causal_loss(model, ids, labels))
    assert clean < score.bigram_loss(bigram, ids, labels) - 0.8
    assert zeroed > clean + 1.0
    assert not any(module._forward_pre_hooks for module in model.modules())  # what follows is not damaged


def test_causal_loss_is_that_of_transformers(score):
    """The same number from the loss inside transformers, one document at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_causal", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_causal", **score.WHOLE)
    document = next(islice(PythonDocs("python_docs").examples("evaluation"), 3, None))
    ids = torch.tensor([tokenizer(document.text)["input_ids"][: score.CAUSAL_CONTEXT]])
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.inference_mode():
        expected = model(ids, labels=ids).loss.item()
    assert score.causal_loss(model, ids[:, :-1], ids[:, 1:]) == pytest.approx(expected, abs=1e-4)


def test_masked_beats_a_unigram_and_needs_its_attention(score):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(ASSETS / "tiny_masked", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_masked", **score.WHOLE)
    around = tokenizer("a text")["input_ids"]
    assert (around[0], around[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)

    ids, labels, keep = some_windows(*score.masked_examples(tokenizer, score.texts("evaluation")))
    unigram, _ = score.fit_ngrams(tokenizer)
    clean = score.masked_loss(model, ids, labels, keep)
    zeroed = score.zeroed_score(model, lambda: score.masked_loss(model, ids, labels, keep))
    assert clean < score.unigram_loss(unigram, labels) - 1.0
    assert zeroed > clean + 1.0


def test_vit_reads_digits_and_needs_its_attention(score):
    import timm

    model = timm.create_model(f"local-dir:{ASSETS / 'tiny_vit'}", pretrained=True).eval()
    images, labels = score.digits_examples(model, "evaluation")
    clean = score.accuracy(model, images, labels)
    zeroed = score.zeroed_score(model, lambda: score.accuracy(model, images, labels))
    assert clean >= 0.95
    assert zeroed <= clean - 0.5


def test_vit_transform_only_normalises():
    """timm's default for an unknown model would enlarge the picture and cut its border off."""
    import numpy as np
    import timm
    from timm.data import create_transform, resolve_data_config

    from ablation_sweeps.datasets.digits import Digits

    model = timm.create_model(f"local-dir:{ASSETS / 'tiny_vit'}")
    config = resolve_data_config({}, model=model)
    picture = next(Digits("digits").examples("evaluation"))
    tensor = create_transform(**config, is_training=False)(picture.read())
    (mean,), (std,) = config["mean"], config["std"]
    np.testing.assert_allclose(tensor, (np.asarray(picture.read())[None] / 255 - mean) / std, atol=1e-5)


def test_assets_are_small_and_name_no_machine():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors"}  # no pickle, no optimizer
    for path in files:
        if path.name in ("README.md", "config.json", "generation_config.json", "tokenizer_config.json"):
            assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text()), path


@pytest.mark.parametrize("name", ["tiny_causal", "tiny_masked"])
def test_weights_load_in_single_precision_unless_told_otherwise(name):
    assert json.loads((ASSETS / name / "config.json").read_text())["dtype"] == "float32"
