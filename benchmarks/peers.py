"""The same work as others do it, in plain transformers: what the time of bench.py is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablation_sweeps.data import Batch


@contextmanager
def replaced(modules: Sequence[nn.Module], masks: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """The ten-line hook that everybody writes."""

    def hook(mask: Tensor, value: Tensor):
        return lambda module, args: (torch.where(mask, value, args[0]), *args[1:])

    handles = [
        module.register_forward_pre_hook(hook(mask, value))
        for module, mask, value in zip(modules, masks, values, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def keep_all(module: nn.Module, modules: Sequence[nn.Module], documents: Sequence[Tensor]) -> list[Tensor]:
    """As the paper's library: documents one by one, all raw activations kept; `[tokens, neurons]` a layer."""
    kept: list[list[Tensor]] = [[] for _ in modules]
    handles = [
        m.register_forward_pre_hook(lambda module, args, i=i: kept[i].append(args[0][0].clone()))
        for i, m in enumerate(modules)
    ]
    try:
        for document in documents:
            module(document[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(layer) for layer in kept]


def peaks_one_by_one(activations: Sequence[Tensor], n_bins: int) -> list[Tensor]:
    """A histogram a neuron, in a loop."""
    peaks = []
    for layer in activations:
        values = []
        for neuron in layer.T.float().cpu().numpy():
            counts, edges = np.histogram(neuron, n_bins)
            fullest = int(counts.argmax())
            values.append((edges[fullest] + edges[fullest + 1]) / 2)
        peaks.append(torch.tensor(np.array(values), dtype=torch.float32))
    return peaks


@torch.inference_mode()
def scores_one_by_one(module: nn.Module, documents: Sequence[Tensor]) -> tuple[float, float, float]:
    """Loss, and accuracies among the first one and ten, over all documents."""
    loss = top1 = top10 = n = 0.0
    for document in documents:
        logits = module(document[None], use_cache=False).logits[0, :-1].float()
        labels = document[1:]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        first = logits.topk(10).indices
        top1 += (first[:, 0] == labels).sum().item()
        top10 += (first == labels[:, None]).any(-1).sum().item()
        n += len(labels)
    return loss / n, top1 / n, top10 / n


def documents(batches: Sequence[Batch], device: torch.device) -> list[Tensor]:
    """Of padded batches, without the padding."""
    return [
        ids[: int(keep.sum())].to(device)
        for batch in batches
        for ids, keep in zip(batch.inputs["input_ids"], batch.keep if batch.keep is not None else (), strict=True)
    ]
