"""Tables, figures and numbers of curves that are written by hand here."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console
from scipy import integrate, stats
from typer.testing import CliRunner

from ablation_sweeps.base import hashing
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.cli.commands import app
from ablation_sweeps.report import figures, page, write
from ablation_sweeps.report.export import export
from ablation_sweeps.report.tables import print_tables
from ablation_sweeps.results import display, metrics, run_folder, run_status
from ablation_sweeps.results.curves import areas, read_curves, studies, summarise
from ablation_sweeps.results.sweep import read_studies
from ablation_sweeps.tracking.wandb import summary as summary_of_run

KINDS = ("png", "svg", "pdf")
TENTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TWENTIETHS = tuple(i / 20 for i in range(21))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Files of figures are empty, but for the test that looks at them: to draw takes longer than all else here."""
    if request.node.name != "test_write_everything":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: Path(path).touch())


def curve(
    method: str, seed: int = 0, fractions: Sequence[float] = TENTHS, slope: float = 4.0, **columns
) -> pd.DataFrame:
    """Loss 3 + slope * f**2, top-1 0.5 * (1 - f), KL slope * f**2."""
    rows = []
    for f in fractions:
        values = {"loss": 3.0 + slope * f**2, "top1": 0.5 * (1 - f) ** (slope / 4), "kl": slope * f**2}
        chances = {"loss": 8.0, "top1": 0.04, "kl": math.nan}
        clean = {"loss": 3.0, "top1": 0.5, "kl": 0.0}
        rows += [
            {"fraction": f, "metric": m, "value": v, "clean": clean[m], "chance": chances[m]} for m, v in values.items()
        ]
    run = {"run_id": "r", "study": "a" * 8, "kind": "causal_lm", "model": "opt", "revision": "main", "dataset": "pile"}
    run |= {"site": "attn_pre_out", "selection": "random", "options": "", "granularity": "neuron", "method": method}
    run |= {"method_params": "{}", "seed": seed, "n_ablated": 0, "n_neurons": 64, "stderr": 0.01, "n": 4000}
    return pd.DataFrame(rows).assign(**{**run, **columns})


def save_run(folder: Path, rows: pd.DataFrame, state: str = "finished", config: dict | None = None) -> None:
    run_folder.begin(folder, config or {})
    run_folder.finish(folder, rows, rows, 1.0)
    if state != "finished":
        run_status.write_state(folder, state)


def printed(curves: pd.DataFrame, width: int = 80, terminal: bool = False) -> str:
    file = io.StringIO()
    print_tables(curves, Console(file=file, width=width, force_terminal=terminal))
    return file.getvalue()


# What is read


def test_a_sweep_that_is_not_there_is_named(tmp_path: Path):
    save_run(tmp_path / "sweep" / "a", curve("zero"))
    for order in ([tmp_path / "sweep", tmp_path / "nowhere"], [tmp_path / "nowhere", tmp_path / "sweep"]):
        error = CliRunner().invoke(app, ["report", *map(str, order)]).exception
        assert isinstance(error, UserError) and str(error).startswith(
            f"{tmp_path / 'nowhere'}: there is no such folder"
        )
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["a"]


def test_only_finished_runs_are_read_and_the_clean_pass_once(tmp_path: Path):
    save_run(tmp_path / "a", curve("zero", fractions=[0.0, 0.1]))
    save_run(tmp_path / "b", curve("zero", fractions=[0.0, 0.5]))
    save_run(tmp_path / "c", curve("mean"), state="running")
    curves = read_curves(tmp_path)
    assert set(curves["method"]) == {"zero"}
    loss = curves[curves["metric"] == "loss"]
    assert loss["fraction"].tolist() == [0.0, 0.1, 0.5]
    assert loss["value"].tolist() == pytest.approx([3.0, 3.04, 4.0])


def test_nothing_finished_is_the_users_to_mend(tmp_path: Path):
    with pytest.raises(UserError, match=r"no finished run below .*: name the folder of a sweep"):
        read_curves(tmp_path)
    for name, state in (("a", "failed"), ("b", "running"), ("c", "failed")):
        save_run(tmp_path / name, curve("zero"), state=state)
    with pytest.raises(
        UserError, match=r"no finished run below .*: 2 failed, 1 running; ablation-sweeps .*status"
    ) as error:
        read_curves(tmp_path)
    assert "\n" not in str(error.value)


