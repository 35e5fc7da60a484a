"""What report.html says and holds, of simulated runs; tests/page opens it in a browser."""

from __future__ import annotations

import base64
import functools
import json
import math
import pickle
import re
import signal
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from simulated import noisy, runs, table

from ablation_sweeps.neurons.statistics import Histogram, Moments, Statistics, bin_index
from ablation_sweeps.report import neurons, page, plots, verdict
from ablation_sweeps.results.study import StudyResult, analyse_study


def study(documents: dict[tuple[str, int], pd.DataFrame], metrics=("loss", "top1")) -> StudyResult:
    return analysed(pickle.dumps(documents), metrics)


@functools.cache
def analysed(documents: bytes, metrics: tuple[str, ...]) -> StudyResult:
    rows = pd.DataFrame({"metric": [*metrics, "perplexity"], "chance": 0.1})
    return analyse_study("a-name", "A title", "token", rows, pickle.loads(documents))


def test_the_verdict_names_the_best_and_what_cannot_be_told_from_it():
    said = verdict.verdict(study(runs()))
    assert re.match(r"(mean and same|same and mean) cannot be told apart: the area under the loss of", said)
    assert "3 seeds, 40 documents" in said and said.endswith("Both do less damage than zero.")


def groups_in(said: str) -> list[set[str]]:
    """The sets of methods of which a verdict says that they cannot be told apart."""
    first = re.match(r"([\w, ]+?) cannot be told apart", said)
    more = re.findall(r"nor can ([\w, ]+?)(?=,? nor can|[:.])", said.partition(" (Holm's")[0])
    return [set(re.split(", | and ", names)) for names in [*([first[1]] if first else []), *more]]


def test_not_different_is_not_transitive():
    """A noisy method differs from none of two that differ from each other: these are in no set together."""
    for documents in (noisy(), noisy(n_seeds=1), noisy(noise=0.4), noisy(above=-0.1)):
        found = study(documents)
        said, decided = verdict.verdict(found), found.ranking.query("better != ''")
        pairs = [{row["method"], row["other"]} for row in decided.to_dict("records")]
        assert pairs and not any(pair <= group for pair in pairs for group in groups_in(said))
        for row in decided.to_dict("records"):
            worse = ({row["method"], row["other"]} - {row["better"]}).pop()
            assert "does the least damage" in said or re.search(rf"{row['better']}\b.* less damage than {worse}", said)
    said = verdict.verdict(study(noisy()))
    assert said.startswith("mean and same cannot be told apart, nor can same and zero: the area under the loss of mean")
    assert "mean does less damage than zero." in said
    best = verdict.verdict(study(noisy(above=-0.1)))  # the noisy one
    assert best.startswith("same and mean cannot be told apart, nor can same and zero: ") and "mean does less" in best
    tied = {row["method"]: row["tied with"] for row in page.areas(study(noisy()))}
    assert tied == {"zero": [["same"]], "mean": [["same"]], "same": [["zero", "mean"]]}


def test_all_largest_groups_without_a_decided_pair():
    pairs = lambda *texts: {frozenset(text) for text in texts}  # noqa: E731
    groups = lambda ranked, undecided: [*verdict.groups_of_tied(ranked, undecided)]  # noqa: E731
    assert groups("abcd", pairs("ab", "bc", "ac", "cd")) == [["a", "b", "c"], ["c", "d"]]
    assert groups("abcd", pairs("ac", "bd")) == [["a", "c"], ["b", "d"]]
    assert groups("abc", pairs()) == []
    assert groups("abc", pairs("ab", "bc", "ac")) == [["a", "b", "c"]]
    random = np.random.default_rng(0)
    for density in np.linspace(0.1, 0.9, 30):
        undecided = {frozenset(pair) for pair in combinations("abcdefgh", 2) if random.random() < density}
        sets = [set(some) for n in range(2, 9) for some in combinations("abcdefgh", n)
                if all(frozenset(pair) in undecided for pair in combinations(some, 2))]  # fmt: skip
        expected = sorted(sorted(group) for group in sets if not any(group < other for other in sets))
        assert groups("abcdefgh", undecided) == expected


