"""Builds a validated Job from a composed config."""

from __future__ import annotations

import dataclasses
import glob
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.moved import MOVED
from ablation_sweeps.base.paths import absolute
from ablation_sweeps.base.plugins import complete, missing_members
from ablation_sweeps.base.terminal import FOLDERS, as_typed, typed_command, typed_subcommand
from ablation_sweeps.datasets.file_formats import stem
from ablation_sweeps.experiment.config_errors import explain, first_line, near, no_such_option

if TYPE_CHECKING:
    from ablation_sweeps.experiment.job import Job


PARTS = (
    *("model", "dataset", "method", "fraction", "site", "unit", "selection", "scope"),
    *("statistics", "eval", "tracking"),
)
SCALARS = ("batch_tokens", "seed", "prefetch", "dry_run", "sweep", "results_dir", "objective")
OPTIONS = (*PARTS, *SCALARS)
MAY_BE_NULL = ("objective",)
# Parts that configs of earlier versions do not have, with what those versions did.
ADDED = {
    "unit": {"_target_": "ablation_sweeps.neurons.units.Unit", "name": "neuron"},
    "scope": {"_target_": "ablation_sweeps.data.scope.Scope", "write": "all", "statistics": "all"},
}
MOST = 2**63 - 1  # limit of every number: tables and random generators take 64 bits
CHOICES = (*(part for part in PARTS if part not in ("statistics", "eval")), "study", "experiment")  # folders of conf/


def to_job(cfg: DictConfig) -> Job:
    """Build and validate every part of a job. It loads nothing heavy; `Job.check` does the checks that need the disk.

    Raises:
        UserError: one line that names the option.
    """
    return from_dict(to_dict(cfg))


def from_dict(config: dict[str, Any]) -> Job:
    """Build a job from a resolved config such as `Job.config`, the form in which jobs are sent to other processes."""
    from ablation_sweeps.experiment.job import Job

    for option in ("study", "experiment"):
        if option in config:
            raise UserError(
                f"{option}={as_typed(config[option])}: its yaml must be a mapping of options, and begin with the line "
                "# @package _global_"
            )
    for option in config.keys() - set(OPTIONS):
        raise UserError(f"{option}: there is no such option{near(option, list(OPTIONS))}; see {typed_command()} --help")
    for option in OPTIONS:
        if config.get(option) is None and option not in MAY_BE_NULL and (option in config or option not in ADDED):
            raise UserError(f"{option}: must be given; leave it out of the command to get its default")
    config = {**ADDED, **config, "objective": config.get("objective")}
    parts = {part: build(part, config[part]) for part in PARTS}
    config |= {part: _with_numbers(config[part], built) for part, built in parts.items()}
    for option, least in (("batch_tokens", 1), ("seed", 0)):
        config[option] = _whole_number(option, config[option], least)
    for option in ("prefetch", "dry_run"):
        config[option] = _flag(option, config[option])
    results_dir, sweep = option_places(config["results_dir"], config["sweep"])
    FOLDERS[results_dir] = "results_dir"
    return Job(
        **parts,
        batch_tokens=config["batch_tokens"],
        seed=config["seed"],
        prefetch=config["prefetch"],
        dry_run=config["dry_run"],
        sweep=sweep,
        results_dir=Path(results_dir),
        objective=config["objective"],
        config=config,
    )


def option_places(results_dir: object, sweep: object) -> tuple[str, str]:
    """The absolute folder of all sweeps, and the name of the sweep's own folder in it.

    Raises:
        UserError: one of them is empty, or `sweep` is not the name of a single folder.
    """
    for option, value in (("results_dir", results_dir), ("sweep", sweep)):
        if value in ("", None):
            raise UserError(f"{option}=: must be a name, e.g. {option}=my_{option}")
    if "/" in str(sweep) or str(sweep).startswith(".") or "\0" in str(sweep) or len(os.fsencode(str(sweep))) > 255:
        raise UserError(f"sweep={sweep}: must be the name of one folder; where it lies is results_dir=FOLDER")
    return absolute(str(results_dir)), str(sweep)


