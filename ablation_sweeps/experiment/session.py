"""State that the jobs of one process share, so that each job reuses what earlier ones have computed."""

from __future__ import annotations

import functools
import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import SPLITS, Batch, Split
from ablation_sweeps.data.encoder import Budget
from ablation_sweeps.data.intake import Contents, Intake
from ablation_sweeps.datasets.dataset import Dataset
from ablation_sweeps.experiment import identity
from ablation_sweeps.experiment.clean_passes import CleanPasses
from ablation_sweeps.models.model import Model
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.certificate import Certificate, certify
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.replay import Replay

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job

log = logging.getLogger(__name__)


class Session:
    """The loaded model, its batches, the cached clean logits and the recorded calibration activations.

    The jobs of a process are given the same session, one after the other. It holds one model at a time: if a job needs
    another one, everything that came from the previous model is dropped first.
    """

    def __init__(self) -> None:
        self._config: Model | None = None
        self._model: Transformer | None = None
        self._certificates: dict[tuple, Certificate] = {}
        self._start_anew()

    def _start_anew(self) -> None:
        # Bounded: batches hold pixels, clean passes fill 256 MB of memory and a replay 4 GB of disk.
        self._batches = functools.lru_cache(maxsize=8)(self._encode)
        self._clean_passes = functools.lru_cache(maxsize=1)(self._new_clean_passes)
        self._replay = functools.lru_cache(maxsize=1)(self._new_replay)

    def model(self, job: Job) -> Transformer:
        """The job's model, loaded unless the job before had the same."""
        if self._model is None or self._config != job.model:
            self._model = None
            self._certificates.clear()
            self._start_anew()
            if torch.cuda.is_available():
                gc.collect()  # a model that is split across devices holds references to itself
                torch.cuda.empty_cache()
            torch.backends.cudnn.allow_tf32 = False  # else, convolutions (patch embeddings) of float32 run in TF32
            model: Transformer = job.model.load()
            model.module.requires_grad_(False)
            self._config, self._model = job.model, model
        return self._model

    def certificate(self, job: Job, projections: list[Projection]) -> Certificate:
        """The certificate of the job's model at these projections, those of all layers; found out once."""
        model = self.model(job)
        key = (job.scope.write, *((projection.site, projection.path) for projection in projections))
        if key not in self._certificates:
            self._certificates[key] = certify(model, projections, job.scope.write)
        return self._certificates[key]

    def batches(self, job: Job, split: Split) -> list[Batch]:
        """The batches of a split, encoded for the job's model."""
        key = self._key(job, split)  # first: it may load another model, and so drop what is kept
        return self._batches(*key)[0]

    def scored_calibration(self, job: Job) -> list[Batch]:
        """The calibration data, with labels to score. A masked language model sees them masked, as in an evaluation."""
        if self.model(job).kind != "masked_lm":
            return self.batches(job, "calibration")
        dataset, split, budget, batch_tokens, seed, calibration = self._key(job, "calibration")
        return self._batches(dataset, split, budget, batch_tokens, seed, calibration, True)[0]

    def left_out(self, job: Job) -> dict[str, list[str]]:
        """Why data were left out: sentences for each split that is incomplete."""
        keys = {split: self._key(job, split) for split in SPLITS}
        found = {split: self._batches(*key)[1].left_out for split, key in keys.items()}
        return {split: sentences for split, sentences in found.items() if sentences}

    def clean_passes(self, job: Job) -> CleanPasses:
        """Cache of the evaluation batches' clean logits, as far as earlier jobs have filled it."""
        key = self._key(job, "evaluation")
        return self._clean_passes(*key)

    def replay(self, job: Job) -> Replay | None:
        """The recorded calibration pass, reused if the previous job had the same calibration data. None on a GPU, where
        computing again is faster than reading from a disk."""
        if not self.model(job).on_cpu:
            return None
        return self._replay(job.results_dir / ".cache", job.site, *self._key(job, "calibration"))

    def check_unchanged(self, job: Job) -> None:
        """Check that the files of model and dataset are still those in the job's signature.

        Raises:
            UserError: they changed while the job ran.
        """
        for option, part in (("model", job.model), ("dataset", job.dataset)):
            if identity.present_content(part) != identity.content(part):
                raise UserError(
                    f"{option}={part.label}: its files changed while the job ran; the same command "
                    "again uses the new ones"
                )

    def _key(self, job: Job, split: Split) -> tuple[Any, Split, Budget, int, int, Budget]:
        """Cache key of a split's batches. That of the evaluation split includes the calibration data, since examples
        that occur in both are left out of the evaluation."""
        model = self.model(job)
        seed = job.seed if model.kind == "masked_lm" and split == "evaluation" else 0  # only masking is random
        return job.dataset, split, job.budget(split), job.batch_tokens, seed, job.budget("calibration")

    def _encode(
        self,
        dataset: Dataset,
        split: Split,
        budget: Budget,
        batch_tokens: int,
        seed: int,
        calibration: Budget,
        is_masked: bool = False,
    ) -> tuple[list[Batch], Intake]:
        assert self._model is not None
        calibrated: Contents = {}
        if split == "evaluation":
            calibrated = self._batches(dataset, "calibration", calibration, batch_tokens, 0, calibration)[1].contents
        intake = Intake(dataset.label, split, dataset.examples(split), calibrated)
        batches = self._model.encode(iter(intake), "evaluation" if is_masked else split, budget, batch_tokens, seed)
        intake.examples = ()  # a dataset may keep files open
        for sentence in intake.left_out:
            log.warning("dataset=%s: of its %s split, %s", dataset.label, split, sentence)
        return batches, intake

    def _new_clean_passes(self, *_key: Any) -> CleanPasses:
        assert self._model is not None
        return CleanPasses(self._model)

    def _new_replay(self, folder: Path, *_key: Any) -> Replay:
        return Replay(folder)
