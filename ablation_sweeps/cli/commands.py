"""Inspect, retry, report and export sweeps: ablation-sweeps status results/<sweep>"""

from __future__ import annotations

import logging
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.terminal import FOLDERS, terminal
from ablation_sweeps.dispatch.watch import overview
from ablation_sweeps.results import run_folder

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


Sweep = Annotated[Path, typer.Argument(help="the folder of a sweep: results/<sweep>")]


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"ablation-sweeps {version('ablation-sweeps')}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Inspect, retry, report and export sweeps."""


@app.command()
def status(sweep: Sweep) -> None:
    """Show how far each job of a sweep is."""
    runs = _runs(sweep)
    console = terminal()
    if not console.is_terminal:
        console.width = 200
    console.print(overview(runs))
    counts = Counter(run_folder.current_status(run).state for run in runs)
    console.print(", ".join(f"{n} {state}" for state, n in sorted(counts.items())), highlight=False)


@app.command()
def retry(sweep: Sweep) -> None:
    """Run failed and interrupted jobs again, in the way in which the sweep was launched."""
    from ablation_sweeps.dispatch import launcher

    logging.basicConfig(format="%(message)s")
    logging.getLogger("ablation_sweeps").setLevel(logging.INFO)
    _runs(sweep)
    launcher.retry(sweep.absolute())


@app.command()
def check(
    options: Annotated[list[str] | None, typer.Argument(help="options of a job: site=mlp_pre_out unit=head")] = None,
    config_dir: Annotated[
        Path | None, typer.Option("--config-dir", "-cd", help="folder with yamls of your own")
    ] = None,
) -> None:
    """Prove for a model what an ablation changes: one line per property; exit code 1 if one of them fails."""
    from ablation_sweeps.experiment.compose import unchecked_job
    from ablation_sweeps.experiment.session import Session
    from ablation_sweeps.neurons import sites

    logging.basicConfig(format="%(message)s")
    job, session = unchecked_job(*(options or ()), config_dir=config_dir), Session()
    projections = sites.find(session.model(job), job.site, job.model.site_paths)
    job.unit.partition(sites.in_layers(projections, job.site))
    certificate = session.certificate(job, projections)
    for verdict in certificate.verdicts:
        print(f"{verdict.outcome:10}  {verdict}")
    certificate.require(job.unit.name)


@app.command()
def report(
    sweep: Sweep,
    more: Annotated[list[Path] | None, typer.Argument(help="further sweeps to include in the tables")] = None,
) -> None:
    """Write tables, figures and report.html into the sweep's folder, and print the tables."""
    from ablation_sweeps.report.write import KINDS, write

    for folder in (sweep, *(more or ())):
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; name the folder of a sweep: results/<sweep>")
    for file in write(sweep, *(more or ())):
        if file.suffix in KINDS:
            print(f"{KINDS[file.suffix]}: {file}")
    if more:
        print(
            f"the tables in {sweep} now include {', '.join(map(str, more))}; report {sweep} alone leaves them out again"
        )


@app.command()
def export(sweep: Sweep, to: Annotated[Path, typer.Option(help="folder to write the files to")] = Path(".")) -> None:
    """Write a sweep's points as csv and parquet, and its AUCs as a LaTeX table."""
    from ablation_sweeps.report import export as export_module

    FOLDERS[str(to.expanduser().absolute())] = "--to"
    for file in export_module.export(sweep, to):
        print(file)


@app.command("wandb")
def send(
    sweep: Sweep,
    project: Annotated[str | None, typer.Option(help="W&B project; the default is that of the runs")] = None,
    entity: Annotated[str | None, typer.Option(help="W&B user or team; the default is that of the runs")] = None,
    again: Annotated[bool, typer.Option("--again", help="also send runs that W&B has already")] = False,
    view: Annotated[
        bool, typer.Option("--view", help="save a W&B view of each study, with its curves by method")
    ] = False,
) -> None:
    """Send finished runs to Weights & Biases, unless it has them already."""
    from ablation_sweeps.tracking.publish import publish, save_views

    _runs(sweep)
    print(publish(sweep, project, entity, again))
    for study, address in (save_views(sweep, project, entity) if view else {}).items():
        print(f"view of {study}: {address}")


def _runs(sweep: Path) -> list[Path]:
    if runs := run_folder.runs(sweep):
        return runs
    raise UserError(f"{sweep}: no job was ever launched there; name the folder of a sweep: results/<sweep>")
