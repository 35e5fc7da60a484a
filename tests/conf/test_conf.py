"""conf/ holds every value, once: each option composes, has its class, and gives each of its fields a value."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import LAUNCH, ROOT, Launch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.experiment.config import PARTS, number_fractions, to_dict, to_job

CONF = ROOT / "conf"
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
OPTIONS = [str(file.with_suffix("")) for file in FILES if len(file.parts) == 2 and file.parts[0] in PARTS]


@pytest.fixture(scope="module", autouse=True)
def conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", number_fractions(list(overrides)))


def class_of(options: Any) -> type:
    module, _, name = options["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_there_are_options_to_test():
    assert {option.split("/")[0] for option in OPTIONS} == set(PARTS) - {"statistics", "eval"}
    assert len(OPTIONS) >= 25


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_opens_with_a_comment_that_says_what_it_is(file):
    lines = (CONF / file).read_text().splitlines()
    first = lines[lines[0].startswith("# @package")]
    assert first.startswith("# ") and len(first) > 10


@pytest.mark.parametrize("part", ["statistics", "eval"])
def test_the_other_parts_fill_each_field_of_their_class(part):
    options = composed()[part]
    assert {field.name for field in dataclasses.fields(class_of(options))} == set(options) - {"_target_"}


LATER = {"adapter": None, "within": None, "layers": "all"}  # options that configs of earlier versions lack


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_fills_each_field_of_its_class_and_no_value_is_kept_in_python(option):
    group, name = option.split("/")
    options = composed(f"{group}={name}")[group]
    fields = dataclasses.fields(class_of(options))
    assert {field.name for field in fields} == set(options) - {"_target_"}
    for field in fields:
        if field.name in LATER:
            default = field.default.default if hasattr(field.default, "default") else field.default
            assert default in (dataclasses.MISSING, LATER[field.name]), field.name
            assert options[field.name] == LATER[field.name], field.name
            continue
        assert field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING, field.name


@pytest.mark.parametrize("option", [option for option in OPTIONS if not option.startswith("model/")])
def test_an_option_is_built(option):
    group, name = option.split("/")
    source = [f"{group}.name=some/set"] if name.startswith("hub_") else []
    source += ["selection.units=[[0,1]]"] if name == "listed" else []
    job = to_job(composed(f"{group}={name}", *source))
    assert type(getattr(job, group)) is class_of(job.config[group])


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith("model/")])
def test_a_model_is_built_once_it_has_a_source(option, tmp_path):
    job = to_job(composed(option.replace("/", "="), f"model.path={tmp_path}"))
    assert job.model.path == str(tmp_path)


def test_a_missing_value_is_refused():
    config = composed()
    config.method.n_bins = "???"
    with pytest.raises(UserError, match=r"method\.n_bins"):
        to_dict(config)


def test_a_yaml_that_forgets_a_field_is_refused():
    config = composed("~method.n_bins")
    with pytest.raises(UserError, match=r"method\.n_bins: has no value"):
        to_job(config)


@pytest.mark.parametrize(
    ("typed", "given"),
    {
        "fraction=0.3": ["fraction.values=[0.3]"],
        "fraction=0.1,0.5": ["fraction.values=[0.1],[0.5]"],
        "fraction=[0.1,0.5]": ["fraction.values=[0.1,0.5]"],
        "fraction=1": ["fraction.values=[1]"],
        "fraction=.5,1e-1": ["fraction.values=[.5],[1e-1]"],
        "fraction=half": ["fraction=half"],
        "fraction=half,tenths": ["fraction=half,tenths"],
        "fraction.values=[0.2]": ["fraction.values=[0.2]"],
        "seed=0.5": ["seed=0.5"],
    }.items(),
)
def test_numbers_are_taken_for_a_fraction(typed, given):
    assert number_fractions([typed]) == given


@pytest.mark.parametrize("typed", ["fraction=0.3", "fraction=[0.1,0.5]", "fraction=tenths"])
def test_a_schedule_is_what_was_typed(typed):
    expected = {"fraction=0.3": (0.3,), "fraction=[0.1,0.5]": (0.1, 0.5)}
    tenths = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert to_job(composed(typed)).fraction.values == expected.get(typed, tenths)


def test_labels_tell_variants_apart():
    assert composed("method=peak").method.label == "peak"
    assert composed("method=peak", "method.estimator=kde").method.label == "peak-kde"
    assert composed("method=resample", "method.source=random_tokens").method.label == "resample-random_tokens"
    assert composed("model=causal_lm", "model.name=who/what-1b").model.label == "what-1b"
    version = ".".join(map(str, sys.version_info[:2]))
    for dataset in ("python_docs", "python_code"):
        assert composed(f"dataset={dataset}").dataset.label == f"{dataset}-{version}"


@pytest.mark.parametrize(
    "path, label",
    [("m/Llama-3.2-8B", "Llama-3.2-8B"), ("m/Llama-3.2-8B/", "Llama-3.2-8B"), ("m/x/../Qwen2.5-0.5B", "Qwen2.5-0.5B"),
     ("data/wiki.v2.txt", "wiki.v2"), ("data/c4.parquet", "c4"),
     ("data/*.txt", "data"), ("data/*/a[bc]*.jsonl", "data")],
)  # fmt: skip
def test_a_label_is_the_whole_name_of_a_folder(path, label):
    assert composed("model=causal_lm", f"model.path='{path}'").model.label == label
    assert composed("dataset=text_files", f"dataset.path='{path}'").dataset.label == label


def test_cfg_job_prints_the_composed_options(launch: Launch):
    outcome = launch("--cfg", "job", "method=median", "fraction=0.1")
    assert outcome.code == 0 and outcome.err == ""
    options = yaml.safe_load(outcome.out)
    assert options["method"]["_target_"].endswith("Median")
    assert options["fraction"]["values"] == [0.1]
    assert "hydra" not in options


def run_and_say_what_is_heavy(folder: Path, *arguments: str) -> str:
    script = (
        f"import runpy, sys; sys.argv[:] = {[str(LAUNCH), *arguments]!r}; sys.path[0] = {str(ROOT)!r}\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('HEAVY', sorted({'torch', 'transformers', 'timm', 'pandas', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_comes_at_once(tmp_path: Path):
    """Without what takes seconds to import, whatever is chosen."""
    said = run_and_say_what_is_heavy(
        tmp_path, "-m", "dry_run=true", "method=zero,mean,median,peak,resample,resample_random", "statistics.passes=1,2"
    )
    assert "12 jobs" in said and "HEAVY []" in said
    said = run_and_say_what_is_heavy(tmp_path, "-m", "dry_run=true", "model=tiny_vit", "dataset=digits")
    assert "1 job" in said and "torch" not in said.split("HEAVY")[1]  # but pandas, which scikit-learn brings along


def test_help_is_worth_reading_and_comes_at_once(tmp_path: Path):
    said = run_and_say_what_is_heavy(tmp_path, "--help")
    assert "HEAVY []" in said
    assert said.count("\n  python launch.py ") >= 3
    for group in set(PARTS) - {"statistics", "eval"}:
        names = sorted(option.split("/")[1] for option in OPTIONS if option.startswith(f"{group}/"))
        assert f"{group}: {', '.join(names)}\n" in said
    for option in ("seed: 0", "batch_tokens:", "n_bins: 100", "HYDRA_FULL_ERROR=1"):
        assert option in said
    assert list(tmp_path.iterdir()) == []
