"""Signatures, files that are whole or not there, and jobs that go on where they stopped."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from socket import gethostname

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from ablation_sweeps.base import files, hashing
from ablation_sweeps.cli.commands import app
from ablation_sweeps.experiment import identity
from ablation_sweeps.experiment import run as run_module
from ablation_sweeps.experiment.job import Job
from ablation_sweeps.experiment.run import measure, run_job
from ablation_sweeps.experiment.session import Session
from ablation_sweeps.neurons import tensor_cache
from ablation_sweeps.report import write
from ablation_sweeps.results import progress, run_folder, run_status


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(14):
        (folder / f"{i}.txt").write_text(f"Text number {i} says {'this and that ' * (i % 5)}and ends.")
    return folder


@pytest.fixture(scope="module")
def composed(job_of, saved, texts):
    """A job on a small model: eight batches or so, nothing tracked."""

    @functools.cache
    def job(*overrides: str) -> Job:
        options = [
            "model=causal_lm", f"model.path={saved('llama')}", "model.device=cpu", "dataset=text_files",
            f"dataset.path={texts}", "fraction.values=[0.5,1.0]", "batch_tokens=100", "statistics.tokens=200",
            "eval.skip=5", "tracking=none", *overrides,
        ]  # fmt: skip
        return job_of(*options)

    return job


@pytest.fixture
def make(composed, tmp_path):
    """The same with results of its own."""
    return lambda *overrides: dataclasses.replace(composed(*overrides), results_dir=tmp_path / "results")


# Signatures


def test_a_signature_is_that_of_the_content_not_of_its_order():
    assert hashing.signature({"a": 1, "b": [1.0, None]}) == hashing.signature({"b": [1.0, None], "a": 1})
    assert hashing.signature({"a": 1}) != hashing.signature({"a": 1.5})
    assert hashing.signature({"a": (1, 2)}) != hashing.signature({"a": (2, 1)})
    with pytest.raises(ValueError):
        hashing.signature(float("nan"))


@pytest.mark.parametrize(
    "override",
    ["seed=1", "batch_tokens=128", "fraction.values=[0.5]", "fraction.values=[0.25,1.0]", "statistics.tokens=100",
     "eval.tokens=100", "eval.top_k=5", "eval.skip=6", "site=mlp_pre_out", "method=mean", "method=resample",
     "method.n_bins=50", "method.estimator=kde", "method.bandwidth=0.2", "model.dtype=bfloat16",
     "model.attn_implementation=eager", "model.max_tokens=16", "model.trust_remote_code=true",
     "model.tokens=no_special", "model.pack=concatenate", "model.quantize=8bit", "statistics.documents=3",
     "eval.documents=3", "dataset.column=other", 
     "model.site_paths=['model.layers.0.self_attn.o_proj']", "dataset.calibration_share=0.5",
     "dataset.document_start='Text.*'"],
)  # fmt: skip
def test_what_can_change_the_numbers_changes_the_signature(composed, override):
    assert composed(override).signature != composed().signature


@pytest.mark.parametrize(
    "override",
    ["model.label=mine", "dataset.label=mine", "method.label=mine", "selection.label=mine", "model.device=auto",
     "model.device_map=auto", "model.use_safetensors=null", "model.revision=abc", "prefetch=true",
     "sweep=other", "results_dir=elsewhere", "tracking=wandb", "fraction.values=[1.0,0.5,0,0.5]"],
)  # fmt: skip
def test_what_cannot_change_the_numbers_does_not(composed, override):
    assert composed(override).signature == composed().signature


def test_a_folder_counts_by_its_content_not_by_its_place(make, saved, texts, tmp_path):
    models, documents = tmp_path / "models", tmp_path / "documents"
    shutil.copytree(saved("llama"), models)
    shutil.copytree(texts, documents)
    moved = make(f"model.path={models}", f"dataset.path={documents}")
    assert moved.signature == make().signature

    (documents / "0.txt").write_text((documents / "0.txt").read_text() + "More.")
    identity.content.cache_clear()  # as in a new process
    changed_text = make(f"model.path={models}", f"dataset.path={documents}").signature
    assert changed_text != make().signature
    weights = bytearray((models / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (models / "model.safetensors").write_bytes(weights)
    identity.content.cache_clear()
    assert make(f"model.path={models}").signature != make().signature


def test_study_is_shared_by_jobs_that_may_be_compared(make):
    study = hashing.signature(make().study_key)
    assert hashing.signature(make("method=zero", "seed=3", "fraction=tenths").study_key) == study
    assert hashing.signature(make("eval.tokens=50").study_key) != study


def test_folders_of_different_jobs_differ_and_have_readable_names(make):
    folders = {make(o).folder for o in ("seed=0", "seed=1", "method=mean", "method.n_bins=7", "model.label=a/b")}
    assert len(folders) == 5
    assert all(folder.parent == make().folder.parent for folder in folders)
    assert "-mean-s4-" in make("method=mean", "seed=4").folder.name
    assert "a--b" in make("model.label=a/b").folder.name


# Files


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with pytest.raises(KeyError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert list(path.parent.iterdir()) == []
    files.write_text(path, "whole")
    with pytest.raises(KeyError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_the_file_is_not_there_until_it_is_whole(tmp_path):
    path = tmp_path / "table.parquet"
    with files.replacing(path) as temporary:
        temporary.write_text("x")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "x"


def test_what_a_killed_writer_left_is_removed_and_what_another_one_writes_is_not(tmp_path):
    def name_of(pid: int) -> Path:
        (name,) = tmp_path.glob(f".*.{pid}.*.tmp")
        return name

    killed = subprocess.Popen([sys.executable, "-c", WRITES_ON, str(tmp_path / "table")], stdout=subprocess.PIPE)
    writes = subprocess.Popen([sys.executable, "-c", WRITES_ON, str(tmp_path / "other")], stdout=subprocess.PIPE)
    try:
        for process in (killed, writes):
            assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        killed.kill()
        killed.wait()
        left, elsewhere, theirs = (
            name_of(killed.pid),
            tmp_path / ".table.0a1b2c3d.1.00ff00ff.tmp",
            tmp_path / ".own.tmp",
        )
        elsewhere.touch()
        theirs.touch()
        files._remove_left_over.cache_clear()
        files.write_text(tmp_path / "text", "x")
        assert not left.exists()
        assert name_of(writes.pid).exists() and elsewhere.exists() and theirs.exists()
        os.utime(elsewhere, (0, 0))  # of another host, and long ago
        files._remove_left_over.cache_clear()
        files.write_text(tmp_path / "text", "y")
        assert not elsewhere.exists() and theirs.exists()
    finally:
        writes.kill()
        writes.wait()


WRITES_ON = """
import sys, time
from pathlib import Path
from ablation_sweeps.base import files
with files.replacing(Path(sys.argv[1])):
    print("begun", flush=True)
    time.sleep(300)
