"""Effects of single units (fraction=each), against numbers that are computed otherwise here."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command import run_python
from matplotlib.collections import PathCollection
from matplotlib.image import imread
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from ablation_sweeps import UserError, compose_job, read_curves, read_units, run_job
from ablation_sweeps.cli.commands import app
from ablation_sweeps.report import write
from ablation_sweeps.results import heat_map, metrics, run_folder
from ablation_sweeps.results.record import RunRecord, points, summary
from ablation_sweeps.results.units import unit_studies

PLACES = [(0, 0), (0, 1), (1, 0), (1, 1)]
CLEAN = np.array([30.0, 28.0, 35.0, 31.0, 33.0, 29.0])  # loss of each document, in nats
DAMAGE = np.array([
    [5.0, 6.0, 5.5, 4.8, 5.2, 6.1],
    [0.4, -0.2, 0.1, 0.3, -0.4, 0.2],
    [1.1, 0.2, 1.9, 0.1, 1.2, 0.4],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
])  # fmt: skip


def documents(damage: np.ndarray, sizes: np.ndarray) -> pd.DataFrame:
    losses = np.vstack([CLEAN[: len(sizes)], CLEAN[: len(sizes)] + damage[:, : len(sizes)]])
    return pd.concat([
        pd.DataFrame({"fraction": 0.25 * (unit >= 0), "unit": unit, "document": range(len(sizes)), "name": "d",
                      "n": sizes.astype(float), "loss": loss, "top1": 4.0 - (unit >= 0), "topk": 5.0,
                      "kl": loss - losses[0],
                      "n_rare": sizes, "loss_rare": loss, "top1_rare": 0.0, "topk_rare": 0.0})
        for unit, loss in enumerate(losses, start=-1)
    ])  # fmt: skip


def save_run(
    folder: Path, method: str = "mean", seed: int = 0, damage: np.ndarray = DAMAGE, sizes: np.ndarray | None = None
) -> None:
    """A run as a job with fraction=each leaves it."""
    table = documents(damage, np.full(6, 10) if sizes is None else sizes)
    rows = metrics.curve(table, 10, 0, {})
    number = rows.pop("number")
    for column, of_unit in zip(("layer", "index"), zip(*PLACES, strict=True), strict=True):
        rows[column] = number.map(dict(enumerate(of_unit))).astype("Int64")
    run = {"run_id": folder.name[-8:], "study": "a" * 8, "kind": "causal_lm", "model": "opt", "revision": "",
           "dataset": "pile", "site": "attn_pre_out", "unit": "head", "selection": "random", "depends_on_seed": False,
           "method": method, "method_params": "{}", "seed": seed, "n_ablated": 1, "n_units": 4,
           "n_neurons": 64}  # fmt: skip
    run_folder.begin(folder, {"sweep": "s"})
    run_folder.finish(folder, rows.assign(**run), table, 1.0)


def test_effects_on_documents_of_one_size_are_those_of_a_paired_t_test(tmp_path: Path):
    save_run(tmp_path / "s" / "run-of-mean0")
    units = read_units(tmp_path)
    loss = units[units["metric"] == "loss"]
    assert [*zip(loss["layer"], loss["index"], strict=True)] == PLACES
    p = []
    for row, damage in zip(loss.to_dict("records"), DAMAGE, strict=True):
        per_token = (CLEAN + damage) / 10, CLEAN / 10
        assert row["value"] == pytest.approx(per_token[0].mean()) and row["clean"] == pytest.approx(per_token[1].mean())
        assert row["effect"] == pytest.approx(damage.mean() / 10)
        p.append(1.0)
        if damage.any():
            expected = stats.ttest_rel(*per_token)
            p[-1] = expected.pvalue
            assert row["stderr"] == pytest.approx(stats.sem(damage / 10))
            assert (row["low"], row["high"]) == pytest.approx([*expected.confidence_interval(0.95)])
        assert row["p"] == pytest.approx(p[-1])
    a, b, c, d = p
    by_hand = [4 * a, 2 * b, 3 * c, max(2 * b, d)]
    assert a < c < b < d and loss["p_holm"].tolist() == pytest.approx([min(1.0, x) for x in by_hand])
    assert loss["significant"].tolist() == [True, False, False, False] and c < 0.05 < 3 * c
    assert (units["n_documents"] == 6).all() and "perplexity" not in set(units["metric"])


def test_long_documents_count_more_and_the_error_is_that_of_a_ratio(tmp_path: Path):
    sizes = np.array([10, 40, 10, 20, 5, 15])
    save_run(tmp_path / "run-of-mean0", sizes=sizes)
    row = read_units(tmp_path).query("metric == 'loss'").iloc[2]
    effect = DAMAGE[2].sum() / 100
    by_hand = math.sqrt(sum((d - effect * n) ** 2 for d, n in zip(DAMAGE[2], sizes, strict=True)) * 6 / 5) / 100
    assert row["effect"] == pytest.approx(effect) and row["stderr"] == pytest.approx(by_hand)
    assert row["high"] - row["effect"] == pytest.approx(stats.t.ppf(0.975, 5) * by_hand)


def test_one_document_has_no_interval(tmp_path: Path):
    save_run(tmp_path / "run-of-mean0", sizes=np.array([10]))
    loss = read_units(tmp_path).query("metric == 'loss'")
    assert loss["effect"].iloc[0] == pytest.approx(0.5) and loss[["stderr", "low", "high"]].isna().all(axis=None)
    assert not loss["significant"].any()


def test_of_several_seeds_the_first_is_read_and_methods_are_corrected_apart(tmp_path: Path):
    for seed in (2, 1):
        save_run(tmp_path / f"run-of-mean{seed}", seed=seed)
    save_run(tmp_path / "run-of-zero1", method="zero", seed=1, damage=2 * DAMAGE)
    units = read_units(tmp_path)
    assert set(units["run_id"]) == {"of-mean1", "of-zero1"}
    both = units[units["metric"] == "loss"].pivot(index=["layer", "index"], columns="method", values="p_holm")
    assert both["zero"].tolist() == pytest.approx(both["mean"].tolist())  # twice the effect, twice the error


def test_a_run_of_single_units_is_no_curve_anywhere(tmp_path: Path):
    """The fractions of its points are all the same, so that its last unit would be taken for the curve."""
    save_run(tmp_path / "s" / "run-of-mean0")
    assert read_curves(tmp_path).empty
    record = RunRecord.of(tmp_path / "s" / "run-of-mean0")
    assert [point["fraction"] for point in points(record.rows)] == [0.0]
    assert {*summary(record.rows)} == {"clean/loss", "clean/top1", "clean/kl"}
    assert record.units is not None and len(record.units) == 4 * 4
    written = {path.name for path in write.write(tmp_path / "s", console=Console(file=io.StringIO()))}
    assert {"units.csv", "units.parquet", "report.html"} <= written and "curves.parquet" not in written
    assert not CliRunner().invoke(app, ["export", str(tmp_path / "s"), "--to", str(tmp_path / "out")]).exception
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"units.csv", "units.parquet"}


def test_the_report_names_the_strongest_units(tmp_path: Path):
    save_run(tmp_path / "run-of-mean0")
    file = io.StringIO()
    write.write(tmp_path, console=Console(file=file, width=100))
    assert "opt on pile · attn_pre_out · 4 heads, each alone · 60 tokens" in file.getvalue()
    assert "mean: 1 of 4 heads alone changes the loss significantly" in file.getvalue()
    assert "of layer 0, head 0." in file.getvalue()
    saved = pd.read_csv(tmp_path / "units.csv")
    assert len(saved) == 16 and saved["effect"].tolist() == pytest.approx(read_units(tmp_path)["effect"].tolist())
    html = (tmp_path / "report.html").read_text()
    content = json.loads(html.partition('id="content">')[2].partition("</script>")[0])
    (study,) = content["studies"]
    heat, unclear = study["charts"]["loss|mean"]["data"]
    assert heat["z"] == [
        [pytest.approx(0.5433, abs=1e-4), pytest.approx(0.0067, abs=1e-4)],
        [pytest.approx(0.0817, abs=1e-4), 0],
    ]
    assert [*zip(unclear["y"], unclear["x"], strict=True)] == [("0", 1), ("1", 0), ("1", 1)]


def test_a_heat_map_has_a_cell_for_each_unit_and_marks_those_that_are_not_significant(tmp_path: Path):
    save_run(tmp_path / "run-of-mean0")
    (study,) = unit_studies(read_units(tmp_path))
    figure = heat_map.draw(study.rows, study.title, study.unit)
    panel = figure.axes[0]
    (image,) = panel.images
    assert image.get_array().tolist() == [[pytest.approx(0.543, abs=1e-3), pytest.approx(0.0067, abs=1e-4)],
                                          [pytest.approx(0.0817, abs=1e-4), 0.0]]  # fmt: skip
    assert image.norm.vmin == -image.norm.vmax
    (dots,) = (artist for artist in panel.collections if isinstance(artist, PathCollection))
    assert sorted(map(tuple, dots.get_offsets().tolist())) == [(0, 1), (1, 0), (1, 1)]
    assert "not significant" in figure._supxlabel.get_text()


def test_options_that_a_table_of_units_has_no_use_for_are_refused():
    with pytest.raises(UserError, match=r"^eval.target_stderr: fraction=each .*; leave it null"):
        compose_job("fraction=each", "unit=head", "eval.target_stderr=0.1").check()
    with pytest.raises(UserError, match=r"^objective=at_50/loss: needs the fraction 0.5"):
        compose_job("fraction=each", "unit=head", "objective=at_50/loss").check()


def test_head_importance_of_a_model(tmp_path: Path):
    small = [
        "eval.tokens=400",
        "statistics.tokens=300",
        "tracking=none",
        f"results_dir={tmp_path}",
        "site.layers=[0,2]",
    ]
    folder = run_job(compose_job("experiment=head_importance", *small))
    units = read_units(tmp_path)
    assert len(units[units["metric"] == "loss"]) == 2 * 8 and set(units["layer"]) == {0, 2}
    rows = pd.read_parquet(folder / "rows.parquet")
    assert not rows["depends_on_seed"].any() and (rows.loc[rows["fraction"] > 0, "n_ablated"] == 1).all()


def test_wandb_gets_a_table_and_a_picture(tmp_path: Path):
    save_run(tmp_path / "run-of-mean0")
    code = (
        "import sys; from pathlib import Path; from ablation_sweeps.results.record import RunRecord; "
        "from ablation_sweeps.tracking.wandb import Wandb; "
        "Wandb('p', None, 'offline', (), False).log_run(RunRecord.of(Path(sys.argv[1])))"
    )
    done = run_python("-c", code, str(tmp_path / "run-of-mean0"), cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")
    (table,) = media.glob("table/units*.json")
    assert len(json.loads(table.read_text())["data"]) == 16
    (picture,) = media.glob("images/heat_map*.png")
    assert imread(picture).std() > 0.05
