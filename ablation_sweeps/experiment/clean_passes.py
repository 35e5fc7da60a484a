"""The clean pass over each batch, which jobs with the same model and data share."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float, Int

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch
from ablation_sweeps.models.transformer import Transformer

MAX_CLEAN_BYTES = 1 << 28  # bytes of main memory

PartKey = tuple[int, ...]  # (7,) is batch 7, (7, 0) its first half, (7, 0, 1) the second half of that


@dataclass
class CleanPasses:
    """Gives the clean logits of a batch where it is scored: to the bit those of a forward pass, and sooner for a batch
    that it has seen.

    Logits of language models are large. Of these it keeps what the head takes, and applies the head again; where that
    does not give the logits (some models scale or cap them afterwards), it keeps nothing.

    Attributes:
        kept: of each batch, or of its parts; on the CPU.
    """

    model: Transformer
    room: int = MAX_CLEAN_BYTES
    kept: dict[PartKey, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model.head is not None and not self._head_comes_last():
            self.room = 0

    def logits(
        self, part: PartKey, batch: Batch, rows: Int[torch.Tensor, " rows"]
    ) -> Float[torch.Tensor, "rows classes"]:
        """Args:
        rows: places of the positions, or images, that are scored; the same whenever it is asked for this part.
        """
        if part in self.kept:
            return self._from(self.kept[part])
        logits, shown = self.model.pass_at(batch, rows)
        x = logits if self.model.head is None else shown
        if x is not None and x.nbytes <= self.room:
            self.kept[part] = x.to("cpu", copy=True)
            self.room -= x.nbytes
        return logits

    def _from(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.model.device)
        if self.model.head is not None:
            x = self.model.head(x[None])[0]
        return x.to(self.model.device)  # where a model that is spread over devices gives its logits

    def _head_comes_last(self) -> bool:
        """Of one short input: the logits of a batch are large."""
        probe = self.model.other_input("probe", 8, 0).to(self.model.device)
        with torch.inference_mode():
            logits, shown = self.model.pass_at(probe, torch.arange(1, 8, device=self.model.device))
            return shown is not None and torch.equal(self._from(shown), logits)
