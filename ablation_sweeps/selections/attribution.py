"""Selection by attribution: the effect of each unit on the loss, estimated from gradients."""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Float
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.selections.effects import baseline_values, gradient_effects
from ablation_sweeps.selections.scored import Scored
from ablation_sweeps.selections.selection import Selecting


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Attribution(Scored):
    """First-order estimate: the activation's distance from the baseline times the gradient of the loss, negated.

    With `z` the gate of a unit (see `gradient_effects`), the score is `-dL/dz` at the unchanged model, in nats per
    scored position. It costs one pass forwards and one backwards over the calibration data.

    Source: Molchanov et al., arXiv:1611.06440; Michel et al., arXiv:1905.10650. Departs from them in: the sign is kept,
    as that of an effect.
    """

    def scores(self, selecting: Selecting) -> Float[torch.Tensor, " units"]:
        """Estimated increase of the mean loss, in nats, when the unit is ablated."""
        return gradient_effects(selecting, baseline_values(selecting, self.baseline), (1.0,))


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class IntegratedGradients(Scored):
    """The same estimate, averaged over points between the unchanged model and the one with all units ablated.

    The scores of all units add up to the effect of ablating all of them, up to the error of the midpoint rule.

    Source: Sundararajan et al., arXiv:1703.01365. Departs from it in: the path runs over the gates of all units, not
    over the inputs.

    Attributes:
        steps: number of points; each costs as much as `Attribution`.
    """

    steps: Annotated[int, Field(ge=1)]

    def scores(self, selecting: Selecting) -> Float[torch.Tensor, " units"]:
        """Estimated increase of the mean loss, in nats, when the unit is ablated."""
        shares = [(step + 0.5) / self.steps for step in range(self.steps)]
        return gradient_effects(selecting, baseline_values(selecting, self.baseline), shares)
