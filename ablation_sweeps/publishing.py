"""The curves of a sweep, from its files alone -> W&B, each of them once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ablation_sweeps import store
from ablation_sweeps.data import UserError
from ablation_sweeps.tracking import RunRecord, Wandb

log = logging.getLogger(__name__)

PROJECT = "ablation-sweeps"  # of runs that were tracked nowhere


def publish(sweep: Path, project: str | None = None, entity: str | None = None, again: bool = False) -> int:
    """Sends the finished runs that W&B does not have yet, and says how many those were. Stopped anywhere, the same
    call goes on: a run that was sent in part is sent whole under the same id, which replaces it.

    Args:
        project, entity: where to; None: where the runs would have logged themselves.
        again: send all of them.

    Raises:
        UserError: no run is finished, there is no key, or W&B does not take a run.
    """
    runs = [run for run in store.runs(sweep) if store.finished(run)]
    if not runs:
        raise UserError(f"{sweep}: no run is finished there; name the folder of a sweep: results/<sweep>")
    missing = [run for run in runs if again or not store.published(run)]
    for number, run in enumerate(tqdm(missing, desc="sending", disable=None)):
        try:
            _tracking(run, project, entity).send(RunRecord.of(run))
        except UserError as error:
            raise UserError(f"{error}; {number} of {len(missing)} runs were sent, the same command goes on") from error
        store.mark_published(run)
    return len(missing)


def _tracking(run: Path, project: str | None, entity: str | None) -> Wandb:
    own = store.config(run).get("tracking") or {}
    tags: Sequence[str] = own.get("tags") or ()
    return Wandb(
        project=project or own.get("project") or PROJECT,
        entity=entity or own.get("entity"),
        mode="online",
        tags=tuple(tags),
        sync=False,
    )
