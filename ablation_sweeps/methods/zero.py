"""Zero ablation: replace a neuron with 0."""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.methods.method import Constant, Fitting


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Zero:
    """Zero for every neuron."""

    label: str

    def fit(self, fitting: Fitting) -> Constant:
        """Zeros, `[neurons]` per layer, float32."""
        return Constant([torch.zeros(p.width) for p in fitting.projections])
