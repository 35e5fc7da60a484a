"""Reads the rows of a sweep's runs as comparable curves, and summarises them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.lazy import pd
from ablation_sweeps.base.terminal import as_typed, typed_subcommand
from ablation_sweeps.results import run_folder, run_status
from ablation_sweeps.results.comparison import half_gone_at, shared
from ablation_sweeps.results.display import scored, units_of
from ablation_sweeps.results.metrics import (
    is_whole,
    metric_named,
    normalised_auc,
    point,
    pooled,
    safe_divide,
    with_clean,
)
from ablation_sweeps.results.record import flatten, is_leave_one_out
from ablation_sweeps.results.study import NOT_MEASURED, StudyResult, of_calibration, thin_calibration

if TYPE_CHECKING:
    from pandas import DataFrame


STUDY = ["study", "kind", "model", "dataset", "site", "selection", "options"]
NAME = ["model", "dataset", "site"]
WITHIN_A_STUDY = ("method", "fraction", "seed", "tracking", "sweep", "results_dir", "prefetch", "dry_run", "objective")
NAMED = {"unit": "unit.name", "selection": "selection.label", "scope": "scope.write"}  # options by which parts go
EARLIER = {"unit.name": "neuron", "scope.write": "all", "scope.statistics": "all", "site.layers": "all"}
CLASSES = ("unit._target_", "selection._target_", "scope._target_", "site._target_")
CALIBRATION = ["calibration_positions", "calibration_asked"]
POINT = ["study", "method", "seed", "fraction", "metric"]


@dataclass(frozen=True)
class Study:
    """The rows of all runs that may be compared with each other."""

    name: str  # file name of its figure; unique in a sweep
    title: str
    unit: str  # "token" or "image"
    rows: DataFrame


def read_curves(*sweeps: str | Path) -> DataFrame:
    """Read the rows of all finished runs below some folders, one per study, method, seed, fraction and metric.

    A run with a damaged file is skipped, with a warning that names the file. Runs of one study are compared on the same
    documents: if a run has more of them at a fraction than another one (see eval.target_stderr), its rows are computed
    from those that all have. Runs with fraction=each are no curves, and are left out: see `units.read_units`. If there
    are no others, the result is empty.

    Raises:
        UserError: there is no finished run.
    """
    runs = {folder: rows for folder, rows in read_runs(*sweeps).items() if not is_leave_one_out(rows)}
    if not runs:
        return pd.DataFrame(columns=[*STUDY, *POINT[1:]])
    for folders in _by_study(runs).values():
        runs |= _on_the_same_documents({folder: runs[folder] for folder in folders})
    rows = _one_seed_where_none_matters(pd.concat(runs.values(), ignore_index=True))
    return rows.drop_duplicates(POINT).sort_values(POINT).reset_index(drop=True)


def read_runs(*sweeps: str | Path) -> dict[Path, DataFrame]:
    """The rows of each finished run below some folders, with methods and studies told apart by their options.

    Raises:
        UserError: there is no finished run.
    """
    paths = sorted(path for sweep in sweeps for path in Path(sweep).rglob("rows.parquet"))
    read = {path.parent: run_folder.result(path.parent, path.name) for path in paths}
    whole = {folder: _filled(rows, run_folder.environment(folder)) for folder, rows in read.items() if rows is not None}
    if not whole:
        raise UserError(_nothing_below(sweeps))
    together = _distinguish(pd.concat(whole.values(), ignore_index=True))
    options, methods = _differing(_by_study(whole), together), iter(together["method"])
    return {
        folder: rows.assign(method=[*islice(methods, len(rows))], options=rows["study"].map(options))
        for folder, rows in whole.items()
    }


def _by_study(runs: Mapping[Path, DataFrame]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for folder, rows in runs.items():
        found.setdefault(rows["study"].iloc[0], []).append(folder)
    return found


def _nothing_below(sweeps: Sequence[str | Path]) -> str:
    states = Counter(run_folder.current_status(run).state for sweep in sweeps for run in run_folder.runs(Path(sweep)))
    remedy = "name the folder of a sweep (results/<sweep>) that has run"
    if states:
        known = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
        remedy = f"{known}; {typed_subcommand('status')} {sweeps[0]} tells more"
    return f"no finished run below {', '.join(map(str, sweeps))}: {remedy}"


def _filled(rows: DataFrame, environment: Mapping[str, Any]) -> DataFrame:
    """Add columns that earlier versions did not write to rows.parquet.

    These are the number of positions in the calibration statistics and the number that was asked for (NaN if not
    recorded), and the clean value on the documents of each point, for which the one on all documents is used.
    """
    rows = rows.assign(**{key: float(environment.get(key) or math.nan) for key in CALIBRATION})
    if "unit" not in rows:
        rows = rows.rename(columns={"granularity": "unit"}).assign(depends_on_seed=True, n_units=rows["n_neurons"])
    if "clean" in rows:
        return rows
    return rows.assign(clean=rows["metric"].map(rows[rows["fraction"] == 0].set_index("metric")["value"]))


def _on_the_same_documents(runs: dict[Path, DataFrame]) -> dict[Path, DataFrame]:
    sizes = {point for rows in runs.values() for point in zip(rows["metric"], rows["fraction"], rows["n"], strict=True)}
    if len(sizes) == len({(metric, fraction) for metric, fraction, _ in sizes}):
        return runs  # the usual case: all have the same, and documents.parquet need not be read
    tables = [table for folder in runs if (table := run_folder.result(folder, "documents.parquet")) is not None]
    if len(tables) < len(runs):
        return runs
    found = {}
    for (folder, rows), table in zip(runs.items(), shared(tables), strict=True):
        at = with_clean(table)
        measured = [point(*at[f], metric) for f, metric in zip(rows["fraction"], rows["metric"], strict=True)]
        found[folder] = rows.assign(**{key: [m[key] for m in measured] for key in ("value", "stderr", "n", "clean")})
    return found


def _one_seed_where_none_matters(rows: DataFrame) -> DataFrame:
    """Keep only the first seed where units do not depend on the seed: others are no further sample of units.

    The column `seeds_left_out` names the others.
    """
    rows = rows.assign(seeds_left_out="")
    if rows["depends_on_seed"].all():
        return rows
    of_method = rows.groupby(["study", "method"])["seed"]
    rows["seeds_left_out"] = of_method.transform(seeds_after_the_first).where(~rows["depends_on_seed"], "")
    return rows.loc[rows["depends_on_seed"] | (rows["seed"] == of_method.transform("min"))]


def seeds_after_the_first(seeds: Iterable[int]) -> str:
    """All seeds but the first, in words: "1, 2"."""
    return ", ".join(str(seed) for seed in sorted(set(seeds))[1:])


def _distinguish(rows: DataFrame) -> DataFrame:
    """Append differing parameters to the names of methods with the same label, so that no name stands for two."""
    for _, same in rows.groupby(["study", "method"]):
        variants = {text: json.loads(text) for text in same["method_params"].unique()}
        keys = sorted({key for params in variants.values() for key in params})
        differing = [key for key in keys if len({json.dumps(params.get(key)) for params in variants.values()}) > 1]
        for text, params in variants.items() if differing else ():
            index = same.index[same["method_params"] == text]
            own = ",".join(f"{key}={params[key]}" for key in differing if key in params)
            rows.loc[index, "method"] += f" {own}" if own else ""
    return rows


def _differing(runs: dict[str, list[Path]], rows: DataFrame) -> dict[str, str]:
    """Text that distinguishes each study from others with the same labels; "" if it is the only one.

    It consists of the options that differ, as typed, and of how texts are passed to the model, if that differs. If all
    of it is equal (the files of the model or of the data differ), it is the time at which the study finished.

    Args:
        runs: run folders of each study.
    """
    found = {}
    for _, same in rows.groupby(NAME):
        options = {study: distinguishing_options(run_folder.config(runs[study][0])) for study in same["study"].unique()}
        keys = sorted({key for of_study in options.values() for key in of_study}, key=_named_first)
        keys = [key for key in keys if _tells_apart(key, [*options.values()])]
        for study, of_study in options.items():
            has = [key for key in keys if key in of_study or not key.startswith("selection.")]  # rules differ in these
            found[study] = " ".join(f"{key}={as_typed(of_study.get(key))}" for key in has)
        texts = {study: run_folder.texts_of(runs[study][0]) for study in options}
        for study, passed in texts.items() if len(set(texts.values())) > 1 else ():
            found[study] = f"{found[study]} texts passed {passed}".strip()
        for study, count in {study: [*map(found.get, options)].count(found[study]) for study in options}.items():
            if count > 1:
                found[study] = f"{found[study]} finished {_finished(runs[study])}".strip()
    return found


def _named_first(key: str) -> tuple[int, str]:
    return [*NAMED].index(key) if key in NAMED else len(NAMED), key


def _tells_apart(key: str, options: Sequence[Mapping[str, Any]]) -> bool:
    """True if studies differ in an option. An option of the selection counts only among selections of one name."""
    of_selection = key.startswith("selection.")
    values: dict[Any, set[Any]] = {}
    for of_study in options:
        values.setdefault(of_study.get("selection") if of_selection else None, set()).add(of_study.get(key))
    return any(len(of_name) > 1 for of_name in values.values())


def _finished(runs: list[Path]) -> str:
    return max(str(run_status.read(run).time) for run in runs).removesuffix("+00:00").replace("T", " ") + " UTC"


def distinguishing_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that distinguish studies, flattened; unit, selection and scope by their names."""
    flat = EARLIER | flatten(config)
    layers = config.get("site", {}).get("layers", "all")
    named_parts = {name: flat.pop(key) for name, key in NAMED.items() if key in flat}
    return named_parts | {
        key: as_typed(layers) if key == "site.layers" else value
        for key, value in flat.items()
        if key.split(".")[0] not in WITHIN_A_STUDY and not key.endswith(".label") and key not in CLASSES
    }


