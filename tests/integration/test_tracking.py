"""Real W&B, in a process of its own for each test: offline files are read back, online mode talks to a local server."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
FRACTIONS = (0.0, 0.5, 1.0)
CURVES = {"loss": (3.0, 4.0, 9.0), "top1": (0.5, 0.25, 0.0), "kl": (0.0, 1.0, 6.0)}
CONFIG = {"model": {"path": "a/b", "layers": [1, 2]}, "batch_size": 8, "dtype": None}
LOG_ONE_RUN = """
import json, logging, sys
from pathlib import Path
from ablation_sweeps import tracking
from ablation_sweeps.tracking import RunRecord, Wandb

logging.basicConfig(format="%(levelname)s %(name)s %(message)s", level=logging.INFO)
tracking.INIT_SECONDS = 8
folder, mode, rows, config, times = json.loads(sys.argv[1])
for turn in range(times):
    run = RunRecord(f"id{turn}", "my-sweep", "opt", "pile", "attn_pre_out", "peak", 7, config, rows, Path(folder))
    Wandb(project="proj", entity=None, mode=mode, tags=("mine",), sync=False).log_run(run)
print("the job goes on")
"""


def rows(fractions: tuple[float, ...] = FRACTIONS) -> list[dict]:
    """In falling order, and with a standard error that is unknown."""
    table = []
    for metric, values in CURVES.items():
        for fraction, value in list(zip(FRACTIONS, values, strict=True))[::-1]:
            if fraction in fractions:
                stderr = float("nan") if metric == "kl" else 0.125
                table.append({"fraction": fraction, "metric": metric, "value": value, "stderr": stderr})
    return table


def expected_history(fractions: tuple[float, ...] = FRACTIONS) -> list[dict]:
    history = []
    for i, fraction in enumerate(FRACTIONS):
        if fraction in fractions:
            point = {"fraction": fraction, "eval/loss_stderr": 0.125, "eval/top1_stderr": 0.125}
            history.append({**point, **{f"eval/{metric}": values[i] for metric, values in CURVES.items()}})
    return history


EXPECTED_SUMMARY = {
    **{"clean/loss": 3.0, "clean/top1": 0.5, "clean/kl": 0.0},
    **{"at_50/loss": 4.0, "at_50/top1": 0.25, "at_50/kl": 1.0},
    **{"auc/loss": 5.0 / 3.0, "auc/top1": 0.5, "auc/kl": 2.0},
}


def own(values: dict) -> dict:
    """Without what W&B adds."""
    return {key: value for key, value in values.items() if not key.startswith("_")}


class Server:
    """As much of W&B's protocol as a run speaks; it keeps every request."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[tuple[str, dict]] = []
        self.talks_nonsense = False
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                outer.requests.append((self.command, self.path))
                reply: dict = {}
                if self.command == "POST":
                    content = json.loads(body)
                    outer.bodies.append((self.path, content))
                    reply = outer.graphql(content) if self.path == "/graphql" else {}
                data = json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_CONNECT = answer

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def graphql(self, content: dict) -> dict:
        variables = content.get("variables") or {}
        if self.talks_nonsense:
            return {"data": {}}
        if "upsertBucket" in content["query"]:
            project = {"id": "p", "name": "proj", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables["name"], "displayName": "d", "description": None, "config": None}
            bucket |= {"sweepName": None, "project": project, "historyLineCount": 0}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in content["query"]:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def variables(self, operation: str) -> list[dict]:
        return [body["variables"] for path, body in self.bodies if path == "/graphql" and operation in body["query"]]

    def streamed(self, file: str) -> list[dict]:
        """Lines of a file of the run, in the order in which they came."""
        streams = [body["files"][file] for _, body in self.bodies if file in body.get("files", {})]
        return [json.loads(line) for stream in streams for line in stream["content"]]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def log_run(
    folder: Path, mode: str, extra: dict[str, str] | None = None, *, times: int = 1, table: list[dict] | None = None
) -> str:
    """Logs in a fresh process whose home is empty; W&B knows no key but one in `extra`. Returns what it said."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC"))}
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    env = {**clean, "HOME": str(home), "PYTHONPATH": str(ROOT), **(extra or {})}
    argument = json.dumps([str(folder), mode, rows() if table is None else table, CONFIG, times])
    command = [sys.executable, "-c", LOG_ONE_RUN, argument]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the job goes on\n"
    return done.stderr


def key_for(url: str) -> dict[str, str]:
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "local-" + "a" * 40}


def offline_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def read_back(path: Path, *options: str) -> str:
    """`finish` may return before the file is complete, so wait for its last record."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(path)]
    for _ in range(50):
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        if "exit_code" in text:
            return text
        time.sleep(0.2)
    raise AssertionError(f"{path} has no last record")


def history_of(path: Path) -> list[dict]:
    records = [json.loads(line) for line in read_back(path).splitlines()]
    return [own(record["history"]["item"]) for record in records if record["type"] == "history"]


