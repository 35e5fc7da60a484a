"""What the embedded models are scored with: shared by scripts/train_tiny.py and the test of the shipped weights.

Plain hooks and plain loops, nothing of the package but its datasets: an independent measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from ablation_sweeps.data.batch import NOT_SCORED, Document, Split
from ablation_sweeps.datasets.digits import Digits
from ablation_sweeps.datasets.python_docs import PythonDocs

CAUSAL_CONTEXT, MASKED_CONTEXT = 256, 128
WHOLE = {"model_max_length": 10**9}  # documents are tokenized whole and cut afterwards: no warning that they are long
MASKING_SEED = 0


def texts(split: Split) -> list[Document]:
    return list(PythonDocs("python_docs").examples(split))


def causal_examples(tokenizer, documents: Iterable[Document]) -> tuple[Tensor, Tensor]:
    """Ids and the ids that follow them, `[window, pos]`; each document is cut into windows of the context's length."""
    windows = []
    for ids in tokenizer([d.text for d in documents])["input_ids"]:
        windows += [ids[i : i + CAUSAL_CONTEXT + 1] for i in range(0, len(ids) - 1, CAUSAL_CONTEXT)]
    rows = torch.stack([pad(torch.tensor(w), (0, CAUSAL_CONTEXT + 1 - len(w)), value=NOT_SCORED) for w in windows])
    return rows[:, :-1].clamp(min=0), rows[:, 1:]  # padding stands right of all text: no causal mask needs to know


@torch.inference_mode()
def causal_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> float:
    """Mean cross entropy in nats a token."""
    total = 0.0
    for x, y in zip(ids.split(16), labels.split(16), strict=True):
        total += cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), ignore_index=NOT_SCORED, reduction="sum")
    return float(total / (labels != NOT_SCORED).sum())


def mask_tokens(tokenizer, ids: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """BERT's task: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay; labels are the chosen."""
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = (torch.rand(ids.shape) < rate) & ~special
    fate = torch.rand(ids.shape)
    random_ids = torch.randint(len(tokenizer.all_special_ids), len(tokenizer), ids.shape)  # special tokens come first
    masked = ids.where(~chosen | (fate >= 0.8), tokenizer.mask_token_id)
    masked = masked.where(~chosen | (fate < 0.8) | (fate >= 0.9), random_ids)
    return masked, ids.where(chosen, NOT_SCORED)


def masked_examples(tokenizer, documents: Iterable[Document]) -> tuple[Tensor, Tensor, Tensor]:
    """Masked ids, labels and attention mask, `[window, pos]`; 15 % of the tokens are chosen, the same each time."""
    windows = []
    for ids in tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]:
        for i in range(0, len(ids), MASKED_CONTEXT - 2):
            windows.append([tokenizer.cls_token_id, *ids[i : i + MASKED_CONTEXT - 2], tokenizer.sep_token_id])
    padding = tokenizer.pad_token_id
    rows = torch.stack([pad(torch.tensor(w), (0, MASKED_CONTEXT - len(w)), value=padding) for w in windows])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(MASKING_SEED)
        return *mask_tokens(tokenizer, rows, rate=0.15), rows != padding


@torch.inference_mode()
def masked_loss(model: nn.Module, ids: Tensor, labels: Tensor, keep: Tensor) -> float:
    """Mean cross entropy in nats a masked token."""
    total = 0.0
    for x, y, k in zip(ids.split(32), labels.split(32), keep.split(32), strict=True):
        logits = model(x, attention_mask=k).logits
        total += cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=NOT_SCORED, reduction="sum")
    return float(total / (labels != NOT_SCORED).sum())


def digits_examples(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """Images `[picture, 1, 8, 8]` as timm's own transform for this model makes them, and their digits."""
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform(**resolve_data_config({}, model=model), is_training=False)
    pictures = list(Digits("digits").examples(split))
    return torch.stack([transform(p.read()) for p in pictures]), torch.tensor([p.label for p in pictures])


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(-1) == labels).float().mean())


def fit_ngrams(tokenizer) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a unigram `[next]` and of a bigram model `[token, next]`, fitted on the train split.

    The bigram is interpolated with the unigram: the rarer the first token, the more (Dirichlet prior, whose weight is
    the one that does best on the calibration split).
    """
    n = len(tokenizer)
    pairs = torch.zeros(n, n, dtype=torch.float64)
    for ids in map(torch.tensor, tokenizer([d.text for d in texts("train")])["input_ids"]):
        pairs.view(-1).index_add_(0, ids[:-1] * n + ids[1:], torch.ones(len(ids) - 1, dtype=torch.float64))
    unigram = (pairs.sum(0) + 0.5) / (pairs.sum() + 0.5 * n)
    totals = pairs.sum(1, keepdim=True)
    candidates = [((pairs + k * unigram) / (totals + k)).log() for k in (10, 20, 50, 100, 200, 400)]
    held_out = causal_examples(tokenizer, texts("calibration"))
    return unigram.log(), min(candidates, key=lambda bigram: bigram_loss(bigram, *held_out))


def unigram_loss(unigram: Tensor, labels: Tensor) -> float:
    return float(-unigram[labels[labels != NOT_SCORED]].mean())


def bigram_loss(bigram: Tensor, ids: Tensor, labels: Tensor) -> float:
    scored = labels != NOT_SCORED
    return float(-bigram[ids[scored], labels[scored]].mean())


@contextmanager
def zeroed_attention(model: nn.Module) -> Iterator[None]:
    """Every neuron at the input of every attention output projection is 0 (Llama, BERT and timm name it so)."""
    names = ("self_attn.o_proj", "attention.output.dense", "attn.proj")
    handles = [
        module.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
        for name, module in model.named_modules()
        if name.endswith(names)
    ]
    assert handles, "no attention output projection found"
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zeroed_score(model: nn.Module, score: Callable[[], float]) -> float:
    with zeroed_attention(model):
        return score()