def groups(rows: DataFrame, keys: list[str]) -> Iterator[tuple[dict[str, Any], DataFrame]]:
    """Group rows by some columns; give the values of these columns, and the rows of the group."""
    for key, group in rows.groupby(keys):
        yield dict(zip(keys, cast("tuple[Any, ...]", key), strict=True)), group


def areas(curves: DataFrame) -> DataFrame:
    """Column `auc` (see `metrics.normalised_auc`) for each study, method and metric, over all seeds.

    NaN where the fractions do not span 0 to 1.
    """
    found = []
    for key, of_study in groups(curves, STUDY):
        for own, curve in groups(pooled(of_study), ["method", "metric"]):
            fractions, values, clean = (curve[name].tolist() for name in ("fraction", "value", "clean"))
            found.append({**key, **own, "auc": normalised_auc(fractions, values, clean, own["metric"])})
    return pd.DataFrame(found)


def summarise(curves: DataFrame, found: Mapping[str, StudyResult] | None = None) -> DataFrame:
    """Summary with one row for each study, method and metric.

    Columns: n_seeds, clean, at_50 (over all seeds of the method), auc, auc_low, auc_high (area from 0 to 1 and its
    95 % interval over documents and seeds), auc_n_seeds, auc_n_documents (numbers that enter the area: those that all
    methods have) and half_gone_at (the fraction at which the curve first falls to half of its clean value; accuracies
    only). NaN where a value was not measured or is never reached.

    Args:
        found: result of each study, by its hash. For a study without one, areas are over all seeds of the method and
            have no intervals.
    """
    rows = []
    for key, of_study in groups(curves, STUDY):
        means, measured = pooled(of_study), (found or {}).get(key["study"])
        seeds = of_study.groupby(["method", "metric"])["seed"].nunique().to_dict()
        for own, curve in groups(means, ["method", "metric"]):
            method, metric = own["method"], own["metric"]
            at = dict(zip(curve["fraction"], curve["value"], strict=True))
            row = {
                "n_seeds": int(seeds[method, metric]),
                "clean": at.get(0.0, math.nan),
                "at_50": at.get(0.5, math.nan),
            }
            row |= _area(curve, metric) if measured is None else _measured_area(measured, metric, method)
            rows.append({**key, **own, **row})
    return pd.DataFrame(rows)


