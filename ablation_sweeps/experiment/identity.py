"""Content of a result's signature: everything that can change a number."""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base import hashing
from ablation_sweeps.base.environment import is_ours
from ablation_sweeps.base.moved import FORMER
from ablation_sweeps.neurons.schedule import Each

if TYPE_CHECKING:
    from ablation_sweeps.datasets.dataset import Dataset
    from ablation_sweeps.experiment.job import Job
    from ablation_sweeps.methods.method import Method
    from ablation_sweeps.models.model import Model
    from ablation_sweeps.models.transformer import Transformer
    from ablation_sweeps.selections.selection import Selection


RESULTS_VERSION = 2  # raise it when the code changes numbers beyond rounding: earlier results are then not reused


def numbers_of(part: Any) -> dict[str, Any]:
    """Options that enter the signature, without the label.

    Options of our own classes that were added later have a default, at which they are left out: earlier results stay
    valid.
    """
    later = {field.name: field.default for field in fields(part)} if is_ours(type(part).__module__) else {}
    options = {key: value for key, value in asdict(part).items() if key != "label"}
    return {key: value for key, value in options.items() if key not in later or value != later[key]}


def options_of(part: Method | Selection) -> dict[str, Any]:
    """Class and options of a part. A class whose values have changed raises its attribute `numbers`."""
    numbers = {} if part.numbers is None else {"numbers": part.numbers}
    return {"class": class_of(part), **numbers_of(part), **numbers}


def present_content(part: Model | Dataset) -> dict[str, Any]:
    """Identity of a model's or dataset's files as they are now: a fingerprint, or the commit on the hub."""
    return part.identity()


@functools.cache
def content(part: Model | Dataset) -> dict[str, Any]:
    """Identity of a model's or dataset's files when this process first read them.

    It is cached, so that a sweep of many jobs reads them once.
    """
    return present_content(part)


def class_of(part: Any) -> str:
    """Import path of a part's class before any move, so that signatures stay the same, and a hash if it is a user's."""
    path = f"{type(part).__module__}.{type(part).__qualname__}"
    return " ".join([FORMER.get(path, path), *edited(type(part))])


@functools.cache
def edited(kind: type) -> list[str]:
    """Hash of the file of a user's class, which may change at any time. Empty for our own: see RESULTS_VERSION."""
    if is_ours(kind.__module__):
        return []
    return [hashing.fingerprint_of_file(Path(inspect.getfile(kind)))]


def columns(job: Job, model: Transformer, *, halved: bool, some_left_out: bool) -> dict[str, Any]:
    """Columns of rows.parquet that identify the experiment of a row.

    Args:
        halved: True if statistics come from halved batches, whose rounding may have changed the replacement by more
            than the last digit. It becomes a parameter of the method, so that such runs are not pooled with others.
        some_left_out: True if duplicates or broken images were removed from the data. Such runs are another study than
            earlier runs that kept them, as are runs that pass texts to the model in another way (`model.texts`).
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
        "unit": job.unit.name,
        "selection": job.selection.label,
        "depends_on_seed": job.selection.depends_on_seed and not isinstance(job.fraction, Each),  # which has all units
        "method": job.method.label,
        "method_params": json.dumps(parameters, sort_keys=True),
        "seed": job.seed,
    }
