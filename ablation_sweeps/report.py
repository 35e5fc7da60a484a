"""Rows of a sweep's runs -> tables on the terminal, curves.parquet, summary.csv, figures and report.html."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ablation_sweeps import neurons, page, store
from ablation_sweeps.activations import Histogram, kept
from ablation_sweeps.comparison import half_gone_at, shared
from ablation_sweeps.data import UserError
from ablation_sweeps.figures import draw, in_order, save
from ablation_sweeps.metrics import auc, measure

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console
    from rich.table import Table

STUDY = ["study", "kind", "model", "dataset", "site", "selection"]
POINT = ["study", "method", "seed", "fraction", "metric"]
MAX_COLUMNS = 11  # fractions in a table


@dataclass(frozen=True)
class Study:
    """The rows of all runs that may be compared."""

    name: str  # of its figure's file; unique in a sweep
    title: str
    unit: str  # "token" or "image"
    rows: DataFrame


def read_curves(*sweeps: Path) -> DataFrame:
    """Rows of all finished runs below some folders, one for each study, method, seed, fraction and metric.

    Runs of one study are compared on the same documents: where a run has more of them at a fraction than another one
    (see eval.target_stderr), its rows are those of the documents that all have.

    Raises:
        UserError: no finished run lies there.
    """
    import pandas as pd

    paths = sorted(path for sweep in sweeps for path in Path(sweep).rglob("rows.parquet"))
    whole = {path.parent: rows for path in paths if (rows := store.result(path.parent, path.name)) is not None}
    if not whole:
        where = ", ".join(map(str, sweeps))
        raise UserError(f"no finished run below {where}: name the folder of a sweep (results/<sweep>) that has run")
    by_study: dict[str, list[Path]] = {}
    for folder, rows in whole.items():
        by_study.setdefault(rows["study"].iloc[0], []).append(folder)
    for folders in by_study.values():
        whole |= _on_the_same_documents({folder: whole[folder] for folder in folders})
    rows = _distinguish(pd.concat(whole.values(), ignore_index=True))
    return rows.drop_duplicates(POINT).sort_values(POINT).reset_index(drop=True)


def _on_the_same_documents(runs: dict[Path, DataFrame]) -> dict[Path, DataFrame]:
    sizes = {point for rows in runs.values() for point in zip(rows["metric"], rows["fraction"], rows["n"], strict=True)}
    if len(sizes) == len({(metric, fraction) for metric, fraction, _ in sizes}):
        return runs  # all the same: the usual case, in which documents.parquet need not be read
    tables = [table for folder in runs if (table := store.result(folder, "documents.parquet")) is not None]
    if len(tables) < len(runs):
        return runs
    found = {}
    for (folder, rows), table in zip(runs.items(), shared(tables), strict=True):
        points = {fraction: group for fraction, group in table.groupby("fraction")}
        measured = [measure(points[f], metric) for f, metric in zip(rows["fraction"], rows["metric"], strict=True)]
        found[folder] = rows.assign(**{key: [m[key] for m in measured] for key in ("value", "stderr", "n")})
    return found


def _distinguish(rows: DataFrame) -> DataFrame:
    """Name the parameters in which methods of one label differ: one label must not hide two experiments."""
    for _, same in rows.groupby(["study", "method"]):
        variants = {text: json.loads(text) for text in same["method_params"].unique()}
        keys = sorted({key for params in variants.values() for key in params})
        differing = [key for key in keys if len({json.dumps(params.get(key)) for params in variants.values()}) > 1]
        for text, params in variants.items() if differing else ():
            index = same.index[same["method_params"] == text]
            rows.loc[index, "method"] += " " + ",".join(f"{key}={params.get(key)}" for key in differing)
    return rows


def _groups(rows: DataFrame, keys: list[str]) -> Iterator[tuple[dict[str, Any], DataFrame]]:
    for key, group in rows.groupby(keys):
        yield dict(zip(keys, cast("tuple[Any, ...]", key), strict=True)), group


def areas(curves: DataFrame) -> DataFrame:
    """Column `auc` (see `metrics.auc`) for each curve and metric; NaN where the fractions do not span 0 to 1."""
    import pandas as pd

    found = []
    for key, curve in _groups(curves, [*STUDY, "method", "seed", "metric"]):
        curve = curve.sort_values("fraction")
        found.append({**key, "auc": auc(curve["fraction"].tolist(), curve["value"].tolist(), key["metric"])})
    return pd.DataFrame(found)


def interval(values: list[float]) -> tuple[float, float]:
    """95 % t-interval of a mean; NaN where there are fewer than two values."""
    from scipy import stats

    if len(values) < 2:
        return math.nan, math.nan
    mean, n = statistics.fmean(values), len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def summarise(curves: DataFrame) -> DataFrame:
    """One row for each study, method and metric.

    Columns: auc, auc_low, auc_high (mean over seeds and its 95 % t-interval), n_seeds, clean, at_50 (means over seeds)
    and half_gone_at: the fraction at which the mean curve first falls to half of its clean value (accuracies only).
    NaN where a value was not measured or is never reached.
    """
    import pandas as pd

    found, keys = [], [*STUDY, "method", "metric"]
    of_seeds = {tuple(key.values()): table["auc"].dropna().tolist() for key, table in _groups(areas(curves), keys)}
    for key, curve in _groups(curves, keys):
        auc = of_seeds[tuple(key.values())]
        low, high = interval(auc)
        mean = {at: float(points["value"].mean()) for at, points in curve.groupby("fraction")}
        row = {"n_seeds": curve["seed"].nunique(), "clean": mean.get(0.0, math.nan), "at_50": mean.get(0.5, math.nan)}
        row |= {"auc": statistics.fmean(auc) if auc else math.nan, "auc_low": low, "auc_high": high}
        points = sorted(mean.items())
        half_gone = half_gone_at(*zip(*points, strict=True)) if key["metric"].startswith("top") else math.nan
        found.append({**key, **row, "half_gone_at": half_gone})
    return pd.DataFrame(found)


def write(sweep_dir: Path, *more: Path, console: Console | None = None) -> list[Path]:
    """Write curves.parquet, summary.csv, comparisons.csv, report.html and a figure for each study; print the tables.

    Args:
        sweep_dir: where all of it goes.
        more: other sweeps that it shall cover as well.
    """
    from rich.console import Console
    from rich.text import Text

    sweep_dir = Path(sweep_dir)
    curves = read_curves(sweep_dir, *more)
    store.write_table(sweep_dir / "curves.parquet", curves)
    write_csv(summarise(curves), sweep_dir / "summary.csv")
    written = [sweep_dir / "curves.parquet", sweep_dir / "summary.csv"]
    of_sweep = studies(curves)
    for study in of_sweep:
        figure = draw(study.rows, study.title, study.unit)
        for suffix in ("png", "svg", "pdf"):
            written.append(sweep_dir / "figures" / f"{study.name}.{suffix}")
            with store.replacing(written[-1]) as temporary:
                save(figure, temporary, suffix)
    console = console or Console()
    print_tables(curves, console)
    folders = folders_by_id(sweep_dir, *more)
    both = [(study, found) for study in of_sweep if (found := _shown(study, folders))]
    shown = [found for _, found in both]
    if not shown:
        return written
    for found, _, _ in shown:
        said = page.verdict(found)
        said = f"{found.name}: {said}" if len(shown) > 1 else said
        console.print(Text(_encodable(said, console)), soft_wrap=True)
    write_csv(comparisons([(study, found) for study, (found, _, _) in both]), sweep_dir / "comparisons.csv")
    failures = [
        (run.name, found["state"], str(found.get("reason", "")))
        for sweep in (sweep_dir, *more)
        for run in store.runs(sweep)
        if (found := store.status(run))["state"] != "finished"
    ]
    store.write_text(sweep_dir / "report.html", page.render(sweep_dir.absolute().name, shown, failures))
    return [*written, sweep_dir / "comparisons.csv", sweep_dir / "report.html"]


def comparisons(found: list[tuple[Study, page.Measured]]) -> DataFrame:
    """Of all studies: their hash, as in the rows, their name, and the columns of `comparison.compare`."""
    import pandas as pd

    tables = []
    for study, measured_ in found:
        tables.append(measured_.comparisons.copy())
        tables[-1].insert(0, "study", study.rows["study"].iloc[0])
        tables[-1].insert(1, "name", study.name)
    return pd.concat(tables, ignore_index=True)


def write_csv(table: DataFrame, path: Path) -> None:
    with store.replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def measured(study: Study, folders: dict[str, Path]) -> page.Measured | None:
    """With all intervals; None where a run has left no sums of documents, as earlier versions did."""
    import pandas as pd

    parts: dict[tuple[str, int], list[DataFrame]] = {}
    for run in study.rows.drop_duplicates(["method", "seed", "run_id"]).to_dict("records"):
        folder = folders.get(run["run_id"][:8])
        table = folder and store.result(folder, "documents.parquet")
        if table is None:
            return None
        parts.setdefault((run["method"], run["seed"]), []).append(table)
    # A curve may be that of several runs, one for each fraction; each of them has a clean pass.
    whole = [pd.concat(tables).drop_duplicates(["fraction", "document"]) for tables in parts.values()]
    documents = dict(zip(parts, shared(whole), strict=True))
    return page.measured(study.name, study.title, study.unit, study.rows, documents)


def all_measured(curves: DataFrame, sweep: Path) -> list[tuple[Study, page.Measured]]:
    """The studies of a sweep, of those that can be measured."""
    folders = folders_by_id(sweep)
    return [(study, found) for study in studies(curves) if (found := measured(study, folders))]


def folders_by_id(*sweeps: Path) -> dict[str, Path]:
    """Of all runs, by the beginning of their id, with which their names end."""
    return {path.parent.name[-8:]: path.parent for sweep in sweeps for path in sweep.rglob("documents.parquet")}


def _shown(study: Study, folders: dict[str, Path]) -> page.Shown | None:
    found = measured(study, folders)
    runs = [folders[run_id[:8]] for run_id in study.rows["run_id"].unique()] if found else []
    return found and (found, _neurons(runs), _setup(runs[0]))


def _neurons(runs: list[Path]) -> dict[str, Any] | None:
    """From the statistics that one of the runs has left in the cache beside its sweep; None where none has."""
    for run in runs:
        cache = store.statistics_of(run)
        if cache is not None and (found := kept(cache, Histogram(neurons.N_BINS))) is not None:
            by_head = store.config(run)["site"]["by_head"]
            return neurons.of(
                found, (store.read_json(run / "environment.json") or {}).get("n_heads") if by_head else None
            )
    return None


def _setup(run: Path) -> dict[str, Any]:
    """Of one run, for all that it is compared with: they differ in method and seed."""
    return {"configuration": store.config(run), "environment": store.read_json(run / "environment.json")}


def studies(curves: DataFrame) -> list[Study]:
    """Each study under a name that says what it is; the hash is part of it only where the rest is not unique."""
    by_name: dict[str, list[DataFrame]] = {}
    for _, rows in curves.groupby("study"):
        name = "-".join(str(rows[label].iloc[0]) for label in ("model", "dataset", "site"))
        by_name.setdefault(re.sub(r"[^\w.-]+", "_", name), []).append(rows)
    found = []
    named = [(name, rows, len(group) == 1) for name, group in sorted(by_name.items()) for rows in group]
    for name, rows, is_unique in named:
        short, unit = rows["study"].iloc[0][:8], "image" if rows["kind"].iloc[0] == "image_classifier" else "token"
        name, also = (name, "") if is_unique else (f"{name}-{short}", f" · study {short}")
        found.append(Study(name, _title(rows, unit) + also, unit, rows))
    return found


def _title(rows: DataFrame, unit: str) -> str:
    n_seeds, counts = rows["seed"].nunique(), rows.loc[rows["metric"] == "loss", "n"]
    size = " to ".join(f"{int(n):,}" for n in sorted({counts.min(), counts.max()}))
    model, dataset, site, selection = rows.iloc[0][["model", "dataset", "site", "selection"]]
    return f"{model} on {dataset} · {site} · {selection} · {size} {unit}s · {n_seeds} seed{'s' * (n_seeds != 1)}"


def print_tables(curves: DataFrame, console: Console | None = None) -> None:
    """A table of the loss and one of the accuracy for each study: no wider than the terminal, whole in a file."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.text import Text

    console = console or Console()
    unlimited, screen = console.options.update(max_width=10_000), console.width
    for study in studies(curves):
        of_study = summarise(study.rows)
        for step in _steps(study.rows["fraction"].nunique()):
            tables = [_table(study, of_study, metric, step, console) for metric in ("loss", "top1")]
            width = max(Measurement.get(console, unlimited, table).maximum for table in tables)
            if width <= screen or not console.is_terminal:
                break
        console.print(Text(_encodable(study.title, console), style="bold"), soft_wrap=True)
        console.width = max(width, screen)  # a table that is cut is of no use: better the terminal wraps its lines
        console.print(*tables)
        console.width = screen
        for note in _notes(study.rows, of_study, step, console):
            console.print(Text(_encodable(note, console), style="dim"), soft_wrap=True)
        console.print()