def test_one_label_never_hides_two_sets_of_parameters(tmp_path: Path):
    for n_bins in (50, 100):
        save_run(tmp_path / str(n_bins), curve("peak", method_params=json.dumps({"n_bins": n_bins, "sigma": 1})))
    save_run(tmp_path / "other", curve("zero"))
    assert set(read_curves(tmp_path)["method"]) == {"peak n_bins=50", "peak n_bins=100", "zero"}


# Numbers


@pytest.mark.parametrize("fractions", [TENTHS, TWENTIETHS, (0.0, 0.03, 0.5, 1.0)])
def test_areas_against_scipy(fractions: tuple[float, ...]):
    shuffled = curve("zero", fractions=fractions).sample(frac=1, random_state=0)
    auc = areas(shuffled).set_index("metric")["auc"]
    f = np.array(fractions)
    assert auc["loss"] == pytest.approx(integrate.trapezoid(3 + 4 * f**2, f) / 3)
    assert auc["top1"] == pytest.approx(integrate.trapezoid(0.5 * (1 - f), f) / 0.5)
    assert auc["kl"] == pytest.approx(integrate.trapezoid(4 * f**2, f))


@pytest.mark.parametrize("fractions", [(0.0, 0.5), (0.0,), (0.1, 1.0), (0.0, 0.95)])
def test_half_a_schedule_has_no_area(fractions: tuple[float, ...]):
    assert areas(curve("zero", fractions=fractions))["auc"].isna().all()


def test_summary_of_seeds():
    slopes = [4.0, 5.0, 7.0]
    curves = pd.concat([curve("zero", seed, slope=slope) for seed, slope in enumerate(slopes)])
    row = summarise(curves).set_index("metric").loc["loss"]
    areas = [integrate.trapezoid(3 + slope * np.array(TENTHS) ** 2, TENTHS) / 3 for slope in slopes]
    assert row["auc"] == pytest.approx(np.mean(areas)) and math.isnan(row["auc_low"])  # no documents, no interval
    assert (row["n_seeds"], row["clean"], row["at_50"]) == pytest.approx((3, 3.0, 3 + np.mean(slopes) / 4))


def measured_sweep(
    folder: Path, seeds: Mapping[str, Sequence[int]], fractions: Sequence[float] = TENTHS, **facts: object
) -> Path:
    """Runs of a masked language model: what is scored, and so the clean value, differs from seed to seed."""
    for number, (method, of_method) in enumerate(seeds.items()):
        for seed in of_method:
            rng = np.random.default_rng(seed)
            n = rng.integers(1, 40 * (seed + 1), 12).astype(float)
            rows = []
            for f in fractions:
                loss = n * (3 + rng.normal(0, 0.3, 12) * seed + (4 + number) * f**2 * (1 + seed))
                sums = {"loss": loss, "top1": n * 0.5 * (1 - f) ** (1 + number), "topk": n * 0.8, "kl": loss - 2 * n}
                rows.append(pd.DataFrame({"fraction": f, "document": range(12), "name": "", "n": n, **sums}))
            documents = pd.concat(rows).assign(n_rare=0.0, loss_rare=0.0, top1_rare=0.0, topk_rare=0.0)
            save_documents(folder / f"{method}-s{seed}", documents, method, seed, facts if method == "mean" else {})
    return folder


def save_documents(folder: Path, documents: pd.DataFrame, method: str, seed: int, facts: Mapping[str, object]) -> None:
    """A finished run with these sums of documents, and the rows that belong to them.

    Args:
        facts: that the run has recorded.
    """
    run_id = hashing.signature(folder.name)[:16]
    rows = metrics.curve(documents, 10, 0, {"loss": 8.0, "top1": 0.04})
    labels = curve(method, seed, kind="masked_lm").iloc[0].drop(list(rows)).to_dict()
    folder = folder.with_name(f"{folder.name}-{run_id[:8]}")
    folder.mkdir(parents=True)
    run_folder.begin(folder, {"seed": seed, **{part: {"label": part} for part in ("model", "dataset", "method")}})
    run_folder.update_environment(folder, **facts)
    run_folder.finish(folder, rows.assign(**{**labels, "run_id": run_id}), documents, 1.0)


