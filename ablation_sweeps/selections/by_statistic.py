"""Selection by a statistic of the calibration activations."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.neurons.collect import MeanAbsolute
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.selections.scored import Scored
from ablation_sweeps.selections.selection import Selecting


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class ByStatistic(Scored):
    """A statistic of each neuron, summed over the neurons of a unit.

    Attributes:
        statistic: mean_abs: mean of the absolute value. variance: population variance. wifv: the variance times the
            squared norm of the neuron's column of the output projection, so the variance of what the neuron adds to
            the hidden state (arXiv:2312.11983).
    """

    statistic: Literal["mean_abs", "variance", "wifv"]

    def scores(self, selecting: Selecting) -> Float[torch.Tensor, " units"]:
        """The statistic, in the activations' units, or their square."""
        if self.statistic == "mean_abs":
            of_neurons = [x.double() for x in selecting.statistics(MeanAbsolute()).mean_abs]
        else:
            of_neurons = [moments.variance for moments in selecting.statistics().moments]
        if self.statistic == "wifv":
            norms = map(squared_column_norms, selecting.projections)
            of_neurons = [variance * norm for variance, norm in zip(of_neurons, norms, strict=True)]
        scores = torch.zeros(len(selecting.units), dtype=torch.float64)
        for unit_of_neuron, values in zip(selecting.units.of_neuron, of_neurons, strict=True):
            scores.index_add_(0, unit_of_neuron, values.cpu())
        return scores


def squared_column_norms(projection: Projection) -> Float[torch.Tensor, " neurons"]:
    """Squared norm of what each neuron adds to the output of the projection, per unit of its activation, float64.

    The projection is applied to unit vectors, so it may be a module of any kind that is linear up to its bias.
    """
    weight = next(projection.module.parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    norms = []
    with torch.inference_mode():
        bias = projection.module(torch.zeros(1, 1, projection.width, dtype=dtype, device=weight.device))
        for some in torch.eye(projection.width, dtype=dtype, device=weight.device).split(1024):
            norms.append(((projection.module(some[None]) - bias)[0].double() ** 2).sum(-1).cpu())
    return torch.cat(norms)
