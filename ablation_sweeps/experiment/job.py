"""A job, one curve: its options, checked, with nothing loaded."""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps.base import hashing
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.data.batch import Picture, Split
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.data.intake import splits_of
from ablation_sweeps.data.scope import Scope
from ablation_sweeps.datasets.dataset import Dataset
from ablation_sweeps.experiment import evaluate
from ablation_sweeps.experiment.identity import RESULTS_VERSION, class_of, content, numbers_of, options_of
from ablation_sweeps.methods.method import Method
from ablation_sweeps.models.model import Model
from ablation_sweeps.neurons import collect, sites, streaming_histogram
from ablation_sweeps.neurons.schedule import Each, Fractions, Schedule
from ablation_sweeps.neurons.units import Unit
from ablation_sweeps.results import run_folder
from ablation_sweeps.results.metrics import MAIN
from ablation_sweeps.results.record import summary
from ablation_sweeps.selections.selection import Selection
from ablation_sweeps.tracking.tracker import Tracker

NO_SPECIAL = 2  # like RESULTS_VERSION, for results with model.tokens=no_special

PROTOCOLS = {"model": Model, "dataset": Dataset, "method": Method, "selection": Selection, "tracking": Tracker}


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Calibration:
    """Amount of calibration data.

    Attributes:
        tokens: positions that the statistics are computed over; for images, their patches.
        documents: maximum number of documents or images; None is no limit.
        passes: number of passes over the data. 2 gives exact histograms; 1 halves the time if the second pass would
            have to run the model, too.
    """

    tokens: Annotated[int, Field(ge=2)]
    documents: Annotated[int | None, Field(ge=1)]
    passes: collect.NPasses = 2


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Evaluation:
    """Amount of evaluation data, and parameters of the metrics.

    Attributes:
        tokens: tokens of text to evaluate; None is all.
        documents: maximum number of documents; None is no limit.
        images: images to evaluate; None is all.
        top_k, top_k_images: the k of top-k accuracy, for tokens and for classes.
        skip: number of most common tokens that the skip metrics leave out.
        target_stderr: stop evaluating a point once the standard error of its loss is at most this, in nats. It is
            checked after batches of 32 texts. None: evaluate every point on all data.
    """

    tokens: Annotated[int | None, Field(ge=2)]
    documents: Annotated[int | None, Field(ge=1)]
    images: Annotated[int | None, Field(ge=1)]
    top_k: Annotated[int, Field(ge=1)]
    top_k_images: Annotated[int, Field(ge=1)]
    skip: Annotated[int, Field(ge=0)]
    target_stderr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class Job:
    """The parts and options of one curve, built and checked; nothing is loaded."""

    model: Model
    dataset: Dataset
    method: Method
    fraction: Schedule
    site: sites.Site | sites.Both
    unit: Unit
    selection: Selection
    scope: Scope
    statistics: Calibration
    eval: Evaluation
    tracking: Tracker
    batch_tokens: int
    seed: int
    prefetch: bool  # download what is needed, then stop
    dry_run: bool  # print what would run, then stop
    sweep: str
    results_dir: Path
    objective: str | None  # name of the value that a sweeper optimises
    config: dict[str, Any]  # composed and resolved; saved as config.yaml

    def check(self) -> None:
        """Check all that can be checked before a model is loaded.

        Raises:
            UserError: one line that names the option and the remedy.
        """
        if self.model.modality != self.dataset.modality:
            fits = "dataset=digits or dataset=image_folder" if self.model.modality == "image" else "dataset=python_docs"
            raise UserError(
                f"dataset={self.dataset.label}: holds {self.dataset.modality}s, but model={self.model.label} takes "
                f"{self.model.modality}s; choose e.g. {fits}"
            )
        for option, part in (("model.path", self.model), ("dataset.path", self.dataset)):
            path = Path(os.path.realpath(part.path or "/nowhere"))
            if Path(os.path.realpath(self.results_dir)).is_relative_to(path):
                raise UserError(
                    f"results_dir={self.results_dir}: lies in {option}={path}, so that results would be taken for what "
                    "belongs there; give results_dir=FOLDER outside of it"
                )
        for part in (self.model, self.dataset, self.method):
            part.check(self.model.modality)
        if self.eval.target_stderr and self.model.pack == "concatenate":
            raise UserError(
                "eval.target_stderr: the pieces of model.pack=concatenate come document by document, so that the first "
                "ones are no fair sample; leave it null, or take model.pack=documents"
            )
        if self.eval.target_stderr and isinstance(self.fraction, Each):
            raise UserError(
                "eval.target_stderr: fraction=each compares all units on the same documents, so that none may stop "
                "earlier; leave it null, and set eval.tokens or eval.documents"
            )
        if self.objective:
            _check_objective(self.objective, self.fraction)
        _check_examples(self.dataset)

    def budget(self, split: Split) -> Budget:
        """Limits on the amount of data in a split."""
        if split == "calibration":
            return Budget(self.statistics.tokens, self.statistics.documents, scope=self.scope.statistics)
        if self.model.modality == "image":
            return Budget(None, self.eval.images)
        return Budget(self.eval.tokens, self.eval.documents, evaluate.LEAST if self.eval.target_stderr else None)

    def fetch(self) -> None:
        """Download all that the job needs from the hub, and compute nothing."""
        self.model.prefetch()
        encode = self.model.encoder()
        for intake in splits_of(self.dataset):
            encode(iter(intake), intake.split, self.budget(intake.split), self.batch_tokens, 0)

    @functools.cached_property
    def statistics_key(self) -> dict[str, Any]:
        """Everything that the calibration statistics depend on."""
        return {
            "numbers": RESULTS_VERSION,
            "model": {"class": class_of(self.model), **content(self.model)},
            "dataset": {"class": class_of(self.dataset), **content(self.dataset)},
            "site": _without_layers(asdict(self.site)),
            "statistics": numbers_of(self.statistics)
            | ({"growing": streaming_histogram.COUNTS_VERSION} if self.statistics.passes == 1 else {})
            | ({"no_special": NO_SPECIAL} if self.model.tokens == "no_special" else {}),
            "batch_tokens": self.batch_tokens,
            **({"scope": self.scope.statistics} if self.scope.statistics != "all" else {}),
        }

    @functools.cached_property
    def scores_key(self) -> dict[str, Any]:
        """Everything that the scores of a selection rule depend on, besides the calibration statistics."""
        rule = options_of(self.selection)
        return {
            "selection": {key: value for key, value in rule.items() if key not in ("order", "within")},
            **self._which_units,
        }

    @property
    def _which_units(self) -> dict[str, Any]:
        """The unit, the layers and the positions, without those at their default: earlier results stay valid."""
        added = {"unit": self.unit.name, "layers": self.site.layers, "write": self.scope.write}
        default = {"unit": "neuron", "layers": "all", "write": "all"}
        return {key: value for key, value in added.items() if value != default[key]}

    @functools.cached_property
    def study_key(self) -> dict[str, Any]:
        """Everything that jobs must have in common to be comparable."""
        own = {"selection": options_of(self.selection), "eval": numbers_of(self.eval)}
        return {**self.statistics_key, **own, **self._which_units}

    @functools.cached_property
    def signature(self) -> str:
        """Hash of everything that can change the numbers."""
        own = {"method": options_of(self.method), "fractions": self.fraction.content, "seed": self.seed}
        return hashing.signature({**self.study_key, **own})

    @functools.cached_property
    def cost_key(self) -> str:
        """Key of jobs that take about equally long: all but method and seed are the same."""
        return hashing.signature([self.study_key, self.fraction.content])[:16]

    @functools.cached_property
    def folder(self) -> Path:
        """Run folder of the job."""
        name = f"{self.model.label}-{self.dataset.label}-{self.method.label}-s{self.seed}-{self.signature[:8]}"
        return self.results_dir / self.sweep / name.replace("/", "--")