def _with_numbers(options: dict[str, Any], built: object) -> dict[str, Any]:
    """The options, where text is replaced by what it was read as: a number (of `${oc.env:N}`), or a list in a file."""
    fields = {key: getattr(built, key, value) for key, value in options.items() if isinstance(value, str)}
    fields = {key: [*map(list, value)] if isinstance(value, list) else value for key, value in fields.items()}
    return options | {key: value for key, value in fields.items() if isinstance(value, int | float | list)}


def _whole_number(option: str, value: object, least: int) -> int:
    """Check a whole number, which may be given as text, e.g. by `seed=${oc.env:SEED}`."""
    number = int(value) if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d{1,30}\s*", value) else value
    if type(number) is not int or number < least:
        raise UserError(f"{option}={as_typed(value)}: must be a whole number of at least {least}")
    if number > MOST:
        raise UserError(f"{option}={as_typed(value)}: must be at most {MOST}")
    return number


def _flag(option: str, value: object) -> bool:
    given = {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value
    if type(given) is not bool:
        raise UserError(f"{option}={as_typed(value)}: must be true or false")
    return given


def to_dict(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config without Hydra's own settings."""
    options = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        return OmegaConf.to_container(options, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def build(part: str, options: Any) -> Any:
    """Instantiate the class that `_target_` names, with the other options as its fields."""
    from pydantic import ValidationError

    if not isinstance(options, dict):
        raise UserError(
            f"{part}={as_typed(options)}: is no mapping; its options are set one by one; {typed_command()} --help "
            "shows them"
        )
    if not options.get("_target_"):
        raise UserError(f"{part}: its yaml has no _target_, the class that implements it")
    fields = {key: value for key, value in options.items() if key != "_target_"}
    fields |= {key: build(f"{part}.{key}", value) for key, value in fields.items() if _has_target(value)}
    for key, value in fields.items():
        if isinstance(value, str) and os.sep in value:
            FOLDERS[absolute(value)] = f"{part}.{key}"
        _check_size(part, key, value, value)
    path = str(options["_target_"])
    target = _find(part, MOVED.get(path, path))
    known = list(inspect.signature(target).parameters)
    for key in fields.keys() - set(known):  # pydantic ignores unknown fields unless told otherwise
        raise UserError(no_such_option(part, key, known))
    try:
        built = target(**fields)
    except ValidationError as error:
        empty = {e["loc"] for e in error.errors() if e["type"] == "too_short"}
        errors = [e for e in error.errors() if not (e["loc"] in empty and fields.get(str(e["loc"][0])))]
        raise UserError("; ".join(explain(part, fields, e) for e in errors)) from error
    except (TypeError, ValueError) as error:  # from a class that pydantic does not check
        raise UserError(f"{part}: {first_line(error)}") from error
    for key in fields:
        _check_size(part, key, fields[key], getattr(built, key, None))
    _complete(part, path, type(built))
    if part in ("model", "dataset"):
        try:
            hash(built)  # it is the cache key of what is loaded
        except TypeError as error:
            raise UserError(
                f"{part}._target_={options['_target_']}: {error}; declare the field that holds it a tuple, and take "
                "pydantic.dataclasses.dataclass, which makes it one"
            ) from error
    return built


def _has_target(value: object) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _check_size(part: str, key: str, given: object, value: object) -> None:
    """Check that numbers, alone or in a list, are finite and fit into 64 bits."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, float) and not isinstance(value, list | tuple) and not math.isfinite(number):
            raise UserError(f"{part}.{key}={as_typed(given)}: must be a finite number")
        if isinstance(number, int) and abs(number) > MOST:
            raise UserError(f"{part}.{key}={as_typed(given)}: must be at most {MOST}")


def _find(part: str, path: str) -> Any:
    """Import the class at `path`."""
    try:
        module, _, name = path.rpartition(".")
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{part}._target_={path}: there is no such class ({first_line(error)}); give it as package.module.Class of "
            "something that Python can import here"
        ) from error
    if part in ("model", "dataset", "method") and (not dataclasses.is_dataclass(target) or target.__hash__ is None):
        raise UserError(
            f"{part}._target_={path}: is no frozen dataclass, whose fields are its options; put "
            "@dataclass(frozen=True) before its class"
        )
    return target


def _complete(part: str, path: str, kind: type) -> None:
    """Check that a class has what its part of a job needs, and give it the defaults of what it may leave out."""
    from ablation_sweeps.experiment.job import PROTOCOLS

    if part not in PROTOCOLS:
        return
    for member in missing_members(kind, PROTOCOLS[part]):
        if member == "label":
            raise UserError(
                f"{part}._target_={path}: has no name for tables, figures and folders; give its class `label: str`, "
                "and its yaml `label: NAME`"
            )
        raise UserError(f"{part}._target_={path}: has no {member}; see docs/adding.md")
    if part == "selection" and len(inspect.signature(kind.orders).parameters) != 2:  # type: ignore[attr-defined]
        raise UserError(  # rules of earlier versions were given the numbers of neurons and the seed
            f"selection._target_={path}: its orders() must take one argument, what a rule may look at; see "
            "docs/adding.md"
        )
    complete(kind, PROTOCOLS[part])


NUMBER = r"(?:[-+]?(?:[.\d][.\deE+-]*|inf|nan))"


def number_fractions(arguments: list[str]) -> list[str]:
    """Rewrite `fraction=0.1,0.5` as `fraction.values=[0.1],[0.5]`: Hydra takes no numbers as names in a group."""
    rewritten = []
    for argument in arguments:
        match = re.fullmatch(rf"fraction=(\[?)({NUMBER}(?:\s*,\s*{NUMBER})*)\]?", argument)
        if match and match[1]:
            argument = f"fraction.values=[{match[2]}]"
        elif match:
            argument = "fraction.values=" + ",".join(f"[{value.strip()}]" for value in match[2].split(","))
        rewritten.append(argument)
    return rewritten


def _embedded(name: str) -> str:
    """Folder of a model that is included in this package."""
    return str(Path(__file__).parents[1] / "assets" / name)


def _package_folder(name: str, remedy: str) -> str:
    """Folder of an installed package that contains a model."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"model: the package {name} is not installed; get it with: {remedy}")
    return str(Path(spec.origin).parent)


def _label_of(name: str | None, path: str | None) -> str:
    """Last part of the path or hub name: for text without its suffix, for a glob the part before the pattern."""
    if path is None:
        return (name or "unnamed").split("/")[-1]
    whole = Path(os.path.abspath(os.path.expanduser(path)))
    plain = whole if whole.exists() else Path(*(part for part in whole.parts if not glob.has_magic(part)))
    return stem(plain)


def _python_version() -> str:
    """The running Python, whose documentation and source code are a dataset: they differ between versions."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _tagged(label: str, variant: str | int | None, default: str | None) -> str:
    """The label, followed by the variant unless that is the default: `peak`, `peak-smoothed`."""
    return label if variant == default else f"{label}-{variant}"


def _read_times_as_text() -> None:
    """Read `time: 10:00:00` in a yaml as text, as on the command line; YAML 1.1 reads the number 36000, in base 60."""
    import yaml

    plain = re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$")
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers
    for start, found in resolvers.items():
        resolvers[start] = [(tag, plain if tag == "tag:yaml.org,2002:int" else regexp) for tag, regexp in found]


_read_times_as_text()


def _folder_of_sweep(results_dir: str, sweep: str) -> str:
    """Folder of a sweep. Hydra creates it before the job runs, so an invalid name is refused here, before that."""
    return os.path.join(*option_places(results_dir, sweep))


OmegaConf.register_new_resolver("folder_of_sweep", _folder_of_sweep, replace=True)
OmegaConf.register_new_resolver("label_of", _label_of, replace=True)
OmegaConf.register_new_resolver("tagged", _tagged, replace=True)
OmegaConf.register_new_resolver("python_version", _python_version, replace=True)
OmegaConf.register_new_resolver("embedded", _embedded, replace=True)
OmegaConf.register_new_resolver("package_folder", _package_folder, replace=True)
OmegaConf.register_new_resolver("typed_command", typed_command, replace=True)
OmegaConf.register_new_resolver("typed_subcommand", typed_subcommand, replace=True)
