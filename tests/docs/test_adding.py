"""docs/adding.md: a reader who copies its files and types its commands gets results."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
from command import ROOT, Launch

BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "docs" / "adding.md").read_text(encoding="utf-8"))
FILES = {title: content for _, title, content in BLOCKS if title}
COMMANDS = [line for language, _, content in BLOCKS if language == "sh" for line in content.splitlines()]


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        if name.endswith(".py"):
            monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(launch: Launch, own_files: Path, on_text: tuple[str, ...], command: str):
    program, *arguments = shlex.split(command)
    assert program == "ablation-sweeps"
    chosen = dict(argument.split("=") for argument in arguments if "=" in argument)
    small = [option for option in on_text if option.partition("=")[0].partition(".")[0] not in chosen]
    outcome = launch(*arguments, *small)
    assert outcome.code == 0, outcome.err
    rows = pd.concat([pd.read_parquet(file) for file in own_files.glob("results/*/*/rows.parquet")])
    assert rows["value"].notna().all() and set(rows["fraction"]) == {0.0, 0.5}
    assert all(rows.query("fraction == 0.5 and metric == 'kl'")["value"] > 0)
    for column in {"method", "selection", "dataset", "model"} & chosen.keys():
        assert set(rows[column]) == set(chosen[column].split(","))
    if "selection" in chosen:
        assert set(rows["unit"]) == {"head"}
    if "tracking" in chosen:
        (line,) = (own_files / "curves.jsonl").read_text().splitlines()
        assert json.loads(line)["method"] == "mean" and set(json.loads(line)["loss"]) == {"0.0", "0.5"}


def test_each_kind_has_a_command():
    groups = {Path(name).parts[1] for name in FILES if name.startswith("my_conf/") and "launcher" not in name}
    assert groups == {"method", "selection", "dataset", "model", "tracking"}
    assert all(any(f"{group}=" in command for command in COMMANDS) for group in groups)


def test_other_yamls_of_the_page_compose(launch: Launch, own_files: Path, on_text: tuple[str, ...]):
    options = [option for option in on_text if not option.startswith("model")]
    outcome = launch("--config-dir", "my_conf", *options, "model=my_gpt2", "--cfg", "job")
    assert outcome.code == 0 and "openai-community/gpt2-medium" in outcome.out, outcome.err
    launched = ("hydra/launcher=our_cluster", "--cfg", "hydra")
    outcome = launch("--config-dir", "my_conf", *on_text, *launched)
    assert outcome.code == 0 and "gres: gpu:1" in outcome.out, outcome.err
    assert "time: 08:00:00" in outcome.out.replace("'", "") and "max_jobs_per_pack: 12" in outcome.out
