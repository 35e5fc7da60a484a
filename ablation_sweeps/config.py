"""The only module that knows Hydra and OmegaConf: a composed config -> a validated Job; their errors -> one line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ablation_sweeps.data import UserError

if TYPE_CHECKING:
    from ablation_sweeps.job import Job

PARTS = ("model", "dataset", "method", "fraction", "site", "selection", "statistics", "eval", "tracking")
OPTIONS = (*PARTS, "batch_tokens", "seed", "sweep", "results_dir")


def to_job(cfg: DictConfig) -> Job:
    """Builds and validates every part. Nothing heavy is loaded; see `Job.check` for what needs the disk.

    Raises:
        UserError: one line that names the option.
    """
    from ablation_sweeps.job import Job

    config: dict[str, Any] = to_dict(cfg)
    for option in config.keys() - set(OPTIONS):
        raise UserError(f"{option}: there is no such option{_near(option, list(OPTIONS))}; see python launch.py --help")
    for option in OPTIONS:
        if config.get(option) is None:
            raise UserError(f"{option}: must be given; leave it out of the command to get its default")
    parts = {part: build(part, config[part]) for part in PARTS}
    for option, least in (("batch_tokens", 1), ("seed", 0)):
        if type(config[option]) is not int or config[option] < least:
            raise UserError(f"{option}={_as_typed(config[option])}: must be a whole number of at least {least}")
    for option in ("sweep", "results_dir"):
        if config[option] == "":
            raise UserError(f"{option}=: must be a name, e.g. {option}=my_{option}")
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


def build(part: str, options: Any) -> Any:
    """An object of the class that `_target_` names, with the rest of the options as its fields."""
    from pydantic import ValidationError

    if not isinstance(options, dict):
        raise UserError(f"{part}={options}: its options are set one by one; python launch.py --help shows them")
    if not options.get("_target_"):
        raise UserError(f"{part}: its yaml has no _target_, the class that implements it")
    fields = {key: value for key, value in options.items() if key != "_target_"}
    try:
        module, _, name = str(options["_target_"]).rpartition(".")
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{part}._target_={options['_target_']}: there is no such class ({_first_line(error)}); give it as "
            "package.module.Class of something that Python can import here"
        ) from error
    try:
        return target(**fields)
    except ValidationError as error:
        empty = {e["loc"] for e in error.errors() if e["type"] == "too_short"}
        errors = [e for e in error.errors() if not (e["loc"] in empty and fields.get(str(e["loc"][0])))]
        raise UserError("; ".join(_explain(part, target, fields, e) for e in errors)) from error
    except (TypeError, ValueError) as error:  # of a class that pydantic does not check
        raise UserError(f"{part}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _explain(part: str, target: Any, fields: dict[str, Any], error: Any) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    option = f"{part}.{name}" if name else part
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f"{part}.{field}" for field in getattr(target, "__dataclass_fields__", {})]
        return f"{option}: there is no such option{_near(option, known)}; {part} has {', '.join(sorted(known))}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{option}: has no value; set {option}=VALUE, or write it in the yaml"
    given = f"={_as_typed(fields[name])}" if name in fields else ""
    if error["type"] in ("tuple_type", "list_type"):
        return f"{option}{given}: must be a list, e.g. {option}=[{_as_typed(fields[name])}]"
    if error["type"] == "too_short":
        return f"{option}{given}: must not be empty"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.replace("valid integer", "whole number").split(", unable to parse")[0]
    return f"{option}{given}: {message[0].lower()}{message[1:]}"


def _as_typed(value: Any) -> str:
    """As on the command line: null, true, [a,b]."""
    if isinstance(value, list):
        return f"[{','.join(_as_typed(item) for item in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


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


def one_line(error: BaseException, conf: Path) -> str:
    """What went wrong and what to do, for a person at a terminal."""
    text = " ".join(str(error).split())
    if type(error).__module__.startswith(("hydra", "omegaconf")) or "Config group override" in text:
        return _of_hydra(error, text, conf)
    return plain(error)


def plain(error: BaseException) -> str:
    """The same for an error that is not Hydra's."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.filename and error.strerror:
        reason = f"{error.strerror[0].lower()}{error.strerror[1:]}"
        return f"{error.filename}: {reason}; if it is the results that cannot be written there, set results_dir=FOLDER"
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def _of_hydra(error: BaseException, text: str, conf: Path) -> str:
    """Hydra's messages, as far as they say little to who has not written the program."""
    text = text.split(" See https://hydra.cc")[0]
    remedy = "write option=value, and quote what holds special characters twice: 'option=\"a(b)\"'"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read; {remedy}"
    if match := re.search(r"(?:Could not (?:override|delete.*?)\.?|but config group) '([^']+)'", text):
        return _no_such_option(match[1], conf)
    if match := re.search(r"An item is already at '([^']+)'", text):
        return f"+{match[1]}: there is such an option already; write it without the +"
    if match := re.search(r"Could not find '([^']+)/([^'/]*)'", text):
        listed = re.search(r"Available options in '[^']+': (.*?) Config search", text)
        options = listed[1].split() if listed else []
        chosen = f"; choose one of {', '.join(options)}" if options else "; see python launch.py --help"
        return f"{match[1]}={match[2]}: there is no such option{_near(match[2], options)}{chosen}"
    if "Ambiguous value for argument" in text:
        argument = re.findall(r"'([^']+)'", text)[0]
        return f"{argument}: several values need a sweep; add -m, as in: python launch.py -m {argument}"
    if match := re.search(r"Multiple values for ([\w/]+)\..*'override [\w/]+: (.*)'", text):
        return f"+{match[1]}={match[2]}: there is a {match[1]} already; write {match[1]}={match[2]}, without the +"
    if "Config group override must be a string" in text:
        groups = sorted(folder.name for folder in conf.iterdir() if folder.is_dir() and folder.name != "hydra")
        return f"{', '.join(groups)}: each takes the name of an option; see python launch.py --help"
    return f"{text} ({_first_line(error.__cause__)})" if error.__cause__ else text


def _no_such_option(key: str, conf: Path) -> str:
    if key.startswith("hydra"):
        return f"{key}: Hydra has no such option; see python launch.py --hydra-help"
    known = _known_options(conf)
    if known.get(key):
        return f"{key}: what is chosen has no such option; these have: {', '.join(sorted(known[key]))}"
    group = key.split(".")[0]
    inside = [option for option in known if option.startswith(f"{group}.")] if "." in key else []
    hint = f"; {group} has {', '.join(sorted(inside))}" if inside else "; see python launch.py --help"
    return f"{key}: there is no such option{_near(key, list(known))}{hint}"


def _near(word: str, options: list[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _known_options(conf: Path) -> dict[str, set[str]]:
    """Every option of every yaml of conf/, e.g. `method.n_bins`, and which have it, e.g. `method=peak`."""
    import yaml

    known: dict[str, set[str]] = {}
    for file in conf.rglob("*.yaml"):
        group = file.relative_to(conf).parts[0] if file.parent != conf else ""
        if group == "hydra":
            continue
        known.setdefault(group or "seed", set())
        for key, value in (yaml.safe_load(file.read_text()) or {}).items():
            if key in ("defaults", "hydra", "_target_"):
                continue
            inner = [f"{key}.{name}" for name in value if name != "_target_"] if isinstance(value, dict) else []
            for option in (key, *inner):
                owners = known.setdefault(f"{group}.{option}" if group else option, set())
                if group:
                    owners.add(f"{group}={file.stem}")
    return known


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