@pytest.mark.parametrize("decided", ["none", "in threes"])
def test_a_verdict_on_many_tied_methods_does_not_hang(decided):
    """Of 36 tied methods, 2^36 groups are no largest ones; with each third decided, 3^12 are."""
    found, names = study(runs(n_seeds=1)), [f"m{number:02}" for number in range(36)]
    row, area = found.ranking.iloc[0].to_dict(), found.areas["loss"]["zero"]
    pairs = [(names[i], names[j]) for i in range(36) for j in range(i + 1, 36)]
    decides = lambda one, other: decided != "none" and names.index(one) // 3 == names.index(other) // 3  # noqa: E731
    ranking = [row | {"method": one, "other": other, "better": one if decides(one, other) else ""}
               for one, other in pairs]  # fmt: skip
    areas = {"loss": {name: replace(area, value=1 + i / 100) for i, name in enumerate(names)}}
    many = replace(found, methods=names, areas=areas, comparisons=pd.DataFrame(ranking))
    signal.signal(signal.SIGVTALRM, lambda *_: pytest.fail("it takes more than 20 seconds of a processor"))
    signal.setitimer(signal.ITIMER_VIRTUAL, 20)
    try:
        said = verdict.verdict(many)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if decided == "none":
        assert said.startswith(", ".join(names[:-1]) + f" and {names[-1]} cannot be told apart: the area")
    else:
        first = [name for i, name in enumerate(names) if i % 3 == 0]
        assert said.startswith(", ".join(first[:-1]) + f" and {first[-1]} cannot be told apart, nor can ")
        assert "nor can the methods of 195 or more other groups (comparisons.csv has all pairs): " in said
        assert said.count("nor can") == 5 and len(groups_in(said)) == 5


def test_the_interval_that_the_verdict_prints_leaves_out_0_where_it_decides():
    for documents in (noisy(), noisy(noise=0.4), runs(), runs(n_seeds=1)):
        found = study(documents)
        said = verdict.verdict(found)
        ends = re.search(r"[+-]\d\.\d{4} \[([+-]\d\.\d{4}), ([+-]\d\.\d{4})\]", said)
        low, high = float(ends[1]), float(ends[2])
        assert (low > 0 or high < 0) == ("does the least damage" in said)
        rows = found.comparisons.query("metric == 'loss' and fraction != fraction")
        assert f"{abs(low):.4f}" in {f"{abs(end):.4f}" for end in (*rows["low"], *rows["high"])}


def test_the_verdict_of_a_clear_winner():
    two = {key: documents for key, documents in runs().items() if key[0] != "same"}
    said = verdict.verdict(study(two))
    measured = study(two)
    (row,) = measured.comparisons.query("metric == 'loss' and fraction != fraction").to_dict("records")
    assert said.startswith("mean does the least damage: the area under the loss is ")
    assert f"difference {-row['difference']:+.4f} [{-row['high']:+.4f}, {-row['low']:+.4f}] (Holm's p < 0.001" in said


def test_one_seed_one_method_and_half_of_the_fractions_are_said():
    one = {key: documents for key, documents in runs().items() if key[1] == 0}
    assert verdict.verdict(study(one)).endswith("One seed: this may not hold for other neurons.")
    assert "nothing to compare" in verdict.verdict(study({("zero", 0): one["zero", 0]}))
    half = {key: documents[documents["fraction"] < 1] for key, documents in one.items()}
    assert "the loss up to 50%" in verdict.verdict(study(half))


def test_methods_with_other_seeds_are_not_compared():
    apart = {("zero", 0): runs()["zero", 0], ("mean", 1): runs()["mean", 1]}
    assert "none is called the best" in verdict.verdict(study(apart))


def test_areas_and_verdict_are_of_the_seeds_and_fractions_that_all_methods_have():
    """Mean has the hard seed alone; zero, which is worse on it, has easier ones as well."""
    two = {key: documents for key, documents in runs().items() if key[0] != "same"}
    harder = lambda table: table.assign(loss=table["loss"] + 3 * table["n"] * (table["fraction"] > 0))  # noqa: E731
    of_one = {("zero", 0): harder(two["zero", 0]), ("mean", 0): harder(two["mean", 0])}
    apart = {**of_one, ("zero", 1): two["zero", 1], ("zero", 2): two["zero", 2]}
    found, expected = study(apart), study(of_one)
    assert verdict.verdict(found) == verdict.verdict(expected) and verdict.verdict(found).startswith(
        "mean does the least damage"
    )
    assert str(page.areas(found)) == str(page.areas(expected))
    of_zero = {key: documents for key, documents in apart.items() if key[0] == "zero"}
    assert found.levels["loss"]["zero"] == study(of_zero).levels["loss"]["zero"]  # the curves are of all seeds

    shorter = {key: table[table["fraction"] < 1] if key[0] == "zero" else table for key, table in two.items()}
    both = {key: table[table["fraction"] < 1] for key, table in two.items()}
    assert str(page.areas(study(shorter))) == str(page.areas(study(both))) and study(shorter).reach == 0.5
    assert "up to 50%" in verdict.verdict(study(shorter))


