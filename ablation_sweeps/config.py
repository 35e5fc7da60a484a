"""The only module that knows Hydra and OmegaConf: a composed config -> a validated Job; their errors -> one line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ablation_sweeps.data import UserError

if TYPE_CHECKING:
    from ablation_sweeps.job import Job

PARTS = ("model", "dataset", "method", "fraction", "site", "selection", "statistics", "eval", "tracking")


def to_job(cfg: DictConfig) -> Job:
    """Builds and validates every part. Nothing heavy is loaded; see `Job.check` for what needs the disk.

    Raises:
        UserError: one line that names the option.
    """
    from ablation_sweeps.job import Job

    config: dict[str, Any] = to_dict(cfg)
    parts = {part: build(part, config[part]) for part in PARTS}
    for option, least in (("batch_tokens", 1), ("seed", 0)):
        if not isinstance(config[option], int) or config[option] < least:
            raise UserError(f"{option}={config[option]}: must be a whole number of at least {least}")
    for option in ("sweep", "results_dir"):
        if not config[option]:
            raise UserError(f"{option}: must be a name, e.g. {option}=results")
    return Job(
        **parts,
        batch_tokens=config["batch_tokens"],
        seed=config["seed"],
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


def build(part: str, options: dict[str, Any]) -> Any:
    """An object of the class that `_target_` names, with the rest of the options as its fields."""
    from pydantic import ValidationError

    fields = {key: value for key, value in options.items() if key != "_target_"}
    try:
        module, _, name = options["_target_"].rpartition(".")
        return getattr(importlib.import_module(module), name)(**fields)
    except KeyError:
        raise UserError(f"{part}: its yaml has no _target_, the class that implements it") from None
    except ValidationError as error:
        raise UserError("; ".join(_explain(part, fields, e) for e in error.errors())) from error
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{part}._target_={options['_target_']}: {str(error).splitlines()[0]}") from error


def _explain(part: str, fields: dict[str, Any], error: Any) -> str:
    location = ".".join(str(place) for place in error["loc"])
    option = f"{part}.{location}" if location else part
    given = f"={fields[location]}" if location in fields else ""
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{option}: there is no such option"
    return f"{option}{given}: {message[0].lower()}{message[1:]}"


def number_fractions(arguments: list[str]) -> list[str]:
    """`fraction=0.1,0.5` -> `fraction.values=[0.1],[0.5]`, since Hydra takes no numbers for a group."""
    rewritten = []
    for argument in arguments:
        match = re.fullmatch(r"fraction=(\[?)([-+.\deE]+(?:\s*,\s*[-+.\deE]+)*)\]?", argument)
        if match and match[1]:
            argument = f"fraction.values=[{match[2]}]"
        elif match:
            argument = "fraction.values=" + ",".join(f"[{value.strip()}]" for value in match[2].split(","))
        rewritten.append(argument)
    return rewritten


def one_line(error: BaseException, conf: Path) -> str:
    """What went wrong and what to do, for a person at a terminal."""
    if isinstance(error, UserError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines)
    if match := re.search(r"(?:Could not override|Key) '([\w.@/]+)'.*(?:is not in struct|in the defaults list)", text):
        return _no_such_option(match[1], conf)
    if match := re.search(r"In '[^']*': Could not find '([^']+)/([^'/]+)'", text):
        options = sorted(file.stem for file in (conf / match[1]).glob("*.yaml"))
        near = _near(match[2], options)
        return f"{match[1]}={match[2]}: there is no such option{near}; choose one of {', '.join(options)}"
    if match := re.search(r"Could not override '([\w./]+)'\. No match in the defaults list", text):
        return _no_such_option(match[1], conf)
    if "Ambiguous value for argument" in text:
        argument = re.findall(r"'([^']+)'", text)[0]
        return f"{argument}: several values need a sweep; add -m, as in: python launch.py -m {argument}"
    if type(error).__module__.startswith(("hydra", "omegaconf")):
        return text
    return f"{type(error).__name__}: {text}"


def _no_such_option(key: str, conf: Path) -> str:
    known = _known_options(conf)
    group = key.split(".")[0]
    inside = sorted({option for option in known if option.startswith(f"{group}.")}) if "." in key else []
    hint = f"; {group} has {', '.join(inside)}" if inside else "; see python launch.py --help"
    return f"{key}: there is no such option{_near(key, known)}{hint}"


def _near(word: str, options: list[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _known_options(conf: Path) -> list[str]:
    """Every option of every yaml of conf/, e.g. `method.n_bins`."""
    import yaml

    known = set()
    for file in conf.rglob("*.yaml"):
        content = yaml.safe_load(file.read_text()) or {}
        group = "" if file.parent == conf else f"{file.relative_to(conf).parts[0]}."
        for key, value in content.items():
            if key in ("defaults", "hydra", "_target_"):
                continue
            known.add(f"{group}{key}")
            known |= (
                {f"{group}{key}.{inner}" for inner in value if inner != "_target_"}
                if isinstance(value, dict)
                else set()
            )
    return sorted(known)


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
    """The folder's name, or the last part of the hub name."""
    return Path(path).expanduser().absolute().stem if path else (name or "unnamed").split("/")[-1]


def _tagged(label: str, variant: str, default: str) -> str:
    """`peak`, `peak-smoothed`: the variant is named where it is not the default."""
    return label if variant == default else f"{label}-{variant}"


OmegaConf.register_new_resolver("label_of", _label_of, replace=True)
OmegaConf.register_new_resolver("tagged", _tagged, replace=True)
OmegaConf.register_new_resolver("embedded", _embedded, replace=True)
OmegaConf.register_new_resolver("package_folder", _package_folder, replace=True)