def everything(sweep: Path) -> tuple[str, pd.DataFrame, pd.DataFrame, str]:
    """What a report prints, its summary and comparisons, and the export in LaTeX."""
    file = io.StringIO()
    write.write(sweep, console=Console(file=file, width=250))
    tex = export(sweep, sweep / "exported")[-1].read_text()
    return file.getvalue(), *(pd.read_csv(sweep / name) for name in ("summary.csv", "comparisons.csv")), tex


def test_one_area_and_one_interval_in_every_output(tmp_path: Path):
    """Of two seeds with other clean values, the mean of the ratios is not the ratio of the sums."""
    sweep = measured_sweep(tmp_path / "sweep", {"zero": (0, 1), "mean": (0, 1)})
    said, summary, comparisons, tex = everything(sweep)
    ((_, found),) = read_studies(read_curves(sweep), sweep)
    loss = summary.query("metric == 'loss'").set_index("method")
    of_runs = [
        summary_of_run(run_folder.result(run, "rows.parquet")) for run in run_folder.runs(sweep) if "zero" in run.name
    ]
    assert abs(np.mean([of_run["auc/loss"] for of_run in of_runs]) - loss.loc["zero", "auc"]) > 1e-2, "no test"
    for row in page.areas(found):
        for metric in ("loss", "top1", "kl"):
            own = summary.query("metric == @metric").set_index("method").loc[row["method"]]
            assert own[["auc", "auc_low", "auc_high"]].tolist() == pytest.approx(row[f"area of {metric}"])
        shown = "{:.3f}  [{:.3f}, {:.3f}]"
        own = loss.loc[row["method"]]
        values = own[["auc", "auc_low", "auc_high"]]
        assert re.sub(r"\*| ", "", shown.format(*values)) in re.sub(r"\*| ", "", said)
        assert f"{values.iloc[0]:.3f}" in tex and f"[{values.iloc[1]:.3f}, {values.iloc[2]:.3f}]" in tex
        assert (own["auc_n_seeds"], own["auc_n_documents"]) == (2, 12)
    best = loss["auc"].idxmin()
    assert f"of {best} differs" in said or f"is {loss['auc'].min():.3f} of the clean loss" in said
    (pair,) = comparisons.query("metric == 'loss' and fraction != fraction").to_dict("records")
    assert pair["difference"] == pytest.approx(loss.loc[pair["method"], "auc"] - loss.loc[pair["other"], "auc"])
    assert summary["auc"].notna().all(), "perplexity has one, too"


def test_the_area_of_one_run_in_wandb_is_that_of_its_sweep(tmp_path: Path):
    sweep = measured_sweep(tmp_path / "sweep", {"zero": (1,)})
    _, summary, *_ = everything(sweep)
    (run,) = run_folder.runs(sweep)
    logged = summary_of_run(run_folder.result(run, "rows.parquet"))
    assert {f"auc/{row.metric}": row.auc for row in summary.itertuples()}.items() >= {
        name: pytest.approx(value) for name, value in logged.items() if name.startswith("auc/")
    }.items()


def test_where_half_of_the_accuracy_is_gone():
    assert half_gone(curve("zero", fractions=[0.0, 0.4, 1.0])) == pytest.approx(0.5)  # between two points
    assert math.isnan(half_gone(curve("zero", fractions=[0.0, 0.4])))  # never


def half_gone(curves: pd.DataFrame) -> float:
    found = dict(summarise(curves)[["metric", "half_gone_at"]].itertuples(index=False))
    assert math.isnan(found["loss"])
    return found["top1"]


# Tables


def two_methods(**columns) -> pd.DataFrame:
    return pd.concat([curve("zero", slope=8.0, **columns), curve("mean", slope=4.0, **columns)])


def test_table_says_what_it_is_of():
    text = printed(two_methods())
    assert text.startswith("opt on pile · attn_pre_out · random · 4,000 tokens · 1 seed\n")
    assert "1,000 images" in printed(two_methods(kind="image_classifier", n=1000))
    assert "3 seeds" in printed(pd.concat([curve("zero", seed) for seed in range(3)]))


