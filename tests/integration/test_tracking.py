"""Real W&B, in a process of its own for each test: offline files are read back, online mode talks to a local server."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from command import LAUNCH, ROOT, Command, Launch, Outcome, run_python

from ablation_sweeps.base import hashing

FRACTIONS = (0.0, 0.5, 1.0)
CURVES = {"loss": (3.0, 4.0, 9.0), "top1": (0.5, 0.25, 0.0), "kl": (0.0, 1.0, 6.0)}
CONFIG = {"model": {"path": "a/b", "layers": [1, 2]}, "batch_size": 8, "dtype": None}
LOG_ONE_RUN = """
import json, logging, sys
from pathlib import Path
from ablation_sweeps.results.record import RunRecord
from ablation_sweeps.tracking import wandb as tracking
from ablation_sweeps.tracking.wandb import Wandb

logging.basicConfig(format="%(levelname)s %(name)s %(message)s", level=logging.INFO)
tracking.INIT_SECONDS = 8
folder, mode, rows, config, times = json.loads(sys.argv[1])
for turn in range(times):
    run = RunRecord(f"id{turn}", "my-sweep", "opt", "pile", "attn_pre_out", "peak", 7, "st", config, rows, Path(folder))
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
        self.uploads: dict[str, bytes] = {}
        self.views: dict[str, dict] = {}
        self.stalls_at: str | None = None  # in a GraphQL request: this is not answered
        self.stalled = threading.Event()
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
                if self.command == "PUT":
                    outer.uploads[self.path] = body
                if outer.stalls_at and outer.stalls_at.encode() in body:
                    outer.stalled.set()
                    return
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

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *args: object) -> None:
                """W&B ends its connections as it likes."""

        self._http = Quiet(("127.0.0.1", 0), Handler)
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
        if "viewer {" in content["query"]:
            viewer = {"id": "u", "entity": "me", "username": "me", "email": "me@here", "flags": "{}"}
            return {"data": {"viewer": viewer | {"teams": {"edges": []}}}}
        if "upsertView" in content["query"]:
            self.views[variables["name"]] = {**variables, "id": variables.get("id") or f"id-{len(self.views)}"}
            view = {"id": self.views[variables["name"]]["id"], "name": variables["name"]}
            return {"data": {"upsertView": {"view": view, "inserted": True}}}
        if "allViews" in content["query"]:
            view = self.views.get(variables["viewName"])
            edges = [{"node": view}] if view else []
            return {"data": {"project": {"allViews": {"edges": edges}}}}
        return {"data": self.artifacts(content["query"], variables)}

    def artifacts(self, query: str, variables: dict) -> dict:
        if "query ArtifactType" in query:
            return {"project": {"artifact": None}}
        if "mutation CreateArtifact " in query:
            name = variables["input"]["artifactCollectionName"]
            return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": None}}}
        if "createArtifactManifest" in query or "updateArtifactManifest" in query:
            operation = "createArtifactManifest" if "createArtifactManifest" in query else "updateArtifactManifest"
            name = variables.get("artifactID") or variables["artifactManifestID"]
            file = {"id": "f", "name": "f", "displayName": "f", "uploadUrl": f"{self.url}/manifest/{name}"}
            return {operation: {"artifactManifest": {"id": name, "file": file | {"uploadHeaders": []}}}}
        if "createArtifactFiles" in query:
            nodes = [
                {"id": file["name"], "name": file["name"], "displayName": file["name"], "storagePath": file["name"],
                 "uploadUrl": f"{self.url}/artifact/{file['artifactID']}/{file['name']}", "uploadHeaders": [],
                 "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}
                for file in variables["input"]["artifactFiles"]
            ]  # fmt: skip
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if "commitArtifact" in query:
            return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}
        return {}

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
    done = run_python("-c", LOG_ONE_RUN, argument, env=env, cwd=home)
    assert done.code == 0, done.err
    assert done.out == "the job goes on\n"
    return done.err


def key_for(url: str) -> dict[str, str]:
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "local-" + "a" * 40}


def offline_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def read_back(path: Path, *options: str) -> str:
    """`finish` may return before the file is complete, so wait for its last record."""
    from wandb.util import get_core_path

    # As `wandb leet inspect` does it, without importing wandb once more.
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *options]
    command += ["--run-file", str(path), str(path.parent)]
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
    labels["study"] = "st"
    settings = {"model.path": "a/b", "model.layers": "1,2", "batch_size": 8, "dtype": None, "model": "opt"}
    assert own(run["config"]) == labels | settings

    records = [json.loads(line) for line in read_back(path).splitlines()]
    started = next(record["run"] for record in records if record["type"] == "run")
    assert (started["run_group"], started["job_type"]) == ("my-sweep", "ablation")
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert any(metric.get("name") == "fraction" and metric["options"]["hidden"] for metric in metrics)
    assert any(metric.get("glob_name") == "eval/*" and metric["step_metric"] == "fraction" for metric in metrics)


