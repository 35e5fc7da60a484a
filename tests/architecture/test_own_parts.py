"""Adding a method, a dataset or a kind of model is one Python file and one yaml, both outside of this repository."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from command import Launch

Add = Callable[[str, str, str, str], str]

METHOD = """
from dataclasses import dataclass
import torch
from ablation_sweeps import Constant

@dataclass(frozen=True)
class Level:
    label: str
    value: float

    def fit(self, fitting):
        return Constant([torch.full((p.width,), self.value) for p in fitting.projections])
"""

DATASET = """
from dataclasses import dataclass
from typing import ClassVar
from ablation_sweeps.data.batch import Document

@dataclass(frozen=True)
class Alphabet:
    label: str
    letters: int
    modality: ClassVar[str] = "text"

    def examples(self, split):
        for i in range(5):
            start = i + 5 * (split == "evaluation")  # the same text would count once
            yield Document(f"{split}/{i}", (2 * "abcdefghijklmnopqrstuvwxyz")[start : start + self.letters])

    def fingerprint(self):
        return f"alphabet {self.letters}"
"""


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """Writes a Python file and a yaml; returns the folder that Hydra has to look into as well."""
    monkeypatch.syspath_prepend(tmp_path / "packages")

    def add(group: str, name: str, python: str, options: str) -> str:
        sys.modules.pop(f"my_{name}", None)  # of another test
        (tmp_path / "packages").mkdir()
        (tmp_path / "packages" / f"my_{name}.py").write_text(python)
        (tmp_path / "my_conf" / group).mkdir(parents=True)
        (tmp_path / "my_conf" / group / f"{name}.yaml").write_text(options)
        return str(tmp_path / "my_conf")

    return add


def rows_of(sweep: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in sweep.glob("*/rows.parquet")], ignore_index=True)


def loss(rows: pd.DataFrame, fraction: float, **where: object) -> float:
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows[(rows["metric"] == "loss") & (rows["fraction"] == fraction)]["value"].item()


def test_a_method(launch: Launch, add: Add, on_text, tmp_path):
    conf = add("method", "level", METHOD, "_target_: my_level.Level\nlabel: level-${.value}\nvalue: 7.0\n")
    outcome = launch("--config-dir", conf, *on_text, "-m", "method=level", "method.value=7.0,0.0")
    assert outcome.code == 0, outcome.err
    assert launch(*on_text, "method=zero").code == 0
    rows = rows_of(tmp_path / "results" / "default")
    assert loss(rows, 0.5, method="level-0.0") == loss(rows, 0.5, method="zero")
    assert loss(rows, 0.5, method="level-7.0") != loss(rows, 0.5, method="zero")
    assert loss(rows, 0.0, method="level-7.0") == loss(rows, 0.0, method="zero")
    assert "level-7.0" in outcome.out


def test_a_mistake_in_an_own_yaml_is_named_too(launch: Launch, add: Add, on_text):
    conf = add("method", "level", METHOD, "_target_: my_level.Level\nlabel: level\n")
    assert "method" in (error := launch("--config-dir", conf, *on_text, "method=level").error) and "value" in error
    listed = launch("--config-dir", conf, *on_text, "method=levle").error
    assert "did you mean level?" in listed and "peak" in listed


def test_a_misspelt_option_of_a_class_that_pydantic_checks_is_not_passed_over(launch: Launch, add: Add, on_text):
    """It has no options that are forbidden, unless it says so."""
    own = METHOD.replace("from dataclasses import", "from pydantic.dataclasses import")
    conf = add("method", "level", own, "_target_: my_level.Level\nlabel: level\nvalue: 7.0\n")
    error = launch("--config-dir", conf, *on_text, "method=level", "++method.valeu=1.0").error
    assert "method.valeu: there is no such option (did you mean method.value?); method has method.label" in error


MODEL = """
from dataclasses import dataclass
from typing import ClassVar

@dataclass(frozen=True)
class Unloaded:
    label: str
    modality: ClassVar[str] = "text"

    def load(self): ...

    def identity(self): ...
"""

SELECTION = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Last:
    label: str

    def orders(self, selecting): ...
"""

TRACKER = """
class Silent:
    def log_run(self, run): ...
"""

