"""Proof that a change changes no numbers: the same small sweeps by the code of a git revision and by this working tree.

    python scripts/same_numbers.py main

Every number and every signature is compared; the exit code is 1 where one differs. Some three minutes on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = {
    "causal": ["model=tiny_causal", "method=zero,mean,median,peak,resample", "fraction=[0.1,0.5,1.0]"],
    "mlp": ["site=mlp_pre_out", "method=mean,peak,resample_random", "fraction=half", "statistics.passes=1"],
    "masked": ["model=tiny_masked", "method=zero,mean,peak,resample", "fraction=[0.5,1.0]", "seed=0,1"],
    "vision": ["model=tiny_vit", "dataset=digits", "method=zero,mean,median,peak,resample", "fraction=[0.3,1.0]"],
    "estimators": ["method=peak", "fraction=half", "method.estimator=coarse_to_fine,averaged,smoothed,kde"],
}
SIZES = ["eval.tokens=1500", "statistics.tokens=3000", "eval.images=200", "tracking=none"]
KEYS = ["sweep", "model", "site", "method_params", "seed", "fraction", "metric"]
NUMBERS = ["value", "stderr", "n", "clean", "chance", "run_id"]


def run(tree: Path, results: Path) -> pd.DataFrame:
    """Rows of all sweeps, computed by the code of `tree`."""
    for sweep, options in SWEEPS.items():
        command = [sys.executable, "launch.py", "-m", *options, *SIZES, f"sweep={sweep}", f"results_dir={results}"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
        subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, check=True)
    files = sorted(results.glob("*/*/rows.parquet"))
    return pd.concat([pd.read_parquet(file).assign(sweep=file.parts[-3]) for file in files])


def main(revision: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-q", "--detach", str(tree), revision], check=True)
        try:
            before = run(tree, Path(folder, "before"))
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
        after = run(ROOT, Path(folder, "after"))
    both = before.merge(after, on=KEYS, suffixes=("", "_after"), how="outer")
    different = 0
    for name in NUMBERS:
        one, other = both[name], both[f"{name}_after"]
        differ = both[~((one == other) | (one.isna() & other.isna()))]
        different += len(differ)
        print(f"{name}: {len(differ)} of {len(both)} differ")
        if len(differ):
            print(differ[KEYS].to_string(max_rows=10))
    return int(different > 0 or both["value"].notna().sum() == 0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
