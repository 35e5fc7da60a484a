"""report.html of a real sweep in headless Chromium: it opens from disk without the network, and its controls work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import FAULTS, Launch

from ablation_sweeps.neurons.collect import load_cached_statistics
from ablation_sweeps.neurons.statistics import Histogram
from ablation_sweeps.report.write import write
from ablation_sweeps.results import run_folder

OPTIONS = ("-m", "method=zero,mean,peak,raises", "seed=0,1", "fraction.values=[0.5,1]", "eval.tokens=3000",
           "statistics.tokens=2000", "tracking=none")  # fmt: skip

OF_IMAGES = ("-m", "model=tiny_vit", "dataset=digits", "sweep=images", "method=zero,mean", "fraction.values=[0.5,1]",
             "eval.images=60", "statistics.tokens=1000", "tracking=none")  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture
def report(launch: Launch, faults: Path, sweep: Path, pictures: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of two sweeps, made once; two jobs fail. The files of its figures are empty: the page has charts of its own."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: Path(path).touch())
    page = sweep / "results" / "default" / "report.html"
    if not page.exists():
        done = launch(*FAULTS, *OPTIONS, f"results_dir={sweep / 'results'}")
        assert done.code == 1 and "2 of 8 jobs failed" in done.error
        done = launch(*OF_IMAGES, f"results_dir={sweep / 'results'}")
        assert done.code == 0, done.error
        write(page.parent, sweep / "results" / "images")
    return page


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium: make browser installs one where it may")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = started.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desk", "phone"])
def page(browser, report: Path, request) -> Iterator:
    """The opened page; at the end, nothing was said on the console, and nothing asked of a network."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert said == [] and asked == [report.as_uri()]
    page.close()


def curve(page, name: str) -> list[float]:
    """What the chart shows."""
    return page.evaluate("name => document.getElementById('curves').data.find(t => t.name === name).y", name)


def test_the_verdict_and_the_curves_are_there(page, report):
    assert any(word in page.text_content("#verdict") for word in ("does the least damage", "cannot be told apart"))
    assert "2 seeds" in page.text_content("#verdict")
    for chart in ("curves", "layers", "stability", "histogram"):
        assert page.locator(f"#{chart} svg.main-svg").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing to scroll to the side
    summary = (report.parent / "summary.csv").read_text().splitlines()
    (of_mean,) = [line for line in summary if "tiny_causal" in line and ",mean,loss," in line]
    clean = float(of_mean.split(",")[summary[0].split(",").index("clean")])
    assert curve(page, "mean")[0] == pytest.approx(clean)


def test_metric_and_reference_change_the_chart(page):
    loss = curve(page, "zero")
    page.select_option("#metric", "top1")
    top1 = curve(page, "zero")
    assert top1[0] > top1[-1] and loss[0] < loss[-1] and max(top1) > 10
    page.select_option("#reference", "mean")
    assert "minus mean's" in page.text_content("#curves .ytitle")
    assert page.evaluate("document.getElementById('curves').data.map(t => t.name)").count("mean") == 0
    page.select_option("#metric", "loss")
    page.select_option("#reference", "")
    assert curve(page, "zero") == loss
    page.select_option("#reference", "mean")
    apart = curve(page, "zero")
    page.select_option("#reference", "")
    assert apart == pytest.approx([a - b for a, b in zip(loss, curve(page, "mean"), strict=True)], abs=1e-9)


def test_a_click_on_the_legend_hides_a_curve_and_its_band(page):
    page.locator("#curves .legendtoggle").first.click()
    page.wait_for_function("document.getElementById('curves').data[0].visible === 'legendonly'")
    name = page.evaluate("document.getElementById('curves').data[0].legendgroup")
    hidden = page.evaluate("document.getElementById('curves').data.map(t => [t.legendgroup, t.visible])")
    assert all((of == name) == (visible == "legendonly") for of, visible in hidden if of)


def test_the_table_sorts(page):
    methods = lambda: page.locator("#areas td:first-child span").all_text_contents()  # noqa: E731
    values = lambda: [float(text.split(" ")[0]) for text in page.locator("#areas td:nth-child(5)").all_text_contents()]  # noqa: E731
    page.get_by_role("button", name="area of loss", exact=True).click()
    assert values() == sorted(values()) and sorted(methods()) == ["mean", "peak", "zero"]
    page.get_by_role("button", name="area of loss", exact=True).click()
    assert values() == sorted(values(), reverse=True)


def test_a_neuron_is_found_by_layer_head_and_index(page, report):
    run = next(path.parent for path in report.parent.glob("*/rows.parquet") if "-peak-" in path.parent.name)
    environment = run_folder.environment(run)
    statistics = load_cached_statistics(report.parents[1] / ".cache" / environment["statistics"], Histogram(100))
    assert statistics is not None
    moments = statistics.moments[2]
    size = len(moments.total) // environment["n_heads"]
    for name, value in (("layer", 2), ("head", 1), ("index", 3)):
        page.fill(f"#{name}", str(value))
    neuron = size + 3
    said = page.text_content("#found")
    assert f"Layer 2, neuron {neuron}:" in said
    assert float(said.split("mean ")[1].split(",")[0]) == pytest.approx(float(moments.mean[neuron]), rel=5e-3)
    heights = page.evaluate("Array.from(document.getElementById('histogram').data[0].y)")
    counts = statistics.counts[Histogram(100)][2][neuron].double()
    assert heights == pytest.approx((counts / counts.max() * 255).round().tolist(), abs=0.51)
    page.fill("#layer", "99")
    assert "no such neuron" in page.text_content("#found")


def test_what_failed_is_said_with_its_reason(page):
    rows = page.locator("#failed tr").all_text_contents()
    assert len(rows) == 2 and all("raises" in row and "no such luck" in row for row in rows)


def test_the_configuration_is_there(page):
    setup = json.loads(page.locator("#setup").text_content())
    assert setup["configuration"]["eval"]["tokens"] == 3000 and setup["environment"]["packages"]["torch"]


def test_the_other_model_is_chosen(page):
    said, loss = page.text_content("#verdict"), curve(page, "zero")
    page.select_option("#study", index=1)
    assert "60 images" in page.text_content("#about") and page.text_content("#verdict") != said
    assert "nats per image" in page.text_content("#curves .ytitle") and curve(page, "zero") != loss
    assert page.locator("#areas td:first-child span").all_text_contents() == ["zero", "mean"]
    assert not page.locator("#neurons").is_visible()  # neither zero nor mean has left histograms
    page.select_option("#study", index=0)
    assert page.text_content("#verdict") == said and curve(page, "zero") == loss
    assert page.locator("#neurons").is_visible()


def test_in_print_the_whole_table_is_there_and_no_control(page):
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 794, "height": 1123})  # A4
    assert page.evaluate("document.getElementById('areas').getBoundingClientRect().right <= window.innerWidth")
    assert not page.locator("#metric").is_visible() and page.locator("#areas small").first.is_visible()
