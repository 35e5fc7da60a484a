"""What a command or a yaml means to its reader is what runs, or one line refuses it: lists, sweeps, numbers, paths."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from command import LAUNCH, ROOT, Launch, run_python

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.experiment.arguments import for_hydra
from ablation_sweeps.experiment.config import CHOICES, SCALARS

CONF = ROOT / "conf"
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")


PAIRS = {
    "model": ("tiny_causal", "tiny_masked"),
    "dataset": ("python_docs", "python_code"),
    "selection": ("random",) * 2,
    "study": ("small_decoder", "small_masked"),
}  # fmt: skip  (of these, others are on the hub, or not two)


def two_of(group: str) -> tuple[str, ...]:
    return PAIRS.get(group) or tuple(sorted(file.stem for file in (CONF / group).glob("*.yaml"))[:2])


def jobs_of(out: str) -> int:
    match = re.search(r"^(\d+) jobs?: ", out, re.MULTILINE)
    assert match, out
    return int(match[1])


@pytest.mark.parametrize("group", [*GROUPS, "hydra/launcher"])
def test_a_list_is_never_its_last_entry(launch: Launch, group):
    """Every group of conf/: with -m a job of each (as with commas), without it one line."""
    names = two_of(group)
    listed, commas = f"{group}=[{','.join(names)}]", f"{group}={','.join(names)}"
    error = launch(listed, "dry_run=true").error
    assert commas in error and ("add -m" in error or "Sweeping over Hydra" in error)
    assert for_hydra(["-m", listed]) == for_hydra(["-m", commas])
    swept = launch("-m", listed, "dry_run=true")
    if group in ("experiment", "hydra/launcher"):  # they belong to a whole launch
        assert swept.error
    else:
        assert jobs_of(swept.out) == 2


def write_experiment(folder: Path, name: str, content: str) -> tuple[str, str]:
    file = folder / "conf" / "experiment" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# @package _global_\n{content}\n")
    return "--config-dir", str(folder / "conf")


@pytest.mark.parametrize(
    "params, jobs",
    [
        ("{method: [zero, mean]}", 2),
        ("{method: [zero, mean], site: [attn_pre_out, mlp_pre_out], seed: [0, 1]}", 8),
        ("{fraction: 'choice(0.1,0.5)', method: zero}", 2),
        ("{fraction: 'half,0.3'}", 2),
        ("{fraction: [0.1, 0.5]}", 1),
        ("{seed: 'range(3)', method: 'glob([zero,mean])'}", 6),
    ],
)
def test_what_an_experiment_sweeps_over(launch: Launch, tmp_path, params, jobs):
    where = write_experiment(tmp_path, "mine", f"hydra: {{sweeper: {{params: {params}}}}}")
    outcome = launch("-m", *where, "experiment=mine", "dry_run=true")
    assert outcome.code == 0, outcome.err
    assert jobs_of(outcome.out) == jobs
    assert len(set(re.findall(r"^    (\S+)$", outcome.out, re.MULTILINE))) == jobs, "as many different curves"
    assert "add -m" in launch(*where, "experiment=mine", "dry_run=true").error


def test_what_is_typed_takes_the_place_of_what_an_experiment_says(launch: Launch, tmp_path):
    where = write_experiment(
        tmp_path, "mine", "hydra: {sweeper: {params: {fraction: '0.1,0.5', method: [zero, mean]}}}"
    )
    typed = launch("-m", *where, "experiment=mine", "fraction=half", "method=zero", "dry_run=true")
    plain = launch("fraction=half", "method=zero", "dry_run=true")
    assert typed.out == plain.out
    assert jobs_of(launch("-m", *where, "experiment=mine", "fraction=[0.2,0.3]", "dry_run=true").out) == 2


@pytest.mark.parametrize("option", ["method: [zero, mean]", "site: [attn_pre_out, mlp_pre_out]",
                                    "study: [small_vit, small_masked]", "model: [tiny_vit, tiny_masked]"])  # fmt: skip
def test_a_list_in_the_defaults_of_an_experiment(launch: Launch, tmp_path, option):
    where = write_experiment(tmp_path, "mine", f"defaults:\n  - override /{option}")
    for multirun in ([], ["-m"]) if option.startswith("method") else (["-m"],):
        error = launch(*multirun, *where, "experiment=mine", "dry_run=true").error
        assert f"{option.split(':')[0]}=[" in error and "takes one at a time" in error


def test_an_experiment_chooses_its_launcher(launch: Launch, tmp_path):
    text = "defaults:\n  - override /hydra/launcher: local\nhydra: {launcher: {max_jobs_per_pack: 1}}"
    where = write_experiment(tmp_path, "packs", text)
    write_experiment(tmp_path, "plain", "seed: 5")
    outcome = launch("-m", *where, "experiment=packs", "seed=0,1", "dry_run=true")
    assert "in 2 packs" in outcome.out, "its launcher holds"
    for both in ("packs,plain", "plain,packs", "[packs,plain]"):
        error = launch("-m", *where, f"experiment={both}", "dry_run=true").error
        assert "experiment=packs: sets hydra.launcher" in error and "by itself" in error
    error = launch("-m", "experiment=paper,paper_small", "dry_run=true").error
    assert "experiment=paper: sets hydra.sweeper" in error


@pytest.mark.parametrize(
    ("typed", "jobs"),
    [("fraction=choice(0.1,0.5)", 2), ("fraction=sort(0.5,0.1)", 2), ("fraction=[0.1,0.5]", 1),
     ("fraction=[half,0.3]", 2), ("fraction=[0.1,0.5],[0.2]", 2), ("method=glob([zero,mean])", 2), ("method=[zero]", 1),
     ("site=[attn_pre_out,mlp_pre_out],attn_pre_out", 3), ("method.n_bins=range(1,3)", 2)],
)  # fmt: skip
def test_what_sweeps_on_the_command_line(launch: Launch, typed, jobs):
    outcome = launch("-m", typed, "dry_run=true")
    assert outcome.code == 0, outcome.err
    assert jobs_of(outcome.out) == jobs


@pytest.mark.parametrize(
    "typed",
    ["fraction=interval(0,1)", "method=glob(x*)", "seed=range(3,1)", "method.n_bins=[5,6]"],
)
def test_what_does_not_sweep_is_refused(launch: Launch, tmp_path, typed):
    error = launch("-m", typed, "dry_run=true").error
    assert typed.lstrip("+").split("=")[0] in error
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_a_range_are_those_that_were_typed():
    assert for_hydra(["fraction=range(0,1.1,0.1)"]) == [f"fraction.values={','.join(f'[{i / 10}]' for i in range(11))}"]


@pytest.mark.parametrize("name", [*CHOICES, *SCALARS])
def test_an_option_with_two_dashes_is_never_taken_for_a_flag(name):
    """W&B's agent types them so; `--experiment` is how `--experimental-rerun` begins."""
    assert for_hydra([f"--{name}=0.5"]) == for_hydra([f"{name}=0.5"]) != [f"--{name}=0.5"]
    with pytest.raises(UserError, match=rf"--{name}: there is no such flag; an option is written {name}=VALUE"):
        for_hydra([f"--{name}", "0.5"])


