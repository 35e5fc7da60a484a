"""What is another result must have another name: fingerprints of texts and of weights."""

import os
from pathlib import Path

import pytest

from ablation_sweeps.data import UserError
from ablation_sweeps.datasets.text_files import TextFiles
from ablation_sweeps.hub import fingerprint


def texts(folder: Path, calibration: Path | None = None) -> TextFiles:
    return TextFiles("texts", str(folder), None if calibration is None else str(calibration), 0.3, None, "text")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts" / "a").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "texts" / "a" / f"{i}.txt").write_text(f"text {i}")
    return tmp_path / "texts"


def test_names_that_decide_the_split_are_part_of_a_text_fingerprint(folder: Path):
    before = texts(folder).fingerprint()
    (folder / "a").rename(folder / "b")
    assert texts(folder).fingerprint() != before


def test_a_letter_of_a_text_changes_its_fingerprint(folder: Path):
    before = texts(folder).fingerprint()
    (folder / "a" / "7.txt").write_text("Text 7")
    os.utime(folder / "a" / "7.txt", ns=(1, 1))
    assert texts(folder).fingerprint() != before


@pytest.mark.parametrize("inside", [".", "a", "a/3.txt"])
def test_calibration_text_that_would_be_evaluated_is_refused(folder: Path, inside: str):
    with pytest.raises(UserError, match=r"dataset\.calibration_path=.*would be evaluated as well"):
        texts(folder, folder / inside).check("text")


def test_one_weight_in_the_middle_changes_the_fingerprint_of_a_model(tmp_path: Path):
    weights = bytearray(os.urandom(3 << 20))
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = fingerprint(str(tmp_path))
    weights[len(weights) // 2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert fingerprint(str(tmp_path)) != before


def test_documentation_beside_a_model_does_not_change_its_fingerprint(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(str(tmp_path))
    (tmp_path / "README.md").write_text("a model")
    assert fingerprint(str(tmp_path)) == before