def test_calibration_that_is_thinner_than_asked_is_said_where_it_is_read(tmp_path: Path):
    both = {"zero": (0,), "mean": (0,)}  # zero needs no statistics
    assert "asked for" not in everything(measured_sweep(tmp_path / "before", both))[0]
    sweep = measured_sweep(tmp_path / "sweep", both, calibration_positions=379, calibration_asked=5000)
    said, *_, tex = everything(sweep)
    thin = "statistics of 379 positions, where 5,000 were asked for"
    title, notes = said.splitlines()[0], said.partition("AUC:")[2]
    assert thin in title and thin in notes and thin.replace("statistics", "Statistics are") in notes and thin in tex
    (study,) = studies(read_curves(sweep))
    assert thin in " ".join(text_of(figures.draw(study.rows, study.title, study.unit))).replace("\n", " ")
    assert thin in (sweep / "report.html").read_text()
    assert read_curves(sweep).set_index("method").loc["mean", "calibration_positions"].unique().tolist() == [379]


def test_a_metric_that_one_run_lacks_does_not_stop_the_report(tmp_path: Path):
    """It was finished before the metric was there: the others are compared in it, and what is missing is said."""
    sweep = measured_sweep(tmp_path / "sweep", {"zero": (0, 1), "mean": (0, 1)})
    (run,) = (run for run in run_folder.runs(sweep) if run.name.startswith("mean-s1"))
    rows, documents = (run_folder.result(run, f"{name}.parquet") for name in ("rows", "documents"))
    run_folder.finish(run, rows[~rows["metric"].isin(["kl", "top1"])], documents.drop(columns=["kl", "top1"]), 1.0)
    said, summary, comparisons, _ = everything(sweep)
    assert "kl was not measured by every run of mean" in said and "top1 was not measured by every run of mean" in said
    assert "compared only on those that have it: top1 (mean), kl (mean)." in said
    assert "not every method has every seed" not in said, "it counts points, not their metrics"
    assert comparisons.groupby("metric")["n_seeds"].unique().map(list).to_dict() == {
        "loss": [2], "top1": [1], "top10": [2], "kl": [1]
    }  # fmt: skip
    assert summary.set_index(["method", "metric"]).loc[("mean", "kl"), ["n_seeds", "auc_n_seeds"]].tolist() == [1, 1]
    for run in run_folder.runs(sweep):  # no run has them any more, and one not even a loss
        rows, documents = (run_folder.result(run, f"{name}.parquet") for name in ("rows", "documents"))
        gone = ["kl", "top1", *(["loss", "perplexity"] if run.name.startswith("mean") else [])]
        columns = [name for name in gone if name in documents]
        run_folder.finish(run, rows[~rows["metric"].isin(gone)], documents.drop(columns=columns), 1.0)
    said, summary, *_ = everything(sweep)
    assert "none is called the best" in said and set(summary["metric"]) == {"loss", "perplexity", "top10"}


DAMAGE = {
    "config.yaml": {"a seed": (b"seed: 1", b"seed: 9"), "a key": (b"seed: 1", b"sead: 1")},
    "environment.json": {"a version": (b'"python"', b'"pYthon"')},
    "status.json": {"a state": (b"finished", b"finishes"), "a time": (b'"time": "2', b'"time": "1')},
    "rows.parquet": {},
    "documents.parquet": {},
}
CUTS = {"truncated": 0.5, "empty": 0.0}


@pytest.mark.parametrize(
    ("name", "how"), [(name, how) for name, changes in DAMAGE.items() for how in (*changes, *CUTS)]
)
def test_a_report_is_made_without_a_damaged_run_and_names_the_file(tmp_path: Path, caplog, name: str, how: str):
    sweep = measured_sweep(tmp_path / "sweep", {"zero": (0, 1), "mean": (0, 1)}, fractions=[0.0, 0.5, 1.0])
    (run,) = (run for run in run_folder.runs(sweep) if run.name.startswith("mean-s1"))
    content = (run / name).read_bytes()
    changed = content[: int(len(content) * CUTS[how])] if how in CUTS else content.replace(*DAMAGE[name][how])
    assert changed != content
    (run / name).write_bytes(changed)
    curves = read_curves(sweep)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert run.name in said and name in said and "\n" not in said
    assert set(curves[["method", "seed"]].itertuples(index=False, name=None)) == {("zero", 0), ("zero", 1), ("mean", 0)}
    if (name, how) != ("rows.parquet", "truncated"):  # one page tells as much as all
        return
    printed_, summary, *_ = everything(sweep)
    assert "1 seed, 12 documents" in printed_ and set(summary["auc_n_seeds"]) == {1}
    page_ = (sweep / "report.html").read_text()
    (failure,) = json.loads(re.findall(r'id="content">(.*?)</script>', page_)[0])["failures"]
    assert failure[:2] == [run.name, "damaged"] and name in failure[2]