@pytest.mark.parametrize(
    ("first", "second"),
    [*((f"{group}={two_of(group)[0]}", f"{group}={two_of(group)[1]}") for group in GROUPS),
     *((f"{option}=1", f"{option}=2") for option in SCALARS), ("seed=0", "seed=0"), ("seed=0", "--seed=1"),
     ("seed=0", "++seed=1"), ("method.n_bins=5", "method.n_bins=6"), ("hydra.sweep.dir=a", "hydra.sweep.dir=b"),
     ("fraction=half", "fraction=0.1"), ("fraction=[0.1]", "fraction.values=[0.2]"),
     ("hydra/launcher=local", "hydra/launcher=slurm"), ("-cd=a", "--config-dir=b")],
)  # fmt: skip
def test_an_option_that_is_given_twice(first, second):
    """Hydra takes the last one in silence."""
    for multirun in ([], ["-m"]):
        with pytest.raises(UserError, match="is given twice, and only the last would count") as refused:
            for_hydra([*multirun, first, "eval.skip=1", second])
        shown = [
            option.replace("fraction=[", "fraction.values=[") for option in (first, second.removeprefix("--seed="))
        ]
        assert str(refused.value).startswith(shown[0]) and f"{shown[1]}: " in str(refused.value)


def test_an_option_of_a_choice_is_not_the_choice_again():
    assert for_hydra(["fraction=half", "fraction.values=[0.1]"]) == ["fraction=half", "fraction.values=[0.1]"]
    assert for_hydra(["method=peak", "method.n_bins=5"]) == ["method=peak", "method.n_bins=5"]


