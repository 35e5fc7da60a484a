"""Prints curves as tables on the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ablation_sweeps.base.terminal import encodable, terminal
from ablation_sweeps.results.curves import Study, first_metric, groups, seeds_said, studies, summarise
from ablation_sweeps.results.display import display_order
from ablation_sweeps.results.metrics import metric_named, pooled
from ablation_sweeps.results.study import of_calibration, thin_calibration

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pandas import DataFrame
    from rich.console import Console
    from rich.table import Table

    from ablation_sweeps.results.study import StudyResult


MAX_COLUMNS = 11  # fractions in a table


def print_tables(
    curves: DataFrame, console: Console | None = None, found: Mapping[str, StudyResult] | None = None
) -> None:
    """Print a table of the loss and one of the accuracy for each study, fitted to a terminal, but complete in a file.

    Args:
        found: result of each study, whose areas are shown with their intervals (see `curves.summarise`).
    """
    from rich.measure import Measurement
    from rich.text import Text

    console = console or terminal()
    unlimited, screen = console.options.update(max_width=10_000), console.width
    for study in studies(curves):
        of_study = summarise(study.rows, found)
        shown = [metric for metric in ("loss", "top1") if (study.rows["metric"] == metric).any()]
        for step in _steps(study.rows["fraction"].nunique()):
            tables = [_table(study, of_study, metric, step, console) for metric in shown]
            width = max((Measurement.get(console, unlimited, table).maximum for table in tables), default=0)
            if width <= screen or not console.is_terminal:
                break
        console.print(Text(encodable(study.title, console), style="bold"), soft_wrap=True)
        console.width = max(width, screen)  # a table is not cut: the terminal wraps its lines
        console.print(*tables)
        console.width = screen
        for note in _notes(study.rows, of_study, step, console):
            console.print(Text(encodable(note, console), style="dim"), soft_wrap=True)
        console.print()


def _steps(n_fractions: int) -> list[int]:
    """Distances between fractions that get a column, from most columns to fewest; those that divide evenly, if any."""
    last = max(n_fractions - 1, 1)
    steps = range(math.ceil(last / (MAX_COLUMNS - 1)), last + 1)
    even = [step for step in steps if last % step == 0]
    return even if len(even) > 1 or last <= 2 else list(steps)


def _table(study: Study, summary: DataFrame, metric: str, step: int, console: Console) -> Table:
    """Table of one metric. The best value of each column is bold; in a file, which has no bold, it gets a star."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown_as, rows = metric_named(metric), study.rows.query("metric == @metric")
    methods = display_order(study.rows["method"].unique())
    points = list(groups(rows, ["fraction", "method"]))
    seeds = {tuple(at.values()): frozenset(of_seeds["seed"]) for at, of_seeds in points}
    means = {
        (at["fraction"], at["method"]): round(shown_as.scale * at["value"], shown_as.digits)
        for at in pooled(rows).to_dict("records")
    }
    columns_of_auc = ["auc", "auc_low", "auc_high", "auc_n_seeds"]
    auc = summary[summary["metric"] == metric].set_index("method")[columns_of_auc].reindex(methods).round(3).T.to_dict()
    fractions = sorted(rows["fraction"].unique())
    shown = [*fractions[:-1:step], fractions[-1]]
    columns = {f"{100 * f:.4g} %" if f else "clean": [means.get((f, m), math.nan) for m in methods] for f in shown}
    # Means over different seeds, and so different neurons, are not comparable.
    covered = {title: [f] for title, f in zip(columns, shown, strict=True)} | {"AUC": fractions}
    fair = {title: len({seeds[f, m] for f in of for m in methods if (f, m) in seeds}) == 1
            for title, of in covered.items()}  # fmt: skip
    # Areas with intervals are over the seeds and fractions that all methods have.
    fair["AUC"] |= any(not math.isnan(auc[method]["auc_n_seeds"]) for method in methods)
    if any(not math.isnan(auc[method]["auc"]) for method in methods):
        columns["AUC"] = [auc[method]["auc"] for method in methods]

    table = Table(shown_as.heading_in(study.unit), box=box.SIMPLE_HEAD, pad_edge=False)
    cells = [[Text(encodable(method, console))] for method in methods]
    for title, values in columns.items():
        table.add_column(title, justify="right", no_wrap=True)
        known = {value for value in values if not math.isnan(value)}
        # If all are equal, as in the column of clean values, none is the best.
        best = None
        if len(known) > 1 and fair[title]:
            best = min(known) if shown_as.less_is_better else max(known)
        for method, row, value in zip(methods, cells, values, strict=True):
            text = "–" if math.isnan(value) else f"{value:.{3 if title == 'AUC' else shown_as.digits}f}"
            text += "" if console.is_terminal else "*" if value == best else " "
            if title == "AUC":
                low, high = auc[method]["auc_low"], auc[method]["auc_high"]
                text += " –" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]"
            row.append(Text(encodable(text, console), style="bold" if value == best else ""))
    for row in cells:
        table.add_row(*row)
    return table


def _notes(rows: DataFrame, summary: DataFrame, step: int, console: Console) -> list[str]:
    points = rows.drop_duplicates(["method", "seed", "fraction"])
    methods, n_fractions, n_seeds = rows["method"].unique(), rows["fraction"].nunique(), rows["seed"].nunique()
    notes = [] if console.is_terminal or len(methods) == 1 else ["*: best of its column"]
    if len(points) > len(points.drop_duplicates(["method", "fraction"])):
        notes.append(f"means over {seeds_said(rows)}")
    if summary["auc"].notna().any():
        notes.append(_about_areas(summary.query("metric in ('loss', 'top1')")))
    if any(of_seed["n"].nunique() > 1 for _, of_seed in first_metric(rows).groupby("seed")):
        notes.append("columns are of different documents (eval.target_stderr): compare within a column; the clean "
                     "value of each is in curves.parquet, and the AUC is of that")  # fmt: skip
    if thin := thin_calibration(rows):
        notes.append(f"statistics {of_calibration(thin)} (statistics.tokens)")
    if step > 1:
        notes.append(f"{math.ceil((n_fractions - 1) / step) + 1} of {n_fractions} fractions; all are in curves.parquet")
    if len(points) < len(methods) * n_seeds * n_fractions:
        has = points.groupby("method").size().to_dict()
        few = ", ".join(f"{method} {n}" for method, n in has.items() if n < n_seeds * n_fractions)
        notes.append(f"not every method has every seed at every fraction: of {n_seeds * n_fractions} points, {few}; "
                     "where seeds differ, no method is marked as the best")  # fmt: skip
    for metric, of_metric in rows.groupby("metric", sort=False):
        has = of_metric.groupby("method").size()
        lacking = [method for method, n in points.groupby("method").size().items() if has.get(method, 0) < n]
        if lacking:
            notes.append(f"{metric} was not measured by every run of {', '.join(map(str, lacking))}")
    return notes


def _about_areas(summary: DataFrame) -> str:
    text = "AUC: mean over fractions 0 to 1, as a share of the clean value"
    known = summary.dropna(subset=["auc_n_seeds"])
    if known.empty:  # no run has sums per document
        return f"{text}; –: no interval without documents.parquet"
    n_seeds = int(known["auc_n_seeds"].max())
    over = "documents; one seed: may not hold for other neurons" if n_seeds == 1 else f"documents and {n_seeds} seeds"
    lacks = "; –: not on the seeds and fractions of the others" if summary["auc"].isna().any() else ""
    alone = "; –: no interval from one document" if known["auc_low"].isna().any() else ""
    return f"{text} [95 % interval over {over}]{lacks}{alone}"