def test_offline_run_holds_the_whole_curve_and_calls_nobody(tmp_path: Path, server: Server):
    proxies = {"HTTP_PROXY": server.url, "HTTPS_PROXY": server.url, "http_proxy": server.url, "https_proxy": server.url}
    stderr = log_run(tmp_path / "sweep", "offline", key_for(server.url) | proxies)
    assert stderr == "", "a user who asked for offline needs no line, and W&B's own chatter is silenced"
    assert server.requests == []

    (path,) = offline_files(tmp_path / "sweep")
    assert history_of(path) == expected_history()

    run = json.loads(read_back(path, "--summary"))
    assert own(run["summary"]) == pytest.approx(EXPECTED_SUMMARY)
    assert (run["run_id"], run["project"], run["name"]) == ("id0", "proj", "opt-attn_pre_out-peak-s7")
    assert run["state"] == "finished"
    assert sorted(run["tags"]) == sorted(["opt", "peak", "attn_pre_out", "mine"])
    labels = {"sweep": "my-sweep", "dataset": "pile", "site": "attn_pre_out", "method": "peak", "seed": 7}
    settings = {"model.path": "a/b", "model.layers": "1,2", "batch_size": 8, "dtype": None, "model": "opt"}
    assert own(run["config"]) == labels | settings

    records = [json.loads(line) for line in read_back(path).splitlines()]
    started = next(record["run"] for record in records if record["type"] == "run")
    assert (started["run_group"], started["job_type"]) == ("my-sweep", "ablation")
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert any(metric.get("name") == "fraction" and metric["options"]["hidden"] for metric in metrics)
    assert any(metric.get("glob_name") == "eval/*" and metric["step_metric"] == "fraction" for metric in metrics)


def test_half_a_schedule_has_no_area(tmp_path: Path):
    log_run(tmp_path / "sweep", "offline", table=rows((0.0, 0.5)))
    (path,) = offline_files(tmp_path / "sweep")
    assert history_of(path) == expected_history((0.0, 0.5))
    known = {key: value for key, value in EXPECTED_SUMMARY.items() if not key.startswith("auc")}
    assert own(json.loads(read_back(path, "--summary"))["summary"]) == pytest.approx(known)


def test_a_retried_job_leaves_one_file(tmp_path: Path):
    for _ in range(2):  # `wandb sync` would append the second file's points to the first one's
        log_run(tmp_path / "sweep", "offline")
    assert len(offline_files(tmp_path / "sweep")) == 1


def test_auto_without_a_key_is_offline_and_says_so_once(tmp_path: Path):
    stderr = log_run(tmp_path / "sweep", "auto", times=2)
    assert len(offline_files(tmp_path / "sweep")) == 2
    (line,) = stderr.splitlines()
    assert line.startswith("WARNING ablation_sweeps.tracking")
    assert "no API key" in line and "wandb sync" in line and str(tmp_path / "sweep") in line


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_online_run_arrives(tmp_path: Path, server: Server, mode: str):
    stderr = log_run(tmp_path / "sweep", mode, key_for(server.url))
    assert stderr == ""
    assert [own(line) for line in server.streamed("wandb-history.jsonl")] == expected_history()
    assert own(server.streamed("wandb-summary.json")[-1]) == pytest.approx(EXPECTED_SUMMARY)

    first = server.variables("upsertBucket")[0]
    assert (first["name"], first["project"]) == ("id0", "proj")
    assert (first["groupName"], first["jobType"]) == ("my-sweep", "ablation")
    assert first["displayName"] == "opt-attn_pre_out-peak-s7"
    assert sorted(first["tags"]) == sorted(["opt", "peak", "attn_pre_out", "mine"])
    config = {key: entry["value"] for key, entry in json.loads(first["config"]).items()}
    assert config["method"] == "peak" and config["model.layers"] == "1,2"
    assert offline_files(tmp_path / "sweep") == []


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_environment_wins(tmp_path: Path, server: Server, mode: str):
    log_run(tmp_path / "sweep", "online", {"WANDB_MODE": mode, **key_for(server.url)})
    assert server.requests == []
    assert len(offline_files(tmp_path / "sweep")) == (1 if mode == "offline" else 0)


def test_an_unreachable_server_costs_no_curve(tmp_path: Path):
    stderr = log_run(tmp_path / "sweep", "auto", key_for("http://127.0.0.1:9"), times=2)
    (line,) = stderr.splitlines()  # one: the second run does not wait for the server again
    assert "WARNING" in line and "connection refused" in line and "wandb sync" in line
    paths = offline_files(tmp_path / "sweep")
    assert [history_of(path) for path in paths] == [expected_history()] * 2
    assert list((tmp_path / "sweep" / "wandb").glob("run-*")) == [], "no half of a run beside the whole one"


