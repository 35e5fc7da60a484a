"""Calibration statistics, computed as a method asks for them, and the record of the data that they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ablation_sweeps.base import files, hashing
from ablation_sweeps.base.lazy import torch
from ablation_sweeps.data.batch import Batch
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons import tensor_cache
from ablation_sweeps.neurons.collect import MeanAbsolute, Medians, collect
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.replay import Replay
from ablation_sweeps.neurons.sites import in_layers
from ablation_sweeps.neurons.statistics import Histogram, Statistics
from ablation_sweeps.results import run_folder

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job


@dataclass
class CalibrationStatistics:
    """Callable that returns the statistics a method asks for: computed, or from the cache of an earlier job.

    Attributes:
        projections: those of all layers, so that jobs for different layers share the statistics.
        folder: run folder, whose environment.json records the cache folder and the calibration data.
        replay: recorder for the activations of the calibration pass; None: every pass runs the model.
        copies_left_out: True if duplicates were removed from the calibration split. Earlier versions counted them, so
            their cached statistics are not reused.
        halved: True if halved batches may have changed the method's values by more than the last digit. Sums change
            only in the last digit, but a method that reads counts may not be continuous in them.
    """

    job: Job
    folder: Path
    model: Transformer
    projections: list[Projection]
    batches: list[Batch]
    replay: Replay | None
    copies_left_out: bool
    halved: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        key = {
            **self.job.statistics_key,
            **({"copies": "left out"} if self.copies_left_out else {}),
            **({"texts": self.model.texts} if self.model.texts else {}),
        }
        self._cache = self.job.results_dir / ".cache" / hashing.signature(key)[:16]
        run_folder.update_environment(
            self.folder,
            statistics=self._cache.name,
            n_heads=self.model.n_heads,
            model_device=str(self.model.device),
            model_left_out=list(self.model.left_out),
        )

    def __call__(self, *wanted: Histogram | Medians | MeanAbsolute) -> Statistics:
        """The moments of each neuron in the layers of the job, plus the requested histograms and medians."""
        statistics = collect(
            self.model,
            self.projections,
            self.batches,
            self._cache,
            *wanted,
            passes=self.job.statistics.passes,
            note=lambda text: run_folder.add_warning(self.folder, text),
            replay=self.replay,
        )
        positions = statistics.moments[0].n
        run_folder.update_environment(
            self.folder, calibration_positions=positions, calibration_asked=self._positions_asked(positions)
        )
        is_continuous = self.job.method.is_continuous
        if is_continuous is None:
            is_continuous = not wanted
        self.halved |= statistics.too_large is not None and not is_continuous
        layers = [projection.order for projection in in_layers(self.projections, self.job.site)]
        return statistics if len(layers) == len(self.projections) else statistics.of_layers(layers)

    def cached_scores(self, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The scores of the job's selection rule, computed once, also by jobs that run at the same time."""
        # A folder of their own, since a rule may ask for statistics, which lock theirs.
        folder = self._cache / f"scores-{hashing.signature(self.job.scores_key)[:16]}"
        with files.locked(folder):
            return tensor_cache.cached(folder / "scores.safetensors", dict, dict, compute)

    def _positions_asked(self, positions: int) -> int:
        """Number of calibration positions that the options ask for. If `statistics.documents` was reached first, the
        number of positions in that many documents."""
        documents = {place for batch in self.batches for place in batch.documents or batch.index}
        return positions if len(documents) == self.job.statistics.documents else self.job.statistics.tokens
