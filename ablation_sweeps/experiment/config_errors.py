"""Translates errors of Hydra, OmegaConf and pydantic into one line that names the option and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.errors import OverrideParseException

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.terminal import as_typed, plain, typed_command


def one_line(error: BaseException, conf: Path, *more: Path) -> str:
    """One line that says what went wrong and what to do.

    Args:
        conf: the config folder.
        more: further config folders.
    """
    import yaml

    text = " ".join(str(error).split())
    if isinstance(error.__cause__, UserError) and not isinstance(error, UserError):  # wrapped by Hydra
        return plain(error.__cause__)
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark):
        said = ", ".join(part for part in (error.context, error.problem) if part)
        return f"{mark.name}: line {mark.line + 1} is not valid yaml ({said}); correct it"
    if isinstance(error, yaml.reader.ReaderError):
        return f"{error.name}: is not yaml ({error.reason}, at {error.position}); save it as text in UTF-8"
    if isinstance(error, UnicodeDecodeError) and (file := _undecodable((conf, *more), error.object)):
        return f"{file}: is not UTF-8 text; convert it (iconv -f latin1 -t utf-8)"
    if type(error).__module__.startswith(("hydra", "omegaconf")) or "Config group override" in text:
        return _of_hydra(error, text, conf)
    return plain(error)


def _undecodable(folders: Iterable[Path], content: bytes) -> Path | None:
    """The config file with this content, since Python's error does not name it."""
    files = (file for folder in folders for file in folder.rglob("*.yaml") if file.is_file())
    return next((file for file in files if file.read_bytes()[: len(content)] == content), None)


def _of_hydra(error: BaseException, text: str, conf: Path) -> str:
    """Rewrite those of Hydra's messages that are hard to understand without knowing the code."""
    text = text.split(" See https://hydra.cc")[0].split(" full_key:")[0]
    remedy = "write option=value, and quote what holds special characters twice: 'option=\"a(b)\"'"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read; {remedy}"
    if match := re.search(r"(?:Could not (?:override|delete.*?)\.?|but config group) '([^']+)'", text):
        return _unknown(match[1], conf)
    if match := re.search(r"An item is already at '([^']+)'", text):
        return f"+{match[1]}: there is such an option already; write it without the +"
    if match := re.search(r"Could not find '([^']+)/([^'/]*)'", text):
        listed = re.search(r"Available options in '[^']+': (.*?) Config search", text)
        options = listed[1].split() if listed else []
        chosen = f"; choose one of {', '.join(options)}" if options else f"; see {typed_command()} --help"
        return f"{match[1]}={match[2]}: there is no such option{near(match[2], options)}{chosen}"
    if "Input config does not have a `_target_` field" in text:
        return "hydra/launcher, hydra/sweeper: its yaml has no _target_, the class that implements it"
    if match := re.search(r"In '([^']+)': .*Cannot merge DictConfig with ListConfig", text):
        return f"{match[1]}.yaml: must be a mapping of options, not a list"
    if "Ambiguous value for argument" in text:
        argument = re.findall(r"'([^']+)'", text)[0]
        return f"{argument}: several values need a sweep; add -m, as in: {typed_command()} -m {argument}"
    if match := re.search(r"Multiple values for ([\w/]+)\..*'override [\w/]+: (.*)'", text):
        return f"+{match[1]}={match[2]}: there is a {match[1]} already; write {match[1]}={match[2]}, without the +"
    if "Config group override must be a string" in text:
        groups = sorted(folder.name for folder in conf.iterdir() if folder.is_dir() and folder.name != "hydra")
        return f"{', '.join(groups)}: each takes the name of an option; see {typed_command()} --help"
    return f"{text} ({first_line(error.__cause__)})" if error.__cause__ else text


def _unknown(key: str, conf: Path) -> str:
    if key.startswith("hydra.launcher."):
        return (
            f"{key}: the launcher has no such option; hydra/launcher=local and slurm have those of conf/hydra/launcher"
        )
    if key.startswith("hydra"):
        return f"{key}: Hydra has no such option; see {typed_command()} --hydra-help"
    known = _known_options(conf)
    if known.get(key):
        return (
            f"{key}: the chosen one has no such option; these have it: {', '.join(sorted(known[key]))} (where all "
            f"that are swept over have it, write ++{key}=VALUE; else launch those that do alone, into the same sweep)"
        )
    group = key.split(".")[0]
    inside = [option for option in known if option.startswith(f"{group}.")] if "." in key else []
    hint = f"; {group} has {', '.join(sorted(inside))}" if inside else f"; see {typed_command()} --help"
    return f"{key}: there is no such option{near(key, list(known))}{hint}"


def near(word: str, options: list[str]) -> str:
    """A hint at the option that was probably meant; empty if none is similar."""
    close = difflib.get_close_matches(word, options, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _known_options(conf: Path) -> dict[str, set[str]]:
    """Every option in the yaml files of conf/, e.g. `method.n_bins`, with the choices that have it: `method=peak`."""
    import yaml

    known: dict[str, set[str]] = {}
    for file in conf.rglob("*.yaml"):
        group = file.relative_to(conf).parts[0] if file.parent != conf else ""
        if group == "hydra":
            continue
        known.setdefault(group or "seed", set())
        for key, value in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).items():
            if key in ("defaults", "hydra", "_target_"):
                continue
            inner = [f"{key}.{name}" for name in value if name != "_target_"] if isinstance(value, dict) else []
            for option in (key, *inner):
                owners = known.setdefault(f"{group}.{option}" if group else option, set())
                if group:
                    owners.add(f"{group}={file.stem}")
    return known


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def no_such_option(part: str, name: str, known: list[str]) -> str:
    """Message about an option that a part of the config does not have."""
    option, options = f"{part}.{name}", sorted(f"{part}.{field}" for field in known)
    return f"{option}: there is no such option{near(option, options)}; {part} has {', '.join(options)}"


def explain(part: str, fields: dict[str, Any], error: Any) -> str:
    """Message about an error of pydantic, in terms of the option that the user typed."""
    name = str(error["loc"][0]) if error["loc"] else ""
    option = f"{part}.{name}" if name else part
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{option}: has no value; set {option}=VALUE, or write it in the yaml"
    given = f"={as_typed(fields[name])}" if name in fields else ""
    if error["type"] in ("tuple_type", "list_type"):
        return f"{option}{given}: must be a list, e.g. {option}=[{as_typed(fields[name])}]"
    if error["type"] == "too_short":
        return f"{option}{given}: must not be empty"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.replace("valid integer", "whole number").split(", unable to parse")[0]
    return f"{option}{given}: {message[0].lower()}{message[1:]}"
