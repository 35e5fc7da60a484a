"""The experiment of one job, from its validated options to rows on disk. Read it from top to bottom."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ablation_sweeps.base import files
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import pd, torch
from ablation_sweeps.data.batch import NOT_SCORED
from ablation_sweeps.experiment import identity
from ablation_sweeps.experiment.calibrate import CalibrationStatistics
from ablation_sweeps.experiment.chance import chance_model
from ablation_sweeps.experiment.evaluate import evaluate, metrics
from ablation_sweeps.experiment.session import Session
from ablation_sweeps.methods.method import Fitting, Replacement
from ablation_sweeps.neurons import sites
from ablation_sweeps.neurons.schedule import CLEAN
from ablation_sweeps.neurons.units import Units
from ablation_sweeps.results import progress, run_folder, run_status
from ablation_sweeps.results.record import RunRecord
from ablation_sweeps.selections.selection import Selecting

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job

log = logging.getLogger(__name__)

# Columns of rows.parquet: first the experiment, then what was measured.
EXPERIMENT = "run_id study kind model revision dataset site unit selection depends_on_seed method method_params seed"
MEASURED = "fraction n_ablated n_units n_neurons metric value stderr n clean chance"
OF_UNIT = "layer index"  # with fraction=each
COLUMNS = [*EXPERIMENT.split(), *OF_UNIT.split(), *MEASURED.split()]


def run_job(job: Job, session: Session | None = None) -> Path:
    """Run the job, unless it has finished before.

    Args:
        session: state that earlier jobs of this process have loaded; None loads everything anew.

    Returns:
        The run folder, which holds the job's rows (`rows.parquet`) and the metric sums of each document
        (`documents.parquet`).
    """
    folder = job.folder
    with files.locked(folder), run_folder.run_log(folder):
        if run_folder.finished(folder):
            log.info("%s is finished already", folder)
            return folder
        run_folder.begin(folder, job.config)
        started = time.perf_counter()
        try:
            documents, rows = measure(job, folder, session or Session())
            run_folder.finish(folder, rows, documents, time.perf_counter() - started, job.cost_key)
        except BaseException as error:
            if not run_status.read(folder).is_finished:  # after that, only tidying up can fail
                run_folder.fail(folder, error)
            raise
    if job.tracking.log_run(RunRecord.of(folder)):  # only a mirror: results on disk do not depend on it
        run_folder.mark_published(folder, job.tracking.place)
    return folder


def measure(job: Job, folder: Path, session: Session) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run the experiment: load, find the neurons, collect, select, fit, evaluate, record.

    Returns:
        The metric sums of each document at each fraction, and the rows of the curve.
    """
    # Load the model and both splits of the data, and find the neurons.
    model = session.model(job)
    run_folder.remember_texts(folder, ", ".join(model.texts))
    all_projections = sites.find(model, job.site, job.model.site_paths)
    projections = sites.in_layers(all_projections, job.site)
    units = job.unit.partition(projections)
    certificate = session.certificate(job, all_projections)
    run_folder.update_environment(folder, certificate=certificate.as_dict())
    certificate.require(job.unit.name)
    calibration = session.batches(job, "calibration")
    batches = session.batches(job, "evaluation")
    session.check_unchanged(job)
    log.debug("%s: %s", job.site.name, ", ".join(f"{p.path} ({p.width})" for p in projections))
    log.debug("%d documents or images in %d batches", sum(len(b.names) for b in batches), len(batches))
    left_out = session.left_out(job)
    if left_out:
        run_folder.update_environment(folder, data_left_out=left_out)

    # Collect statistics of each neuron on the calibration data, once the selection or the method asks for them.
    statistics = CalibrationStatistics(
        job=job,
        folder=folder,
        model=model,
        projections=all_projections,
        batches=calibration,
        replay=session.replay(job),
        copies_left_out="calibration" in left_out,
    )

    # Select the units to ablate at each point: the same for every method.
    orders = job.selection.orders(
        Selecting(
            model=model,
            projections=projections,
            units=units,
            statistics=statistics,
            batches=session.scored_calibration(job),
            write=job.scope.write,
            seed=job.seed,
            cached=statistics.cached_scores,
            note=lambda text: run_folder.add_warning(folder, text, logging.INFO),
        )
    )
    selected = job.fraction.points(orders, len(units))

    # Fit the method: compute the values that replace the neurons.
    replacement = job.method.fit(
        Fitting(
            model=model,
            projections=projections,
            statistics=statistics,
            length=max(batch.labels.shape[-1] for batch in batches),
            seed=job.seed,
            note=lambda text: run_folder.add_warning(folder, text, logging.DEBUG),  # shown in the report only
        )
    )
    if not isinstance(replacement, Replacement):
        raise UserError(
            f"method={job.method.label}: its fit gives {type(replacement).__name__}, which is no Replacement; give a "
            "Constant, or an object with reads_clean that is called with each batch: see docs/adding.md"
        )

    # Evaluate: one clean pass over each batch, and one at each point.
    chance = chance_model(job, model, batches, calibration)
    top_k = job.eval.top_k_images if model.modality == "image" else job.eval.top_k
    done = progress.load(
        folder, [batch.names for batch in batches], warn=lambda text: run_folder.add_warning(folder, text)
    )
    run_status.expect(folder, len(batches))
    documents = evaluate(
        model=model,
        projections=projections,
        batches=batches,
        masks={point: units.masks(numbers) for point, numbers in selected.items()},
        replacement=replacement,
        common=chance.common,
        top_k=top_k,
        done=done,
        save=lambda number, sums: progress.save(folder, number, sums),
        note=lambda text: run_folder.add_warning(folder, text),
        target_stderr=job.eval.target_stderr,
        clean=session.clean_passes(job),
        write=job.scope.write,
    )
    session.check_unchanged(job)  # pixels of a large set of images are read only when needed

    # Record the result: the metrics at each point, in rows that identify their experiment.
    labels = torch.cat([batch.labels[batch.labels != NOT_SCORED] for batch in batches])
    rows = metrics(documents, chance, labels, top_k)
    n_ablated = {CLEAN.fraction: 0, **{point.fraction: len(numbers) for point, numbers in selected.items()}}
    columns = {
        **identity.columns(job, model, halved=statistics.halved, some_left_out=bool(left_out)),
        **places(rows, units),
        "n_ablated": rows["fraction"].map(n_ablated),
        "n_units": len(units),
        "n_neurons": sum(projection.width for projection in projections),
    }
    rows = rows.assign(**columns)
    return documents, rows.loc[:, [column for column in COLUMNS if column in rows]]


def places(rows: pd.DataFrame, units: Units) -> dict[str, pd.Series]:
    """Columns `layer` and `index`: the place of the unit that is ablated alone; missing in the clean pass.

    Without such units, there are no such columns.
    """
    if "number" not in rows:
        return {}
    number = rows["number"].where(rows["number"] >= 0).astype("Int64")
    by_number = {"layer": dict(enumerate(units.layer.tolist())), "index": dict(enumerate(units.index.tolist()))}
    return {column: number.map(place).astype("Int64") for column, place in by_number.items()}