def test_a_cell_of_text_is_no_formula(tmp_path: Path):
    odd = ["=1+1", "+cmd", "-x", "@SUM(A1)", "\t=2", "zero = one"]
    for number, method in enumerate(odd):
        save_run(tmp_path / str(number), curve(method, stderr=-0.01))
    write.write(tmp_path, console=Console(file=io.StringIO()))
    export(tmp_path, tmp_path / "exported")
    for file in (tmp_path / "summary.csv", tmp_path / "exported" / "curves.csv"):
        table = pd.read_csv(file)
        assert set(table["method"]) == {*(f"'{method}" for method in odd[:-1]), odd[-1]}
    assert set(table["stderr"]) == {-0.01}, "a number is no text"


def test_plain_text_is_whole_and_without_codes():
    text = printed(two_methods(), width=30)
    assert "\x1b" not in text and "…" not in text
    (header,) = [line for line in text.splitlines() if "loss (nats/token)" in line]
    assert header.split()[2:] == ["clean", *" ".join(f"{10 * i} %" for i in range(1, 11)).split(), "AUC"]
    (mean,) = [line for line in text.splitlines() if line.strip().startswith("mean") and "3.000" in line]
    assert mean.split()[:4] == ["mean", "3.000", "3.040*", "3.160*"], "where all are equal, none is best"
    (mean,) = [line for line in text.splitlines() if line.strip().startswith("mean") and "50.0" in line]
    assert mean.split()[:4] == ["mean", "50.0", "45.0*", "40.0*"]


def test_the_best_is_bold_and_ties_within_rounding_are_too():
    tied = pd.concat([two_methods(fractions=[0.0, 0.5]), curve("peak", fractions=[0.0, 0.5], slope=4.0001)])
    text = printed(tied, width=200, terminal=True)
    assert text.count("\x1b[1m4.000\x1b[0m") == 2
    assert "5.000" in text and "\x1b[1m5.000" not in text
    assert text.count("\x1b[1m25.0\x1b[0m") == 2
    assert "*" not in text
    assert "\x1b[1m3.000" not in text


def test_interval_and_the_lack_of_one(tmp_path: Path):
    for name, seeds in (("one", (1,)), ("two", (0, 1))):
        said, summary, *_ = everything(measured_sweep(tmp_path / name, {"zero": seeds}))
        row = summary.set_index("metric").loc["loss"]
        assert f"{row['auc']:.3f}  [{row['auc_low']:.3f}, {row['auc_high']:.3f}]" in said
        assert ("may not hold for other neurons" in said, "documents and 2 seeds]" in said) == (
            name == "one",
            name == "two",
        )
    assert "–: no interval without documents.parquet" in printed(two_methods())


def test_points_on_fewer_documents_than_the_clean_one_are_not_compared_with_it():
    """See eval.target_stderr."""
    text = printed(two_methods().assign(n=lambda rows: np.where(rows["fraction"] == 0.5, 2000, 4000)))
    assert "2,000 to 4,000 tokens" in text and "compare within a column" in text
    assert "compare within a column" not in printed(two_methods())


@pytest.mark.parametrize(
    ("width", "fractions"), [(60, TENTHS), (80, TWENTIETHS), (100, tuple(i / 11 for i in range(12)))]
)
def test_a_narrow_terminal_gets_fewer_columns(width: int, fractions: tuple[float, ...]):
    text = printed(two_methods(fractions=fractions), width=width, terminal=True)
    assert "…" not in text and "fractions; all are in curves.parquet" in text and "AUC" in text
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in text.splitlines()]
    tables = [line for line in lines if "nats/" in line or "─" in line or "3.000" in line]
    assert len(tables) >= 4 and max(map(len, tables)) <= width


