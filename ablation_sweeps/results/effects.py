"""Effects of single units, each ablated alone (fraction=each), with paired intervals and corrected p-values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ablation_sweeps.base.lazy import pd
from ablation_sweeps.results.comparison import LEVEL, Estimate, holm, with_interval
from ablation_sweeps.results.metrics import display_rank, metric_named, ratio

if TYPE_CHECKING:
    from pandas import DataFrame


def effects(rows: DataFrame, documents: DataFrame) -> DataFrame:
    """The effect of each unit on each metric, one row each: see `units.read_units` for the columns.

    Perplexity is left out: its effect is that of the loss.

    Args:
        rows, documents: rows.parquet and documents.parquet of one run with fraction=each.
    """
    places = rows.loc[rows["fraction"] > 0, ["layer", "index"]].drop_duplicates()  # in the order of the units' numbers
    tables = []
    for metric in sorted(set(rows["metric"]) - {"perplexity"}, key=display_rank):
        known = metric_named(metric)
        totals, counts = (
            documents.pivot(index="unit", columns="document", values=sums).sort_index().to_numpy(float)
            for sums in (known.total, known.count)
        )
        clean, n = totals[0], counts[0]  # number -1 is the clean pass
        found = [effect(total, clean, n) for total in totals[1:]]
        values = rows.loc[(rows["metric"] == metric) & (rows["fraction"] > 0), ["value", "clean"]]
        table = pd.DataFrame({**places.reset_index(drop=True).astype(int), "metric": metric})
        table[["value", "clean"]] = values.to_numpy()
        table["effect"], table["stderr"] = [one.value for one in found], [one.stderr for one in found]
        table["low"], table["high"] = [one.low for one in found], [one.high for one in found]
        table["p"] = [one.p for one in found]
        table["p_holm"] = holm(table["p"].tolist())
        table["significant"] = table["p_holm"] < 1 - LEVEL
        tables.append(table.assign(n=int(n.sum()), n_documents=int(np.count_nonzero(n))))
    return pd.concat(tables, ignore_index=True)


def effect(
    totals: Float[np.ndarray, " documents"],
    clean: Float[np.ndarray, " documents"],
    counts: Float[np.ndarray, " documents"],
) -> Estimate:
    """Difference of two means over positions, paired over documents, with its t-interval.

    Args:
        totals, clean: sums over the positions of each document, with a unit ablated and without.
        counts: number of positions of each document.
    """
    value, stderr = ratio(totals - clean, counts)
    return with_interval(value, stderr**2, 0.0, int(np.count_nonzero(counts)), 1)
