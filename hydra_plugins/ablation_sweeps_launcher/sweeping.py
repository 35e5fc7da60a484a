"""Hydra's basic sweeper, for launchers that compose and check all jobs before they run the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from ablation_sweeps.base.errors import UserError


class ComposedByTheLauncher(BasicSweeper):
    """Leaves composing jobs and creating folders to the launcher.

    Planning a large sweep then takes half the time, and a command that is refused creates nothing.
    """

    def sweep(self, arguments: list[str]) -> Any:
        assert self.launcher is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        typed = parser.parse_overrides(arguments)
        given = [override for override in self._params(parser) if not _replaced(override, typed)]
        batches = self.split_arguments([_checked(override) for override in (*given, *typed)], self.max_batch_size)
        returns, first = [], 0
        for batch in batches:
            returns.append(self.launcher.launch(batch, initial_job_idx=first))
            first += len(batch)
            for returned in returns[-1]:
                _ = returned.return_value  # raises what the job raised
        return returns

    def _params(self, parser: OverridesParser) -> list[Override]:
        """Overrides in `hydra.sweeper.params`, where a list means the same as names with commas between them."""
        from ablation_sweeps.experiment.arguments import options_for_hydra, typed

        params = OmegaConf.to_container(OmegaConf.create(self.params or {}), resolve=True)
        if not isinstance(params, dict):
            raise UserError(f"hydra.sweeper.params={params}: must be a mapping, such as {{method: 'zero,mean'}}")
        for key, value in params.items():
            if isinstance(value, dict):
                raise UserError(f"hydra.sweeper.params.{key}={value}: must be values with commas between, or a list")
        options = [f"{key}={value if isinstance(value, str) else typed(value)}" for key, value in params.items()]
        return parser.parse_overrides(options_for_hydra(options))


def _replaced(given: Override, typed: Sequence[Override]) -> bool:
    """True if a typed override replaces one of an experiment; `fraction` may have two names."""
    alike = {"fraction": "fraction.values"}
    key = alike.get(given.key_or_group, given.key_or_group)
    return any(alike.get(override.key_or_group, override.key_or_group) == key for override in typed)


def _checked(override: Override) -> Override:
    """The override in the form in which it is swept over.

    Raises:
        UserError: it gives nothing to sweep over.
    """
    from ablation_sweeps.experiment.arguments import with_exact_range

    if override.is_interval_sweep():
        raise UserError(
            f"{override.input_line}: an interval is for a sweeper that draws from it, such as hydra/sweeper=optuna; "
            "write the values, or range(start,stop,step)"
        )
    override = with_exact_range(override)
    if override.is_discrete_sweep() and not list(override.sweep_string_iterator()):
        raise UserError(f"{override.input_line}: gives no value, so there is no job; write values that exist")
    return override