# Files


def test_write_everything(tmp_path: Path):
    save_run(tmp_path / "a", two_methods())
    file = io.StringIO()
    written = write.write(tmp_path, console=Console(file=file))
    names = ["curves.parquet", "summary.csv", *(f"figures/opt-pile-attn_pre_out.{kind}" for kind in KINDS)]
    assert written == [tmp_path / name for name in names]
    assert {path.name for path in (tmp_path / "figures").glob("[!.]*")} == {Path(name).name for name in names[2:]}
    pdf = written[4].read_bytes()
    assert pdf.startswith(b"%PDF") and b"/FontFile2" in pdf and b"/Type3" not in pdf, "a font is not embedded"
    assert len(pd.read_parquet(written[0])) == len(two_methods())
    assert set(pd.read_csv(written[1])["method"]) == {"zero", "mean"}
    image = imread(written[2])
    assert image.shape[1] == 2160 and image.std() > 0.05, "a blank page"
    colours = {tuple(pixel) for pixel in (image[..., :3].reshape(-1, 3) * 255).round().astype(int)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= colours, "a method is not drawn"
    assert "opt on pile" in file.getvalue()

    before = [path.read_bytes() for path in written]
    write.write(tmp_path, console=Console(file=io.StringIO()))
    assert [path.read_bytes() for path in written] == before, "the same rows must give the same files"


def test_two_studies_of_one_name_are_kept_apart(tmp_path: Path):
    save_run(tmp_path / "a", curve("zero", model="org/opt"))
    save_run(tmp_path / "b", curve("zero", model="org/opt", study="b" * 8))
    written = write.write(tmp_path, console=Console(file=io.StringIO()))
    assert {path.name for path in written if path.suffix == ".png"} == {
        "org_opt-pile-attn_pre_out-aaaaaaaa.png",
        "org_opt-pile-attn_pre_out-bbbbbbbb.png",
    }


def test_a_figure_of_a_study_that_is_not_shown_any_more_is_removed(tmp_path: Path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "own.png").touch()
    save_run(tmp_path / "a", curve("zero"))

    def figures_after_a_report() -> tuple[set[str], set[str]]:
        written = write.write(tmp_path, console=Console(file=io.StringIO()))
        there = {path.name for path in (tmp_path / "figures").glob("[!.]*")}
        return there, {path.name for path in written if path.parent.name == "figures"} | {"own.png"}

    there, expected = figures_after_a_report()
    assert there == expected and len(there) == 4
    save_run(tmp_path / "b", curve("zero", study="b" * 8))
    there, expected = figures_after_a_report()
    assert there == expected and len(there) == 7
    shutil.rmtree(tmp_path / "b")
    there, expected = figures_after_a_report()
    assert there == expected and len(there) == 4


def test_studies_of_one_name_say_in_which_options_they_differ(tmp_path: Path, monkeypatch):
    dtypes = {"a": "float32", "b": "bfloat16", "c": "bfloat16"}
    for i, (name, dtype) in enumerate(dtypes.items()):
        options = {"model": {"label": f"opt{i}", "dtype": dtype}, "seed": i, "method": {"label": "zero", "n_bins": i}}
        monkeypatch.setattr(run_status, "now", lambda i=i: f"2026-01-02T02:04:0{5 + i}+00:00")
        save_run(tmp_path / name, curve("zero", study=8 * name), config=options)
    *others, newer, older = [study.title.split(" · ")[-1] for study in studies(read_curves(tmp_path))]
    assert others == ["model.dtype=float32"]
    assert newer == "model.dtype=bfloat16 finished 2026-01-02 02:04:07 UTC"  # its data were changed, for example
    assert older == "model.dtype=bfloat16 finished 2026-01-02 02:04:06 UTC"
    assert "model.dtype=float32" in set(summarise(read_curves(tmp_path))["options"])
    shutil.rmtree(tmp_path / "b")
    shutil.rmtree(tmp_path / "c")
    (alone,) = studies(read_curves(tmp_path))
    assert alone.title.endswith(" · 1 seed")


RULES = {
    "random": {"_target_": "a.Random", "label": "random", "within": None},
    "wifv": {"_target_": "b.ByStatistic", "label": "wifv-least_first", "order": "least_first", "checked_units": 30},
}


def options(unit: str, rule: str, write: str = "all", layers: object = "all", **of_rule: object) -> dict:
    """The options of a run, as config.yaml has them."""
    scope = {"_target_": "c.Scope", "write": write, "statistics": "all"}
    site = {"_target_": "d.Site", "label": "attn_pre_out", "layers": layers}
    return {
        "unit": {"_target_": "e.Unit", "name": unit},
        "selection": RULES[rule] | of_rule,
        "scope": scope,
        "site": site,
    }


def test_studies_that_differ_in_unit_selection_or_scope_say_so_as_typed(tmp_path: Path):
    configs = {
        "a": {"model": {"label": "opt"}},  # of an earlier version
        "b": options("head", "random"),
        "c": options("head", "wifv", write="not_first"),
        "d": options("head", "wifv", write="not_first", checked_units=10),
        "e": options("head", "wifv", layers=[1]),
    }
    for name, config in configs.items():
        unit, rule = (
            (config["unit"]["name"], config["selection"]["label"]) if "unit" in config else ("neuron", "random")
        )
        rows = curve("zero", study=8 * name, selection=rule, unit=unit, depends_on_seed=rule == "random", n_units=8)
        save_run(tmp_path / name, rows, config={"selection": RULES["random"]} | config)
    found = {study.rows["study"].iloc[0][0]: study for study in studies(read_curves(tmp_path))}
    told = {name: study.rows["options"].iloc[0] for name, study in found.items()}
    assert not any("_target_" in text or "null" in text for text in told.values()), told
    assert told["a"].startswith("unit=neuron selection=random scope=all")
    assert told["c"].startswith("unit=head selection=wifv-least_first scope=not_first")
    assert "selection.checked_units=30" in told["c"] and "selection.checked_units=10" in told["d"]
    assert told["e"].endswith("site.layers=[1]")
    assert found["b"].title.count("random") == 1
    assert found["b"].name == "opt-pile-attn_pre_out-unit-head_selection-random_scope-all_site.layers-all"


def test_heads_are_not_called_neurons():
    texts = text_of(drawn(curve("zero", unit="head")))
    assert "opt on pile · attn_pre_out · heads · random · 4,000 tokens · 1 seed" in texts
    assert "Heads ablated (%)" in texts and "Neurons ablated (%)" not in texts


def test_seeds_of_a_rule_that_does_not_depend_on_them_are_one_and_that_is_said(tmp_path: Path):
    for seed in (2, 0, 1):
        rows = curve("zero", seed, slope=4.0 + seed, depends_on_seed=False, unit="head", n_units=8)
        run_folder.begin(tmp_path / f"r{seed}-rrrrrrrr", {})
        sums = pd.DataFrame({"fraction": rows["fraction"].unique()}).merge(
            pd.DataFrame({"document": range(3)}), "cross"
        )
        sums = sums.assign(
            name="d", n=10.0, loss=30.0 + seed + sums["document"] * (1 + sums["fraction"]), top1=5.0, kl=0.0
        )
        run_folder.finish(tmp_path / f"r{seed}-rrrrrrrr", rows.assign(run_id="r" * 8), sums, 1.0)
    curves = read_curves(tmp_path)
    assert set(curves["seed"]) == {0} and set(curves["seeds_left_out"]) == {"1, 2"}
    (study,) = studies(curves)
    assert study.title.endswith("1 seed")
    file = io.StringIO()
    write.write(tmp_path, console=Console(file=file, width=200))
    assert "zero: results of seeds 1, 2 are left out: the ablated units do not depend on the seed" in file.getvalue()
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert set(summary["n_seeds"]) == {1} and set(summary["auc_n_seeds"].dropna()) <= {1}
    assert file.getvalue().count("seeds") == 1


def text_of(figure) -> list[str]:
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]