def test_a_command_with_an_option_twice(tmp_path):
    for multirun in ([], ["-m"]):
        error = run_python(str(LAUNCH), *multirun, "method=zero", "+method=mean", "dry_run=true", cwd=tmp_path).error
        assert "method=zero +method=mean: method is given twice" in error and "-m method=A,B" in error
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_the_user(launch: Launch, tmp_path, texts, saved, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    home.mkdir()
    (home / "texts").symlink_to(texts)
    (home / "model").symlink_to(saved("llama"))
    (home / "other").mkdir()
    (home / "other" / "a.txt").write_text("another text")
    paths = ("dataset.path=~/texts", "dataset.calibration_path='~/other'", "model.path=~/model", "results_dir='~/out'")
    outcome = launch("model=causal_lm", "dataset=text_files", *paths, "tracking=none", "dry_run=true")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["home"], "no folder that is called ~"


def test_values_from_the_environment(launch: Launch, monkeypatch):
    """They are text: numbers and truth values are made of it, and give the same curves."""
    values = {"SEED": "3", "BINS": "50", "TOKENS": "300", "DRY": "true", "SHARE": "0.2"}
    options = {"seed": "SEED", "method.n_bins": "BINS", "eval.tokens": "TOKENS", "batch_tokens": "TOKENS",
               "dry_run": "DRY", "method.bandwidth": "SHARE"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    named = [f"{option}=${{oc.env:{name}}}" for option, name in options.items()]
    typed = [f"{option}={values[name]}" for option, name in options.items()]
    outcome = launch(*named)
    assert outcome.code == 0, outcome.err
    assert outcome.out == launch(*typed).out
    assert launch("-m", *named, "method.n_bins=5,${oc.env:BINS}").code == 0
    monkeypatch.setenv("BAD", "many")
    for option in ("seed", "method.n_bins"):
        assert f"{option}=many: must be a" in launch(f"{option}=${{oc.env:BAD}}").error


@pytest.mark.parametrize("option", ["seed", "eval.tokens", "method.n_bins"])
def test_numbers_beyond_64_bits(launch: Launch, tmp_path, option):
    value = 10**30 if option == "seed" else 2**63
    assert f"{option}={value}: must be at most" in launch(f"{option}={value}", "dry_run=true").error
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_a_launcher_beyond_64_bits(launch: Launch):
    error = launch("-m", "hydra/launcher=local", f"hydra.launcher.max_parallel={2**63}").error
    assert f"hydra.launcher.max_parallel={2**63}: must be at most" in error


def test_nothing_is_made_before_a_command_is_refused(launch: Launch, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.chdir(tmp_path / "a" / "b")
    before = sorted(tmp_path.rglob("*"))
    all_of_them = ("sweep=../../x", "sweep=/x", "sweep=..", "results_dir=", "seed=-1", "sweep=x/y")
    for multirun, mistakes in (
        ([], ("sweep=..", "results_dir=")),
        (["-m"], all_of_them),
        (["-m", "hydra/launcher=local"], ("sweep=..", "seed=-1")),
        (["-m", "hydra/launcher=basic"], ("sweep=..", "results_dir=")),  # it makes the sweep's folder, where it may
    ):
        for wrong in mistakes:
            assert wrong.split("=")[0] in launch(*multirun, wrong).error
            assert sorted(tmp_path.rglob("*")) == before, (multirun, wrong)


USERS_YAML = {
    "syntax": (b"label: [a\n", "line 2"),
    "twice": (b"label: a\nlabel: b\n", "line 2"),
    "latin1": (b"label: caf\xe9\n", "UTF-8"),
    "utf16": ("label: a\n".encode("utf-16"), "UTF-8"),
    "list": (b"- a\n- b\n", "mapping"),
    "empty": (b"", ""),
    "nul": (b"label: a\0b\n", "UTF-8"),
}


@pytest.mark.parametrize("name", USERS_YAML)
def test_a_bad_yaml_of_the_user(launch: Launch, tmp_path, name):
    """Each kind in a group of options; two kinds in the groups that belong to a whole launch, too."""
    content, said = USERS_YAML[name]
    check_bad_yaml(launch, tmp_path, "method", [], name, content, said)
    if name in ("syntax", "empty"):
        check_bad_yaml(launch, tmp_path, "experiment", ["-m"], name, content, said)
        check_bad_yaml(launch, tmp_path, "hydra/launcher", ["-m"], name, content, said)


def check_bad_yaml(launch: Launch, tmp_path: Path, group: str, multirun: list[str], name: str, content: bytes, said):
    file = tmp_path / "conf" / group / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes((b"# @package _global_\n" if group == "experiment" and name != "empty" else b"") + content)
    outcome = launch(*multirun, "--config-dir", str(tmp_path / "conf"), f"{group}={name}", "dry_run=true")
    if outcome.code == 0:
        assert (group, name) in {("experiment", "empty")}
        return
    assert said in outcome.error or group in outcome.error
    if said in ("line 2", "UTF-8"):
        assert str(file) in outcome.error


@pytest.mark.parametrize("flag", [["--config-path", "conf"], ["--config-path=conf"], ["-cp", "conf"]])
def test_a_config_path_begins_in_the_current_folder(launch: Launch, tmp_path, flag):
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf" / "method" / "mine.yaml").write_text("defaults: [mean]\nlabel: mine\n")
    assert "-mine-s0-" in launch(*flag, "method=mine", "dry_run=true").out


def test_a_pipe_or_a_ring_for_a_folder(launch: Launch, on_text, tmp_path, no_weights):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "ring").symlink_to("ring")
    (tmp_path / "conf" / "method").mkdir(parents=True)
    os.mkfifo(tmp_path / "conf" / "method" / "pipe.yaml")
    (tmp_path / "conf" / "method" / "ring.yaml").symlink_to("ring.yaml")
    for name in ("pipe", "ring"):
        assert str(tmp_path / name) in launch("--config-dir", str(tmp_path / name)).error
        assert f"method={name}" in launch("--config-dir", str(tmp_path / "conf"), f"method={name}").error
        for multirun in ([], ["-m"]):
            error = launch(*multirun, *on_text, f"results_dir={tmp_path / name}").error
            assert str(tmp_path / name) in error and "results_dir=FOLDER" in error
        rest = [option for option in on_text if not option.startswith("model.path")]
        assert f"model.path={tmp_path / name}" in launch(*rest, f"model.path={tmp_path / name}").error