def _area(curve: DataFrame, metric: str) -> dict[str, float]:
    """Area and half_gone_at from the values alone, without an interval."""
    fractions, values, clean = (curve[name].tolist() for name in ("fraction", "value", "clean"))
    shares = safe_divide(curve["value"].to_numpy(), curve["clean"].to_numpy())
    half_gone = half_gone_at(fractions, shares.tolist()) if not metric_named(metric).less_is_better else math.nan
    unknown = dict.fromkeys(("auc_low", "auc_high", "auc_n_seeds", "auc_n_documents"), math.nan)
    return {"auc": normalised_auc(fractions, values, clean, metric), **unknown, "half_gone_at": half_gone}


def _measured_area(study: StudyResult, metric: str, method: str) -> dict[str, float]:
    area = study.area(metric, method) if is_whole(study.fractions) else NOT_MEASURED
    known = not math.isnan(area.value)
    return {
        "auc": area.value, "auc_low": area.low, "auc_high": area.high,
        "auc_n_seeds": study.n_seeds[metric] if known else math.nan,
        "auc_n_documents": study.n_documents[metric] if known else math.nan,
        "half_gone_at": study.half_gone.get(metric, {}).get(method, math.nan),
    }  # fmt: skip


def studies(curves: DataFrame) -> list[Study]:
    """All studies, each with a name that describes it; see `named`."""
    return named(curves, "", _title)


