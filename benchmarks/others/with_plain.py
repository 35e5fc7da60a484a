"""Plain transformers with the hook that everybody writes."""

from __future__ import annotations

from pathlib import Path

import torch
from protocol import DEVICE, Work, points, serve
from torch import Tensor
from transformers import AutoModelForCausalLM


def load(folder: Path, work: Work):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=work.dtype).to(DEVICE).eval()
    names = ("self_attn.o_proj", "self_attn.out_proj")  # of Llama and Mistral, and of OPT
    projections = [module for name, module in model.named_modules() if name.endswith(names)]

    def hooked(hooks, run):
        handles = [p.register_forward_pre_hook(hook) for p, hook in zip(projections, hooks, strict=True)]
        try:
            return run()
        finally:
            for handle in handles:
                handle.remove()

    def collect() -> list[Tensor]:
        kept: list[list[Tensor]] = [[] for _ in projections]
        hooks = [lambda module, args, layer=layer: layer.append(args[0].flatten(0, 1)) for layer in kept]
        for ids in work.ids:
            hooked(hooks, lambda ids=ids: model.base_model(ids, use_cache=False))  # without the head
        return [torch.cat(layer) for layer in kept]

    def clean(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    def ablated(ids: Tensor, mask: Tensor) -> Tensor:
        hooks = [
            lambda module, args, m=m, v=v: (torch.where(m, v, args[0]),)
            for m, v in zip(mask, work.values, strict=True)
        ]  # fmt: skip
        return hooked(hooks, lambda: clean(ids))

    return collect, lambda: points(work, clean, ablated)


if __name__ == "__main__":
    serve("transformers", load)
