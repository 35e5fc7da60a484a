"""Statistics of the calibration data, as a method asks for them, and the record of what they were taken from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ablation_sweeps.base import hashing
from ablation_sweeps.data.batch import Batch
from ablation_sweeps.models.transformer import Transformer
from ablation_sweeps.neurons.collect import Medians, collect
from ablation_sweeps.neurons.hooks import Projection
from ablation_sweeps.neurons.replay import Replay
from ablation_sweeps.neurons.statistics import Histogram, Statistics
from ablation_sweeps.results import run_folder

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job


@dataclass
class CalibrationStatistics:
    """Gives a method the statistics that it asks for: computed, or read where an earlier job has left them.

    Attributes:
        folder: the run's, whose environment.json tells where the statistics are and what they were taken from.
        replay: the activations of a pass over the batches, once one was recorded; None: the model is run again.
        copies_left_out: examples of the calibration split were left out. Earlier versions counted copies, so that
            their statistics are not taken for these.
        halved: rounding may change what the method computes by more than the last digit, since batches had to be
            halved: sums then differ in the last digit, and a method that reads counts is not continuous in them.
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

    def __call__(self, *wanted: Histogram | Medians) -> Statistics:
        """The moments of each neuron, and the histograms and medians that are wanted."""
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
        is_continuous = getattr(self.job.method, "is_continuous", not wanted)
        self.halved |= statistics.too_large is not None and not is_continuous
        return statistics

    def _positions_asked(self, positions: int) -> int:
        """Number of positions that the options ask for. Where `statistics.documents` was reached first, these are the
        positions of so many documents."""
        documents = {place for batch in self.batches for place in batch.documents or batch.index}
        return positions if len(documents) == self.job.statistics.documents else self.job.statistics.tokens
