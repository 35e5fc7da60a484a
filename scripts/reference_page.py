"""Writes the tables of results/reference/**/README.md from the runs of scripts/reference.sh.

A table is called after its study, `tiny_vit`; where that has several models also after one of them,
`paper_small/tiny_vit`.

Intervals are 95 % percentile bootstrap intervals of paired differences: documents (images) and seeds are drawn with
replacement, the same draw for both methods, since both saw the same documents with the same neurons ablated.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

RUNS, PAGE = Path("results/reference-runs"), Path("results/reference")
REPEATS = 4000


def documents_of(name: str) -> pd.DataFrame:
    """Sums of every document of all finished runs of one study, with method and seed."""
    study, _, model = name.partition("/")
    tables = []
    for file in sorted((RUNS / study).glob("*/documents.parquet")):
        run = pd.read_parquet(file.with_name("rows.parquet")).iloc[0]
        if model in ("", run["model"]):
            tables.append(pd.read_parquet(file).assign(method=run["method"], seed=run["seed"]))
    return pd.concat(tables, ignore_index=True)


def cube(documents: pd.DataFrame, column: str) -> np.ndarray:
    """`[method, seed, fraction, document]`, methods in alphabetical order."""
    table = documents.set_index(["method", "seed", "fraction", "document"])[column].sort_index()
    assert table.index.is_unique
    shape = [len(level) for level in table.index.levels]
    assert np.prod(shape) == len(table), "a run is missing"
    return table.to_numpy().reshape(shape)


def intervals(documents: pd.DataFrame, column: str, pick) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Methods, their values, and `[repeat, method]` bootstrapped values of `pick(curve)`, curves `[.., fraction]`."""
    sums, counts = cube(documents, column), cube(documents, "n")
    _, n_seeds, _, n_documents = sums.shape
    values = pick(sums.sum((1, 3)) / counts.sum((1, 3)))
    rng = np.random.default_rng(0)
    repeats = []
    for _ in range(REPEATS):
        seeds, some = rng.integers(n_seeds, size=n_seeds), rng.integers(n_documents, size=n_documents)
        drawn = np.ix_(range(len(sums)), seeds, range(sums.shape[2]), some)
        repeats.append(pick(sums[drawn].sum((1, 3)) / counts[drawn].sum((1, 3))))
    return sorted(documents["method"].unique()), values, np.array(repeats)


def span(draws: np.ndarray) -> str:
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"[{low:+.2f}, {high:+.2f}]"


def table(study: str) -> str:
    documents = documents_of(study)
    fractions = sorted(documents["fraction"].unique())
    half = fractions.index(0.5)
    area = lambda curve: np.trapezoid(curve, fractions, axis=-1)  # noqa: E731
    methods, at_half, half_draws = intervals(documents, "loss", lambda curve: curve[..., half])
    _, areas, area_draws = intervals(documents, "loss", area)
    _, right, _ = intervals(documents, "top1", lambda curve: 100 * curve[..., half])
    first = documents.query("fraction == 0 and seed == seed.min()").groupby("method").sum(numeric_only=True).iloc[0]
    n_documents, seeds = documents["document"].nunique(), documents["seed"].nunique()
    mean = methods.index("mean")
    lines = [
        f"**{study}**: {int(first['n'])} scored positions of {n_documents} documents (images), {seeds} seeds; "
        f"undamaged loss {first['loss'] / first['n']:.3f}, top-1 {100 * first['top1'] / first['n']:.1f} %.",
        "",
        "| method | loss at 50 % | minus mean's | top-1 at 50 % | average loss, 0 to 100 % | minus mean's |",
        "|---|---|---|---|---|---|",
    ]
    for i in np.argsort(areas):
        gap, area_gap = at_half[i] - at_half[mean], areas[i] - areas[mean]
        paired = [
            f"{value:+.2f} {span(draws[:, i] - draws[:, mean])}" if i != mean else ""
            for value, draws in ((gap, half_draws), (area_gap, area_draws))
        ]
        lines.append(
            f"| {methods[i]} | {at_half[i]:.3f} | {paired[0]} | {right[i]:.1f} % | {areas[i]:.3f} | {paired[1]} |"
        )
    (PAGE / study).mkdir(parents=True, exist_ok=True)
    documents.to_parquet(PAGE / study / "documents.parquet", index=False)
    return "\n".join(lines)


def write(file: Path) -> None:
    page = file.read_text()
    for study in re.findall(r"<!-- table ([\w/]+) -->", page):
        if not (RUNS / study.split("/")[0]).exists():
            print(f"{study}: no runs here, its table is left as it is", file=sys.stderr)
            continue
        begin, end = f"<!-- table {study} -->", f"<!-- end {study} -->"
        before, rest = page.split(begin)
        after = rest.split(end)[1]
        page = f"{before}{begin}\n{table(study)}\n{end}{after}"
        print(study, file=sys.stderr)
    file.write_text(page)


if __name__ == "__main__":
    for readme in sorted(PAGE.rglob("README.md")):
        write(readme)
