"""taker, the library of arXiv:2408.17322: `get_midlayer_data` to collect, its masks and offsets to ablate. The sweep
is evaluated by it, too, as in the paper: text by text, and token by token.

Its data are texts, one by one, that it tokenizes: here they are the ids already, and its tokenizer is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from protocol import N_BINS, Work, points, serve
from taker import Model
from taker.activations import get_midlayer_data
from taker.data_classes import EvalConfig
from taker.eval import run_evaluation
from torch import Tensor


def load(folder: Path, work: Work):
    model = Model(str(folder), dtype={torch.float32: "fp32", torch.bfloat16: "bfp16"}[work.dtype])
    model.get_ids = lambda text: text
    documents = [{"text": ids[None]} for ids in work.ids.flatten(0, 1)]
    config = EvalConfig(
        "ids", dataset_custom_load_fn=lambda: {"train": documents}, is_train_mode=True, sample_size=work.ids.numel()
    )
    site = model.hooks["attn_pre_out"]

    def collect() -> list[Tensor]:
        found = get_midlayer_data(
            model, eval_config=config, sample_size=work.ids.numel(), calculate_ff=False, collect_attn=True
        )
        raw = found.raw["attn"]  # [tokens, layers, heads, d_head]
        return list(raw.flatten(2).unbind(1))

    def clean(ids: Tensor) -> Tensor:
        return model.get_logits(input_ids=ids)

    def ablated(ids: Tensor, mask: Tensor) -> Tensor:
        site.delete_neurons(mask)
        for hook, v in zip(site["mask"], work.values, strict=True):
            hook.set_offset(v)
        try:
            return clean(ids)
        finally:
            for hook in site["mask"]:
                hook.reset()

    def measure() -> dict:
        model.hooks.disable_all_collect_hooks()
        return points(work, clean, ablated)

    def loss() -> float:
        return run_evaluation(model, config).loss_data["loss"]

    def curve(values: Callable[[], list[Tensor]]) -> list[float]:
        """One run of it: the model as it is, the values, and a point for each fraction."""
        model.hooks.disable_all_collect_hooks()
        losses, written = [loss()], values()
        model.hooks.disable_all_collect_hooks()
        for mask in work.sweep_masks:
            site.delete_neurons(mask)
            for hook, v in zip(site["mask"], written, strict=True):
                hook.set_offset(v)
            losses.append(loss())
        for hook in site["mask"]:
            hook.reset()
        return losses

    def sweep() -> dict:
        """The statistics are collected once for mean and peak: it keeps all activations."""
        layers: list[Tensor] = []
        return {
            "zero": curve(lambda: list(torch.zeros_like(work.values))),
            "mean": curve(lambda: layers.extend(collect()) or [x.mean(0) for x in layers]),
            "peak": curve(lambda: peaks(layers)),
        }

    return collect, measure, sweep


def peaks(layers: list[Tensor]) -> list[Tensor]:
    """The centre of the fullest bin of each neuron: a histogram a neuron, in a loop."""
    found = []
    for x in layers:
        histograms = [np.histogram(neuron, N_BINS) for neuron in x.T.float().cpu().numpy()]
        centres = [edges[np.argmax(counts) :][:2].mean() for counts, edges in histograms]
        found.append(torch.tensor(np.array(centres), dtype=torch.float32, device=x.device))
    return found


if __name__ == "__main__":
    serve("taker", load)