OWN = {
    "method": (METHOD, "_target_: my_own.Level\nlabel: own\nvalue: 7.0\n"),
    "dataset": (DATASET, "_target_: my_own.Alphabet\nlabel: own\nletters: 20\n"),
    "model": (MODEL, "_target_: my_own.Unloaded\nlabel: own\n"),
    "selection": (SELECTION, "_target_: my_own.Last\nlabel: own\n"),
    "tracking": (TRACKER, "_target_: my_own.Silent\n"),
}


@pytest.mark.parametrize(
    ("group", "missing"),
    [
        *(("method", "fit()"), ("dataset", "examples()"), ("dataset", "modality"), ("dataset", "fingerprint()")),
        *(("model", "load()"), ("model", "identity()"), ("selection", "orders()"), ("tracking", "log_run()")),
    ],
)
def test_what_every_class_of_its_kind_must_have_is_missed_before_anything_runs(
    launch: Launch, add: Add, on_text, group: str, missing: str
):
    python, options = OWN[group]
    name = missing.removesuffix("()")
    conf = add(group, "own", python.replace(f" {name}", f" no_{name}"), options)
    others = [option for option in on_text if not option.startswith(group)]
    outcome = launch("--config-dir", conf, *others, f"{group}=own", "dry_run=true")
    assert f"has no {missing}; see docs/adding.md" in outcome.error


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("@dataclass(frozen=True)\n", "", "my_level.Level: is no frozen dataclass, whose fields are its options; put"),
        ("(frozen=True)", "", "my_level.Level: is no frozen dataclass, whose fields are its options; put"),
        (
            "    label: str\n",
            "",
            "my_level.Level: has no name for tables, figures and folders; give its class `label: str`",
        ),
        ("def fit(", "def fitt(", "my_level.Level: has no fit(); see docs/adding.md"),
        ("return Constant(", "return (", "its fit gives list, which is no Replacement"),
    ],
)
def test_what_a_class_lacks_is_said_with_its_remedy(launch: Launch, add: Add, on_text, before, after, said):
    conf = add("method", "level", METHOD.replace(before, after), "_target_: my_level.Level\nvalue: 7.0\n")
    named = () if "no name" in said else ("+method.label=level",)
    assert said in launch("--config-dir", conf, *on_text, "method=level", *named).error


def test_a_tracker(launch: Launch, add: Add, on_text, tmp_path):
    """It is told of each run, and of the sweep when all of them have been logged."""
    python = """
class Told:
    def log_run(self, run):
        print("told of", run.method)
        return False

    def log_sweep(self, folder):
        print("told of", folder.name)
"""
    conf = add("tracking", "told", python, "_target_: my_told.Told\n")
    options = [option for option in on_text if not option.startswith("tracking")]
    outcome = launch("--config-dir", conf, *options, "-m", "tracking=told", "method=zero,mean", "sweep=mine")
    assert outcome.code == 0, outcome.err
    assert re.findall("told of (.*)", outcome.out) == ["zero", "mean", "mine"]


SELECTION = """
from dataclasses import dataclass


@dataclass(frozen=True)
class InOrder:
    label: str
    depends_on_seed = False

    def orders(self, selecting):
        return []
"""


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("(self, selecting)", "(self, widths, seed)", "its orders() must take one argument, what a rule may look at"),
        ("    depends_on_seed = False\n", "", "my_in_order.InOrder: has no depends_on_seed; see docs/adding.md"),
    ],
)
def test_a_selection_of_an_earlier_version_is_refused_with_its_remedy(
    launch: Launch, add: Add, on_text, before, after, said
):
    conf = add("selection", "in_order", SELECTION.replace(before, after), "_target_: my_in_order.InOrder\nlabel: o\n")
    assert said in launch("--config-dir", conf, *on_text, "selection=in_order").error


def test_a_list_that_nothing_can_be_kept_under_is_refused(launch: Launch, add: Add, on_text):
    own = DATASET.replace("letters: int", "letters: list")
    conf = add("dataset", "alphabet", own, "_target_: my_alphabet.Alphabet\nlabel: alphabet\nletters: [1, 2]\n")
    options = [option for option in on_text if not option.startswith("dataset")]
    error = launch(*options, "--config-dir", conf, "dataset=alphabet", "method=mean").error
    assert "my_alphabet.Alphabet: unhashable type: 'list'; declare the field that holds it a tuple" in error
