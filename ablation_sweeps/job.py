"""One job is one curve: the whole experiment, from a validated configuration to rows on disk. Read top to bottom."""

from __future__ import annotations

import functools
import gc
import inspect
import json
import logging
import os
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from ablation_sweeps import activations, evaluation, files, growing, sites, store
from ablation_sweeps.ablation import Fitting, Method, Replacement
from ablation_sweeps.clean import CleanPasses
from ablation_sweeps.console import counted
from ablation_sweeps.data import NOT_SCORED, SPLITS, Batch, Split, UserError
from ablation_sweeps.environment import SHIPPED
from ablation_sweeps.intake import Intake
from ablation_sweeps.lazy import pd, torch
from ablation_sweeps.metrics import MAIN
from ablation_sweeps.recording import Recording
from ablation_sweeps.selection import Random, Schedule, granularity, masks
from ablation_sweeps.tracking import RunRecord, summary
from ablation_sweeps.transformer import Budget, Transformer

log = logging.getLogger(__name__)

NUMBERS = 2  # raise it when the code changes numbers beyond rounding: earlier results are then not taken for new
NO_SPECIAL = 2  # likewise, for model.tokens=no_special alone


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Calibration:
    """Attributes:
    tokens: positions that the statistics are taken over; for images, their patches.
    documents: at most so many documents or images; None is no limit.
    passes: over the data: 2 gives exact histograms, 1 takes half of the time where the second one is of the model, too.
    """

    tokens: Annotated[int, Field(ge=2)]
    documents: Annotated[int | None, Field(ge=1)]
    passes: activations.NPasses = 2


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Evaluation:
    """Attributes:
    tokens: of text that are evaluated; None is all there are.
    documents: at most so many; None is no limit.
    images: that are evaluated; None is all there are.
    top_k, top_k_images: the k of the second accuracy, for tokens and for classes.
    skip: this many of the most common tokens are left out of the skip metrics.
    target_stderr: of the loss, in nats: a point that is as precise as that after some number of documents or images
        needs no more of them. Texts are looked at 32 by 32; None: all points get all.
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
    """One curve. Its parts are built and checked; nothing is loaded."""

    model: Any  # a class of ablation_sweeps.models, or one of your own: see the README, "Adding"
    dataset: Any
    method: Method
    fraction: Schedule
    site: sites.Site
    selection: Random
    statistics: Calibration
    eval: Evaluation
    tracking: Any
    batch_tokens: int
    seed: int
    prefetch: bool  # fetch what is needed, and stop
    dry_run: bool  # say what would run, and stop
    sweep: str
    results_dir: Path
    objective: str | None  # what the sweeper optimises
    config: dict[str, Any]  # as composed and resolved: what config.yaml keeps

    def check(self) -> None:
        """All that can be found out before a model is loaded."""
        if self.model.modality != self.dataset.modality:
            fits = "dataset=digits or dataset=image_folder" if self.model.modality == "image" else "dataset=python_docs"
            raise UserError(
                f"dataset={self.dataset.label}: holds {self.dataset.modality}s, but model={self.model.label} takes "
                f"{self.model.modality}s; choose e.g. {fits}"
            )
        for option, part in (("model.path", self.model), ("dataset.path", self.dataset)):
            path = Path(os.path.realpath(getattr(part, "path", None) or "/nowhere"))
            if Path(os.path.realpath(self.results_dir)).is_relative_to(path):
                raise UserError(
                    f"results_dir={self.results_dir}: lies in {option}={path}, so that results would be taken for what "
                    "belongs there; give results_dir=FOLDER outside of it"
                )
        for part in (self.model, self.dataset, self.method):
            check = getattr(part, "check", None)  # most methods have nothing to check
            if check is not None:
                check(self.model.modality)
        if self.eval.target_stderr and getattr(self.model, "pack", None) == "concatenate":
            raise UserError(
                "eval.target_stderr: the pieces of model.pack=concatenate come document by document, so that the first "
                "ones are no fair sample; leave it null, or take model.pack=documents"
            )
        if self.objective:
            _check_objective(self.objective, self.fraction.values)
        _check_examples(self.dataset)

    def check_unchanged(self) -> None:
        """The files are still those of the signature: what is loaded, and kept for later jobs, is what it says."""
        for option, part in (("model", self.model), ("dataset", self.dataset)):
            if _content.__wrapped__(part) != _content(part):
                raise UserError(
                    f"{option}={part.label}: its files were changed while they were computed with; the same command "
                    "again takes them as they are then"
                )

    def budget(self, split: Split) -> Budget:
        if split == "calibration":
            return Budget(self.statistics.tokens, self.statistics.documents)
        if self.model.modality == "image":
            return Budget(None, self.eval.images)
        return Budget(self.eval.tokens, self.eval.documents, evaluation.LEAST if self.eval.target_stderr else None)

    def fetch(self) -> None:
        """Gets all that the job needs from the hub, and computes nothing."""
        if hasattr(self.model, "prefetch"):
            self.model.prefetch()
        encode = self.model.encoder() if hasattr(self.model, "encoder") else load(self.model).encode
        calibrated: Collection[bytes] = frozenset()
        for split in SPLITS:
            intake = Intake(self.dataset.label, split, self.dataset.examples(split), calibrated)
            encode(iter(intake), split, self.budget(split), self.batch_tokens, 0)
            calibrated = intake.contents

    @functools.cached_property
    def data(self) -> dict[str, Any]:
        """What the statistics depend on."""
        return {
            "numbers": NUMBERS,
            "model": {"class": _class(self.model), **_content(self.model)},
            "dataset": {"class": _class(self.dataset), **_content(self.dataset)},
            "site": asdict(self.site),
            "statistics": _numbers(self.statistics)
            | ({"growing": growing.NUMBERS} if self.statistics.passes == 1 else {})
            | ({"no_special": NO_SPECIAL} if getattr(self.model, "tokens", "all") == "no_special" else {}),
            "batch_tokens": self.batch_tokens,
        }

    @functools.cached_property
    def study(self) -> dict[str, Any]:
        """What is the same for all jobs that may be compared."""
        return {**self.data, "selection": _options(self.selection), "eval": _numbers(self.eval)}

    @functools.cached_property
    def signature(self) -> str:
        """Of everything that can change the numbers."""
        own = {"method": _options(self.method), "fractions": self.fraction.values, "seed": self.seed}
        return files.signature({**self.study, **own})

    @functools.cached_property
    def like(self) -> str:
        """The same for jobs that take about as long: all but method and seed."""
        return files.signature([self.study, self.fraction.values])[:16]

    @functools.cached_property
    def folder(self) -> Path:
        name = f"{self.model.label}-{self.dataset.label}-{self.method.label}-s{self.seed}-{self.signature[:8]}"
        return self.results_dir / self.sweep / name.replace("/", "--")


def _numbers(part: Calibration | Evaluation) -> dict[str, Any]:
    """What came later, left at its default, is no part of it: results from before are still valid."""
    later = {"target_stderr": None, "passes": 2}
    return {key: value for key, value in asdict(part).items() if (key, value) not in later.items()}


def _options(part: Any) -> dict[str, Any]:
    """What it computes with; a label is only a name. A class whose values have changed since says so by `numbers`."""
    options = {key: value for key, value in asdict(part).items() if key != "label"}
    numbers = getattr(part, "numbers", None)
    return {"class": _class(part), **options, **({"numbers": numbers} if isinstance(numbers, int) else {})}


@functools.cache
def _content(part: Any) -> dict[str, Any]:
    """Of a model's or dataset's files, when this process first looked at them: what it keeps in memory."""
    return part.identity() if hasattr(part, "identity") else {"fingerprint": part.fingerprint()}


def _class(part: Any) -> str:
    return " ".join([f"{type(part).__module__}.{type(part).__qualname__}", *_edited(type(part))])


@functools.cache
def _edited(kind: type) -> list[str]:
    """What the file of a class held when it was imported, where NUMBERS does not stand for it: it may be changed at any
    time."""
    if kind.__module__ in SHIPPED:
        return []
    return [files.fingerprint_of_file(Path(inspect.getfile(kind)))]


def run_job(job: Job) -> Path:
    """Runs the job, unless it is finished already. Returns its folder, which holds its rows."""
    folder = job.folder
    with files.locked(folder), store.run_log(folder):
        if store.finished(folder):
            log.info("%s is finished already", folder)
            return folder
        store.begin(folder, job.config)
        started = time.perf_counter()
        try:
            documents, rows = measure(job, folder)
            store.finish(folder, rows, documents, time.perf_counter() - started, job.like)
        except BaseException as error:
            if store.status(folder)["state"] != "finished":  # what comes after that is only tidying up
                store.fail(folder, error)
            raise
    if job.tracking.log_run(RunRecord.of(folder)):  # a mirror: what is on disk does not depend on it
        store.mark_published(folder, getattr(job.tracking, "place", ""))
    return folder


def _check_objective(name: str, fractions: tuple[float, ...]) -> None:
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
    """The number of a finished curve that `objective` names: what a sweeper such as Optuna's optimises.

    Raises:
        UserError: the curve has no such number.
    """
    if job.objective is None:
        return None
    rows = store.result(job.folder, "rows.parquet")
    value = None if rows is None else summary(rows).get(job.objective)
    if value is None:
        raise UserError(f"objective={job.objective}: {job.folder.name} has no such value")
    return value


def measure(job: Job, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The experiment. Returns the sums of every document, and the rows of the curve."""
    model = load(job.model)
    store.remember_texts(folder, ", ".join(model.texts))
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
    cache = job.results_dir / ".cache" / files.signature(key)[:16]
    note = functools.partial(store.note, folder)
    store.remember(folder, statistics=cache.name, n_heads=model.n_heads, model_device=str(model.device),
                   model_left_out=list(model.left_out))  # fmt: skip
    halved = False

    def statistics(*wanted: activations.Histogram | activations.Medians) -> activations.Statistics:
        nonlocal halved
        found = activations.collect(
            model, projections, calibration, cache, *wanted, passes=job.statistics.passes, note=note,
            recording=recording(job, model),
        )  # fmt: skip
        positions = found.moments[0].n
        store.remember(
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
        store.remember(folder, data_left_out=missing)
    done = store.progress(folder, [batch.names for batch in batches])
    store.expect(folder, len(batches))
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
    documents = evaluation.evaluate(
        model,
        projections,
        batches,
        {fraction: masks(orders, fraction) for fraction in job.fraction.values},
        replacement,
        guess.common,
        top_k,
        done=done,
        save=functools.partial(store.save_progress, folder),
        note=note,
        target_stderr=job.eval.target_stderr,
        clean=clean_passes(job, model),
    )
    job.check_unchanged()  # of many images, pixels are read as they are needed
    labels = torch.cat([batch.labels[batch.labels != NOT_SCORED] for batch in batches])
    rows = evaluation.metrics(documents, guess, labels, top_k)
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


def chance(job: Job, model: Transformer, batches: list[Batch], calibration: list[Batch]) -> evaluation.Guess:
    """The guesser that does not see the input."""
    with torch.inference_mode():
        n_classes = model.logits(model.other_input("probe", 8, 0).to(model.device)).shape[-1]
    if model.modality == "image":
        names = job.dataset.class_names()
        if len(names) != n_classes:
            raise UserError(
                f"dataset={job.dataset.label}: has {counted(len(names), 'class', 'es')}, but the model knows "
                f"{n_classes}, so labels would be wrong; choose data with the model's classes (of an image_folder, "
                "dataset.classes=FILE gives their order)"
            )
        known = set(model.class_names)
        for number, (name, own) in enumerate(zip(names, model.class_names, strict=False)):  # which may be empty
            if name != own and name in known:
                raise UserError(
                    f"dataset={job.dataset.label}: its class {number} is {name}, but the model's is {own}: in another "
                    "order, so that labels would be wrong; of an image_folder, dataset.classes=FILE gives the order"
                )
        return evaluation.uniform(n_classes)
    scored = frozenset(torch.cat([batch.labels.flatten() for batch in batches]).unique().tolist())
    return evaluation.unigram(calibration, n_classes, model.special_ids - scored, job.eval.skip)


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
        "study": files.signature(
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


_loaded: dict[Any, Transformer] = {}


def load(model: Any) -> Transformer:
    """Loaded once for all jobs of this process that follow each other with the same model; never two at a time."""
    if model not in _loaded:
        _loaded.clear()
        _encode.cache_clear()
        _clean_passes.cache_clear()
        _recording.cache_clear()
        if torch.cuda.is_available():
            gc.collect()  # a model that is spread over devices holds itself
            torch.cuda.empty_cache()
        torch.backends.cudnn.allow_tf32 = False  # or float32 is not float32 where pictures are cut into patches
        _loaded[model] = model.load()
        _loaded[model].module.requires_grad_(False)
    return _loaded[model]


def encode(job: Job, model: Transformer, split: Split) -> list[Batch]:
    return _encode(*_of(job, model, split))[0]


def left_out(job: Job, model: Transformer) -> dict[str, list[str]]:
    """What was left out of the data, and why, by split."""
    found = {split: _encode(*_of(job, model, split))[1].left_out for split in SPLITS}
    return {split: sentences for split, sentences in found.items() if sentences}


def clean_passes(job: Job, model: Transformer) -> CleanPasses:
    """Over the batches of the evaluation split: those of the job before, where it had the same."""
    return _clean_passes(*_of(job, model, "evaluation"))


def recording(job: Job, model: Transformer) -> Recording | None:
    """Of the pass over the calibration split: that of the job before, where it had the same. None for a GPU, which
    computes faster than a disk writes."""
    if not model.on_cpu:
        return None
    return _recording(job.results_dir / ".cache", job.site, *_of(job, model, "calibration"))


def _of(job: Job, model: Transformer, split: Split) -> tuple[Any, Any, Split, Budget, int, int, Budget]:
    """What batches depend on. Of those of the evaluation split, copies of the calibration data are left out."""
    seed = job.seed if model.kind == "masked_lm" and split == "evaluation" else 0  # only masking is random
    return job.model, job.dataset, split, job.budget(split), job.batch_tokens, seed, job.budget("calibration")


@functools.lru_cache(maxsize=8)
def _encode(
    model: Any, dataset: Any, split: Split, budget: Budget, batch_tokens: int, seed: int, calibration: Budget
) -> tuple[list[Batch], Intake]:
    calibrated: Collection[bytes] = frozenset()
    if split == "evaluation":
        calibrated = _encode(model, dataset, "calibration", calibration, batch_tokens, 0, calibration)[1].contents
    intake = Intake(dataset.label, split, dataset.examples(split), calibrated)
    batches = load(model).encode(iter(intake), split, budget, batch_tokens, seed)
    intake.examples = ()  # a dataset may hold its files
    for sentence in intake.left_out:
        log.warning("dataset=%s: of its %s split, %s", dataset.label, split, sentence)
    return batches, intake


@functools.lru_cache(maxsize=1)
def _clean_passes(model: Any, *batches: Any) -> CleanPasses:
    return CleanPasses(load(model))


@functools.lru_cache(maxsize=1)
def _recording(folder: Path, *_data: Any) -> Recording:
    return Recording(folder)


@functools.lru_cache(maxsize=64)
def _check_examples(dataset: Any) -> None:
    """There is something to calibrate on and something to evaluate, as far as that is seen without a tokenizer."""
    calibrated: Collection[bytes] = frozenset()
    for split in SPLITS:
        intake = Intake(dataset.label, split, dataset.examples(split), calibrated, threaded=False)
        if not any(len(getattr(example, "text", "of a picture")) > 1 for example in intake):
            raise UserError(
                f"dataset={dataset.label}: nothing to score in its {split} split: no example, or all documents are "
                "shorter than two tokens; give longer or more documents"
            )
        calibrated = intake.contents  # its first example is calibrated on, whatever the budget