def _without_layers(site: dict[str, Any]) -> dict[str, Any]:
    """The options of a site without its layers: statistics are collected in all of them."""
    return {
        key: _without_layers(value) if isinstance(value, dict) else value
        for key, value in site.items()
        if key != "layers"
    }


def _check_objective(name: str, schedule: Schedule) -> None:
    fractions = schedule.values if isinstance(schedule, Fractions) else ()
    kind, _, metric = name.partition("/")
    if kind not in ("auc", "at_50") or metric not in MAIN:
        raise UserError(
            f"objective={name}: must be one of {', '.join(f'{k}/{m}' for k in ('auc', 'at_50') for m in MAIN)}, or null"
        )
    if kind == "auc" and (len(fractions) < 2 or fractions[-1] != 1):
        raise UserError(f"objective={name}: needs a curve up to 1.0 with a fraction below, such as fraction=tenths")
    if kind == "at_50" and 0.5 not in fractions:
        raise UserError(f"objective={name}: needs the fraction 0.5, such as fraction=half")


def objective(job: Job) -> float | None:
    """Value of a finished curve that the option `objective` names, for a sweeper such as Optuna's to optimise.

    Raises:
        UserError: the curve has no such value.
    """
    if job.objective is None:
        return None
    rows = run_folder.result(job.folder, "rows.parquet")
    value = None if rows is None else summary(rows).get(job.objective)
    if value is None:
        raise UserError(f"objective={job.objective}: {job.folder.name} has no such value")
    return value


@functools.lru_cache(maxsize=64)
def _check_examples(dataset: Dataset) -> None:
    """Check that there is something to calibrate on and to evaluate, as far as possible without a tokenizer."""
    for intake in splits_of(dataset, threaded=False):  # of each, only the first example is read
        if not any(isinstance(example, Picture) or len(example.text) > 1 for example in intake):
            raise UserError(
                f"dataset={dataset.label}: nothing to score in its {intake.split} split: no example, or all documents "
                "are shorter than two tokens; give longer or more documents"
            )
