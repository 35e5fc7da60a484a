"""The command `check`, and the certificate of a result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from command import SMALL
from typer.testing import CliRunner

from ablation_sweeps.cli.commands import app

NAMES = ["hooks", "input", "clean values", "written", "scope", "effect", "heads", "padding", "neighbour"]
PADDING_IS_TEXT = """
import dataclasses
from pydantic.dataclasses import dataclass
from ablation_sweeps.models.causal_lm import CausalLM

@dataclass(frozen=True)
class PaddingIsText(CausalLM):
    def load(self):
        return dataclasses.replace(super().load(), in_scope=lambda batch, scope: None)
"""


def check(*options: str) -> tuple[int, list[str], str]:
    """Exit code, lines, and the error."""
    result = CliRunner().invoke(app, ["check", *options])
    return result.exit_code, result.output.splitlines(), str(result.exception or "")


def with_a_fault(folder: Path, monkeypatch) -> list[str]:
    """The options of a model of one's own, whose padding is in every scope."""
    (folder / "model").mkdir()
    (folder / "padding_is_text.py").write_text(PADDING_IS_TEXT)
    yaml = "defaults: [tiny_causal]\n_target_: padding_is_text.PaddingIsText\nlabel: mine\n"
    (folder / "model" / "mine.yaml").write_text(yaml)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    return ["--config-dir", str(folder), "model=mine"]


def test_a_property_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, lines, _ = check("model=tiny_vit", "unit=head")
    assert code == 0 and [line[:10].rstrip() for line in lines] == ["passed"] * len(NAMES)
    assert [line[12:].partition(":")[0] for line in lines] == NAMES
    assert not list(tmp_path.iterdir())


def test_units_that_are_not_proven_are_refused():
    code, lines, error = check("site=mlp_pre_out")
    assert code == 0 and [line[12:17] for line in lines if line.startswith("not proven")] == ["heads"]
    code, _, error = check("site=mlp_pre_out", "unit=head")
    assert code == 1 and error.startswith("unit=head: ") and error.endswith("or unit=neuron")


def test_a_fault_is_an_exit_code(tmp_path, monkeypatch):
    code, lines, error = check(*with_a_fault(tmp_path, monkeypatch))
    assert code == 1 and "failed      padding: padding is in scope=all" in lines
    assert error.startswith("model: ")


def test_a_job_with_a_fault_is_refused_and_says_which(launch, tmp_path, monkeypatch):
    done = launch(*with_a_fault(tmp_path, monkeypatch), "method=zero", *SMALL)
    assert "a property fails: scope: " in done.error and "model.site_paths" in done.error
    (file,) = tmp_path.glob("results/default/*/environment.json")
    assert "padding: padding is in scope=all" in json.loads(file.read_text())["certificate"]["failed"]


def test_a_result_keeps_its_certificate(launch, tmp_path):
    assert launch("model=tiny_causal", "method=zero", "unit=head", *SMALL).code == 0
    (file,) = tmp_path.glob("results/default/*/environment.json")
    kept = json.loads(file.read_text())["certificate"]
    assert kept["failed"] == kept["not_proven"] == []
    assert [sentence.partition(":")[0] for sentence in kept["passed"]] == NAMES
