"""Signatures recorded before the code was moved: a result keeps its name, wherever its classes live."""

from __future__ import annotations

import json
from pathlib import Path
from pkgutil import resolve_name

import pytest

from ablation_sweeps.base.moved import MOVED
from ablation_sweeps.experiment.config import from_dict

RECORDED = {
    "model=causal_lm dataset=text_files method=zero":
        "ac7f5b7c446e9d1c1a91a5ebc960d5d83f27ac5c0aea8a4023058828ec3208c6",
    "model=causal_lm dataset=text_files method=mean site=mlp_pre_out seed=3":
        "8480583c357e03d34c90c335f3ec351dc04053617e329ba5d38cdf487763c1f4",
    "model=causal_lm dataset=text_files method=peak statistics.passes=1 fraction=half":
        "bc7092b6577b4650315926e66be679be9de2d5f9cfd406e53f289f46a105ea16",
    "model=causal_lm dataset=text_files method=resample eval.target_stderr=0.1":
        "c17e59d0d051c80b9136dee7e1cf69ec8db880c2a51710679006ec810ed6ebbc",
    "model=causal_lm dataset=text_files method=resample_random":
        "2304e1874e98a197c995bf47cb0a671542cfd60100bc247304e93ff888019dd3",
    "model=masked_lm dataset=text_files method=peak method.estimator=kde":
        "3860d89ea2593ca84bff5fb4d6e9363a5ce402d24ffd37a5799351c91b6d6ff7",
    "model=image_classifier dataset=image_folder method=zero":
        "a4fb3892702c5bc9150b8aecf0cdf916e8d7d571d1fbcc2054fdbac58d08b000",
    "model=timm dataset=image_folder method=mean batch_tokens=99":
        "def3848012dfc14a1b28af611b228faba4c4e84bafb8ee8fa0571cc811ac64e7",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Files whose bytes never change: signatures look at nothing else."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("model/config.json", "model/model.safetensors", "texts/a.txt", "images/cat/1.png", "images/dog/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"the content of {name}".encode())
    return folder


def signature(job_of, data: Path, *options: str) -> str:
    paths = (f"model.path={data}/model", "model.name=a_name" if "model=timm" in options else None)
    images = f"{data}/images" if "dataset=image_folder" in options else f"{data}/texts"
    return job_of(*options, *filter(None, paths), f"dataset.path={images}").signature


@pytest.mark.parametrize("options", RECORDED)
def test_a_signature_is_what_it_was(job_of, data: Path, options: str):
    assert signature(job_of, data, *options.split()) == RECORDED[options]


def test_a_config_of_before_the_move_is_read_as_the_same_job(job_of, data: Path, tmp_path: Path):
    """A sweep that was launched then is retried, resumed and compared now."""
    made = job_of("model=causal_lm", "dataset=text_files", f"model.path={data}/model", f"dataset.path={data}/texts")
    text = json.dumps(made.config)
    for former, present in MOVED.items():
        text = text.replace(present, former)
    assert "ablation_sweeps.selection.Random" in text and "ablation_sweeps.job.Evaluation" in text
    assert from_dict(json.loads(text)).signature == made.signature


def test_what_was_moved_is_there():
    for present in MOVED.values():
        assert resolve_name(present)