"""


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int32), "c": torch.tensor([0.1]).double()}
    tensor_cache.save_tensors(tmp_path / "t.safetensors", tensors)
    found = tensor_cache.load_tensors(tmp_path / "t.safetensors")
    assert found is not None and set(found) == set(tensors)
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    assert tensor_cache.load_tensors(tmp_path / "none.safetensors") is None


@pytest.mark.parametrize("place", ["other/t.safetensors", "one/u.safetensors"])
def test_tensors_of_another_place_are_not_taken(tmp_path, caplog, place):
    """Statistics of other data, copied over those of a job, are whole and yet wrong."""
    tensor_cache.save_tensors(tmp_path / place, {"a": torch.zeros(3)})
    (tmp_path / "one").mkdir(exist_ok=True)
    shutil.copyfile(tmp_path / place, tmp_path / "one" / "t.safetensors")
    assert tensor_cache.load_tensors(tmp_path / "one" / "t.safetensors") is None
    assert "t.safetensors is damaged" in caplog.text


@pytest.mark.parametrize("content", [b"", b"PAR1 but no more", None])
def test_a_damaged_table_is_none_with_a_warning(tmp_path, caplog, content):
    path = tmp_path / "rows.parquet"
    sha256 = files.write_table(path, pd.DataFrame({"a": range(1000)}))
    assert files.read_table(path, sha256) is not None
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with caplog.at_level(logging.WARNING):
        assert files.read_table(path, sha256) is None
    assert "rows.parquet" in caplog.text
    assert files.read_table(tmp_path / "none.parquet", sha256) is None


def test_modes_are_those_of_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "text", "x")
        files.write_table(tmp_path / "table", table(0))
        tensor_cache.save_tensors(tmp_path / "tensors", {"a": torch.zeros(2)})
        with files.locked(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {"text": 0o640, "table": 0o640, "tensors": 0o640, ".lock": 0o640}


NOT_A_STATUS = [
    "", "{", '{"state": ', "[]", "null", "1", "{}", '{"state": 1}', '{"state": "mended"}', '{"state": "damaged"}',
    '{"state": "running", "host": "HOST"}', '{"state": "running", "pid": 1}',
    '{"state": "running", "host": "HOST", "pid": "1"}', '{"state": "queued", "host": "HOST", "pid": 1, "time": 5}',
    '{"state": "running", "host": "HOST", "pid": 1, "started": "2026-01-01"}', '{"state": "finished", "sha256": []}',
    '{"state": "finished"}', '{"state": "finished", "sha256": {"status.json": "0"}}',
    '{"state": "running", "batches": "9"}',
]  # fmt: skip


@pytest.mark.parametrize("content", NOT_A_STATUS)
def test_a_status_that_cannot_be_true_is_damaged(tmp_path, content):
    """Truncated, of another type, or with a key missing: the run is shown as damaged, and is run again."""
    run = tmp_path / "sweep" / "run"
    run.mkdir(parents=True)
    (run / "status.json").write_text(content.replace("HOST", gethostname()))
    assert not run_folder.finished(run)
    shown = CliRunner().invoke(app, ["status", str(run.parent)])
    assert "1 damaged" in shown.output and "status.json is damaged" in shown.output
    run_folder.queue(run, {}, survives_launcher=False)
    assert run_status.read(run).state == "queued"


@pytest.mark.parametrize("content", ["", "[]", '{"notes": 5}', '{"notes": ["a"], "seconds": "5"}', '{"packages": 1}'])
def test_a_damaged_environment_of_an_unfinished_run_is_written_again(tmp_path, content):
    run_folder.begin(tmp_path, {})
    (tmp_path / "environment.json").write_text(content)
    run_folder.add_warning(tmp_path, "less memory")
    run_folder.begin(tmp_path, {})
    assert run_folder.environment(tmp_path).get("notes") == ["less memory"]


def table(i: int) -> pd.DataFrame:
    return pd.DataFrame({"i": [i]})


def test_progress_is_read_up_to_the_first_damage(tmp_path):
    for i in range(4):
        progress.save(tmp_path, i, table(i))
    assert [int(t["i"][0]) for t in progress.load(tmp_path)] == [0, 1, 2, 3]
    (damaged,) = tmp_path.glob("progress-000002-*")
    damaged.write_bytes(b"half")
    assert [int(t["i"][0]) for t in progress.load(tmp_path)] == [0, 1]
    assert len(list(tmp_path.glob("progress-*"))) == 2
    progress.save(tmp_path, 2, table(7))
    assert [int(t["i"][0]) for t in progress.load(tmp_path)] == [0, 1, 7]


def test_progress_of_another_batch_or_run_is_not_taken(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for i in range(3):
        progress.save(one, i, table(i))
        progress.save(other, i, table(10 + i))
    shutil.copyfile(*(next(folder.glob("progress-000001-*")) for folder in (other, one)))
    assert [int(t["i"][0]) for t in progress.load(one)] == [0]
    progress.save(one, 1, table(1))
    next(one.glob("progress-000001-*")).unlink()
    taken = next(other.glob("progress-000001-*"))  # under the name that it has there
    shutil.copyfile(taken, one / taken.name)
    assert [int(t["i"][0]) for t in progress.load(one)] == [0]
    last = next(other.glob("progress-000002-*"))
    last.rename(last.with_name(last.name.replace("000002", "000001")))
    taken.unlink()
    assert [int(t["i"][0]) for t in progress.load(other)] == [10]


def test_progress_of_other_documents_is_not_taken(tmp_path):
    """As that of an earlier version, which read the same data in other batches."""
    run_folder.begin(tmp_path, {})
    batches = [["a", "b"], ["c", "d"], ["e"]]
    for i, names in enumerate(batches):
        rows = [{"fraction": fraction, "name": name} for fraction in (0.0, 0.5) for name in names]
        progress.save(tmp_path, i, pd.DataFrame(rows))
    assert len(progress.load(tmp_path, [*batches, ["f"]])) == 3 and "notes" not in run_folder.environment(tmp_path)
    assert len(progress.load(tmp_path, batches[:2])) == 2  # there are fewer now
    warn = lambda text: run_folder.add_warning(tmp_path, text)  # noqa: E731
    assert len(progress.load(tmp_path, [["a", "b"], ["d", "c"], ["e"]], warn)) == progress.batches_done(tmp_path) == 1
    assert "batches from the 2. on were of other documents" in run_folder.environment(tmp_path)["notes"][-1]


def test_progress_with_a_gap_stops_at_the_gap(tmp_path):
    for i in range(4):
        progress.save(tmp_path, i, table(i))
    next(tmp_path.glob("progress-000001-*")).unlink()
    assert [int(t["i"][0]) for t in progress.load(tmp_path)] == [0]


# Jobs


def rows_of(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "rows.parquet")


def state(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def alter(file: Path) -> None:
    """Another content of the same length; of text, one that still reads: another seed, another number of seconds."""
    content = file.read_bytes()
    digits = [place for place, byte in enumerate(content) if chr(byte).isdigit() and file.suffix != ".parquet"]
    place = digits[-1] if digits else len(content) // 2
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.fixture
def measured(monkeypatch) -> list[Job]:
    """The jobs that were computed."""
    jobs: list[Job] = []
    real = measure
    monkeypatch.setattr(run_module, "measure", lambda job, *more: jobs.append(job) or real(job, *more))
    return jobs


def test_a_finished_job_is_computed_again_where_any_of_its_files_is_damaged(make, measured, caplog):
    job = make("method=zero")
    folder = run_job(job)
    first = rows_of(folder)
    run_job(job)
    assert len(measured) == 1
    names = ("config.yaml", "environment.json", "status.json", "rows.parquet", "documents.parquet")
    for n, name in enumerate(names, start=2):
        whole = (folder / name).read_bytes()
        for damage in (Path.unlink, truncate, empty, alter):
            (folder / name).write_bytes(whole)
            damage(folder / name)
            found = run_folder.current_status(folder)
            assert found.state == "damaged" and (found.reason or "").startswith(f"{name} is"), damage
            assert run_folder.result(folder, "rows.parquet") is None
        caplog.clear()
        run_job(job)
        assert len(measured) == n and f"{name} is" in caplog.text
        assert run_folder.finished(folder) and run_folder.current_status(folder).is_finished
    pd.testing.assert_frame_equal(rows_of(folder), first, check_exact=True)


def test_results_of_another_run_are_not_taken_for_its_own(make, measured):
    other, job = run_job(make("method=zero")), make("method=mean")
    shutil.copytree(other, job.folder)
    assert "status.json is that of another run" in (run_folder.current_status(job.folder).reason or "")
    assert set(rows_of(run_job(job))["method"]) == {"mean"} and len(measured) == 2


def test_a_run_of_an_earlier_version_stays_valid(make, measured):
    """It kept the sums of its tables alone: its other files must be readable, and fit the folder's name."""
    job = make("method=zero")
    folder = run_job(job)
    status = state(folder)
    sums = {name: status["sha256"][name] for name in ("documents.parquet", "rows.parquet")}
    files.write_json(folder / "status.json", {"state": "finished", "time": status["time"], "sha256": sums})
    run_job(job)
    assert len(measured) == 1 and run_folder.result(folder, "rows.parquet") is not None
    config = (folder / "config.yaml").read_text()
    for text in ("", config.replace("seed: 0", "seed: 1"), config.replace("method:", "way:"), config[:300], "- a"):
        (folder / "config.yaml").write_text(text)
        assert (run_folder.current_status(folder).reason or "").startswith("config.yaml is")
    (folder / "config.yaml").write_text(config)
    (folder / "environment.json").write_text("{")
    assert (run_folder.current_status(folder).reason or "").startswith("environment.json is")
    run_job(job)
    assert len(measured) == 2 and "environment.json" in state(folder)["sha256"]