def test_a_point_that_one_seed_lacks_is_drawn_from_the_others():
    """As when a second seed was run at 100 % alone."""
    two = {key: documents for key, documents in runs(n_seeds=2).items() if key[0] == "zero"}
    short = {**two, ("zero", 1): two["zero", 1].query("fraction != 0.5")}
    line, alone, both = (dict(study(d).levels["loss"]["zero"]) for d in (short, {("zero", 0): two["zero", 0]}, two))
    assert list(line) == [0.0, 0.5, 1.0]
    assert line[0.5] == alone[0.5] and line[1.0] == both[1.0] and line[0.0] == both[0.0]


def test_a_line_from_end_to_end_is_not_taken_for_a_curve():
    """Mean was run at 100 % alone: the areas of 0 and 100 % would say something else than those of zero's curve."""
    two = {key: documents for key, documents in runs().items() if key[0] != "same"}
    ends = {key: t[t["fraction"] != 0.5] if key[0] == "mean" else t for key, t in two.items()}
    found = study(ends)
    assert "none is called the best" in verdict.verdict(found) and math.isnan(found.areas["loss"]["zero"].value)
    assert found.comparisons["fraction"].tolist() == [1.0, 1.0]  # of loss and top1; no area


def test_one_odd_run_does_not_keep_the_others_from_being_compared():
    """Mean was run at 100 % alone, or with another seed: the verdict on the others is that without it."""
    without = {key: table for key, table in runs().items() if key[0] != "mean"}
    ends = {key: t[t["fraction"] != 0.5] if key[0] == "mean" else t for key, t in runs().items()}
    elsewhere = {**without, ("mean", 7): runs()["mean", 0]}
    for odd in (ends, elsewhere):
        found, expected = study(odd), study(without)
        assert verdict.verdict(found) == verdict.verdict(expected) + (
            " mean is left out, for lack of results on the same seeds and fractions."
        )
        areas = {row["method"]: row for row in page.areas(found)}
        assert math.isnan(areas.pop("mean")["area of loss"][0])
        assert str([row["area of loss"] for row in areas.values()]) == str(
            [row["area of loss"] for row in page.areas(expected)]
        )


def test_where_nothing_was_ablated_there_is_no_area():
    clean = {key: table[table["fraction"] == 0] for key, table in runs().items()}
    found = study(clean)
    assert "none is called the best" in verdict.verdict(found) and all(
        math.isnan(a.value) for a in found.areas["loss"].values()
    )


def test_names_are_no_markup():
    odd = {(f"<b>{method}$<!--", seed): table for (method, seed), table in runs().items()}
    found = study(odd)
    names = {trace.get("name") for trace in plots.figures(found)["loss|"]["data"]}
    assert "&lt;b&gt;zero$&lt;!--" in names
    text = page.render("t", [(found, None, {})], [("a", "failed", "got <!-- a page <script>x</script>")])
    content = text.split('id="content">')[1].split("</script>")[0]
    assert "<" not in content and json.loads(content)["failures"][0][2] == "got <!-- a page <script>x</script>"


def of(figure: dict, name: str) -> dict:
    (found,) = [trace for trace in figure["data"] if trace.get("name") == name]
    return found


def test_a_difference_is_that_of_the_curves_whichever_method_it_is_to():
    figures = plots.figures(study(runs()))
    assert set(figures) == {f"{m}|{r}" for m in ("loss", "top1") for r in ("", "zero", "mean", "same")}
    for reference, other in (("zero", "mean"), ("mean", "zero")):
        apart = np.array(of(figures[f"loss|{reference}"], other)["y"])
        curves = [np.array(of(figures["loss|"], name)["y"]) for name in (other, reference)]
        np.testing.assert_allclose(apart, curves[0] - curves[1], atol=1e-12)
        low, high = np.array(of(figures[f"loss|{reference}"], other)["customdata"]).T
        assert (low <= apart).all() and (apart <= high).all()
    assert of(figures["top1|"], "mean")["y"][0] == pytest.approx(50)  # in %
    assert of(figures["loss|"], "mean")["x"] == [0, 50, 100]


def test_areas_and_who_beats_whom():
    rows = {row["method"]: row for row in page.areas(study(runs()))}
    assert [rows[m]["beats"] for m in ("zero", "mean", "same")] == [[0], [1], [1]]
    assert [rows[m]["beaten by"] for m in ("zero", "mean", "same")] == [[2], [0], [0]]
    value, low, high = rows["zero"]["area of loss"]
    assert low < value < high and value > rows["mean"]["area of loss"][0] > 1


def test_a_method_has_one_colour_in_the_chart_and_in_the_table():
    """Two of one's own, of which each alone would have the same."""
    found = study(
        {(f"own{n}", seed): of_run for n in (0, 1) for (name, seed), of_run in runs(2).items() if name == "mean"}
    )
    drawn = {method: of(plots.figures(found)["loss|"], method)["line"]["color"] for method in ("own0", "own1")}
    assert {row["method"]: row["colour"] for row in page.areas(found)} == drawn and len(set(drawn.values())) == 2


