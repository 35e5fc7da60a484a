"""Translates command-line arguments into the form that Hydra takes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, RangeSweep, ValueType
from hydra.errors import HydraException

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.paths import absolute
from ablation_sweeps.experiment.config import CHOICES, OPTIONS, SCALARS, number_fractions

BARE_FLAGS = (
    *("-m", "--multirun", "-r", "--run", "-sc", "--shell-completion", "--resolve"),
    *("-h", "--help", "--hydra-help", "--version"),
)
SHORT = {
    "-cd": "--config-dir",
    "-cp": "--config-path",
    "-cn": "--config-name",
    "-c": "--cfg",
    "-p": "--package",
    "-i": "--info",
}
FLAGS = (*SHORT, *SHORT.values(), "--experimental-rerun")  # each takes a value
FOLDERS = ("-cd", "--config-dir", "-cp", "--config-path")


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """Rewrite a command's arguments so that Hydra's parser takes them.

    Flags come first, since the parser refuses options on both sides of a flag. `--seed=3`, as W&B's agent types it,
    becomes `seed=3`. Options are rewritten by `options_for_hydra`.

    Raises:
        UserError: a flag that Hydra does not have, or a flag or option that is given twice.
    """
    flags, options, before = [], [], ""
    values: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if before not in FLAGS and name in FLAGS:
            long = SHORT.get(name, name)
            if long in values:
                raise UserError(f"{values[long]} {argument}: the flag is given twice, and only the last would count; "
                                "give it once")  # fmt: skip
            values[long] = argument
        if before in FLAGS:
            flags.append(_folder(argument) if before in FOLDERS else argument)
        elif equals and name in FOLDERS:
            flags.append(f"{name}={_folder(value)}")
        elif _is_flag(name):
            flags.append(argument)
        elif equals or not name.startswith("--"):
            options.append(re.sub(r"^--", "", argument))
        else:
            raise UserError(f"{name}: there is no such flag; an option is written {name.lstrip('-')}=VALUE")
        before = argument if before not in FLAGS else ""
    return flags + options_for_hydra(options)


def _folder(given: str) -> str:
    """Absolute path of a config folder: Hydra would resolve a relative `--config-path` inside this package."""
    return given if not given or given.startswith("pkg://") else absolute(given)


def config_folders(arguments: Sequence[str]) -> list[Path]:
    """Config folders that are named in arguments returned by `for_hydra`."""
    pairs = zip(("", *arguments), arguments, strict=False)
    given = [value if before in FOLDERS else value.partition("=")[2] for before, value in pairs
             if before in FOLDERS or value.partition("=")[0] in FOLDERS]  # fmt: skip
    return [Path(folder) for folder in given if folder]


def _is_flag(name: str) -> bool:
    """True for a flag of Hydra, or the beginning of one, which its parser takes as well; False for an option."""
    if name.removeprefix("--") in (*CHOICES, *OPTIONS):
        return False
    if name.startswith("--"):
        return any(flag.startswith(name) for flag in (*BARE_FLAGS, *FLAGS) if len(name) > 2)
    return name in (*BARE_FLAGS, *FLAGS)


def options_for_hydra(options: Sequence[str]) -> list[str]:
    """Rewrite options that Hydra would misread or refuse:

    - `method=[zero,mean]`: a sweep over both, as `method=zero,mean`; Hydra would take only the last one;
    - `fraction=0.1,0.5`, `fraction=choice(0.1,0.5)` and the like: numbers, where Hydra expects names of yaml files;
    - `model.path=~/gpt2`: `~` is expanded to the user's home folder.

    Raises:
        UserError: an option is given twice, of which Hydra would take the last one.
    """
    _check_once(options)
    rewritten = [_rewritten(option) for option in number_fractions([_at_home(option) for option in options])]
    _check_once(rewritten)  # fraction=0.1 and fraction.values=[0.5] are the same option
    return rewritten


def _check_once(options: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for option in options:
        key = option.partition("=")[0].strip().lstrip("+")
        if key in first:
            raise UserError(
                f"{first[key]} {option}: {key} is given twice, and only the last would count; give it once "
                f"(a sweep over several values is -m {key}=A,B)"
            )
        first[key] = option


def _at_home(option: str) -> str:
    """Expand `~` and `~user` at the beginning of a value or of a list item, as a shell does."""
    key, equals, value = option.partition("=")
    if "~" not in value or "'" in value or '"' in value:  # a quoted value is expanded where it is used
        return option

    def expanded(match: re.Match[str]) -> str:
        path = os.path.expanduser(match[0])
        return match[0] if path == match[0] else typed(path)

    return key + equals + re.sub(r"(?:^|(?<=[\[(,]))~[^,\[\](){}]*", expanded, value)


def _rewritten(option: str) -> str:
    before, _, value = option.partition("=")
    key = before.lstrip("+")
    if not (re.search(r"[\[(]", value) and takes_one(key)):
        return option
    try:
        override = OverridesParser.create().parse_override(option)
    except HydraException:  # Hydra reports it when it parses the option
        return option
    given = override.value()
    if key == "fraction" and isinstance(given, RangeSweep):
        given = _choice(given)
    items = given if isinstance(given, list) else given.list if isinstance(given, ChoiceSweep) else []
    if not items:
        return option
    if key == "fraction" and isinstance(given, list) and all(map(_is_number, items)):
        return f"{before}.values={typed(items)}"
    if key == "fraction" and all(_is_number(x) for item in items for x in (item if isinstance(item, list) else [item])):
        return f"{before}.values={_sweep((x if isinstance(x, list) else [x] for x in items), given)}"
    return f"{before}={_sweep(_flat(items), given)}"


def with_exact_range(override: Override) -> Override:
    """Replace a decimal range by the numbers as typed: Hydra adds floats, so `range(0.1,0.4,0.1)` has
    0.30000000000000004."""
    given = override.value()
    if not isinstance(given, RangeSweep) or isinstance(given.range(), range):
        return override
    return replace(override, value_type=ValueType.CHOICE_SWEEP, _value=_choice(given))


def takes_one(key: str) -> bool:
    """True if an option takes a single value or name, so that a list of them can only mean a sweep."""
    return key in (*CHOICES, *SCALARS) or key.startswith("hydra/")


def _sweep(items: Iterable, given: Any) -> str:
    listed = ",".join(map(typed, items))
    return f"shuffle({listed})" if isinstance(given, ChoiceSweep | RangeSweep) and given.shuffle else listed


def _flat(items: list) -> list:
    return [flat for item in items for flat in (_flat(item) if isinstance(item, list) else [item])]


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool)


def _choice(given: RangeSweep) -> ChoiceSweep:
    """The numbers of a range, added up in decimal."""
    whole = all(isinstance(value, int) for value in (given.start, given.stop, given.step))
    start, stop, step = (Decimal(str(value)) for value in (given.start, given.stop, given.step))
    n = max(0, math.ceil((stop - start) / step)) if step else 0
    values = (start + i * step for i in range(n))
    return ChoiceSweep(list=[int(x) if whole else float(x) for x in values], shuffle=given.shuffle)


def typed(value: Any) -> str:
    """The value written in Hydra's override grammar."""
    if isinstance(value, QuotedString):
        return value.with_quotes()
    if isinstance(value, str) and not re.fullmatch(r"[\w./+-]*(\$\{.*\})?[\w./+-]*", value):
        return QuotedString(value, Quote.single).with_quotes()
    return Override._get_value_element_as_str(value)
