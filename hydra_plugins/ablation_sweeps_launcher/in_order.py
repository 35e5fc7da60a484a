"""The default launcher: checks every job before it runs the first, then runs them in this process, one by one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from ablation_sweeps.base.errors import UserError
from hydra_plugins.ablation_sweeps_launcher.composing import compose, record

log = logging.getLogger(__name__)


class InOrderLauncher(Launcher):
    """Runs jobs in this process, where they share the loaded model. A failing job does not affect the others."""

    def __init__(self, **options: Any) -> None:
        if options:
            raise UserError(
                f"hydra.launcher.{next(iter(options))}: jobs that run in this process have no such option; choose "
                "hydra/launcher=local or slurm"
            )

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from ablation_sweeps.dispatch.packs import poisons
        from ablation_sweeps.dispatch.plan import by_model
        from ablation_sweeps.dispatch.sweep import Failures, check, end_of_sweep, only_asked, waiting

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        configs = compose(self.config, self.hydra_context, job_overrides, initial_job_idx)
        jobs = check(configs)
        if only_asked(jobs, None, 1):
            return []
        record(self.config)
        failures = Failures()
        returns: dict[int, JobReturn] = {}
        with waiting(jobs):
            for place, i in enumerate(by_model(jobs), start=1):
                log.info("[%d/%d] %s", place, len(jobs), jobs[i].folder.name)
                returns[i] = run_job(
                    task_function=self.task_function, config=configs[i], job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir", hydra_context=self.hydra_context,
                )  # fmt: skip
                configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
                if returns[i].status is not JobStatus.COMPLETED:
                    error = returns[i]._return_value
                    failures.add(jobs[i].folder.name, error)
                    if poisons(error):
                        log.error("this process cannot compute any more; the same command runs the missing jobs")
                        break
        end_of_sweep(jobs, failures)
        return [returns[i] for i in range(len(jobs))]
