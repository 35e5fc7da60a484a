"""`import ablation_sweeps`: what a notebook needs, imported when it is used."""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import ablation_sweeps
from ablation_sweeps import UserError, compose_job


def test_the_examples_of_the_docstring_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(ablation_sweeps)
    assert (failed, tried > 10) == (0, True)


def test_every_name_is_there_documented_and_known_to_editors():
    assert ablation_sweeps.__version__ == version("ablation-sweeps")
    documented = ablation_sweeps.__doc__.partition("Names:")[2]
    (for_editors,) = [node for node in ast.parse(Path(ablation_sweeps.__file__).read_text()).body
                      if isinstance(node, ast.If)]  # fmt: skip
    known = {alias.asname or alias.name for node in for_editors.body if isinstance(node, ast.ImportFrom)
             for alias in node.names}  # fmt: skip
    assert known | {"__version__"} == set(ablation_sweeps.__all__)
    for name in ablation_sweeps.__all__:
        assert getattr(ablation_sweeps, name) is not None
        assert name in dir(ablation_sweeps)
        assert name in documented
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ablation_sweeps.no_such_name


def test_the_package_is_imported_without_anything_heavy():
    script = "import sys, ablation_sweeps; from ablation_sweeps import UserError; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "pandas", "hydra", "transformers", "matplotlib"}


def test_a_job_is_composed_as_on_the_command_line(job_of, tmp_path: Path):
    assert (
        compose_job("method=mean", "fraction=[0.5]").signature
        == job_of("method=mean", "fraction.values=[0.5]").signature
    )
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("defaults: [mean]\nlabel: mine\n")
    assert compose_job("method=mine", config_dir=tmp_path).method.label == "mine"
    for wrong, said in {
        "method=maen": r"method=maen: there is no such option \(did you mean mean\?\)",
        "method=zero,mean": "several values need a sweep",
        "eval.token=1": "eval.token: there is no such option",
        "dataset=digits": "holds images, but",
    }.items():
        with pytest.raises(UserError, match=said):
            compose_job(wrong)
