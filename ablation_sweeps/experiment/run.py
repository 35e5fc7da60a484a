"""The whole experiment, from a validated job to rows on disk. Read it top to bottom."""

from __future__ import annotations

import functools
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ablation_sweeps.base import files, hashing
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import pd, torch
from ablation_sweeps.data.batch import NOT_SCORED, Batch
from ablation_sweeps.experiment import evaluate
from ablation_sweeps.experiment.chance import chance
from ablation_sweeps.experiment.identity import _edited, _options
from ablation_sweeps.experiment.job import left_out
from ablation_sweeps.experiment.session import clean_passes, encode, load, recording
from ablation_sweeps.methods.method import Fitting, Replacement
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import collect, sites
from ablation_sweeps.neurons.selection import granularity, masks
from ablation_sweeps.neurons.statistics import Histogram, Statistics
from ablation_sweeps.results import run_folder
from ablation_sweeps.results.record import RunRecord

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job

log = logging.getLogger(__name__)


def run_job(job: Job) -> Path:
    """Runs the job, unless it is finished already. Returns its folder, which holds its rows."""
    folder = job.folder
    with files.locked(folder), run_folder.run_log(folder):
        if run_folder.finished(folder):
            log.info("%s is finished already", folder)
            return folder
        run_folder.begin(folder, job.config)
        started = time.perf_counter()
        try:
            documents, rows = measure(job, folder)
            run_folder.finish(folder, rows, documents, time.perf_counter() - started, job.like)
        except BaseException as error:
            if run_folder.status(folder)["state"] != "finished":  # what comes after that is only tidying up
                run_folder.fail(folder, error)
            raise
    if job.tracking.log_run(RunRecord.of(folder)):  # a mirror: what is on disk does not depend on it
        run_folder.mark_published(folder, getattr(job.tracking, "place", ""))
    return folder


