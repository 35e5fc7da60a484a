"""Computes metric sums over each example's scored positions from logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import Float, Int

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import NOT_SCORED, Batch
from ablation_sweeps.neurons.hooks import rows_at_a_time
from ablation_sweeps.results.metrics import SUMS


class Targets(NamedTuple):
    """The scored positions of a batch: their target ids `labels`, and their indices `rows` in the flattened batch."""

    rows: Int[torch.Tensor, " scored"]
    labels: Int[torch.Tensor, " scored"]
    shape: tuple[int, int]  # (examples, positions per example) of the batch


def _targets(batch: Batch) -> Targets:
    labels = batch.labels.flatten()
    rows = (labels != NOT_SCORED).nonzero()[:, 0]
    return Targets(rows, labels[rows], (len(batch.names), len(labels) // len(batch.names)))


def _chunks(logits: Float[torch.Tensor, "scored classes"]) -> Iterator[slice]:
    size = rows_at_a_time(logits.shape[1], logits.device)
    return (slice(start, start + size) for start in range(0, len(logits), size))


class CleanPrediction(NamedTuple):
    """The clean model's prediction at the scored positions."""

    p: Float[torch.Tensor, "scored classes"]  # probabilities
    negentropy: Float[torch.Tensor, " scored"]  # the sum of p log p, in nats


def _clean(logits: Float[torch.Tensor, "scored classes"]) -> CleanPrediction:
    p = torch.empty(logits.shape, device=logits.device)
    negentropy = torch.empty(len(logits), device=logits.device)
    for chunk in _chunks(logits):
        log_p = logits[chunk].float().log_softmax(-1)
        torch.exp(log_p, out=p[chunk])
        negentropy[chunk] = (p[chunk] * log_p).sum(-1)
    return CleanPrediction(p, negentropy)


def _sums(
    logits: Float[torch.Tensor, "scored classes"],
    clean: CleanPrediction,
    targets: Targets,
    common: Int[torch.Tensor, " common"],
    top_k: int,
) -> Float[torch.Tensor, "batch sums"]:
    """The sums of `SUMS` over each example's scored positions, in float64."""
    values = [
        _score(logits[chunk].float(), CleanPrediction(*(x[chunk] for x in clean)), targets.labels[chunk], common, top_k)
        for chunk in _chunks(logits)
    ]
    # Scatter by position, then sum per example: a GPU adds to examples in no fixed order, so not bit-equal each time.
    everywhere = torch.zeros(math.prod(targets.shape), len(SUMS), dtype=torch.float64, device=logits.device)
    if values:
        everywhere[targets.rows] = torch.cat(values)
    return everywhere.unflatten(0, targets.shape).sum(1)


def _score(
    logits: Float[torch.Tensor, "scored classes"],
    clean: CleanPrediction,
    labels: Int[torch.Tensor, " scored"],
    common: Int[torch.Tensor, " common"],
    top_k: int,
) -> Float[torch.Tensor, "scored sums"]:
    own = labels[:, None]
    rank = _rank(logits, own, top_k)
    log_q = logits.log_softmax(-1)
    kl = clean.negentropy - (clean.p * log_q).sum(-1)
    one = torch.ones_like(kl)
    all_tokens = torch.stack([one, -log_q.gather(-1, own)[:, 0], (rank < 1).float(), (rank < top_k).float()], -1)
    rare = ~(own == common).any(-1)  # isin would sort, and synchronise with the GPU
    return torch.cat([all_tokens, kl[:, None], all_tokens * rare[:, None]], -1).double()


def _rank(
    logits: Float[torch.Tensor, "scored classes"], own: Int[torch.Tensor, "scored 1"], top_k: int
) -> Float[torch.Tensor, " scored"]:
    """Rank of each label, 0 for the highest logit; exact below `top_k`.

    Among equal logits the lower id wins, so that a model with constant logits is not counted as right.
    """
    mine = logits.gather(-1, own)
    if logits.device.type != "cpu":  # without synchronising with the GPU
        lower = torch.arange(logits.shape[-1], device=logits.device) < own
        return torch.where(lower, logits >= mine, logits > mine).sum(-1).float()
    flags = torch.empty_like(logits)  # as floats, which a CPU compares and sums faster
    rank = torch.gt(logits, mine, out=flags).sum(-1)
    tied = (torch.eq(logits, mine, out=flags).sum(-1) > 1) & (rank < top_k)
    if tied.any():
        lower = torch.arange(logits.shape[-1], device=logits.device) < own[tied]
        rank[tied] += ((logits[tied] == mine[tied]) & lower).sum(-1)
    return rank
