"""Runs a batch in halves where the device has too little memory for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch

TOO_LARGE = "the device has too little memory for {} examples at once, so they are halved: the last digit may differ"

PartKey = tuple[int, ...]  # (7,) is batch 7, (7, 0) its first half, (7, 0, 1) the second half of that

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A batch, or the part of one that is run in one pass.

    Attributes:
        start: number of examples of the whole batch before this part.
    """

    batch: Batch
    key: PartKey
    start: int = 0

    def in_two(self) -> tuple[Part, Part]:
        """The first half of the part and the second one.

        Raises:
            UserError: it has a single example, which does not fit into memory then.
        """
        first, last = self.batch.split_in_two()
        return (
            Part(first, (*self.key, 0), self.start),
            Part(last, (*self.key, 1), self.start + len(first.names)),
        )


@dataclass
class PassLimit:
    """The largest pass that is tried on a device.

    Attributes:
        positions: most positions, or images, in one pass; lowered where the device has too little memory for them.
        warn: called with a warning each time the limit is lowered.
    """

    positions: int
    warn: Callable[[str], None]

    def lower_below(self, batch: Batch) -> None:
        """Lower the limit to half of a batch that did not fit into memory."""
        n = len(batch.names)
        self.positions = (n + 1) // 2 * (batch.size // n)
        self.warn(TOO_LARGE.format(n))


def run_in_memory(run: Callable[[], T]) -> T | None:
    """Call `run` and return its result; None if the device has too little memory, all of which is then free again."""
    try:
        return run()
    except torch.OutOfMemoryError:  # it keeps the memory of the failed pass alive until this function returns
        return None


def run_at_once(batch: Batch, run: Callable[[], T], limit: PassLimit) -> T | None:
    """Call `run`, a pass over the whole batch, if the limit allows it; None if the batch does not fit into memory."""
    if not batch.fits(limit.positions):
        return None
    result = run_in_memory(run)
    if result is None:
        limit.lower_below(batch)
    return result


def run_in_halves(part: Part, run: Callable[[Part], T], limit: PassLimit) -> list[T]:
    """Call `run` with a batch, or, if it does not fit into memory, with its halves, or with theirs.

    Args:
        run: a pass over a batch or a part of one. It may not return None.

    Returns:
        The results of the parts, from the first examples to the last.

    Raises:
        UserError: a single example does not fit.
    """
    result = run_at_once(part.batch, lambda: run(part), limit)
    if result is not None:
        return [result]
    first, last = part.in_two()
    return [*run_in_halves(first, run, limit), *run_in_halves(last, run, limit)]