def drawn(curves: pd.DataFrame):
    (study,) = studies(curves)
    return figures.draw(study.rows, study.title, study.unit)


@pytest.mark.parametrize("n_seeds, lines, bands", [(1, 1, 0), (2, 3, 0), (3, 4, 0), (5, 1, 1)])
def test_few_seeds_are_lines_and_many_a_band(n_seeds: int, lines: int, bands: int):
    curves = pd.concat([curve("zero", seed, slope=4 + seed / 10) for seed in range(n_seeds)])
    kl = drawn(curves).axes[2]  # has no levels
    assert len(kl.lines) == lines and len(kl.collections) == bands
    mean = np.mean([4 + seed / 10 for seed in range(n_seeds)]) * np.array(TENTHS) ** 2
    assert np.asarray(kl.lines[0].get_ydata()) == pytest.approx(mean)
    if bands:
        at_one = [4 + seed / 10 for seed in range(n_seeds)]
        low, high = stats.t.interval(0.95, n_seeds - 1, loc=np.mean(at_one), scale=stats.sem(at_one))
        edges = [y for x, y in np.asarray(kl.collections[0].get_paths()[0].vertices) if x == 100]
        assert (min(edges), max(edges)) == pytest.approx((low, high))


def test_a_method_looks_the_same_in_all_figures_and_never_like_another():
    alone = display.method_styles(["peak"])["peak"]
    many = display.method_styles(["zero", "mean", "median", "peak", "peak-kde", "resample", "mine", "x", "y", "z", "w"])
    assert many["peak"] == alone
    assert len({(look["color"], look["linestyle"]) for look in many.values()}) == len(many)


