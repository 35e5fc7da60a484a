"""Writes the report of a sweep: tables of curves and of single units, figures and report.html."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import TypedDict

from ablation_sweeps.base import files
from ablation_sweeps.base.files import write_csv
from ablation_sweeps.base.terminal import encodable, terminal
from ablation_sweeps.neurons.collect import load_cached_statistics
from ablation_sweeps.neurons.statistics import Histogram
from ablation_sweeps.report import neurons, page, verdict
from ablation_sweeps.report.figures import draw, save
from ablation_sweeps.report.layers import draw_layers
from ablation_sweeps.report.tables import print_tables
from ablation_sweeps.report.units import print_units, units_verdict
from ablation_sweeps.results import heat_map, run_folder
from ablation_sweeps.results.curves import Study, read_curves, studies, summarise
from ablation_sweeps.results.layers import LayerSweep, layer_sweeps, layers_verdict
from ablation_sweeps.results.record import flatten
from ablation_sweeps.results.sweep import comparisons, folders_by_id, read_study, runs_of
from ablation_sweeps.results.units import read_units, unit_studies

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.console import Console


T = TypeVar("T", Study, LayerSweep)
KINDS = {".png": "figure", ".html": "page"}  # written files that are shown to the user, by suffix
FOUND_BY = ("status.json", "rows.parquet")  # a run has at least one of them
DIFFER = "runs differ in"  # other than method and seed
NOTES = "notes"  # warnings for the reader


def write(sweep_dir: Path, *more: Path, console: Console | None = None) -> list[Path]:
    """Write tables, report.html and a figure for each study; print the tables.

    Curves give curves.parquet, summary.csv and comparisons.csv; runs with fraction=each give units.csv and
    units.parquet.

    Args:
        sweep_dir: sweep to report on, and folder for the files.
        more: other sweeps to include.

    Returns:
        Paths of the files.
    """
    sweep_dir = Path(sweep_dir)
    curves, units = read_curves(sweep_dir, *more), read_units(sweep_dir, *more)
    folders = folders_by_id(sweep_dir, *more)
    of_sweep, of_units = studies(curves), unit_studies(units)
    runs = [runs_of(study, folders) for study in of_sweep]
    runs_of_units = [runs_of(study, folders) for study in of_units]
    doubts = _doubts(chain(*(own.values() for own in (*runs, *runs_of_units))))
    both = [(study, found) for study, own in zip(of_sweep, runs, strict=True) if (found := _shown(study, own, doubts))]
    measured_ = {study.rows["study"].iloc[0]: found for study, (found, _, _) in both}
    written = [
        *_written(sweep_dir / "curves.parquet", curves, not curves.empty),
        *_written(sweep_dir / "summary.csv", summarise(curves, measured_), not curves.empty),
        *_written(sweep_dir / "units.parquet", units, not units.empty),
        *_written(sweep_dir / "units.csv", units, not units.empty),
    ]
    sweeps = layer_sweeps((study, found, setup["configuration"]) for study, (found, _, setup) in both)
    figures = [
        *_drawn(sweep_dir, of_sweep, lambda study: draw(study.rows, study.title, study.unit)),
        *_drawn(sweep_dir, of_units, lambda study: heat_map.draw(study.rows, study.title, study.unit)),
        *_drawn(sweep_dir, sweeps, draw_layers),
    ]
    _remove_figures_of_before(sweep_dir / "figures", [file.name for file in figures])
    console = console or terminal()
    print_tables(curves, console, measured_)
    print_units(of_units, console)
    shown = [found for _, found in both]
    shown_units = [
        (study, {NOTES: _notes(study, own, doubts), **_setup([*own.values()])})
        for study, own in zip(of_units, runs_of_units, strict=True)
    ]
    written += figures
    if not shown and not shown_units:
        return written
    said = [(found.title, verdict.verdict(found), setup) for found, _, setup in shown]
    said += [(study.title, units_verdict(study), setup) for study, setup in shown_units]
    setups = {id(found): setup for found, _, setup in shown}
    shown_sweeps = [(sweep, setups[id(next(iter(sweep.studies.values())))] | {NOTES: []}) for sweep in sweeps]
    said += [(sweep.title, layers_verdict(sweep), setup) for sweep, setup in shown_sweeps]
    _print_verdicts(said, console)
    compared = comparisons([(study, found) for study, (found, _, _) in both])
    written += _written(sweep_dir / "comparisons.csv", compared, bool(both))
    failures = [
        (run.name, str(found.state), found.reason or "")
        for sweep in (sweep_dir, *more)
        for run in sorted({path.parent for name in FOUND_BY for path in Path(sweep).rglob(name)})  # at any depth
        if not (found := run_folder.current_status(run)).is_finished
    ]
    files.write_text(
        sweep_dir / "report.html", page.render(sweep_dir.absolute().name, shown, failures, shown_units, shown_sweeps)
    )
    return [*written, sweep_dir / "report.html"]


def _written(path: Path, table: DataFrame, wanted: bool) -> list[Path]:
    """Write a table; if it is not wanted, delete one of an earlier report."""
    if not wanted:
        path.unlink(missing_ok=True)
        return []
    if path.suffix == ".csv":
        write_csv(table, path)
    else:
        files.write_table(path, table)
    return [path]


def _drawn(sweep_dir: Path, found: Sequence[T], draw: Callable[[T], Figure]) -> list[Path]:
    """Save the figure of each study or layer sweep, as png, svg and pdf."""
    paths = []
    for study in found:
        figure = draw(study)
        for suffix in ("png", "svg", "pdf"):
            paths.append(sweep_dir / "figures" / f"{study.name}.{suffix}")
            with files.replacing(paths[-1]) as temporary:
                save(figure, temporary, suffix)
    return paths


def _print_verdicts(said: Sequence[tuple[str, str, dict[str, Any]]], console: Console) -> None:
    """Print the notes and the verdict on each study, with its title if there are several."""
    from rich.text import Text

    for title, verdict_, setup in said:
        before = f"{title}: " if len(said) > 1 else ""
        for note in setup[NOTES]:
            console.print(Text(encodable(f"{before}{note}", console), style="dim"), soft_wrap=True)
        differ = f" Its runs differ in {setup[DIFFER]}." if setup[DIFFER] else ""
        console.print(Text(encodable(f"{before}{verdict_}{differ}", console)), soft_wrap=True)


class Written(TypedDict):
    """Content of .written.json: the names of the figures that this program has written."""

    names: list[str]


def _remove_figures_of_before(folder: Path, names: list[str]) -> None:
    """Delete figures of studies that are gone or have another name; files that others put there are left alone."""
    ours = folder / ".written.json"
    for name in set((files.read_json(ours, Written) or {"names": []})["names"]) - set(names):
        (folder / Path(name).name).unlink(missing_ok=True)
    files.write_json(ours, {"names": names})


def _shown(study: Study, runs: dict[str, Path], doubts: dict[Path, str]) -> page.ReportEntry | None:
    found, folders = read_study(study, runs), [*runs.values()]
    return found and (found, _neurons(folders), {NOTES: _notes(study, runs, doubts), **_setup(folders)})


def _doubts(runs: Iterable[Path]) -> dict[Path, str]:
    """A sentence on each run whose scores may be wrong, since texts of different lengths were in the same pass.

    Earlier versions did that with every model. Other runs of the same model show that its scores depend on it.
    """
    texts = {run: run_folder.texts_of(run) for run in runs}
    if set(texts.values()) <= {run_folder.TOGETHER}:
        return {}
    models = {run: _model(run) for run in texts}
    otherwise = {models[run]: passed for run, passed in texts.items() if passed != run_folder.TOGETHER}
    return {
        run: f"texts were passed together, but other runs of this model pass them {otherwise[models[run]]}, since its "
        "scores depend on that: these may be wrong, and are not compared with those; results_dir=FOLDER computes "
        "them again"
        for run, passed in texts.items()
        if passed == run_folder.TOGETHER and models[run] in otherwise
    }


def _model(run: Path) -> str:
    """All options of a run's model that can change what it computes, as json."""
    elsewhere = ("label", "device", "device_map")
    options = run_folder.config(run).get("model", {})
    return json.dumps({key: value for key, value in options.items() if value is not None and key not in elsewhere})


