"""Scopes: at which positions of a text values are written, or statistics are collected."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import NOT_SCORED, Batch

Positions = Literal["all", "not_first", "no_special", "last", "scored"]


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Scope:
    """Positions that take part in an ablation; padding never does.

    Each is "all"; "not_first", all but the first position of a text, where many models keep activations of a size of
    their own; "no_special", all but BOS, CLS, SEP and the like; "last", the last position; or "scored", those whose
    logits are scored.

    Attributes:
        write: positions at which values are written. Elsewhere the activation stays as the ablated pass computes it.
        statistics: calibration positions that enter the statistics.
    """

    write: Positions
    statistics: Positions


@runtime_checkable
class InScope(Protocol):
    """Gives the positions of a batch that are in a scope, `[batch, pos]`; None if all are, and nothing is padding.

    A loaded model has one, since only it knows its special tokens.
    """

    def __call__(self, batch: Batch, scope: Positions, /) -> Bool[torch.Tensor, "batch pos"] | None: ...


def positions(
    batch: Batch, scope: Positions, special_ids: Collection[int] = ()
) -> Bool[torch.Tensor, "batch pos"] | None:
    """The positions of a batch of texts that are in scope; None if all are, and nothing is padding.

    Args:
        special_ids: ids of the tokens that "no_special" leaves out.

    Raises:
        UserError: the batch holds images, and the scope is not "all".
    """
    if batch.labels.ndim == 1:
        if scope != "all":
            raise UserError(f"scope={scope}: this model does not tell the positions of an image apart; use scope=all")
        return None
    mask = batch.inputs.get("attention_mask")
    is_text = torch.ones_like(batch.labels, dtype=torch.bool) if mask is None else mask.bool()
    number = is_text.cumsum(1)  # 1 at the first position that is not padding
    if scope == "all":
        return None if is_text.all() else is_text
    if scope == "not_first":
        return is_text & (number > 1)
    if scope == "last":
        return is_text & (number == number[:, -1:])
    if scope == "scored":
        return batch.labels != NOT_SCORED
    special = torch.tensor(sorted(special_ids), dtype=torch.long, device=is_text.device)
    return is_text & ~torch.isin(batch.inputs["input_ids"], special)
