"""Cache of clean (unablated) logits, shared by jobs with the same model and data."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float, Int

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch
from ablation_sweeps.data.memory import PartKey
from ablation_sweeps.models.transformer import Transformer

MAX_CLEAN_BYTES = 1 << 28  # in main memory


@dataclass
class CleanPasses:
    """Gives the clean logits of a batch at its scored positions, bit-equal to a forward pass, cached if they fit.

    The logits of a language model are large, so the input of its head is cached instead and the head applied again. If
    that does not reproduce the logits (some models scale or cap them after the head), nothing is cached.

    Attributes:
        room: bytes that are left in the cache.
        kept: the cached tensor of each batch, or part of one, on the CPU.
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
        """Clean logits of one batch, or part of one.

        Args:
            rows: indices of the scored positions, or images, in the flattened batch; the same at every call for a part.
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
        return x.to(self.model.device)  # a model that is split across devices may give its logits on another one

    def _head_comes_last(self) -> bool:
        """True if the head reproduces the logits from its input. Tried with one short input, whose logits are small."""
        probe = self.model.other_input("probe", 8, 0).to(self.model.device)
        with torch.inference_mode():
            logits, shown = self.model.pass_at(probe, torch.arange(1, 8, device=self.model.device))
            return shown is not None and torch.equal(self._from(shown), logits)
