"""README.md and docs/: links lead somewhere, and what they name is there."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path

import pandas as pd
import pytest
import yaml
from command import ROOT, Launch

from ablation_sweeps.results.run_folder import Environment
from ablation_sweeps.results.run_status import RunState, RunStatus
from ablation_sweeps.results.units import OF_EFFECT, OF_RUN

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
CONF = ROOT / "conf"
GROUPS = ("model", "dataset", "method", "fraction", "site", "selection", "tracking", "study", "experiment",
          "hydra/launcher")  # fmt: skip
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("page", TEXTS)


def anchors(page: Path) -> set[str]:
    """The names of its headings, as GitHub and mkdocs write them into links."""
    headings = HEADING.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
    return {
        re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip()) for heading in headings
    }


@every_page
def test_links_lead_somewhere(page: str):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", TEXTS[page])):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert file.is_relative_to(ROOT) and file.exists(), target
        assert not anchor or anchor in anchors(file), target
        if page.startswith("docs/"):  # or the site lacks it
            assert file.parent == ROOT / "docs", target


@every_page
def test_paths_exist(page: str):
    folders = "ablation_sweeps|hydra_plugins|conf|tests|benchmarks|scripts|results/reference"
    for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/-]+(?:\.\w+)*", TEXTS[page]):
        assert (ROOT / path).exists(), path


@every_page
def test_dotted_names_exist(page: str):
    from pkgutil import resolve_name

    for name in set(re.findall(r"(?<![\w/.-])ablation_sweeps(?:\.[A-Za-z_]\w*)+", TEXTS[page])):
        resolve_name(name)
    for module, names in re.findall(r"^(?:from (ablation_sweeps[\w.]*) import (.+))$", TEXTS[page], re.MULTILINE):
        for name in names.split(", "):
            resolve_name(f"{module}:{name}")


def own_options() -> set[tuple[str, str]]:
    """The yamls that docs/adding.md shows, as pairs of a group and a name."""
    titles = re.findall(r'title="my_conf/([\w/]+)/(\w+)\.yaml"', TEXTS["docs/adding.md"])
    return {(group, name) for group, name in titles}


@every_page
def test_choices_exist(page: str):
    found = re.findall(rf"(?<![\w.])({'|'.join(GROUPS)})=(?:\[|choice\()?([a-z_][\w,]*)", TEXTS[page])
    for group, names in found:
        for name in names.split(","):
            if name not in ("range", "glob"):
                assert (CONF / group / f"{name}.yaml").exists() or (group, name) in own_options(), f"{group}={name}"


@every_page
def test_options_exist(page: str):
    """`group.option=` and `` `group.option` ``, and options that belong to no group."""
    known = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    options = {group: set(known[group]) for group in ("statistics", "eval")}
    for group in GROUPS:
        files = (CONF / group).glob("*.yaml")
        options[group] = set().union(*(yaml.safe_load(file.read_text(encoding="utf-8")) for file in files))
    options["hydra.launcher"] = options["hydra/launcher"]
    groups = "|".join(sorted((re.escape(group) for group in options), key=len, reverse=True))
    for group, option in re.findall(rf"(?<![\w./])({groups})\.([a-z_]+)(?==|`)", TEXTS[page]):
        if (group, option) not in {("model", "safetensors"), ("selection", "orders")}:  # a file, and a method
            assert option in options[group], f"{group}.{option}"
    scalars = set(known) | {"method", "hydra"}
    for option in re.findall(r"(?<![\w.$/-])([a-z]+_[a-z]+)=(?!=)", FENCED.sub("", TEXTS[page])):
        assert option in scalars or option in str(options) or option == "reads_clean", option


def test_functions_stand_where_the_architecture_says():
    row = re.compile(r"\| `((?:ablation_sweeps|hydra_plugins)/[\w/.]+\.py)` \| ([^|]*) \|$", re.MULTILINE)
    rows = row.findall(TEXTS["docs/architecture.md"])
    assert len(rows) > 30
    for file, names in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^\s*(?:def|class) {name}\b", source, re.MULTILINE), f"{file}: {name}"


def test_the_tree_is_that_of_the_package():
    shown = re.findall(r"^    (\w+)/ ", TEXTS["README.md"], re.MULTILINE)
    assert {*shown} == {file.parent.name for file in (ROOT / "ablation_sweeps").glob("*/__init__.py")}
    layers = re.findall(r"`ablation_sweeps/(\w+)`", TEXTS["docs/architecture.md"].partition("## Three ways")[0])
    assert {*layers} == {*shown}


def test_every_page_is_in_the_menu():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert {*re.findall(r"(\w+\.md)$", text, re.MULTILINE)} == {file.name for file in (ROOT / "docs").glob("*.md")}


def test_every_preset_is_named():
    """Of models and data."""
    for group in ("model", "dataset"):
        for file in (CONF / group).glob("*.yaml"):
            pattern = rf"`{file.stem}`|{group}={file.stem}\b"
            assert re.search(pattern, TEXTS["docs/inputs.md"]), file.stem


def described(file: str) -> set[str]:
    """The columns or entries of a file, in the first column of its table in docs/files.md."""
    section = TEXTS["docs/files.md"].partition(f"\n## {file}\n")[2].partition("\n## ")[0]
    return {
        name for cell in re.findall(r"^\| (`.+?`) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }


def test_every_column_is_described(launch: Launch, on_text: tuple[str, ...], tmp_path: Path):
    assert launch("-m", "method=zero,mean", *on_text).code == 0
    sweep = tmp_path / "results" / "default"
    run = next(sweep.glob("*-mean-*/"))
    rows = pd.read_parquet(run / "rows.parquet")
    assert described("rows.parquet") - {"layer", "index"} == {*rows}  # which runs with fraction=each have
    assert described("documents.parquet") - {"unit"} == {*pd.read_parquet(run / "documents.parquet")}
    assert described("curves.parquet") | {*rows} == {*pd.read_parquet(sweep / "curves.parquet")}
    for table in ("summary.csv", "comparisons.csv"):
        assert described(table) == {*pd.read_csv(sweep / table)}
    environment = json.loads((run / "environment.json").read_text())
    assert {*environment} <= described("environment.json")
    assert described("environment.json") <= {*environment, *typing.get_type_hints(Environment)}
    assert described("status.json") == {*RunStatus.__annotations__}


def test_every_column_of_the_effects_is_described():
    assert described("units.csv") == {*OF_RUN, *OF_EFFECT}


def test_every_state_is_explained():
    states = {state.value for state in RunState} - {"new"}
    section = TEXTS["docs/launcher.md"].partition("## Status and retry")[2].partition("\n## ")[0]
    assert states == set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


def test_the_readme_is_short_and_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    assert len(TEXTS["README.md"].splitlines()) < 150
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXTS["README.md"], re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.count("mean") == 2
