"""Retrain the three embedded models: `python scripts/train_tiny.py [--only causal] [--out DIR]`.

Seventeen minutes on one CPU core that nothing else uses, no download: the data comes with Python and with scikit-learn.
Every number of the model cards beside the weights is measured here, on the weights as loaded back from disk. What to
expect on held-out data: a causal loss one nat below a bigram's, a masked loss two and a half below a unigram's, and
96 % of the digits.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import tiny_scores as score
import torch
from tiny_scores import CAUSAL_CONTEXT, MASKED_CONTEXT, WHOLE, texts, zeroed_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, pad
from tqdm import tqdm

from ablation_sweeps.data.batch import NOT_SCORED, Document
from ablation_sweeps.datasets.digits import Digits
from ablation_sweeps.datasets.python_docs import PythonCode

ASSETS = Path(__file__).resolve().parent.parent / "ablation_sweeps" / "assets"
SEED = 0
VOCABULARY = 512  # short tokens: more of them to learn each from, in the minutes there are
N_CODE = 60  # source files that join the documentation in training, where the docs alone would be read ten times over


# ---- tiny_causal: a Llama with grouped-query attention, on Python's documentation ----------------------------------


def train_causal(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = train_tokenizer(folder, CAUSAL_CONTEXT, special, around="<bos> $A")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CAUSAL_CONTEXT,
        tie_word_embeddings=True,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in special},
    )
    model = LlamaForCausalLM(config)
    stream = torch.cat([torch.tensor(ids) for ids in tokenizer([d.text for d in training_texts()])["input_ids"]])

    def loss() -> Tensor:
        ids = random_windows(stream, n=4, length=CAUSAL_CONTEXT + 1)
        return cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())

    steps, seconds = 2200, time.perf_counter()
    fit(model, loss, steps, lr=2e-3, name="tiny_causal")
    seconds = time.perf_counter() - seconds
    save(model, folder)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, **WHOLE)
    ids, labels = score.causal_examples(tokenizer, texts("evaluation"))
    unigram, bigram = score.fit_ngrams(tokenizer)
    scores = {
        "the model": score.causal_loss(model, ids, labels),
        "with every attention neuron at 0": zeroed_score(model, lambda: score.causal_loss(model, ids, labels)),
        "a bigram model, smoothed": score.bigram_loss(bigram, ids, labels),
        "a unigram model": score.unigram_loss(unigram, labels),
    }
    unit = f"nats a token, lower is better ({(labels != NOT_SCORED).sum()} tokens)"
    write_card(folder, model, "LlamaForCausalLM", docs_description(), steps, seconds, scores, unit)


# ---- tiny_masked: a BERT, on the same documents --------------------------------------------------------------------


def train_masked(folder: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

    torch.manual_seed(SEED)
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    tokenizer = train_tokenizer(folder, MASKED_CONTEXT, special, around="[CLS] $A [SEP]")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MASKED_CONTEXT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.06,  # the usual 0.02 is for widths of 768 and more
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForMaskedLM(config)
    look_at_neighbours(model)
    lists = tokenizer([d.text for d in training_texts()], add_special_tokens=False)["input_ids"]
    stream = torch.cat([torch.tensor(ids) for ids in lists])

    def loss() -> Tensor:
        windows = random_windows(stream, n=8, length=MASKED_CONTEXT - 2)
        windows = pad(pad(windows, (1, 0), value=tokenizer.cls_token_id), (0, 1), value=tokenizer.sep_token_id)
        ids, labels = score.mask_tokens(tokenizer, windows, rate=0.3)
        hidden = model.bert(ids).last_hidden_state[labels != NOT_SCORED]  # the head only where it is scored: faster
        return cross_entropy(model.cls(hidden), labels[labels != NOT_SCORED])

    steps, seconds = 2600, time.perf_counter()
    fit(model, loss, steps, lr=1e-3, name="tiny_masked")
    seconds = time.perf_counter() - seconds
    save(model, folder)

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, **WHOLE)
    ids, labels, keep = score.masked_examples(tokenizer, texts("evaluation"))
    unigram, _ = score.fit_ngrams(tokenizer)
    scores = {
        "the model": score.masked_loss(model, ids, labels, keep),
        "with every attention neuron at 0": zeroed_score(model, lambda: score.masked_loss(model, ids, labels, keep)),
        "a unigram model": score.unigram_loss(unigram, labels),
    }
    unit = f"nats a masked token at 15 % masked, lower is better ({(labels != NOT_SCORED).sum()} tokens)"
    write_card(folder, model, "BertForMaskedLM", docs_description(), steps, seconds, scores, unit)


@torch.no_grad()
def look_at_neighbours(model) -> None:
    """Start from sinusoidal positions, and from heads in the first layer that look 1 and 2 tokens back and ahead.

    From random weights a small masked model stays near the unigram for most of the minutes there are: it must find
    out which positions are neighbours before any of them can tell it something.
    """
    layer, table = model.bert.encoder.layer[0].attention.self, model.bert.embeddings.position_embeddings.weight
    width, size = table.shape[1], layer.attention_head_size
    frequencies = 2.5 * 1000 ** (-torch.arange(width // 2) / (width // 2))
    angles = torch.arange(len(table))[:, None] * frequencies  # [pos, width / 2]
    table.copy_(2.5 * model.config.initializer_range * torch.cat([angles.sin(), angles.cos()], dim=1))

    fast = torch.arange(0, size, 2)  # the high frequencies tell neighbours apart
    read = torch.eye(width)[torch.cat([fast, fast + width // 2])]  # [d_head, width]: sines, then cosines
    for head, shift in enumerate((-1, 1, -2, 2)):
        cos, sin = (frequencies[fast] * shift).cos().diag(), (frequencies[fast] * shift).sin().diag()
        turn = torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])  # by `shift` positions
        rows = slice(head * size, (head + 1) * size)
        layer.key.weight[rows], layer.query.weight[rows] = 1.5 * read, 1.5 * turn @ read


# ---- tiny_vit: a timm VisionTransformer, on 8 x 8 digits -----------------------------------------------------------


def train_vit(folder: Path) -> None:
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(SEED)
    mean, std = pixel_statistics()
    pretrained_cfg = {
        "input_size": [1, 8, 8],
        "mean": [mean],
        "std": [std],
        "crop_pct": 1.0,  # timm's default would enlarge the picture and cut off its border
        "interpolation": "bilinear",
        "num_classes": 10,
        "label_names": Digits("digits").class_names(),
    }
    sizes: dict[str, Any] = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2,
    }
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, pretrained_cfg=pretrained_cfg, **sizes)
    images, labels = score.digits_examples(model, "train")

    def loss() -> Tensor:
        rows = torch.randint(len(images), (64,))
        return cross_entropy(model(jitter(images[rows], background=-mean / std)), labels[rows])

    steps, seconds = 2500, time.perf_counter()
    fit(model.train(), loss, steps, lr=2e-3, name="tiny_vit")
    seconds = time.perf_counter() - seconds
    save_for_hf(model, str(folder), model_config={"model_args": sizes}, safe_serialization=True)

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images, labels = score.digits_examples(model, "evaluation")
    scores = {
        "the model": score.accuracy(model, images, labels),
        "with every attention neuron at 0": zeroed_score(model, lambda: score.accuracy(model, images, labels)),
        "always the most frequent digit": float(labels.bincount().max() / len(labels)),
    }
    data = f"scikit-learn's handwritten digits, 8 x 8, {sum(1 for _ in Digits('digits').examples('train'))} to train on"
    unit = f"fraction of the pictures classified correctly, higher is better ({len(labels)} pictures)"
    write_card(folder, model, "timm VisionTransformer", data, steps, seconds, scores, unit)


def pixel_statistics() -> tuple[float, float]:
    import numpy as np

    pixels = np.stack([np.asarray(p.read()) for p in Digits("digits").examples("train")]) / 255
    return round(float(pixels.mean()), 4), round(float(pixels.std()), 4)


def jitter(images: Tensor, background: float) -> Tensor:
    """Turn, scale and move each picture a little: 1279 of them would be learned by heart."""
    angle, scale = 0.2 * torch.rand(2, len(images)).mul(2).sub(1)  # up to 11 degrees, up to 20 %
    cosine, sine = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    shift = 0.25 * torch.rand(2, len(images)).mul(2).sub(1)  # up to one pixel of eight, on a scale from -1 to 1
    rows = [torch.stack([cosine, -sine, shift[0]], 1), torch.stack([sine, cosine, shift[1]], 1)]
    grid = affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return grid_sample(images - background, grid, align_corners=False) + background


# ---- what the three share ------------------------------------------------------------------------------------------


def training_texts() -> list[Document]:
    return texts("train") + list(islice(PythonCode("python_code").examples("train"), N_CODE))


def docs_description() -> str:
    version = platform.python_version()
    return f"train splits of python_docs ({len(texts('train'))} documents) and python_code ({N_CODE}), Python {version}"


def train_tokenizer(folder: Path, length: int, special: dict[str, str], around: str):
    """Byte-level BPE that puts special tokens `around` each text, as in "[CLS] $A [SEP]"; saved in the folder."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((d.text for d in training_texts()), trainer)
    ids = [(token, raw.token_to_id(token)) for token in special.values()]
    raw.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    inputs = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=length, model_input_names=inputs, **special
    )
    tokenizer.save_pretrained(folder)
    edit_json(
        folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"
    )  # transformers 4 knows it too
    return AutoTokenizer.from_pretrained(folder, **WHOLE)