def test_no_method_is_called_the_best_by_other_seeds_than_the_others():
    """The second seed of `zero` is worse than its first, and so its mean: on the seed that both have, it is better."""
    fractions = [0.0, 0.5, 1.0]
    zero = [curve("zero", 0, fractions, 4.0), curve("zero", 1, fractions, 5.0)]
    uneven = printed(pd.concat([*zero, curve("mean", 0, fractions, 4.1)]), width=200)
    assert "of 6 points, mean 3; where seeds differ, no method is marked as the best" in uneven
    assert "*" not in uneven.partition("AUC:")[0].replace("*: best of its column", "")
    even = printed(pd.concat([*zero, *(curve("mean", seed, fractions, 4.1) for seed in (0, 1))]), width=200)
    assert "3.512*" not in even and "4.025*" in even and "not every method" not in even
    some = printed(pd.concat([*zero, *(curve("mean", seed, fractions[: 3 - seed], 4.1) for seed in (0, 1))]), width=200)
    assert "4.025*" in some and "7.100*" not in some


# Layers


def test_layers_that_are_ablated_alone_are_drawn_against_each_other(tmp_path: Path):
    places = {"a": [0], "b": [1], "c": [2], "d": "all", "e": [3, 4]}
    for number, (name, layers) in enumerate(places.items()):
        folder = tmp_path / f"run-{8 * name}"
        rows = curve("zero", fractions=(0.0, 0.5, 1.0), study=8 * name, run_id=8 * name, unit="head", n_units=8,
                     depends_on_seed=True)  # fmt: skip
        sums = pd.DataFrame({"fraction": [0.0, 0.5, 1.0]}).merge(pd.DataFrame({"document": range(3)}), "cross")
        loss = 30.0 + sums["document"] + sums["fraction"] * (number + sums["document"] / 10)
        sums = sums.assign(name="d", n=10.0, loss=loss, top1=5.0, kl=0.0)
        run_folder.begin(folder, options("head", "random", layers=layers))
        run_folder.finish(folder, rows, sums, 1.0)
    file = io.StringIO()
    written = write.write(tmp_path, console=Console(file=file, width=200))
    assert "opt-pile-attn_pre_out-site.layers-0-to-2.png" in {path.name for path in written}
    assert "opt on pile · attn_pre_out · heads · random · layers 0 to 2" in file.getvalue()
    assert "100% of the heads of one layer ablated (clean: 3.100): zero: 3.310 in layer 2, 3.110 in layer 0." in (
        " ".join(file.getvalue().split())
    )
    html = (tmp_path / "report.html").read_text()
    (sweep,) = (one for one in json.loads(html.partition('id="content">')[2].partition("</script>")[0])["studies"]
                if one.get("heading") == "Layer by layer")  # fmt: skip
    line = sweep["charts"]["loss|0.5"]["data"][-1]
    assert line["x"] == [0, 1, 2] and line["y"] == pytest.approx([3.105, 3.155, 3.205])