def test_a_bad_key_costs_no_curve(tmp_path: Path):
    stderr = log_run(tmp_path / "sweep", "auto", {"WANDB_API_KEY": "too-short"})
    assert "WARNING" in stderr and len(stderr.splitlines()) == 1
    (path,) = offline_files(tmp_path / "sweep")
    assert history_of(path) == expected_history()


def test_a_server_that_talks_nonsense_costs_no_curve(tmp_path: Path, server: Server):
    server.talks_nonsense = True  # W&B 0.31's service process dies of it, and `wandb.teardown` raises
    stderr = log_run(tmp_path / "sweep", "auto", key_for(server.url))
    assert "logging offline" in stderr
    (path,) = offline_files(tmp_path / "sweep")
    assert history_of(path) == expected_history()


# python -m ablation_sweeps wandb


def in_a_sweep(launch_options: tuple[str, ...], folder: Path, env: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "launch.py"), *launch_options]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def publish(folder: Path, env: dict[str, str], *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ablation_sweeps", "wandb", "results/default", *options]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "home").mkdir()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC"))}
    return {**clean, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}


def test_a_sweep_is_sent_from_its_files_once(on_text, tmp_path: Path, environment, server: Server):
    """One run was tracked nowhere, one offline; the second sending stops after the first run, as when it is killed."""
    options = tuple(option for option in on_text if not option.startswith("tracking"))
    in_a_sweep((*options, "method=zero", "tracking=none"), tmp_path, environment)
    in_a_sweep((*options, "method=mean", "tracking.mode=offline", "tracking.tags=[mine]"), tmp_path, environment)
    sweep = tmp_path / "results" / "default"
    assert len(offline_files(sweep)) == 1

    refused = publish(tmp_path, environment)
    assert refused.returncode == 1 and "no API key found" in refused.stderr and "WANDB_API_KEY" in refused.stderr
    unreachable = publish(tmp_path, environment | key_for("http://127.0.0.1:9"))
    assert unreachable.returncode == 1 and "0 of 2 runs were sent, the same command goes on" in unreachable.stderr
    assert len(offline_files(sweep)) == 1

    online = environment | key_for(server.url)
    sent = publish(tmp_path, online, "--project", "elsewhere")
    assert sent.returncode == 0 and sent.stdout == "2 runs sent\n", sent.stderr
    started = server.variables("upsertBucket")
    ids = {variables["name"] for variables in started}
    first = {variables["name"]: variables["project"] for variables in reversed(started)}
    assert set(first.values()) == {"elsewhere"}  # later ones go to what the server calls it
    rows = [pd.read_parquet(path) for path in sweep.glob("*/rows.parquet")]
    assert ids == {table["run_id"].iloc[0] for table in rows} and len(ids) == 2
    assert [tuple(sorted(variables["tags"])) for variables in started if "mine" in (variables["tags"] or ())] == [
        ("attn_pre_out", "mean", "mine", "tiny")
    ]
    history = [own(line) for line in server.streamed("wandb-history.jsonl")]
    losses = sorted(row["value"] for table in rows for row in table.to_dict("records") if row["metric"] == "loss")
    assert sorted(point["eval/loss"] for point in history) == pytest.approx(losses)
    assert offline_files(sweep) == []  # or `wandb sync` would send it a second time

    before = len(server.requests)
    assert publish(tmp_path, online).stdout == "0 runs sent\n" and len(server.requests) == before
    (next(sweep.glob("*-zero-*")) / "wandb.json").unlink()  # killed before it was written down
    assert publish(tmp_path, online).stdout == "1 run sent\n"
    assert publish(tmp_path, online, "--again").stdout == "2 runs sent\n"
    assert {variables["name"] for variables in server.variables("upsertBucket")} == ids


def test_what_was_sent_by_the_job_is_not_sent_again_and_sync_sends_the_rest(
    on_text, tmp_path: Path, environment, server: Server
):
    options = tuple(option for option in on_text if not option.startswith("tracking"))
    in_a_sweep((*options, "method=zero", "tracking=none"), tmp_path, environment)
    online = environment | key_for(server.url)
    in_a_sweep((*options, "method=mean", "tracking.sync=true"), tmp_path, online)
    assert len({variables["name"] for variables in server.variables("upsertBucket")}) == 2
    history = [own(line) for line in server.streamed("wandb-history.jsonl")]
    assert len(history) == 4  # two points each, once
    assert publish(tmp_path, online).stdout == "0 runs sent\n"


def test_what_failed_is_said_though_nothing_can_be_sent(on_text, tmp_path: Path, environment, broken: Path):
    options = tuple(option for option in on_text if not option.startswith(("tracking", "model.path")))
    paths = f"model.path={next(o for o in on_text if o.startswith('model.path')).partition('=')[2]},{broken}"
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *options, paths, "method=mean", "tracking.sync=true"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "tracking.sync: W&B: no API key found" in done.stderr
    assert "1 of 2 jobs failed, the others are finished and kept" in done.stderr.splitlines()[-1]
