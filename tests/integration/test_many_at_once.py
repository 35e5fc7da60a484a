"""Twelve processes that need the same statistics at once: they are computed by one of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command import Launch, run_python, same_bits

PROCESSES = 12

# One import and one load, then forks: what is tested is the lock between processes.
TOGETHER = """
import os, sys, time
from ablation_sweeps import run_job
from ablation_sweeps.experiment.config import from_dict
from ablation_sweeps.experiment.session import Session
from ablation_sweeps.neurons import collect
import yaml

config, results, n = yaml.safe_load(open(sys.argv[1])), sys.argv[2], int(sys.argv[3])
computed = collect.CalibrationData.run
def counted(*arguments):
    with open(os.path.join(results, "passes"), "a") as file:
        file.write(f"{os.getpid()} {arguments[-1]}\\n")
    time.sleep(1)  # long enough for all of the others to come
    computed(*arguments)
collect.CalibrationData.run = counted
session = Session()
session.model(from_dict(config))
start, children = time.time() + 3, []
for seed in range(n):
    if (child := os.fork()) == 0:
        time.sleep(max(0, start - time.time()))
        try:
            run_job(from_dict({**config, "seed": seed, "results_dir": results}), session)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_statistics_are_computed_by_one_process(launch: Launch, on_text, tmp_path: Path):
    assert launch(*on_text, "method=peak", "results_dir=first").code == 0
    (config,) = (tmp_path / "first").glob("default/*/config.yaml")
    results = tmp_path / "together"
    results.mkdir()
    done = run_python("-c", TOGETHER, str(config), str(results), str(PROCESSES), cwd=tmp_path)
    assert done.code == 0, done.err
    passes = [line.split(maxsplit=1) for line in (results / "passes").read_text().splitlines()]
    assert [title for _, title in passes] == ["statistics, pass 1", "statistics, pass 2"]
    assert len(list(results.glob("default/*/rows.parquet"))) == PROCESSES
    same_bits(tmp_path / "first" / "default", results / "default")
