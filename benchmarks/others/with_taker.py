"""taker, the library of arXiv:2408.17322: `get_midlayer_data` to collect, its masks and offsets to ablate.

Its data are texts, one by one, that it tokenizes: here they are the ids already, and its tokenizer is left out.
"""

from __future__ import annotations

from pathlib import Path

from protocol import Work, points, serve
from taker import Model
from taker.activations import get_midlayer_data
from taker.data_classes import EvalConfig
from torch import Tensor


def load(folder: Path, work: Work):
    model = Model(str(folder), dtype="fp32")
    model.get_ids = lambda ids: ids
    documents = [{"text": ids[None]} for ids in work.ids.flatten(0, 1)]
    config = EvalConfig("ids", dataset_custom_load_fn=lambda: {"train": documents}, is_train_mode=True)
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

    return collect, measure


if __name__ == "__main__":
    serve("taker", load)
