"""TransformerLens: its cache to collect, its hooks to ablate. Its attention is always eager."""

from __future__ import annotations

from pathlib import Path

import torch
from protocol import DEVICE, Work, points, serve
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge


def load(folder: Path, work: Work):
    model = TransformerBridge.boot_transformers(str(folder), device=DEVICE, dtype=work.dtype)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]

    def collect() -> list[Tensor]:
        caches = [model.run_with_cache(ids, names_filter=names)[1] for ids in work.ids]
        return [torch.cat([cache[name].flatten(0, 1).flatten(1) for cache in caches]) for name in names]

    def ablated(ids: Tensor, mask: Tensor) -> Tensor:
        def writing(m: Tensor, v: Tensor):
            return lambda z, hook: torch.where(m.view(z.shape[2:]), v.view(z.shape[2:]), z)

        hooks = [(name, writing(m, v)) for name, m, v in zip(names, mask, work.values, strict=True)]
        return model.run_with_hooks(ids, fwd_hooks=hooks)

    return collect, lambda: points(work, model, ablated)


if __name__ == "__main__":
    serve("transformer-lens", load)
