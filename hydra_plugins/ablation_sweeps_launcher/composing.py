"""Composes the configs of all jobs of a sweep at once, so that later edits in conf/ change nothing."""

from collections.abc import Sequence
from pathlib import Path

from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from ablation_sweeps.base.errors import UserError

OF_A_LAUNCH = ("launcher", "sweeper")  # settings of Hydra that the jobs of a launch share
OPTIMISERS = ("optuna", "ax_sweeper", "nevergrad")  # sweepers that need a number from each job


def compose(
    config: DictConfig, context: HydraContext, overrides: Sequence[Sequence[str]], first: int
) -> list[DictConfig]:
    """Compose the config of each job.

    Args:
        overrides: overrides of each job.
        first: number of the first job.

    Raises:
        UserError: there is no job, or a job cannot be part of this launch.
    """
    from ablation_sweeps.experiment.arguments import options_for_hydra
    from ablation_sweeps.experiment.config_choices import check_choices

    if not overrides:
        raise UserError("there is no job: nothing is swept over; see hydra.sweeper and what is typed after -m")
    configs = []
    bar = tqdm(overrides, desc="composing the jobs", delay=2, leave=False, disable=None)
    for number, of_job in enumerate(bar, start=first):
        job = context.config_loader.load_sweep_config(config, options_for_hydra(of_job))
        check_choices(job, context.config_loader)
        _check_same_launch(job, config, of_job)
        if job.get("objective") is None and any(name in config.hydra.sweeper._target_ for name in OPTIMISERS):
            raise UserError("objective: is null, but this hydra/sweeper optimises a number; give objective=auc/loss")
        with open_dict(job):
            job.hydra.job.id = job.hydra.job.num = number
        configs.append(job)
    return configs


def _check_same_launch(job: DictConfig, launch: DictConfig, of_job: Sequence[str]) -> None:
    """Check that a job does not set another launcher or sweeper than its launch, which Hydra would ignore.

    An experiment may set them, and a sweep may be over several experiments.

    Raises:
        UserError: it sets another one.
    """
    differing = [part for part in OF_A_LAUNCH if job.hydra[part] != launch.hydra[part]]
    if differing:
        options = [option for option in of_job if option.startswith(("experiment=", "study=", "hydra"))] or of_job
        raise UserError(
            f"{' '.join(options)}: sets hydra.{differing[0]}, which holds for a whole launch and not for one job of "
            "a sweep; launch it by itself, with -m and without another experiment"
        )


def record(config: DictConfig) -> None:
    """Save the composed command in the sweep's folder, as Hydra's own sweeper does."""
    folder = Path(config.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "multirun.yaml")