def test_a_retried_job_leaves_one_file(tmp_path: Path):
    for _ in range(2):  # `wandb sync` would append the second file's points to the first one's
        log_run(tmp_path / "sweep", "offline")
    assert len(offline_files(tmp_path / "sweep")) == 1


def test_auto_without_a_key_is_offline_and_says_so_once(tmp_path: Path):
    stderr = log_run(tmp_path / "sweep", "auto", times=2)
    assert len(offline_files(tmp_path / "sweep")) == 2
    (line,) = stderr.splitlines()
    assert line.startswith("WARNING ablation_sweeps.tracking.wandb")
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


@pytest.mark.parametrize("variable", [{"WANDB_MODE": "offline"}, {"WANDB_DISABLED": "true"}], ids=str)
def test_the_environment_wins(tmp_path: Path, server: Server, variable: dict[str, str]):
    log_run(tmp_path / "sweep", "online", {**variable, **key_for(server.url)})
    assert server.requests == []
    assert len(offline_files(tmp_path / "sweep")) == (1 if variable == {"WANDB_MODE": "offline"} else 0)


def test_variables_of_wandb_count_where_no_option_says_otherwise(tmp_path: Path):
    there = tmp_path / "there"
    variables = {
        "WANDB_TAGS": "theirs, mine", "WANDB_RUN_GROUP": "their-group", "WANDB_JOB_TYPE": "their-type",
        "WANDB_NAME": "their name", "WANDB_NOTES": "their notes", "WANDB_DIR": str(there), "WANDB_PROJECT": "not this",
    }  # fmt: skip
    for _ in range(2):  # the second one replaces the first one there, too
        assert log_run(tmp_path / "sweep", "offline", variables) == ""
    assert not (tmp_path / "sweep" / "wandb").exists()
    (path,) = offline_files(there)
    started = next(r["run"] for line in read_back(path).splitlines() if (r := json.loads(line))["type"] == "run")
    assert (started["run_group"], started["job_type"]) == ("their-group", "their-type")
    assert (started["display_name"], started["notes"]) == ("their name", "their notes")
    assert (started["run_id"], started["project"]) == ("id0", "proj")  # an option wins
    assert sorted(started["tags"]) == sorted(["opt", "peak", "attn_pre_out", "mine", "theirs"])
    assert history_of(path) == expected_history()


def test_where_wandb_dir_cannot_be_written_that_is_said_and_no_curve_is_lost(tmp_path: Path):
    there = tmp_path / "there"
    there.touch()
    (line,) = log_run(tmp_path / "sweep", "offline", {"WANDB_DIR": str(there)}, times=2).splitlines()
    assert f"WANDB_DIR={there}: " in line and line.endswith(f"; runs go to {tmp_path / 'sweep'}/wandb")
    paths = offline_files(tmp_path / "sweep")
    assert [history_of(path) for path in paths] == [expected_history()] * 2


def test_where_nothing_can_be_logged_that_is_said_and_the_job_goes_on(tmp_path: Path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "wandb").touch()  # where its folder would be
    (line,) = log_run(tmp_path / "sweep", "offline").splitlines()
    assert line.startswith("ERROR") and "W&B: nothing logged for opt-" in line and "rows.parquet" in line


def test_one_run_id_does_not_merge_the_curves(tmp_path: Path):
    variables = {"WANDB_RUN_ID": "same", "WANDB_RESUME": "must"}
    (line,) = log_run(tmp_path / "sweep", "offline", variables, times=2).splitlines()
    assert "WANDB_RUN_ID=same names one run, and is ignored" in line
    paths = offline_files(tmp_path / "sweep")
    assert {path.stem for path in paths} == {"run-id0", "run-id1"}
    assert [history_of(path) for path in paths] == [expected_history()] * 2


