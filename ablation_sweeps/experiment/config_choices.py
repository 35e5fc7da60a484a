"""Checks that a composed config chooses one option per config group."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.experiment.config import CHOICES


def check_choices(cfg: DictConfig, loader: Any) -> None:
    """Refuse a yaml whose defaults list chooses several options of one group, of which Hydra would take the last.

    Args:
        loader: the config loader of Hydra that composed `cfg`.

    Raises:
        UserError: several options of a group are chosen.
    """
    absent = [
        group for group in (*CHOICES, "hydra/launcher", "hydra/sweeper") if group not in cfg.hydra.runtime.choices
    ]
    if not absent:
        return
    from hydra.types import RunMode

    overrides = [str(option) for part in ("hydra", "task") for option in cfg.hydra.overrides[part]]
    chosen = loader.compute_defaults_list(cfg.hydra.job.config_name, overrides, RunMode.RUN).defaults
    for group in absent:
        together: dict[tuple, list[str]] = {}
        for entry in chosen:
            if entry.config_path and os.path.dirname(entry.config_path) == group:
                together.setdefault((entry.parent, entry.package), []).append(os.path.basename(entry.config_path))
        for names in together.values():
            if len(names) > 1:
                raise UserError(
                    f"{group}=[{','.join(names)}]: takes one at a time, and the last one would count; with -m, "
                    f"{group}={','.join(names)} makes a job of each, and so does hydra.sweeper.params in a yaml"
                )
