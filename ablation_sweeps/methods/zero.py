"""Zero: the neuron is silent."""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.ablation import Constant, Fitting
from ablation_sweeps.lazy import torch


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Zero:
    label: str

    def fit(self, fitting: Fitting) -> Constant:
        return Constant([torch.zeros(p.width) for p in fitting.projections])