@pytest.mark.parametrize("sweeps", [False, True], ids=["one curve", "a sweep"])
def test_the_run_of_wandb_agent_is_that_of_one_curve(
    on_text, tmp_path: Path, environment, server: Server, sweeps: bool
):
    """A curve that `wandb agent` has launched is the run that it waits for; two would be merged there."""
    options = tuple(option for option in on_text if not option.startswith("tracking"))
    agents = {"WANDB_SWEEP_ID": "sw33p", "WANDB_RUN_ID": "theirs", "WANDB_PROJECT": "theirs", "WANDB_ENTITY": "me"}
    command = ("-m", *options, "method=zero,mean") if sweeps else (*options, "method=mean")
    in_a_sweep(command, tmp_path, environment | key_for(server.url) | agents)
    started = {v["name"]: v for v in server.variables("upsertBucket") if v["jobType"]}
    curves = {name: v["sweep"] for name, v in started.items() if v["jobType"] == "ablation"}
    assert curves == {"theirs": "sw33p"} if not sweeps else len(curves) == 2 and set(curves.values()) == {None}
    (tables,) = (v for v in started.values() if v["jobType"] == "report")
    assert tables["name"] != "theirs" and tables["sweep"] is None
    assert {v["project"] for v in started.values()} == {"theirs"}


def test_an_unreachable_server_costs_no_curve(tmp_path: Path):
    stderr = log_run(tmp_path / "sweep", "auto", key_for("http://127.0.0.1:9"), times=2)
    (line,) = stderr.splitlines()  # one: the second run does not wait for the server again
    assert "WARNING" in line and "connection refused" in line and "wandb sync" in line
    paths = offline_files(tmp_path / "sweep")
    assert [history_of(path) for path in paths] == [expected_history()] * 2
    assert list((tmp_path / "sweep" / "wandb").glob("run-*")) == [], "no half of a run beside the whole one"


def test_a_server_that_talks_nonsense_costs_no_curve(tmp_path: Path, server: Server):
    server.talks_nonsense = True  # W&B 0.31's service process dies of it, and `wandb.teardown` raises
    stderr = log_run(tmp_path / "sweep", "auto", key_for(server.url))
    assert "logging offline" in stderr
    (path,) = offline_files(tmp_path / "sweep")
    assert history_of(path) == expected_history()


# python -m ablation_sweeps wandb


def in_a_sweep(launch_options: tuple[str, ...], folder: Path, env: dict[str, str]) -> None:
    done = run_python(str(LAUNCH), *launch_options, env=env, cwd=folder)
    assert done.code == 0, done.err


def publish(folder: Path, env: dict[str, str], *options: str, sweep: str = "results/default") -> Outcome:
    return run_python("-m", "ablation_sweeps", "wandb", sweep, *options, env=env, cwd=folder)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "home").mkdir()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC"))}
    return {**clean, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}


def test_a_sweep_is_sent_from_its_files_once(launch: Launch, on_text, tmp_path: Path, environment, server: Server):
    """One run was tracked nowhere, one offline; the second sending stops after the first run, as when it is killed."""
    options = tuple(option for option in on_text if not option.startswith("tracking"))
    assert launch(*options, "method=zero", "tracking=none").code == 0
    in_a_sweep((*options, "method=mean", "tracking.mode=offline", "tracking.tags=[mine]"), tmp_path, environment)
    sweep = tmp_path / "results" / "default"
    assert len(offline_files(sweep)) == 1

    refused = publish(tmp_path, environment)
    assert refused.code == 1 and "no API key found" in refused.err and "WANDB_API_KEY" in refused.err
    online = environment | key_for(server.url)
    server.talks_nonsense = True
    broken = publish(tmp_path, online)
    assert broken.code == 1 and "0 of 2 runs were sent; the same command sends the rest" in broken.err
    assert len(offline_files(sweep)) == 1

    server.talks_nonsense = False
    server.bodies.clear()
    sent = publish(tmp_path, online, "--project", "elsewhere")
    assert sent.code == 0 and sent.out == "2 runs and the tables of the sweep sent\n", sent.err
    started = server.variables("upsertBucket")
    ids = {variables["name"] for variables in started}
    first = {variables["name"]: variables["project"] for variables in reversed(started)}
    assert set(first.values()) == {"elsewhere"}  # later ones go to what the server calls it
    rows = [pd.read_parquet(path) for path in sweep.glob("*/rows.parquet")]
    assert len(rows) == 2 and len(ids) == 3 and "report" in {variables["jobType"] for variables in started}
    settings = [json.loads(v["config"]) for v in started if v["config"] and "run_id" in v["config"]]
    assert {s["run_id"]["value"] for s in settings} == {table["run_id"].iloc[0] for table in rows}
    assert [
        tuple(sorted(variables["tags"]))
        for variables in started
        if "tiny" in (variables["tags"] or ()) and "mine" in variables["tags"]
    ] == [("attn_pre_out", "mean", "mine", "tiny")]
    history = [own(line) for line in server.streamed("wandb-history.jsonl") if "eval/loss" in line]
    losses = sorted(row["value"] for table in rows for row in table.to_dict("records") if row["metric"] == "loss")
    assert sorted(point["eval/loss"] for point in history) == pytest.approx(losses)
    assert offline_files(sweep) == []  # or `wandb sync` would send it a second time

    before, there = len(server.requests), ("--project", "elsewhere")
    assert publish(tmp_path, online, *there).out == "0 runs sent\n" and len(server.requests) == before
    (next(sweep.glob("*-zero-*")) / "wandb.json").unlink()  # killed before it was written down
    assert publish(tmp_path, online, *there).out == "1 run sent\n"
    assert publish(tmp_path, online, *there, "--again").out == "2 runs and the tables of the sweep sent\n"
    assert publish(tmp_path, online).out == "2 runs and the tables of the sweep sent\n"  # to another project
    assert {variables["name"] for variables in server.variables("upsertBucket")} == ids
    forbidden = publish(tmp_path, online | {"WANDB_MODE": "offline"}, "--again")
    assert forbidden.code == 1 and "WANDB_MODE=offline forbids" in forbidden.err


