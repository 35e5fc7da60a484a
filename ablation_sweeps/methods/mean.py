"""Mean ablation: replace a neuron with its mean over the calibration data."""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.methods.method import Constant, Fitting


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Mean:
    """The mean of each neuron's calibration activations."""

    label: str

    def fit(self, fitting: Fitting) -> Constant:
        """Constants `[neurons]` per layer, float32, in the activations' units."""
        return Constant([moments.mean.float() for moments in fitting.statistics().moments])
