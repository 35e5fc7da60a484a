"""python -m ablation_sweeps report: of one sweep or more, from the files alone."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
from command import Launch, run_python
from rich.console import Console

from ablation_sweeps.data.batch import Document
from ablation_sweeps.datasets import python_docs
from ablation_sweeps.experiment import identity, job
from ablation_sweeps.experiment.run import run_job
from ablation_sweeps.report import write
from ablation_sweeps.results import run_folder


def test_two_sweeps_are_compared_on_one_page(launch: Launch, on_text, tmp_path):
    for method in ("zero", "mean"):
        assert launch(*on_text, f"method={method}", f"sweep={method}", "seed=3").code == 0
        alone = pd.read_csv(tmp_path / "results" / method / "comparisons.csv")
        assert not len(alone) and "nothing to compare" in (tmp_path / "results" / method / "report.html").read_text()
    done = run_python("-m", "ablation_sweeps", "report", "results/zero", "results/mean", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "figure: results/zero/figures/" in done.out and "page: results/zero/report.html" in done.out
    assert "does the least damage" in done.out or "cannot be told apart" in done.out
    found = pd.read_csv(tmp_path / "results" / "zero" / "comparisons.csv")
    assert set(zip(found["method"], found["other"], strict=True)) in ({("zero", "mean")}, {("mean", "zero")})
    (area,) = found.query("metric == 'loss' and fraction != fraction").to_dict("records")
    curves = pd.read_parquet(tmp_path / "results" / "zero" / "curves.parquet").query("metric == 'loss'")
    means = curves.pivot(index="fraction", columns="method", values="value")
    shares = (means / means.loc[0.0]).mean()  # of two points, the trapezoid is their mean
    assert area["difference"] == pytest.approx(shares[area["method"]] - shares[area["other"]])
    assert (tmp_path / "results" / "mean" / "curves.parquet").exists()


def test_the_report_is_written_whatever_the_terminal_is(launch: Launch, on_text, tmp_path):
    """It takes nothing but ASCII, and its reader has gone."""
    assert launch(*on_text, "-m", "method=zero,mean").code == 0
    sweep = tmp_path / "results" / "default"
    written = {name: (sweep / name).read_bytes() for name in ("comparisons.csv", "summary.csv")}
    for name in (*written, "report.html"):
        (sweep / name).unlink()
    command = [sys.executable, "-m", "ablation_sweeps", "report", "results/default"]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, **ascii_only}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == 0 and not said
    assert {name: (sweep / name).read_bytes() for name in written} == written and (sweep / "report.html").exists()


def test_a_curve_of_several_runs_is_compared_at_all_their_fractions(launch: Launch, on_text, tmp_path):
    """fraction=0.5,1 is a job for each."""
    assert launch(*on_text, "-m", "method=zero,mean", "fraction=0.5,1").code == 0
    found = pd.read_csv(tmp_path / "results" / "default" / "comparisons.csv").query("metric == 'loss'")
    assert found["fraction"].dropna().tolist() == [0.5, 1.0]
    assert launch(*on_text, "-m", "method=zero,mean", "fraction.values=[0.5,1]", "sweep=whole").code == 0
    whole = pd.read_csv(tmp_path / "results" / "whole" / "comparisons.csv").query("metric == 'loss'")
    columns = ["fraction", "difference", "low", "high", "p"]
    pd.testing.assert_frame_equal(found[columns], whole[columns], check_exact=False, rtol=1e-5)


def test_notes_of_the_runs_are_shown_with_their_methods(launch: Launch, on_text, tmp_path):
    said = launch(*on_text, "-m", "method=zero,peak", "seed=0,1").out
    page = (tmp_path / "results" / "default" / "report.html").read_text()
    lines = [line for line in said.splitlines() if "two fullest bins lie within counting noise" in line]
    assert len(lines) == 1 and re.match(r"peak: .* in \d+ % of the neurons", lines[0])
    assert lines[0].replace("<", "\\u003c") in page
    for run in tmp_path.glob("results/default/*-s?-*"):
        noted = "within counting noise" in (run / "log").read_text()
        assert noted == bool(run_folder.environment(run).get("notes")) == ("-peak-" in run.name)


def test_runs_of_other_code_or_another_torch_are_not_taken_for_equals_in_silence(launch: Launch, on_text, tmp_path):
    """They are not computed again for it, since most changes of code and of versions change no number."""
    said = launch(*on_text, "-m", "method=zero,mean").out
    assert "Its runs differ in" not in said
    (run,) = tmp_path.glob("results/default/*-mean-*")
    code, packages = (run_folder.environment(run)[key] for key in ("code", "packages"))
    torch_ = packages["torch"]
    run_folder.update_environment(run, code="0" * 16, packages=packages | {"torch": "0.1"}, threads=9)
    run_folder.finish(run, *(pd.read_parquet(run / f"{name}.parquet") for name in ("rows", "documents")), seconds=1.0)
    done = run_python("-m", "ablation_sweeps", "report", "results/default", cwd=tmp_path)
    differ = f"code ({'0' * 16}, {code}), packages.torch (0.1, {torch_})"
    assert f" Its runs differ in {differ}." in done.out
    assert f'"runs differ in": "{differ}"' in (tmp_path / "results" / "default" / "report.html").read_text()


def test_export_for_other_programs_and_for_a_paper(launch: Launch, on_text, tmp_path):
    assert launch(*on_text, "-m", "method=zero,peak", "seed=0,1", "fraction.values=[0.5,1]").code == 0
    command = ["-m", "ablation_sweeps", "export", "results/default", "--to"]
    done = run_python(*command, "out", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.split() == ["out/curves.csv", "out/curves.parquet", "out/areas.tex"]
    assert "set --to=FOLDER to another one" in run_python(*command, "out/areas.tex", cwd=tmp_path).error
    curves = pd.read_parquet(tmp_path / "results" / "default" / "curves.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "curves.parquet"), curves)
    text = pd.read_csv(tmp_path / "out" / "curves.csv", dtype={"run_id": str})
    assert len(text) == len(curves) and text["value"].sum() == pytest.approx(curves["value"].sum())
    table = (tmp_path / "out" / "areas.tex").read_text()
    assert table.count(r"\begin{table}") == table.count(r"\end{table}") == 1 and r"\toprule" in table
    of_pair = r"^Loss & {number} & {number} \\\\\n & \\scriptsize \[{number}, {number}\] & ".replace(
        "{number}", r"(\d\.\d{3})"
    )
    found = re.search(of_pair, table, re.MULTILINE)
    summary = (
        pd.read_csv(tmp_path / "results" / "default" / "summary.csv").query("metric == 'loss'").set_index("method")
    )
    assert found and float(found[1]) == pytest.approx(summary.loc["zero", "auc"], abs=2e-3)
    assert float(found[3]) <= float(found[1]) <= float(found[4])
    assert r"attn\_pre\_out" in table and not re.search(
        r"(?<!\\)[_%#]", table.replace("tab:tiny-texts-attn_pre_out", "")
    )


def test_a_folder_without_results_is_said(tmp_path):
    assert "no finished run below" in run_python("-m", "ablation_sweeps", "report", str(tmp_path), cwd=tmp_path).error


@pytest.mark.parametrize("labels", [("python_docs-3.10", "python_docs-3.13"), ("python_docs", "python_docs")])
def test_runs_on_the_texts_of_two_pythons_are_never_drawn_together(job_of, tmp_path, monkeypatch, labels):
    """The label tells them apart, and where it does not, as before it named the version, the content of the texts."""
    for label, method, word in zip(labels, ("zero", "mean"), ("list", "tuple"), strict=True):
        text = f"There is a {word} of names, and each of them is one word. " * 8
        found = [
            Document(f"{split}{i}", f"{split} {i}: {text}") for split in ("calibration", "evaluation") for i in "01"
        ]
        monkeypatch.setattr(python_docs, "docs", lambda found=found: found)
        monkeypatch.setattr(python_docs, "split_of", lambda name: name[:-1])
        options = ("model=tiny_causal", f"method={method}", "fraction.values=[0.5,1]", "tracking=none", "sweep=both")
        for cache in (identity.content, job._check_examples):
            cache.cache_clear()  # another Python is another process
        run_job(job_of(*options, f"dataset.label={label}", f"results_dir={tmp_path}"))
    file = io.StringIO()
    written = write.write(tmp_path / "both", console=Console(file=file, width=200))
    assert len([path for path in written if path.suffix == ".png"]) == 2
    titles = [line for line in file.getvalue().splitlines() if line.startswith("tiny_causal on python_docs")]
    tables, verdicts = titles[:2], titles[2:]
    assert len(set(tables)) == 2 and [line.partition(": ")[0] for line in verdicts] == tables
    assert ["Only mean is finished" in line for line in verdicts] in ([True, False], [False, True])
    assert pd.read_csv(tmp_path / "both" / "comparisons.csv").empty
    if labels[0] != labels[1]:
        assert [label in title for label, title in zip(labels, tables, strict=True)] == [True, True]
