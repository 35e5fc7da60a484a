"""hydra/launcher=slurm and hydra/launcher=local: the jobs of a sweep in packs, each of which loads its model once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.ablation_sweeps_launcher.composing import compose


class InPacksLauncher(Launcher):
    """Checks every job before it submits the first."""

    def __init__(self, **options: Any) -> None:
        pass  # `launch` reads them from the config, and says in one line what is wrong with them

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from ablation_sweeps import dispatch
        from ablation_sweeps.config import build
        from ablation_sweeps.launching import check, only_asked

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        given: dict[str, Any] = OmegaConf.to_container(self.config.hydra.launcher, resolve=True)  # type: ignore
        given["_target_"] = given.pop("to")
        options = build("hydra.launcher", given)
        jobs = check(compose(self.config, self.hydra_context, job_overrides, initial_job_idx))
        if only_asked(jobs, options.max_jobs_per_pack, options.at_once):
            return []
        dispatch.launch(options, jobs)
        return []
