"""launch.py from the command to the files: what is printed, what is written, and that nothing is done twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from command import LAUNCH, ROOT, Launch, run_python, states, write_texts

RUN_FILES = {"config.yaml", "environment.json", "status.json", "rows.parquet", "documents.parquet", "log"}
COLUMNS = [
    *("run_id", "study", "kind", "model", "revision", "dataset", "site", "unit", "selection"),
    *("depends_on_seed", "method", "method_params", "seed", "fraction", "n_ablated", "n_units", "n_neurons"),
    *("metric", "value", "stderr", "n", "clean", "chance"),
]
DOCS = f"python_docs-{sys.version_info.major}.{sys.version_info.minor}"  # the text is another one in other versions
PROGRESS = re.compile(r"[\x1b\r]|\d+%\||it/s")


def runs_of(sweep: Path) -> list[Path]:
    return sorted(path.parent for path in sweep.glob("*/status.json"))


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def hashes(sweep: Path) -> dict[str, str]:
    """Of all files of all runs but their logs, which also tell of the runs that found them finished."""
    files = [path for run in runs_of(sweep) for path in run.iterdir() if path.name != "log"]
    return {str(path.relative_to(sweep)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_command_alone_runs_the_embedded_default(launch: Launch, tmp_path, pictures):
    if not (ROOT / "ablation_sweeps" / "assets" / "tiny_causal" / "model.safetensors").is_file():
        pytest.skip("the embedded models are not trained yet: scripts/train_tiny.py")
    outcome = launch("statistics.tokens=1000", "eval.tokens=1000", "fraction=half")
    assert outcome.code == 0, outcome.err
    assert f"tiny_causal on {DOCS} ·" in outcome.out and "loss (nats/token)" in outcome.out
    (run,) = runs_of(tmp_path / "results" / "default")
    assert re.fullmatch(rf"tiny_causal-{re.escape(DOCS)}-peak-s0-[0-9a-f]{{8}}", run.name)


def test_a_sweep_leaves_the_folders_that_were_promised(launch: Launch, on_text, tmp_path, pictures):
    outcome = launch(*on_text, "-m", "method=zero,mean", "seed=0,1", "fraction=[0.5,1.0]")
    assert outcome.code == 0, outcome.err
    sweep = tmp_path / "results" / "default"
    names = [re.sub(r"-[0-9a-f]{8}$", "", run.name) for run in runs_of(sweep)]
    assert names == ["tiny-texts-mean-s0", "tiny-texts-mean-s1", "tiny-texts-zero-s0", "tiny-texts-zero-s1"]
    assert set(states(sweep).values()) == {"finished"}
    for run in runs_of(sweep):
        assert visible(run) == RUN_FILES, run.name
        environment = json.loads((run / "environment.json").read_text())
        assert {"git_commit", "git_changed", "packages", "device", "seconds", "peak_memory_mb"} <= set(environment)
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["method"]["label"] in run.name and "hydra" not in config
    assert {"curves.parquet", "summary.csv", "comparisons.csv", "report.html", "figures"} <= visible(sweep)
    assert visible(sweep / "figures") == {f"tiny-texts-attn_pre_out.{kind}" for kind in ("png", "svg", "pdf")}
    assert visible(tmp_path) == {"results"}, "nothing is left where the command was typed"

    for method in ("zero", "mean"):
        assert re.search(rf"^ *{method} .*\d\.\d+", outcome.out, re.MULTILINE), outcome.out
    assert "2 seeds" in outcome.out and "AUC" in outcome.out


def test_rows_have_the_columns_and_the_points_of_the_curve(launch: Launch, on_text, tmp_path):
    assert launch(*on_text, "method=mean", "fraction=[0.25,1.0]").code == 0
    (run,) = runs_of(tmp_path / "results" / "default")
    rows = pd.read_parquet(run / "rows.parquet")
    assert list(rows.columns) == COLUMNS
    expected = {"kind": "causal_lm", "model": "tiny", "dataset": "texts", "site": "attn_pre_out", "method": "mean",
                "selection": "random", "unit": "neuron", "depends_on_seed": True, "seed": 0,
                "revision": "", "n_units": 96, "n_neurons": 96}  # fmt: skip
    assert {key: set(rows[key]) for key in expected} == {key: {value} for key, value in expected.items()}
    assert set(zip(rows["fraction"], rows["n_ablated"], strict=True)) == {(0.0, 0), (0.25, 24), (1.0, 96)}
    metrics = {"loss", "perplexity", "top1", "top10", "kl", "loss_skip5", "top1_skip5", "top10_skip5"}
    assert [set(group["metric"]) for _, group in rows.groupby("fraction")] == [metrics] * 3
    assert rows["value"].notna().all() and rows["stderr"].notna().all() and (rows["n"] > 0).all()
    assert rows.query("metric == 'kl' and fraction == 0")["value"].item() == 0
    assert run.name.endswith(rows["run_id"].iloc[0][:8])


@pytest.fixture
def five_classes(images, tmp_path) -> str:
    """The model's classes; there are images of some of them."""
    names = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    (tmp_path / "classes.txt").write_text("\n".join([*names, *(f"other{i}" for i in range(5 - len(names)))]))
    return f"dataset.classes={tmp_path / 'classes.txt'}"