def _notes(study: Study, runs: dict[str, Path], doubts: dict[Path, str]) -> list[str]:
    """Notes for the reader, each with the methods that it concerns.

    They say why numbers may be wrong, repeat the warnings recorded by the runs (see `run_folder.add_warning`), and say
    what was left out of the model's files and of the data.
    """
    methods: dict[str, list[str]] = {}
    for run in study.rows.drop_duplicates(["method", "run_id"]).to_dict("records"):
        folder = runs[run["run_id"]]
        doubt = [doubts[folder]] if folder in doubts else []
        if others := run["seeds_left_out"]:
            seeds = "seeds" if "," in others else "seed"
            doubt.append(f"results of {seeds} {others} are left out: the ablated units do not depend on the seed")
        for note in [*doubt, *run_folder.environment(folder).get("notes", []), *run_folder.left_out(folder)]:
            methods.setdefault(note, []).append(run["method"])
    return [f"{', '.join(dict.fromkeys(noted))}: {note}" for note, noted in methods.items()]


def _neurons(runs: list[Path]) -> dict[str, Any] | None:
    """Neuron summary from the cached statistics of one of the runs; None if there are none."""
    for run in runs:
        cache = run_folder.statistics_of(run)
        if cache is not None and (found := load_cached_statistics(cache, Histogram(neurons.N_BINS))) is not None:
            by_head = run_folder.config(run)["site"]["by_head"]
            return neurons.neuron_summary(found, run_folder.environment(run).get("n_heads") if by_head else None)
    return None


def _setup(runs: list[Path]) -> dict[str, Any]:
    """Setup of one run, which stands for all runs of its study, with a list of what differs between them."""
    environments = [run_folder.environment(run) for run in runs]
    parts = [
        flatten({"code": e.get("code"), "packages": e.get("packages"), "device": e.get("device"),
                 "on": str(e.get("model_device", "")).split(":")[0]}) for e in environments
    ]  # fmt: skip
    # Earlier versions did not keep all of it.
    values = {key: sorted({str(part[key]) for part in parts if part.get(key)}) for key in dict.fromkeys(chain(*parts))}
    differ = [f"{key} ({', '.join(found)})" for key, found in values.items() if len(found) > 1]
    return {DIFFER: ", ".join(differ), "configuration": run_folder.config(runs[0]), "environment": environments[0]}
