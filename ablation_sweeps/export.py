"""The numbers of a sweep for other programs: csv, parquet, and a table for a paper in LaTeX."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ablation_sweeps import page, store
from ablation_sweeps.report import folders_by_id, measured, read_curves, studies, write_csv


def export(sweep: Path, to: Path) -> list[Path]:
    """Writes curves.csv and curves.parquet, every point, and areas.tex, one table a study. Returns their paths."""
    curves = read_curves(sweep)
    files = [to / name for name in ("curves.csv", "curves.parquet", "areas.tex")]
    write_csv(curves, files[0])
    store.write_table(files[1], curves)
    folders = folders_by_id(sweep)
    found = [of_study for study in studies(curves) if (of_study := measured(study, folders))]
    store.write_text(files[2], "\n".join(map(_table, found)))
    return files


def _table(study: page.Measured) -> str:
    """Areas with their intervals; needs the package booktabs."""
    import pandas as pd

    rows = [
        {"Method": row["method"], **{_heading(key): _cell(row[key]) for key in row if key.startswith("area of")}}
        for row in page.areas(study)
    ]
    caption = f"{study.title}. Areas under the curves, as a share of the clean value (KL: nats), with 95 % intervals."
    table = pd.DataFrame(rows).map(_escaped).rename(columns=_escaped)
    return table.to_latex(index=False, caption=_escaped(caption), label=f"tab:{study.name}", position="htbp",
                          column_format="l" + "r" * (table.shape[1] - 1))  # fmt: skip


def _heading(key: str) -> str:
    return key.removeprefix("area of ")


def _cell(values: list[Any]) -> str:
    value, low, high = values
    return f"{value:.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def _escaped(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text.replace("·", r"\textperiodcentered{}").replace("‖", r"\textbar\textbar{}")