def _steps(n_fractions: int) -> list[int]:
    """Every how many fractions a column may stand, from the most columns to the fewest; even steps if there are any."""
    last = max(n_fractions - 1, 1)
    steps = range(math.ceil(last / (MAX_COLUMNS - 1)), last + 1)
    even = [step for step in steps if last % step == 0]
    return even if len(even) > 1 or last <= 2 else list(steps)


def _table(study: Study, summary: DataFrame, metric: str, step: int, console: Console) -> Table:
    """The best of each column is bold; a file has no bold, so there it gets a star."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    is_loss, rows = metric == "loss", study.rows.query("metric == @metric")
    methods, scale, digits = in_order(rows["method"].unique()), 1 if is_loss else 100, 3 if is_loss else 1
    points = _groups(rows, ["fraction", "method"])
    means = {tuple(at.values()): round(scale * float(of_seeds["value"].mean()), digits) for at, of_seeds in points}
    auc = summary[summary["metric"] == metric].set_index("method")[["auc", "auc_low", "auc_high"]].round(3).T.to_dict()
    fractions = sorted(rows["fraction"].unique())
    shown = [*fractions[:-1:step], fractions[-1]]
    columns = {f"{100 * f:.3g} %" if f else "clean": [means.get((f, m), math.nan) for m in methods] for f in shown}
    if any(not math.isnan(auc[method]["auc"]) for method in methods):
        columns["AUC"] = [auc[method]["auc"] for method in methods]

    table = Table(f"loss (nats/{study.unit})" if is_loss else "top-1 (%)", box=box.SIMPLE_HEAD, pad_edge=False)
    cells = [[Text(_encodable(method, console))] for method in methods]
    for title, values in columns.items():
        table.add_column(title, justify="right", no_wrap=True)
        known = {value for value in values if not math.isnan(value)}
        best = (min if is_loss else max)(known) if len(known) > 1 else None  # where all are equal, as clean, none is
        for method, row, value in zip(methods, cells, values, strict=True):
            text = "–" if math.isnan(value) else f"{value:.{3 if title == 'AUC' else digits}f}"
            text += "" if console.is_terminal else "*" if value == best else " "
            if title == "AUC":
                low, high = auc[method]["auc_low"], auc[method]["auc_high"]
                text += " –" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]"
            row.append(Text(_encodable(text, console), style="bold" if value == best else ""))
    for row in cells:
        table.add_row(*row)
    return table


def _notes(rows: DataFrame, summary: DataFrame, step: int, console: Console) -> list[str]:
    n_fractions, n_seeds = rows["fraction"].nunique(), rows["seed"].nunique()
    notes = [] if console.is_terminal else ["*: best of its column"]
    if n_seeds > 1:
        notes.append(f"means over {n_seeds} seeds")
    if summary["auc"].notna().any():
        notes.append("AUC: mean over fractions 0 to 1, as a share of the clean value [95 % t-interval over seeds]")
        if summary["auc_low"].isna().any():
            notes.append("–: no interval from one seed")
    if step > 1:
        notes.append(f"{math.ceil((n_fractions - 1) / step) + 1} of {n_fractions} fractions; all are in curves.parquet")
    if len(rows) < rows["method"].nunique() * n_seeds * n_fractions * rows["metric"].nunique():
        notes.append("not every method has every seed at every fraction: compare with care (curves.parquet)")
    return notes


def _encodable(text: str, console: Console) -> str:
    """A log file in ASCII gets question marks and not a traceback."""
    return text.encode(console.encoding, "replace").decode(console.encoding)
