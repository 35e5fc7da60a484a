"""Runs one job, or with -m a sweep: python launch.py -m method=zero,mean,resample,peak"""

import os
import sys
from pathlib import Path

try:
    import hydra
except ImportError:
    sys.exit("error: this Python lacks hydra; make setup installs all, and source .venv/bin/activate makes it python")
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ablation_sweeps.config import number_fractions, to_job
from ablation_sweeps.messages import one_line

CONF = Path(__file__).parent / "conf"
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"

BARE_FLAGS = ("-m", "--multirun")
FLAGS = ("-cd", "--config-dir", "-cp", "--config-path", "-cn", "--config-name", "-c", "--cfg")  # take a value


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    from ablation_sweeps.job import run_job

    if HydraConfig.get().mode is RunMode.MULTIRUN:  # the launcher has checked it, and will report
        run_job(to_job(cfg))
        return
    from ablation_sweeps.data import UserError
    from ablation_sweeps.launching import Failures, end_of_sweep, only_asked

    try:  # Hydra would print the overrides above the error
        if (chosen := HydraConfig.get().runtime.choices["hydra/launcher"]) != "in_order":
            raise UserError(f"hydra/launcher={chosen}: launches sweeps; add -m, also for one job")
        job = to_job(cfg)
        job.check()
        if only_asked([job], None, 1):
            return
        run_job(job)
        end_of_sweep([job], Failures())
    except Exception as error:
        leave(error)


def flags_first(arguments: list[str]) -> list[str]:
    """Hydra's parser refuses the options that come after a flag if others come before it."""
    flags, options, takes_value = [], [], False
    for argument in arguments:
        (flags if takes_value or argument in (*BARE_FLAGS, *FLAGS) else options).append(argument)
        takes_value = argument in FLAGS
    return flags + options


def leave(error: BaseException) -> None:
    if WANTS_TRACEBACK:
        raise error
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(f"error: {one_line(error, CONF)}")


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves errors to us
    sys.argv[1:] = flags_first(number_fractions(sys.argv[1:]))
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        leave(error)
