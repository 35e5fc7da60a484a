"""Selection by the exact effect: each unit is ablated alone, and the loss is measured."""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Float
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.selections.effects import baseline_values, exact_effects
from ablation_sweeps.selections.scored import Scored
from ablation_sweeps.selections.selection import Selecting


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Exact(Scored):
    """Leave-one-out on the calibration data: one pass for each unit.

    Attributes:
        tokens: scored calibration positions (or images) on which the loss is measured; None is all.
    """

    tokens: Annotated[int | None, Field(ge=1)]

    def scores(self, selecting: Selecting) -> Float[torch.Tensor, " units"]:
        """Increase of the mean loss, in nats, when the unit alone is ablated."""
        every_unit = torch.arange(len(selecting.units))
        return exact_effects(selecting, baseline_values(selecting, self.baseline), every_unit, self.tokens)
