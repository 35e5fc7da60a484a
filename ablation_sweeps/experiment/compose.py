"""Composes a job from options and the yaml files in conf/."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.experiment.arguments import options_for_hydra, typed
from ablation_sweeps.experiment.config import to_job
from ablation_sweeps.experiment.config_choices import check_choices
from ablation_sweeps.experiment.config_errors import one_line

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job


PACKAGE = Path(str(files("ablation_sweeps")))
# A wheel holds conf/ inside the package; a checkout has it beside the package.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"


def compose_job(*options: str, config_dir: str | os.PathLike[str] | None = None) -> Job:
    """Compose and check the job that the command line makes of the same options. Nothing is loaded or written yet.

    Args:
        options: options as typed on the command line: `"method=mean"` or `"eval.tokens=5000"`.
        config_dir: folder with yaml files of your own, as for the flag `--config-dir`.

    Raises:
        UserError: one line that names the option and the remedy.
    """
    job = unchecked_job(*options, config_dir=config_dir)
    job.check()
    return job


def unchecked_job(*options: str, config_dir: str | os.PathLike[str] | None = None) -> Job:
    """The job of `compose_job`, whose parts need not fit together: for a command that uses some of them only."""
    more = [] if config_dir is None else [Path(config_dir).expanduser().absolute()]
    search = [f"hydra.searchpath={typed([f'file://{folder}' for folder in more])}"] if more else []
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", [*options_for_hydra(options), *search], return_hydra_config=True)
            check_choices(config, GlobalHydra.instance().config_loader())
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(one_line(error, CONF, *more)) from error
    return to_job(config)
