"""Layer sweeps: studies that differ only in the one layer that they ablate, put together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ablation_sweeps.results.comparison import Estimate
from ablation_sweeps.results.curves import NAME, Study, distinguishing_options
from ablation_sweeps.results.display import display_order
from ablation_sweeps.results.study import StudyResult

if TYPE_CHECKING:
    from collections.abc import Sequence

Line = list[tuple[int, Estimate]]  # layers in increasing order, and values at them


@dataclass(frozen=True)
class LayerSweep:
    """Values of several layers, each ablated in a study of its own.

    Attributes:
        name: file name of its figure.
        unit: what is scored, "token" or "image".
        ablated: what is ablated, "neurons", "heads", ...
        studies: the study of each layer, in increasing order of layers.
        fractions: fractions above 0 that all layers have.
    """

    name: str
    title: str
    unit: str
    ablated: str
    methods: list[str]
    studies: Mapping[int, StudyResult]
    fractions: list[float]

    def lines(self, metric: str, fraction: float) -> dict[str, Line]:
        """For each method, its value at a fraction in each layer that has it."""
        found: dict[str, Line] = {}
        for layer, study in self.studies.items():
            for method, points in study.levels.get(metric, {}).items():
                found.setdefault(method, []).extend((layer, value) for at, value in points if at == fraction)
        return {method: found[method] for method in self.methods if found.get(method)}

    @property
    def metrics(self) -> list[str]:
        """Metrics that every layer has, in the order of display."""
        first, *others = self.studies.values()
        return [metric for metric in first.levels if all(metric in other.levels for other in others)]

    def clean(self, metric: str) -> float:
        """The clean value."""
        return self.lines(metric, 0.0)[self.methods[0]][0][1].value


def layer_sweeps(found: Iterable[tuple[Study, StudyResult, Mapping[str, Any]]]) -> list[LayerSweep]:
    """All layer sweeps among some studies, which are given with their analyses and their options.

    Studies belong together if all their options but `site.layers` are the same, and if the clean model has the same
    loss in them; otherwise their data or their model have changed.
    """
    groups: dict[tuple[object, ...], dict[int, tuple[Study, StudyResult]]] = {}
    for study, result, config in found:
        layers = config.get("site", {}).get("layers", "all")
        if not isinstance(layers, list) or len(layers) != 1:
            continue
        options = {key: value for key, value in distinguishing_options(config).items() if key != "site.layers"}
        clean = next(iter(next(iter(result.levels.values())).values()))[0][1].value
        key = (*study.rows.iloc[0][NAME], tuple(sorted((k, str(v)) for k, v in options.items())), f"{clean:.5g}")
        groups.setdefault(key, {}).setdefault(int(layers[0]), (study, result))
    together = [_together(dict(sorted(group.items()))) for group in groups.values() if len(group) > 1]
    return [sweep for sweep in together if sweep.fractions]


def _together(group: Mapping[int, tuple[Study, StudyResult]]) -> LayerSweep:
    results = {layer: result for layer, (_, result) in group.items()}
    (first, result), *_ = group.values()
    model, dataset, site, selection = first.rows.iloc[0][[*NAME, "selection"]]
    options = [
        word for word in first.rows["options"].iloc[0].split(" ") if word and not word.startswith("site.layers=")
    ]
    titled = [f"{model} on {dataset}", site, result.ablated, selection, f"layers {_said([*group])}", *options]
    fractions = set.intersection(*({at for at, _ in _first_line(result)} for result in results.values())) - {0.0}
    return LayerSweep(
        name=f"{first.name}-to-{max(group)}",
        title=" · ".join(titled),
        unit=first.unit,
        ablated=result.ablated,
        methods=display_order({method for result in results.values() for method in result.methods}),
        studies=results,
        fractions=sorted(fractions),
    )


def _first_line(result: StudyResult) -> Sequence[tuple[float, Estimate]]:
    return next(iter(next(iter(result.levels.values())).values()))


def _said(layers: list[int]) -> str:
    """Layers in words: "0 to 11" or "0, 2, 5"."""
    is_range = layers == [*range(layers[0], layers[-1] + 1)]
    return f"{layers[0]} to {layers[-1]}" if is_range else ", ".join(map(str, layers))


def layers_verdict(sweep: LayerSweep) -> str:
    """Say for each method in which layer the loss is highest, and in which it is lowest."""
    at = sweep.fractions[-1]
    said = []
    for method, line in sweep.lines("loss", at).items():
        ranked = sorted((value.value, layer) for layer, value in line if not math.isnan(value.value))
        (low, least), (high, most) = ranked[0], ranked[-1]
        said.append(f"{method}: {high:.3f} in layer {most}, {low:.3f} in layer {least}")
    return (
        f"Highest and lowest loss with {100 * at:.4g}% of the {sweep.ablated} of one layer ablated (clean: "
        f"{sweep.clean('loss'):.3f}): {'; '.join(said)}. Single values: whether two layers differ is not tested."
    )