def named(table: DataFrame, ending: str, title: Callable[[DataFrame, str], str]) -> list[Study]:
    """All studies of a table, each with a name that describes it.

    If names are not unique, a hash is added to the name, and the differences to the title. Of studies that differ in no
    option, the last to finish comes first.

    Args:
        ending: end of all names.
        title: gives the title of a study from its rows and what is scored, "token" or "image".
    """
    by_name: dict[str, list[DataFrame]] = {}
    for _, rows in table.groupby("study"):
        name = "-".join(str(rows[label].iloc[0]) for label in NAME)
        by_name.setdefault(re.sub(r"[^\w.-]+", "_", name), []).append(rows)
    found = []
    for name, of_name in sorted(by_name.items()):
        of_name.sort(key=lambda rows: rows["options"].iloc[0], reverse=True)
        options = [rows["options"].iloc[0] for rows in of_name]
        for rows, own in zip(of_name, options, strict=True):
            short, unit = rows["study"].iloc[0][:8], scored(rows["kind"].iloc[0])
            apart = [own] if own else []
            apart += [f"study {short}"] if options.count(own) > 1 else []
            unique = name if len(of_name) == 1 else f"{name}-{_in_a_name(own) or short}"
            found.append(Study(f"{unique}{ending}", " · ".join([title(rows, unit), *apart]), unit, rows))
    return found


def _in_a_name(options: str) -> str:
    """Options as part of a file name; "" if there are others than unit, selection, scope and layers."""
    only_these = re.fullmatch(r"((unit|selection|scope|site\.layers)=\S+ ?)+", options)
    return re.sub(r"[^\w.-]+", "_", re.sub(r"[\[\]]", "", options).replace("=", "-")) if only_these else ""


def _title(rows: DataFrame, unit: str) -> str:
    model, dataset, site, selection = rows.iloc[0][["model", "dataset", "site", "selection"]]
    options = rows["options"].iloc[0]
    what = [] if "unit=" in options or (kind := units_of(rows)) == "neurons" else [kind]
    what += [] if "selection=" in options else [selection]
    size = f"{span(first_metric(rows)['n'].astype(int).tolist())} {unit}s"
    thin = thin_calibration(rows)
    statistics = f" · statistics {of_calibration(thin)}" if thin else ""
    return f"{' · '.join([f'{model} on {dataset}', site, *what, size, seeds_said(rows)])}{statistics}"


def first_metric(rows: DataFrame) -> DataFrame:
    """The points of the loss or, if earlier versions did not measure it, of the first metric."""
    metric = "loss" if (rows["metric"] == "loss").any() else rows["metric"].iloc[0]
    return rows.loc[rows["metric"] == metric]


def seeds_said(rows: DataFrame) -> str:
    """Number of seeds per point, in words: "3 seeds", or "1 to 2 seeds"."""
    counts = [of_point["seed"].nunique() for _, of_point in rows.groupby(["method", "fraction"])]
    return f"{span(counts)} seed{'s' if max(counts) > 1 else ''}"


def span(counts: Iterable[int]) -> str:
    """The smallest and the largest count, in words: "1 to 3", or "3" if they are equal."""
    counts = sorted(counts)
    return " to ".join(f"{n:,}" for n in dict.fromkeys((counts[0], counts[-1])))