def test_labels_are_not_guessed_where_the_model_has_other_classes(launch: Launch, on_images):
    outcome = launch(*on_images, "method=zero")
    assert outcome.code != 0 and "dataset.classes=FILE" in outcome.err


def test_images_go_the_same_way(launch: Launch, on_images, five_classes, tmp_path, pictures):
    outcome = launch(*on_images, five_classes, "method=resample")
    assert outcome.code == 0, outcome.err
    assert "nats/image" in outcome.out and "top-1" in outcome.out
    (run,) = runs_of(tmp_path / "results" / "default")
    assert set(pd.read_parquet(run / "rows.parquet")["kind"]) == {"image_classifier"}


def test_the_same_command_again_computes_nothing(launch: Launch, on_text, tmp_path, request):
    command = [*on_text, "-m", "method=zero,mean"]
    first = launch(*command)
    before = hashes(tmp_path / "results" / "default")
    request.getfixturevalue("no_weights")
    again = launch(*command)
    assert (again.code, again.out) == (0, first.out)
    assert hashes(tmp_path / "results" / "default") == before
    assert again.err.count("is finished already") == 2


def test_what_is_added_to_a_sweep_leaves_the_rest_alone(launch: Launch, on_text, tmp_path):
    assert launch(*on_text, "method=zero").code == 0
    before = hashes(tmp_path / "results" / "default")
    outcome = launch(*on_text, "-m", "method=zero,mean", "fraction=0.5,1.0")
    after = hashes(tmp_path / "results" / "default")
    assert outcome.code == 0, outcome.err
    assert before.items() <= after.items()
    assert len(runs_of(tmp_path / "results" / "default")) == 4  # 0.5 is half: that run is there already


@pytest.mark.parametrize("name", ["it's a,b=c", 'say "yes"', "Übergröße 日本"])
def test_paths_of_any_name(launch: Launch, on_text, tmp_path, name):
    data, results = ("'" + path.replace("'", "\\'") + "'" for path in (name, f"of {name}"))
    write_texts(tmp_path / name)
    options = [option for option in on_text if not option.startswith("dataset.path")]
    outcome = launch(*options, "method=zero", f"dataset.path={data}", f"results_dir={results}")
    assert outcome.code == 0, outcome.err
    (run,) = runs_of(tmp_path / f"of {name}" / "default")
    assert f"-{name}-zero-" in run.name
    assert yaml.safe_load((run / "config.yaml").read_text())["dataset"]["path"] == name


@pytest.mark.parametrize("option", ["model", "dataset"])
def test_results_do_not_lie_among_the_weights_or_the_data(launch: Launch, on_text, saved, tmp_path, option):
    folder = write_texts(tmp_path / "dataset") if option == "dataset" else tmp_path / "model"
    shutil.copytree(saved("llama"), tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    error = launch(*on_text, f"{option}.path={folder}", "results_dir=link/results").error
    assert "link/results: lies in" in error and f"{option}.path={folder}" in error


def test_a_python_without_the_packages_says_how_to_get_them(tmp_path):
    done = subprocess.run([sys.executable, "-S", str(LAUNCH)], cwd=tmp_path, capture_output=True, timeout=60, env={})
    (said,) = done.stderr.decode().splitlines()
    assert done.returncode == 1 and said.startswith("error: ") and "make setup" in said and "activate" in said


STOPS = """
import atexit, os, signal, time
from dataclasses import dataclass

@dataclass(frozen=True)
class Stops:
    label: str

    def check(self, modality):
        atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(9)))
        raise KeyboardInterrupt

    def fit(self, fitting): ...
"""


MODULE = ["-m", "ablation_sweeps"]


@pytest.mark.parametrize("command", [[str(LAUNCH)], [*MODULE, "status"]], ids=str)
def test_ctrl_c_while_modules_are_imported_shows_no_traceback(tmp_path, command):
    for name in ("hydra", "typer"):
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt")
    check_ctrl_c(tmp_path, *command)


def test_a_second_ctrl_c_while_it_leaves_shows_no_traceback(tmp_path):
    (tmp_path / "stops.py").write_text(STOPS)
    check_ctrl_c(tmp_path, str(LAUNCH), "-m", "method=zero", "method._target_=stops.Stops", "tracking=none")


def check_ctrl_c(tmp_path: Path, *command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, timeout=240, env=environment)
    assert done.stderr.decode().splitlines()[-1:] == ["interrupted; the same command continues where it stopped"]
    assert done.returncode == -signal.SIGINT and b"Traceback" not in done.stderr


def test_a_file_gets_plain_text_and_no_progress_bars(on_text, tmp_path):
    """A process of its own, whose output is no terminal; the tables go to stdout, all else to stderr."""
    more = ("-m", "method=zero,peak", "statistics.tokens=64")  # all there are
    done = run_python(str(LAUNCH), *on_text, *more, cwd=tmp_path)
    out, err = done.out, done.err
    assert done.code == 0, err
    assert not PROGRESS.search(out + err)
    assert re.search(r"\d\*", out), "what a terminal shows in bold, a file gets with a star"
    assert [line.split("] ")[0] for line in err.splitlines()] == ["[1/2", "[2/2"], "one line a job, nothing else"
    assert set(states(tmp_path / "results" / "default").values()) == {"finished"}
