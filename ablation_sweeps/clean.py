"""The clean pass over each batch, which jobs with the same model and data share."""

from __future__ import annotations

from dataclasses import dataclass, field

from ablation_sweeps.data import Batch
from ablation_sweeps.lazy import torch
from ablation_sweeps.transformer import Transformer

ROOM = 1 << 28  # bytes of main memory

Part = tuple[int, ...]  # (7,) is batch 7, (7, 0) its first half, (7, 0, 1) the second half of that


@dataclass
class CleanPasses:
    """Gives the clean logits of a batch: to the bit those of a forward pass, and sooner for a batch that it has seen.

    Logits of language models are large. Of these it keeps what the head takes, and applies the head again; where that
    does not give the logits (some models scale or cap them afterwards), it keeps nothing.

    Attributes:
        kept: of each batch, or of its parts; on the CPU.
    """

    model: Transformer
    room: int = ROOM
    kept: dict[Part, torch.Tensor] = field(default_factory=dict)

    def logits(self, part: Part, batch: Batch) -> torch.Tensor:
        """`[batch, pos, d_vocab]` or `[batch, classes]`."""
        if part in self.kept:
            return self._from(self.kept[part])
        seen: list[torch.Tensor] = []
        head = self.model.head
        handle = head and head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            logits = self.model.logits(batch)
        finally:
            if handle:
                handle.remove()
        self._keep(part, seen[0] if seen else logits, logits)
        return logits

    def _from(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.model.device)
        if self.model.head is not None:
            x = self.model.head(x).to(self.model.device)  # a model that is spread over devices gives its logits there
        return x

    def _keep(self, part: Part, x: torch.Tensor, logits: torch.Tensor) -> None:
        if x.nbytes > self.room:
            return
        x = x.to("cpu", copy=True)
        if not self.kept and not torch.equal(self._from(x), logits):
            self.room = 0  # it is so for all batches
            return
        self.kept[part] = x
        self.room -= x.nbytes