def random_windows(stream: Tensor, n: int, length: int) -> Tensor:
    starts = torch.randint(len(stream) - length, (n, 1))
    return stream[starts + torch.arange(length)]  # [n, length]


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float, name: str) -> None:
    """AdamW, 100 steps of warm-up, then a cosine down to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    average = None
    for _ in (bar := tqdm(range(steps), desc=name, mininterval=5)):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average = value.item() if average is None else 0.98 * average + 0.02 * value.item()
        bar.set_postfix(loss=f"{average:.3f}", refresh=False)


def save(model, folder: Path) -> None:
    """Half precision on disk, half the size; the config still asks for float32, so that is what loads."""
    model.half().save_pretrained(folder)
    edit_json(folder / "config.json", dtype="float32")


def edit_json(path: Path, **changes: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")


def write_card(folder: Path, model, kind: str, data: str, steps: int, seconds: float, scores: dict, unit: str) -> None:
    n_parameters = sum(p.numel() for p in model.parameters())
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items())
    n_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with_what = f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    card = f"""# {folder.name}

Written by `scripts/train_tiny.py --only {folder.name.removeprefix("tiny_")}`, which trains and measures this model.

- Kind: {kind}, {n_parameters:,} parameters, {n_bytes:,} bytes
- Data: {data}
- Training: {steps} steps, seed {SEED}, {seconds:.0f} seconds on {with_what}

On the evaluation split, {unit}:

| | |
|---|---|
{rows}
"""
    (folder / "README.md").write_text(card)
    print(card)


def main() -> None:
    trainers_by_name = {"causal": train_causal, "masked": train_masked, "vit": train_vit}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=trainers_by_name, help="one of the three models")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder that gets one folder a model")
    parser.add_argument("--threads", type=int, default=2, help="1 is a third slower, and does not mind other programs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, train in trainers_by_name.items():
        if arguments.only in (None, name):
            folder = arguments.out / f"tiny_{name}"
            folder.mkdir(parents=True, exist_ok=True)
            train(folder)


if __name__ == "__main__":
    main()
