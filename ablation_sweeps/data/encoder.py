"""Interfaces for turning examples into the batches of one model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ablation_sweeps.data.batch import Batch, Document, Picture, Split
from ablation_sweeps.data.scope import Positions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """How much data to use: up to whichever limit comes first. None is no limit.

    Attributes:
        tokens: maximum number of positions.
        examples: maximum number of documents or images.
        window: texts are batched by length only among this many consecutive ones, so that after each window the
            finished texts are the first ones of the data, not the longest ones. None: among all texts.
        scope: calibration positions that enter the statistics; only these use up `tokens`.
    """

    tokens: int | None
    examples: int | None
    window: int | None = None
    scope: Positions = "all"

    def say_if_short(self, split: Split, positions: int, more: str = "") -> None:
        """Log if there are fewer calibration data than asked for: unlike scores, statistics do not show their size.

        Args:
            more: says how to get more data.
        """
        enough = self.tokens is None or positions >= self.tokens - 1  # a single token is not scored
        if split == "calibration" and not enough and self.examples is None:
            log.info("statistics.tokens=%d: the calibration data have only %d, and all are used%s", self.tokens,
                     positions, more)  # fmt: skip


@runtime_checkable
class Encoder(Protocol):
    """Turns documents or images into the batches of one model."""

    def __call__(
        self, examples: Iterable[Document | Picture], split: Split, budget: Budget, batch_tokens: int, seed: int
    ) -> list[Batch]: ...


@runtime_checkable
class OtherInput(Protocol):
    """Makes one input of `length` positions that is unrelated to the data, for the resample method."""

    def __call__(self, source: str, length: int, seed: int) -> Batch: ...
