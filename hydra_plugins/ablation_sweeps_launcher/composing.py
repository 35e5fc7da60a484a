"""The configs of a sweep's jobs, composed at once: what is edited in conf/ later changes nothing."""

from collections.abc import Sequence

from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict
from tqdm import tqdm


def compose(
    config: DictConfig, context: HydraContext, overrides: Sequence[Sequence[str]], first: int
) -> list[DictConfig]:
    configs = []
    bar = tqdm(overrides, desc="composing the jobs", delay=2, leave=False, disable=None)
    for number, of_job in enumerate(bar, start=first):
        job = context.config_loader.load_sweep_config(config, list(of_job))
        with open_dict(job):
            job.hydra.job.id = job.hydra.job.num = number
        configs.append(job)
    return configs
