"""How examples become the batches of one model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ablation_sweeps.data.batch import Batch, Document, Picture, Split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """How much data is used: whichever limit comes first. None is no limit.

    Attributes:
        window: texts are batched by length among so many that follow each other, so that after each window the texts
            done are the first ones of the data, and not the longest; None: among all of them.
    """

    tokens: int | None
    examples: int | None
    window: int | None = None

    def say_if_short(self, split: Split, positions: int, more: str = "") -> None:
        """Statistics do not show how much data they were taken over; scores do.

        Args:
            more: what gives more of it.
        """
        enough = self.tokens is None or positions >= self.tokens - 1  # one token alone is not scored
        if split == "calibration" and not enough and self.examples is None:
            log.info("statistics.tokens=%d: the calibration data have %d, all taken%s", self.tokens, positions, more)


@runtime_checkable
class Encoder(Protocol):
    """Turns documents or pictures into the batches of one model."""

    def __call__(
        self, examples: Iterable[Document | Picture], split: Split, budget: Budget, batch_tokens: int, seed: int
    ) -> list[Batch]: ...


@runtime_checkable
class OtherInput(Protocol):
    """One input of `length` positions that has nothing to do with the data, for the resample method."""

    def __call__(self, source: str, length: int, seed: int) -> Batch: ...
