"""What enters the signature of a result: whatever can change a number."""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base import hashing
from ablation_sweeps.base.environment import is_ours
from ablation_sweeps.base.moved import FORMER

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Calibration, Evaluation, Job
    from ablation_sweeps.models.transformer import Transformer


RESULTS_VERSION = (
    2  # raise it when the code changes numbers beyond rounding: earlier results are then not taken for new
)


def numbers_of(part: Calibration | Evaluation) -> dict[str, Any]:
    """What came later, left at its default, is no part of it: results from before are still valid."""
    later = {"target_stderr": None, "passes": 2}
    return {key: value for key, value in asdict(part).items() if (key, value) not in later.items()}


def options_of(part: Any) -> dict[str, Any]:
    """What it computes with; a label is only a name. A class whose values have changed since says so by `numbers`."""
    options = {key: value for key, value in asdict(part).items() if key != "label"}
    numbers = getattr(part, "numbers", None)
    return {"class": class_of(part), **options, **({"numbers": numbers} if isinstance(numbers, int) else {})}


def present_content(part: Any) -> dict[str, Any]:
    """What the files of a model or dataset hold now."""
    return part.identity() if hasattr(part, "identity") else {"fingerprint": part.fingerprint()}


@functools.cache
def content(part: Any) -> dict[str, Any]:
    """What the files of a model or dataset held when this process first looked at them: a sweep of many jobs reads them
    once."""
    return present_content(part)


def class_of(part: Any) -> str:
    path = f"{type(part).__module__}.{type(part).__qualname__}"
    return " ".join([FORMER.get(path, path), *edited(type(part))])


@functools.cache
def edited(kind: type) -> list[str]:
    """A hash of the file of a user's class, which may be changed at any time; for ours, RESULTS_VERSION stands."""
    if is_ours(kind.__module__):
        return []
    return [hashing.fingerprint_of_file(Path(inspect.getfile(kind)))]


def columns(job: Job, model: Transformer, *, halved: bool, some_left_out: bool) -> dict[str, Any]:
    """The columns of rows.parquet that tell which experiment a row is of.

    Args:
        halved: rounding may have changed the replacement by more than the last digit, since the statistics come from
            halved batches: part of the method's parameters, so that such runs are not drawn together with others.
        some_left_out: the data hold copies, or broken pictures. Runs from before those were left out are another study,
            as are runs that passed texts in another way.
    """
    kind = "@".join([type(job.method).__name__, *(content[:6] for content in edited(type(job.method)))])
    parameters = {**options_of(job.method), "class": kind, **({"statistics": "halved"} if halved else {})}
    study = [job.study_key, job.model.label, job.dataset.label, *["left out"] * some_left_out, *model.texts]
    return {
        "run_id": job.signature[:16],
        "study": hashing.signature(study)[:8],
        "kind": model.kind,
        "model": job.model.label,
        "revision": model.revision,
        "dataset": job.dataset.label,
        "site": job.site.name,
        "selection": job.selection.label,
        "method": job.method.label,
        "method_params": json.dumps(parameters, sort_keys=True),
        "seed": job.seed,
    }
