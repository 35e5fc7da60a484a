"""A composed config -> a validated Job."""

from __future__ import annotations

import dataclasses
import glob
import importlib
import importlib.util
import inspect
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ablation_sweeps.console import as_typed
from ablation_sweeps.data import UserError
from ablation_sweeps.messages import explain, first_line, near, no_such_option

if TYPE_CHECKING:
    from ablation_sweeps.job import Job

PARTS = ("model", "dataset", "method", "fraction", "site", "selection", "statistics", "eval", "tracking")
OPTIONS = (*PARTS, "batch_tokens", "seed", "prefetch", "dry_run", "sweep", "results_dir")


def to_job(cfg: DictConfig) -> Job:
    """Builds and validates every part. Nothing heavy is loaded; see `Job.check` for what needs the disk.

    Raises:
        UserError: one line that names the option.
    """
    return from_dict(to_dict(cfg))


def from_dict(config: dict[str, Any]) -> Job:
    """The same from a resolved config, as `Job.config` keeps it: what is shipped to another process."""
    from ablation_sweeps.job import Job

    for option in config.keys() - set(OPTIONS):
        raise UserError(f"{option}: there is no such option{near(option, list(OPTIONS))}; see python launch.py --help")
    for option in OPTIONS:
        if config.get(option) is None:
            raise UserError(f"{option}: must be given; leave it out of the command to get its default")
    parts = {part: build(part, config[part]) for part in PARTS}
    for option, least in (("batch_tokens", 1), ("seed", 0)):
        if type(config[option]) is not int or config[option] < least:
            raise UserError(f"{option}={as_typed(config[option])}: must be a whole number of at least {least}")
    for option in ("prefetch", "dry_run"):
        if type(config[option]) is not bool:
            raise UserError(f"{option}={as_typed(config[option])}: must be true or false")
    for option in ("sweep", "results_dir"):
        if config[option] == "":
            raise UserError(f"{option}=: must be a name, e.g. {option}=my_{option}")
    if "/" in str(config["sweep"]) or str(config["sweep"]).startswith("."):
        raise UserError(f"sweep={config['sweep']}: must be the name of one folder; where it lies is results_dir=FOLDER")
    return Job(
        **parts,
        batch_tokens=config["batch_tokens"],
        seed=config["seed"],
        prefetch=config["prefetch"],
        dry_run=config["dry_run"],
        sweep=str(config["sweep"]),
        results_dir=Path(config["results_dir"]).expanduser().absolute(),
        config=config,
    )


def to_dict(cfg: DictConfig) -> dict[str, Any]:
    """Resolved, without Hydra's own settings."""
    options = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        return OmegaConf.to_container(options, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def build(part: str, options: Any) -> Any:
    """An object of the class that `_target_` names, with the rest of the options as its fields."""
    from pydantic import ValidationError

    if not isinstance(options, dict):
        raise UserError(f"{part}={options}: its options are set one by one; python launch.py --help shows them")
    if not options.get("_target_"):
        raise UserError(f"{part}: its yaml has no _target_, the class that implements it")
    fields = {key: value for key, value in options.items() if key != "_target_"}
    for key, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{part}.{key}={value}: must be a finite number")
    target = _find(part, str(options["_target_"]))
    known = list(inspect.signature(target).parameters)
    for key in fields.keys() - set(known):  # which pydantic does not mind, unless it is told to
        raise UserError(no_such_option(part, key, known))
    try:
        built = target(**fields)
    except ValidationError as error:
        empty = {e["loc"] for e in error.errors() if e["type"] == "too_short"}
        errors = [e for e in error.errors() if not (e["loc"] in empty and fields.get(str(e["loc"][0])))]
        raise UserError("; ".join(explain(part, fields, e) for e in errors)) from error
    except (TypeError, ValueError) as error:  # of a class that pydantic does not check
        raise UserError(f"{part}: {first_line(error)}") from error
    if part in ("model", "dataset"):
        try:
            hash(built)  # what is loaded is kept under it
        except TypeError as error:
            raise UserError(
                f"{part}._target_={options['_target_']}: {error}; declare the field that holds it a tuple, and take "
                "pydantic.dataclasses.dataclass, which makes it one"
            ) from error
    return built


def _find(part: str, path: str) -> Any:
    """The class of that path, which has what a part needs."""
    try:
        module, _, name = path.rpartition(".")
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{part}._target_={path}: there is no such class ({first_line(error)}); give it as package.module.Class of "
            "something that Python can import here"
        ) from error
    if part not in ("model", "dataset", "method"):
        return target
    if not dataclasses.is_dataclass(target) or target.__hash__ is None:
        raise UserError(
            f"{part}._target_={path}: is no frozen dataclass, whose fields are its options; put "
            "@dataclass(frozen=True) before its class"
        )
    does = {"model": "load", "dataset": "examples", "method": "fit"}[part]
    if not hasattr(target, does):
        raise UserError(f"{part}._target_={path}: has no {does}(); see the README, Adding")
    if "label" not in {*target.__dataclass_fields__, *dir(target)}:
        raise UserError(
            f"{part}._target_={path}: has no name for tables, figures and folders; give its class `label: str`, and "
            "its yaml `label: NAME`"
        )
    return target


NUMBER = r"(?:[-+]?(?:[.\d][.\deE+-]*|inf|nan))"


def number_fractions(arguments: list[str]) -> list[str]:
    """`fraction=0.1,0.5` -> `fraction.values=[0.1],[0.5]`, since Hydra takes no numbers for a group."""
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
    """Folder of a model that ships with this package."""
    return str(Path(__file__).parent / "assets" / name)


def _package_folder(name: str, remedy: str) -> str:
    """Folder of an installed package that carries a model."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"model: the package {name} is not installed; get it with: {remedy}")
    return str(Path(spec.origin).parent)


def _label_of(name: str | None, path: str | None) -> str:
    """The last part of the path or of the name on the hub; of text without its suffix, of a glob what is no pattern."""
    if path is None:
        return (name or "unnamed").split("/")[-1]
    whole = Path(os.path.abspath(Path(path).expanduser()))
    plain = whole if whole.exists() else Path(*(part for part in whole.parts if not glob.has_magic(part)))
    return plain.stem if plain.suffix in (".txt", ".jsonl", ".parquet") else plain.name


def _tagged(label: str, variant: str | int | None, default: str | None) -> str:
    """`peak`, `peak-smoothed`: the variant is named where it is not the default."""
    return label if variant == default else f"{label}-{variant}"


OmegaConf.register_new_resolver("label_of", _label_of, replace=True)
OmegaConf.register_new_resolver("tagged", _tagged, replace=True)
OmegaConf.register_new_resolver("embedded", _embedded, replace=True)
OmegaConf.register_new_resolver("package_folder", _package_folder, replace=True)