def measure(job: Job, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The experiment. Returns the sums of every document, and the rows of the curve."""
    model = load(job.model)
    run_folder.remember_texts(folder, ", ".join(model.texts))
    projections = sites.find(model, job.site, job.model.site_paths)
    log.debug("%s: %s", job.site.name, ", ".join(f"{p.path} ({p.width})" for p in projections))

    # Calibration: what does each neuron do on data that is not evaluated?
    calibration = encode(job, model, "calibration")
    # Copies in the calibration data once counted, and texts were passed together: those statistics are not these.
    key = {
        **job.data,
        **({"copies": "left out"} if "calibration" in left_out(job, model) else {}),
        **({"texts": model.texts} if model.texts else {}),
    }
    cache = job.results_dir / ".cache" / hashing.signature(key)[:16]
    note = functools.partial(run_folder.add_warning, folder)
    run_folder.update_environment(folder, statistics=cache.name, n_heads=model.n_heads, model_device=str(model.device),
                   model_left_out=list(model.left_out))  # fmt: skip
    halved = False

    def statistics(*wanted: Histogram | collect.Medians) -> Statistics:
        nonlocal halved
        found = collect.collect(
            model, projections, calibration, cache, *wanted, passes=job.statistics.passes, note=note,
            recording=recording(job, model),
        )  # fmt: skip
        positions = found.moments[0].n
        run_folder.update_environment(
            folder, calibration_positions=positions, calibration_asked=positions_asked(job, calibration, positions)
        )
        # Sums differ in the last digit, but not every method is continuous: one that reads counts must say so.
        halved |= found.too_large is not None and not getattr(job.method, "is_continuous", not wanted)
        return found

    # Evaluation: the same documents, and the same neurons, for every method.
    images = model.modality == "image"
    batches = encode(job, model, "evaluation")
    job.check_unchanged()
    missing = left_out(job, model)
    if missing:
        run_folder.update_environment(folder, data_left_out=missing)
    done = run_folder.progress(folder, [batch.names for batch in batches])
    run_folder.expect(folder, len(batches))
    log.debug("%d documents or images in %d batches", sum(len(b.names) for b in batches), len(batches))
    orders = job.selection.orders([p.width for p in projections], job.seed)
    length = max(b.labels.shape[-1] for b in batches)
    quietly = functools.partial(note, level=logging.DEBUG)  # the report shows it: no line for each job
    replacement = job.method.fit(Fitting(model, projections, statistics, length, job.seed, quietly))
    if not isinstance(replacement, Replacement):
        raise UserError(
            f"method={job.method.label}: its fit gives {type(replacement).__name__}, which is no Replacement; give a "
            "Constant, or an object with reads_clean that is called with each batch: see the README, Adding"
        )
    top_k = job.eval.top_k_images if images else job.eval.top_k
    guess = chance(job, model, batches, calibration)
    documents = evaluate.evaluate(
        model,
        projections,
        batches,
        {fraction: masks(orders, fraction) for fraction in job.fraction.values},
        replacement,
        guess.common,
        top_k,
        done=done,
        save=functools.partial(run_folder.save_progress, folder),
        note=note,
        target_stderr=job.eval.target_stderr,
        clean=clean_passes(job, model),
    )
    job.check_unchanged()  # of many images, pixels are read as they are needed
    labels = torch.cat([batch.labels[batch.labels != NOT_SCORED] for batch in batches])
    rows = evaluate.metrics(documents, guess, labels, top_k)
    n_ablated = {f: sum(int(m.sum()) for m in masks(orders, f)) for f in (0.0, *job.fraction.values)}
    unit = granularity(orders, job.fraction.values, model.n_heads if job.site.by_head else None)
    n_neurons = sum(p.width for p in projections)
    return documents, describe(rows, job, model, n_ablated, n_neurons, unit, halved, bool(missing))


def positions_asked(job: Job, calibration: list[Batch], positions: int) -> int:
    """Number of positions that the options ask the statistics to be taken from.

    Where `statistics.documents` is the limit that was reached first, these are the positions of so many documents.

    Args:
        positions: number that they were taken from.
    """
    documents = {place for batch in calibration for place in batch.documents or batch.index}
    return positions if len(documents) == job.statistics.documents else job.statistics.tokens


def describe(
    rows: pd.DataFrame,
    job: Job,
    model: Transformer,
    n_ablated: dict[float, int],
    n_neurons: int,
    unit: str,
    halved: bool,
    some_left_out: bool,
) -> pd.DataFrame:
    """The columns that tell the runs apart, in front of the measurements.

    Args:
        unit: see `selection.granularity`.
        halved: rounding may have changed the replacement by more than the last digit, since the statistics come from
            passes over halved batches: part of the method's parameters, so that such runs are not drawn together with
            others.
        some_left_out: the data hold copies, or broken pictures. Runs from before those were left out are another study,
            as are runs that passed texts in another way.
    """
    kind = "@".join([type(job.method).__name__, *(content[:6] for content in _edited(type(job.method)))])
    parameters = {**_options(job.method), "class": kind, **({"statistics": "halved"} if halved else {})}
    own = {
        "run_id": job.signature[:16],
        "study": hashing.signature(
            [job.study, job.model.label, job.dataset.label, *["left out"] * some_left_out, *model.texts]
        )[:8],
        "kind": model.kind,
        "model": job.model.label,
        "revision": model.revision,
        "dataset": job.dataset.label,
        "site": job.site.name,
        "selection": job.selection.label,
        "granularity": unit,
        "method": job.method.label,
        "method_params": json.dumps(parameters, sort_keys=True),
        "seed": job.seed,
    }
    table = rows.assign(**own, n_ablated=rows["fraction"].map(n_ablated), n_neurons=n_neurons)
    measured = ["fraction", "n_ablated", "n_neurons", "metric", "value", "stderr", "n", "clean", "chance"]
    return table.loc[:, [*own, *measured]]