def test_the_same_job_in_two_sweeps_is_two_runs_and_the_tables_follow(
    on_text, tmp_path: Path, environment, server: Server
):
    options = tuple(option for option in on_text if not option.startswith("tracking"))
    online = environment | key_for(server.url)
    for sweep in ("one", "two"):
        in_a_sweep((*options, "method=zero", f"sweep={sweep}"), tmp_path, online)
    groups = {(v["name"], v["groupName"]) for v in server.variables("upsertBucket") if v["groupName"]}
    assert len(groups) == len({name for name, _ in groups}) == 4  # a curve and the tables of each
    kinds = [variables["jobType"] for variables in server.variables("upsertBucket") if variables["jobType"]]
    assert kinds.count("report") == kinds.count("ablation") == 2


def test_tables_and_statistics_of_a_sweep(launch: Launch, on_text, tmp_path: Path, environment, server: Server):
    options = tuple(option for option in on_text if not option.startswith("tracking"))
    assert launch("-m", *options, "method=zero,mean", "tracking=none").code == 0
    sweep, online = tmp_path / "results" / "default", environment | key_for(server.url)
    assert publish(tmp_path, online).out == "2 runs and the tables of the sweep sent\n"
    (of_sweep,) = {v["name"] for v in server.variables("upsertBucket") if v["jobType"] == "report"}

    def table(name: str) -> pd.DataFrame:
        found = json.loads(server.uploads[f"/artifact/run-{of_sweep}-{name}/{name}.table.json"])
        return pd.DataFrame(found["data"], columns=found["columns"])

    curves, sent = pd.read_parquet(sweep / "curves.parquet"), table("curves")
    assert list(sent) == list(curves) and len(sent) == len(curves)
    assert sent["value"].tolist() == pytest.approx(curves["value"].tolist())
    assert table("comparisons")["p_holm"].tolist() == pytest.approx(
        pd.read_csv(sweep / "comparisons.csv")["p_holm"].tolist(), nan_ok=True
    )
    assert table("summary")["method"].nunique() == 2

    (cache,) = (tmp_path / "results" / ".cache").iterdir()
    created = {v["input"]["artifactCollectionName"]: v["input"] for v in server.variables("mutation CreateArtifact ")}
    statistics = created[f"statistics-{cache.name}"]
    assert statistics["artifactTypeName"] == "statistics"
    assert json.loads(statistics["metadata"])["signature"] == cache.name
    for file in cache.glob("*.safetensors"):
        assert server.uploads[f"/artifact/statistics-{cache.name}/{file.name}"] == file.read_bytes()
    assert list(cache.glob("*.safetensors"))


@pytest.mark.parametrize("stop", ["run", "tables"])
def test_killed_while_it_sends_the_same_command_goes_on(
    launch: Launch, on_text, tmp_path: Path, environment, server: Server, stop: str
):
    options = tuple(option for option in on_text if not option.startswith("tracking"))
    assert launch("-m", *options, "method=zero,mean", "tracking=none").code == 0
    online = environment | key_for(server.url)
    runs = sorted(path.parent for path in (tmp_path / "results" / "default").glob("*/rows.parquet"))
    ids = [hashing.signature([pd.read_parquet(run / "rows.parquet")["run_id"].iloc[0], "default"])[:16] for run in runs]
    server.stalls_at = ids[1] if stop == "run" else "mutation CreateArtifact "
    sending = Command("-m", "ablation_sweeps", "wandb", "results/default", env=online, cwd=tmp_path)
    assert server.stalled.wait(120)
    os.kill(sending.pid, signal.SIGKILL)
    sending.wait()
    marked = [(run / "wandb.json").exists() for run in runs]
    assert marked == ([True, False] if stop == "run" else [True, True])

    server.stalls_at = None
    first = {v["name"] for v in server.variables("upsertBucket") if v["jobType"] == "report"}
    server.bodies.clear()
    again = publish(tmp_path, online)
    sent = "1 run" if stop == "run" else "0 runs"
    assert again.out == f"{sent} and the tables of the sweep sent\n", again.err
    started = {v["name"]: v["jobType"] for v in server.variables("upsertBucket") if v["jobType"]}
    of_sweep = {name for name, kind in started.items() if kind == "report"}
    assert set(started) == of_sweep | ({ids[1]} if stop == "run" else set()) and len(of_sweep) == 1
    assert stop == "run" or of_sweep == first
    assert publish(tmp_path, online).out == "0 runs sent\n"