def test_what_was_continued_in_another_environment_says_so(tmp_path, monkeypatch):
    run_folder.begin(tmp_path, {})
    progress.save(tmp_path, 0, table(0))
    run_folder.begin(tmp_path, {})
    assert "notes" not in json.loads((tmp_path / "environment.json").read_text())
    real = run_folder.describe()
    monkeypatch.setattr(run_folder, "describe", lambda: {**real, "device": "another GPU"})
    run_folder.begin(tmp_path, {})
    (said,) = json.loads((tmp_path / "environment.json").read_text())["notes"]
    assert said.startswith("begun elsewhere (1 batch): ") and real["device"] in said


def test_what_is_left_out_of_the_model_and_of_the_data_is_kept_and_shown(make, texts, monkeypatch, tmp_path, capsys):
    shutil.copytree(texts, tmp_path / "copies")
    shutil.copy(texts / "3.txt", tmp_path / "copies" / "again.txt")
    weights, session = "model.path=llama: 2 of its weights are left out", Session()
    job = make("method=zero", f"dataset.path={tmp_path / 'copies'}")
    session._model = dataclasses.replace(session.model(job), left_out=(weights,))
    folder = run_job(job, session)
    found = json.loads((folder / "environment.json").read_text())
    (copies,) = found["data_left_out"].items()
    assert found["model_left_out"] == [weights] and copies[1][0].startswith("1 ")
    write.write(folder.parent)
    printed, page = capsys.readouterr().out, (folder.parent / "report.html").read_text()
    for said in (weights, f"of the {copies[0]} split, {copies[1][0]}"):
        assert f"zero: {said}" in printed and said in run_folder.left_out(folder) and said in page
    for earlier, said in (["weights"], "weights"), ({"evaluation": ["copies"]}, "of the evaluation split, copies"):
        files.write_json(folder / "environment.json", {"left_out": earlier})
        assert run_folder.left_out(folder) == [said]


def test_rows_carry_what_tells_runs_apart(make):
    job = make("method=mean")
    rows = rows_of(run_job(job))
    assert set(rows["run_id"]) == {job.signature[:16]}
    assert rows["n_neurons"].unique().tolist() == [3 * 32]
    assert rows.groupby("fraction")["n_ablated"].first().to_dict() == {0.0: 0, 0.5: 48, 1.0: 96}
    assert set(rows["method"]) == {"mean"} and set(rows["seed"]) == {0}