def test_half_of_the_accuracy_is_gone_where_the_line_crosses_half():
    accuracy = np.array([[0.8], [0.6], [0.2]]) + np.zeros(5)
    rows = page.areas(study({("zero", 0): table(np.full((3, 5), 3.0), accuracy)}))
    assert rows[0]["half gone"] == [pytest.approx(75)]
    rows = page.areas(study({("zero", 0): table(np.full((3, 5), 3.0), np.full((3, 5), 0.7))}))
    assert math.isnan(rows[0]["half gone"][0])


def test_the_page_is_one_file_of_valid_json_and_a_name_is_no_code():
    failures = [("a-run", "failed", "ValueError: </script><script>alert(1)</script>")]
    text = page.render("<b>sweep</b>", [(study(runs()), None, {"x": math.nan})], failures)
    assert "<title>&lt;b&gt;sweep&lt;/b&gt;</title>" in text and "alert(1)</script>" not in text
    (content,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', text, re.DOTALL)
    found = json.loads(content)
    assert found["failures"] == [list(failures[0])] and found["studies"][0]["setup"] == {"x": None}
    assert not re.findall(r'(?:src|href)="', text.partition("<body>")[2])


# Neurons


@pytest.fixture
def activations() -> list[torch.Tensor]:
    """`[tokens, neurons]` of two layers; the third neuron of the second one is skewed."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(3000, 4, generator=generator), torch.randn(3000, 6, generator=generator) + 2]
    layers[1][:, 2] = layers[1][:, 2].exp()
    return layers


def statistics(layers: list[torch.Tensor]) -> Statistics:
    moments = [Moments.of(x) for x in layers]
    counts = []
    for x, m in zip(layers, moments, strict=True):
        index = bin_index(x, m.minimum, m.maximum, 100)
        counts.append(torch.stack([torch.bincount(row, minlength=100) for row in index]).int())
    return Statistics(moments, {Histogram(100): counts})


def unpacked(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_each_neuron_has_its_moments_peak_and_histogram(activations):
    found = neurons.neuron_summary(statistics(activations), 2)
    x = [column for layer in activations for column in layer.T.numpy()]
    assert found["widths"] == [4, 6] and found["heads"] == 2 and found["tokens"] == 3000 and found["all"]
    np.testing.assert_allclose(unpacked(found["mean"], "<f4"), [v.mean() for v in x], atol=1e-5)
    np.testing.assert_allclose(unpacked(found["median"], "<f4"), [np.median(v) for v in x], atol=0.5)
    heights = unpacked(found["heights"], "u1").reshape(10, 100)
    for i, values in enumerate(x):
        counts, edges = np.histogram(values, 100)
        np.testing.assert_allclose(heights[i], np.round(counts / counts.max() * 255), atol=6)
        width = edges[1] - edges[0]
        fullest = (
            edges[:-1][counts >= counts.max() - 2] + width / 2
        )  # values within rounding of an edge may change bins
        assert np.abs(unpacked(found["peak"], "<f4")[i] - fullest).min() < 1e-3 * width + 1e-5
    layer, index, skew = found["least"][0]
    assert (layer, index) == (1, 2) and skew == pytest.approx(stats.skew(x[6]), rel=0.05)


def test_by_layer_the_peak_is_that_far_from_the_mean(activations):
    figure = neurons.neuron_summary(statistics(activations), None)["layers"]
    spread = of(figure, "spread (standard deviation)")["y"]
    assert spread == pytest.approx([float(np.median(layer.numpy().std(0))) for layer in activations], rel=1e-3)
    assert len(of(figure, "|peak - mean|")["y"]) == 2


def test_more_calibration_data_find_the_same_peak_more_often(activations):
    figure = neurons.neuron_summary(statistics(activations), None)["stability"]
    same, near = (np.array(of(figure, name)["y"]) for name in ("the same bin", "within one bin"))
    assert (near >= same).all() and same[-1] > same[0] and (same <= 100).all()
    assert of(figure, "the same bin")["x"][4] == 3000


def test_of_a_large_model_the_least_symmetrical_are_kept(activations, monkeypatch):
    monkeypatch.setattr(neurons, "MAX_HISTOGRAM_BYTES", 300)
    found = neurons.neuron_summary(statistics(activations), None)
    assert not found["all"] and len(found["layer"]) == len(found["index"]) == 3
    assert (1, 2) in set(zip(found["layer"], found["index"], strict=True))
    assert len(unpacked(found["heights"], "u1")) == 300
