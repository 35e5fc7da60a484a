"""Exports the numbers of a sweep: csv, parquet, and a LaTeX table for a paper."""

from __future__ import annotations

import math
import re
from pathlib import Path

from ablation_sweeps.base import files
from ablation_sweeps.base.files import write_csv
from ablation_sweeps.base.lazy import pd
from ablation_sweeps.results.curves import read_curves
from ablation_sweeps.results.metrics import metric_named
from ablation_sweeps.results.study import StudyResult
from ablation_sweeps.results.sweep import read_studies
from ablation_sweeps.results.units import read_units


def export(sweep: Path, to: Path) -> list[Path]:
    """Write all points to curves.csv and curves.parquet, and the areas to areas.tex, one table per study.

    The effects of units that were ablated alone go to units.csv and units.parquet.

    Returns:
        Paths of the files.
    """
    curves, units = read_curves(sweep), read_units(sweep)
    written = []
    for name, table in (("curves", curves), ("units", units)):
        if len(table):
            written += [to / f"{name}.csv", to / f"{name}.parquet"]
            write_csv(table, written[-2])
            files.write_table(written[-1], table)
    if len(curves):
        written.append(to / "areas.tex")
        files.write_text(written[-1], "\n".join(_table(found) for _, found in read_studies(curves, sweep)))
    return written


def _table(study: StudyResult) -> str:
    """LaTeX table of each metric and method: the area, and its interval below it. It needs the package booktabs."""
    lines, rarer = [], ""
    for metric in study.levels:
        found = [study.area(metric, method) for method in study.methods]
        name = re.sub(r" \(.*?\)", "", metric_named(metric).label_in(study.unit))  # areas have another unit
        name, _, skipped = name.partition(", without")
        if skipped:  # too long for a column
            name, rarer = f"{name}, rarer tokens", f" Rarer tokens: without{skipped}."
        lines.append([_escaped(name), *(f"{area.value:.3f}" for area in found)])
        if not all(math.isnan(area.low) for area in found):
            lines.append(["", *(rf"\scriptsize [{area.low:.3f}, {area.high:.3f}]" for area in found)])
    caption = (
        f"{study.title}. Areas under the curves up to {100 * study.reach:.4g}%, as a share of the clean value (KL: "
        f"nats), with 95 % intervals over {study.basis}.{rarer}"
    )
    table = pd.DataFrame(lines, columns=["", *map(_escaped, study.methods)])
    text = table.to_latex(index=False, caption=_escaped(caption), label=f"tab:{study.name}", position="htbp",
                          column_format="l" + "r" * len(study.methods))  # fmt: skip
    return text.replace("\\caption", "\\centering\n\\footnotesize\n\\setlength{\\tabcolsep}{4pt}\n\\caption", 1)


SPECIAL = {character: "\\" + character for character in "&%$#_{}"}
SPECIAL |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _escaped(text: str) -> str:
    text = "".join(SPECIAL.get(character, character) for character in text)
    return text.replace("·", r"\textperiodcentered{}").replace("‖", r"\textbar\textbar{}")
