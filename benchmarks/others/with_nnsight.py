"""nnsight: one trace a pass, which is stopped after the last projection where logits are not needed."""

from __future__ import annotations

from pathlib import Path

import nnsight
import torch
from protocol import DEVICE, Work, points, serve
from torch import Tensor


def load(folder: Path, work: Work):
    model = nnsight.TransformersModel(str(folder), task="text-generation", dtype=work.dtype, dispatch=True)
    model.to(DEVICE)
    if hasattr(model.model, "decoder"):
        projections = [layer.self_attn.out_proj for layer in model.model.decoder.layers]  # OPT
    else:
        projections = [layer.self_attn.o_proj for layer in model.model.layers]

    def collect() -> list[Tensor]:
        passes = []
        for ids in work.ids:
            with model.trace(ids, use_cache=False) as tracer:
                kept = nnsight.save([projection.input.flatten(0, 1) for projection in projections])
                tracer.stop()
            passes.append(kept)
        return [torch.cat(layer) for layer in zip(*passes, strict=True)]

    def clean(ids: Tensor) -> Tensor:
        with model.trace(ids, use_cache=False):
            logits = model.output.logits.save()
        return logits

    def ablated(ids: Tensor, mask: Tensor) -> Tensor:
        with model.trace(ids, use_cache=False):
            for projection, m, v in zip(projections, mask, work.values, strict=True):
                projection.input = torch.where(m, v, projection.input)
            logits = model.output.logits.save()
        return logits

    return collect, lambda: points(work, clean, ablated)


if __name__ == "__main__":
    serve("nnsight", load)