def test_a_saved_view_for_each_study(launch: Launch, on_text, tmp_path: Path, environment, server: Server):
    options = tuple(option for option in on_text if not option.startswith("tracking"))
    assert launch("-m", *options, "method=zero,mean", "tracking=none", "batch_tokens=64,128").code == 0
    online = environment | key_for(server.url)
    done = publish(tmp_path, online, "--view")
    assert done.code == 0 and len(server.views) == 2, done.err
    addresses = [line.split()[-1] for line in done.out.splitlines() if line.startswith("view of ")]
    assert all(address.startswith(f"{server.url}/me/ablation-sweeps?nw=") for address in addresses)
    curves = pd.read_parquet(tmp_path / "results" / "default" / "curves.parquet")
    studies = set()
    for view in server.views.values():
        section = json.loads(view["spec"])["section"]
        (runs,) = section["runSets"]
        wanted = {f["key"]["name"]: f["value"] for f in runs["filters"]["filters"]}
        studies.add(wanted.pop("study"))
        assert wanted == {"group": "default", "jobType": "ablation"}
        lines, bars = (s["panels"] for s in section["panelBankConfig"]["sections"])
        shown = {panel["config"]["metrics"][0] for panel in lines}
        assert shown == {f"eval/{metric}" for metric in curves["metric"].unique() if metric != "perplexity"}
        for panel in lines:
            assert panel["config"]["xAxis"] == "fraction" and panel["config"]["groupArea"] == "stderr"
            assert panel["config"]["groupBy"] == "method.value" and panel["config"]["groupAgg"] == "mean"
        assert [panel["config"]["metrics"] for panel in bars] == [
            [f"summary_metrics.auc/{metric}"] for metric in ("loss", "top1", "kl")
        ]
        assert [key["name"] for key in runs["grouping"]] == ["method.value"]
    assert studies == set(curves["study"])
    before = set(server.views)
    again = publish(tmp_path, online, "--view")
    assert again.out.splitlines()[1:] == [f"view of {line.split()[2]} {a}" for line, a in
                                             zip(done.out.splitlines()[1:], addresses, strict=True)]  # fmt: skip
    assert set(server.views) == before  # written again, not once more
    deleted = server.views.pop(min(before))["name"]
    assert publish(tmp_path, online, "--view").code == 0
    assert len(server.views) == 2 and deleted not in server.views
    before = set(server.views)

    assert launch("-m", *options, "method=peak", "method.n_bins=50,100", "sweep=bins", "tracking=none").code == 0
    done = publish(tmp_path, online, "--view", sweep="results/bins")
    assert done.code == 0, done.err
    (name,) = set(server.views) - before
    section = json.loads(server.views[name]["spec"])["section"]
    assert [key["name"] for key in section["runSets"][0]["grouping"]] == ["method.value", "method.n_bins.value"]
    configs = [json.loads(v["config"]) for v in server.variables("upsertBucket") if v["config"]]
    assert {c["method.n_bins"]["value"] for c in configs if "method.n_bins" in c} == {50, 100}


def test_what_was_sent_by_the_job_is_not_sent_again_and_sync_sends_the_rest(
    launch: Launch, on_text, tmp_path: Path, environment, server: Server
):
    options = tuple(option for option in on_text if not option.startswith("tracking"))
    assert launch(*options, "method=zero", "tracking=none").code == 0
    online = environment | key_for(server.url)
    in_a_sweep((*options, "method=mean", "tracking.sync=true"), tmp_path, online)
    assert len({variables["name"] for variables in server.variables("upsertBucket")}) == 3  # two curves, the tables
    history = [line for line in server.streamed("wandb-history.jsonl") if "eval/loss" in line]
    assert len(history) == 4  # two points each, once
    assert publish(tmp_path, online).out == "0 runs sent\n"
