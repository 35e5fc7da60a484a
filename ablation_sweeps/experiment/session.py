"""What jobs of one process share: the loaded model, encoded batches, clean passes and the recorded calibration pass."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch, Split
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.data.intake import Intake
from ablation_sweeps.experiment.clean_passes import CleanPasses
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.replay import Replay

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job

log = logging.getLogger(__name__)


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


def clean_passes(job: Job, model: Transformer) -> CleanPasses:
    """Over the batches of the evaluation split: those of the job before, where it had the same."""
    return _clean_passes(*_of(job, model, "evaluation"))


def recording(job: Job, model: Transformer) -> Replay | None:
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
def _recording(folder: Path, *_data: Any) -> Replay:
    return Replay(folder)
