"""Base of the rules that order units by a score."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.selections.effects import Baseline, baseline_values, exact_effects
from ablation_sweeps.selections.selection import Selecting, Within, grouped, ranked


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Scored:
    """Units in the order of their scores. A rule of your own inherits from it, and has a method `scores`.

    A score says little by itself: first-order estimates may even be anticorrelated with what they estimate where a
    model is near an optimum. So the exact effect of some units on the loss is measured as well, and the rank
    correlation of the two is logged and shown in the report.

    Attributes:
        order: "least_first": the units with the lowest score are ablated first; "most_first": those with the highest.
        within: "layer": the same share of the units in each layer; "model": of all units together. None: "layer", or
            "model" if units are whole layers.
        baseline: value that an ablated neuron has where an effect is estimated or measured: its calibration mean, or
            zero. It does not depend on the method, so that all methods ablate the same units.
        checked_units: number of units, taken at random, whose exact effect is measured; 0 for none.
        checked_tokens: scored calibration positions (or images) on which it is measured.
    """

    label: str
    order: Literal["least_first", "most_first"]
    within: Within | None
    baseline: Baseline
    checked_units: Annotated[int, Field(ge=0)]
    checked_tokens: Annotated[int, Field(ge=1)]
    depends_on_seed = False

    def scores(self, selecting: Selecting) -> Float[torch.Tensor, " units"]:
        """The score of each unit; higher for a more important one."""
        raise NotImplementedError

    def orders(self, selecting: Selecting) -> list[Int[torch.Tensor, " _units"]]:
        """Each group of units in the order of the scores.

        Raises:
            UserError: the scores have another shape than `[units]`, or are not finite.
        """
        groups = grouped(selecting.units, self.within)
        tensors = selecting.cached(lambda: self._tensors(selecting))
        if len(tensors["checked"]) > 1:
            rho = rank_correlation(tensors["scores"][tensors["checked"]], tensors["exact"])
            selecting.note(
                f"selection={self.label}: rank correlation of the score with the exact effect on the loss {rho:.2f}, "
                f"on {len(tensors['checked'])} of {len(selecting.units)} units"
            )
        return ranked(tensors["scores"], groups, self.order)

    def _tensors(self, selecting: Selecting) -> dict[str, torch.Tensor]:
        n_units = len(selecting.units)
        scores = torch.as_tensor(self.scores(selecting)).detach().double().cpu()
        if scores.shape != (n_units,):
            raise UserError(f"selection: gives scores of shape {list(scores.shape)} for {n_units} units; give [units]")
        if not scores.isfinite().all():
            raise UserError("selection: gives a score that is not finite; try model.dtype=float32")
        checked = torch.randperm(n_units, generator=torch.Generator().manual_seed(0))[: self.checked_units]
        exact = torch.zeros(0, dtype=torch.float64)
        if len(checked):
            exact = exact_effects(selecting, baseline_values(selecting, self.baseline), checked, self.checked_tokens)
        return {"scores": scores, "checked": checked, "exact": exact}


def rank_correlation(a: Float[torch.Tensor, " n"], b: Float[torch.Tensor, " n"]) -> float:
    """Spearman's rank correlation; NaN if all values of one are equal."""
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(x.numpy())) for x in (a, b)]
    if any(len(rank.unique()) < 2 for rank in ranks):
        return math.nan
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
