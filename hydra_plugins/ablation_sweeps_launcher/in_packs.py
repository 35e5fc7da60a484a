"""hydra/launcher=slurm and hydra/launcher=local: run the jobs of a sweep in packs that load their model once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.ablation_sweeps_launcher.composing import compose, record

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job


class InPacksLauncher(Launcher):
    """Checks every job before it submits the first."""

    def __init__(self, **options: Any) -> None:
        pass  # `launch` reads them from the config, and explains errors in one line

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from ablation_sweeps.dispatch import launcher
        from ablation_sweeps.dispatch.sweep import check, only_asked
        from ablation_sweeps.experiment.config import build

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        given: dict[str, Any] = OmegaConf.to_container(self.config.hydra.launcher, resolve=True)  # type: ignore
        given["_target_"] = given.pop("to")
        options = build("hydra.launcher", given)
        jobs = check(compose(self.config, self.hydra_context, job_overrides, initial_job_idx))
        if only_asked(jobs, options.max_jobs_per_pack, options.max_concurrent_packs):
            return []
        record(self.config)
        launcher.launch(options, jobs)
        return [] if jobs[0].objective is None else [_returned(job, options) for job in jobs]


def _returned(job: Job, options: Any) -> JobReturn:
    """Return value of a job that ran in another process, for a sweeper that optimises it."""
    from ablation_sweeps.base.errors import UserError
    from ablation_sweeps.experiment.job import objective
    from ablation_sweeps.results import run_folder

    if not options.wait and not run_folder.finished(job.folder):
        raise UserError(f"objective={job.objective}: is known only when the job has run; give hydra.launcher.wait=true")
    return JobReturn(status=JobStatus.COMPLETED, _return_value=objective(job))
