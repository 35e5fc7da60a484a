"""Sums of documents of simulated runs, whose methods are known to differ or not."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ablation_sweeps.results.metrics import SUMS

FRACTIONS = (0.0, 0.5, 1.0)


def table(losses: np.ndarray, top1: np.ndarray | None = None) -> pd.DataFrame:
    """`[fractions, documents]` means of each document, of 10 tokens."""
    rows = []
    for i, fraction in enumerate(FRACTIONS):
        for document, loss in enumerate(losses[i]):
            if not np.isnan(loss):
                sums = dict.fromkeys(SUMS, 0.0)
                sums |= {"n": 10.0, "loss": 10 * loss, "top1": 10 * (top1[i, document] if top1 is not None else 0.5)}
                rows.append({"fraction": fraction, "document": document, "name": str(document), **sums})
    return pd.DataFrame(rows)


def noisy(
    n_seeds: int = 3, n_documents: int = 40, noise: float = 3.0, above: float = 0.25
) -> dict[tuple[str, int], pd.DataFrame]:
    """As `runs`, but `same` is now above and now below the others: it differs from none, and zero from mean.

    Args:
        above: mean by which its loss lies above that of `mean`.
    """
    rng = np.random.default_rng(5)
    found = runs(n_seeds, n_documents)
    luck = np.array([0, noise, noise])[:, None] * rng.normal(0, 1, n_documents)
    for method, seed in list(found):
        if method == "same":
            other = found["mean", seed].pivot(index="fraction", columns="document", values="loss").to_numpy() / 10
            apart = np.array([0, above, above])[:, None] + luck - luck.mean(1, keepdims=True)
            found[method, seed] = table(other + apart)
    return found


def runs(n_seeds: int = 3, n_documents: int = 40) -> dict[tuple[str, int], pd.DataFrame]:
    rng = np.random.default_rng(0)
    base = 3 + np.linspace(0, 2, 3)[:, None] + rng.normal(0, 0.5, n_documents)
    found = {}
    for method, more in (("zero", 0.5), ("mean", 0.0), ("same", 0.0)):
        for seed in range(n_seeds):
            luck = rng.normal(0, 0.02, base.shape)
            luck[0] = 0
            found[method, seed] = table(base + luck + np.array([0, more, more])[:, None], 0.5 - 0 * base)
    return found
