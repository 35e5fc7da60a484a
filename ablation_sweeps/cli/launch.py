"""Runs one job, or with -m a sweep: Hydra composes the configs, and a launcher in hydra_plugins runs the jobs."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ablation_sweeps.base import interrupts
from ablation_sweeps.base.terminal import lose_output
from ablation_sweeps.experiment.arguments import config_folders, for_hydra
from ablation_sweeps.experiment.compose import CONF
from ablation_sweeps.experiment.config import to_job
from ablation_sweeps.experiment.config_choices import check_choices
from ablation_sweeps.experiment.config_errors import one_line

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job
    from ablation_sweeps.experiment.session import Session


class PastHydra(BaseException):
    """Carries an error out of Hydra, which would print the overrides above any other exception."""


def launch() -> None:
    """Launch what `sys.argv` says; if that fails, exit with one line."""
    with_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves errors to us
    try:
        sys.argv[1:] = for_hydra(sys.argv[1:])
        run()
    except (Exception, KeyboardInterrupt, PastHydra) as error:
        cause = error.__cause__ if isinstance(error, PastHydra) and error.__cause__ else error
        if with_traceback:
            raise cause  # noqa: B904
        leave(cause)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(cfg: DictConfig) -> float | None:
    """Run one job, which is one of a sweep if -m is given."""
    from ablation_sweeps.experiment.job import objective
    from ablation_sweeps.experiment.run import run_job

    if HydraConfig.get().mode is RunMode.MULTIRUN:  # the launcher checks the job, and reports
        job = job_of(cfg)
        if job.prefetch or job.dry_run:  # launchers of other packages ignore these
            return only_do_what_is_asked(job)
        run_job(job, session())
        return objective(job)
    from ablation_sweeps.base.errors import UserError
    from ablation_sweeps.dispatch.sweep import Failures, end_of_sweep

    try:
        if (chosen := HydraConfig.get().runtime.choices.get("hydra/launcher")) != "in_order":
            raise UserError(f"hydra/launcher={chosen}: works only with -m, even for one job; add -m")
        if HydraConfig.get().sweeper.get("params"):
            raise UserError("hydra.sweeper.params: the chosen experiment is a sweep; add -m to run its jobs")
        job = job_of(cfg)
        job.check()
        if job.prefetch or job.dry_run:
            return only_do_what_is_asked(job)
        run_job(job, session())
        end_of_sweep([job], Failures())
        return objective(job)
    except Exception as error:
        raise PastHydra from error


@functools.cache
def session() -> Session:
    """The session of this process: for a sweep that runs in order, Hydra calls `run` for each job."""
    from ablation_sweeps.experiment.session import Session

    return Session()


def job_of(cfg: DictConfig) -> Job:
    """Build the job of a config. Relative paths begin where the command was typed, a folder that Hydra has left if
    hydra.job.chdir=true."""
    from hydra.core.global_hydra import GlobalHydra

    left = os.getcwd()
    os.chdir(HydraConfig.get().runtime.cwd)
    try:
        full = OmegaConf.create({"hydra": HydraConfig.get()})
        check_choices(full, GlobalHydra.instance().config_loader())
        return to_job(cfg)
    finally:
        os.chdir(left)


def only_do_what_is_asked(job: Job) -> None:
    """Download or plan, as prefetch=true and dry_run=true ask for."""
    from ablation_sweeps.dispatch.sweep import only_asked

    job.check()
    only_asked([job], None, 1)


def leave(error: BaseException) -> NoReturn:
    """Exit with one line about the error."""
    if isinstance(error, BrokenPipeError):  # `| head`: the reader has gone
        lose_output()
        sys.exit(1)
    if isinstance(error, KeyboardInterrupt):
        interrupts.end_at_the_next()
        print(interrupts.LINE, file=sys.stderr)
        sys.exit(130)
    sys.exit(f"error: {one_line(error, CONF, *config_folders(sys.argv))}")
