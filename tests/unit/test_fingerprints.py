"""What is another result must have another name: fingerprints of texts and of weights."""

import importlib
import os
import sys
from pathlib import Path

import pytest
from PIL.Image import new

from ablation_sweeps.base import environment
from ablation_sweeps.base.errors import UserError
from ablation_sweeps.datasets import hub_rows
from ablation_sweeps.datasets.image_folder import ImageFolder
from ablation_sweeps.datasets.text_files import TextFiles
from ablation_sweeps.experiment import identity
from ablation_sweeps.models.pretrained import fingerprint


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


def test_text_that_is_no_utf8_is_refused(folder: Path):
    (folder / "a" / "7.txt").write_bytes("Größe".encode("latin1"))
    for encoding in ("latin1", "utf-16", "utf-16-le"):
        (folder / "a" / "7.txt").write_bytes("Größe".encode(encoding))
        with pytest.raises(UserError, match=r"7\.txt is not UTF-8; convert it"):
            list(texts(folder).examples("evaluation"))


def test_a_damaged_letter_is_said_and_no_more(folder: Path, caplog):
    (folder / "a" / "7.txt").write_bytes(b"a" * 2000 + b"\xe4")
    for split in ("evaluation", "calibration"):
        list(texts(folder).examples(split))
    assert [record.message for record in caplog.records] == [
        f"{folder}/a/7.txt: 1 of 2,001 characters are not valid UTF-8"
    ]


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


def test_a_picture_of_the_same_size_changes_the_fingerprint_of_a_folder(tmp_path: Path):
    for i in range(3):
        (tmp_path / "cat").mkdir(exist_ok=True)
        new("L", (90, 90), i).save(tmp_path / "cat" / f"{i}.bmp")
    folder = ImageFolder("images", str(tmp_path), "folder", None, 0.2)
    before, size = folder.fingerprint(), (tmp_path / "cat" / "1.bmp").stat().st_size
    new("L", (90, 90), 9).save(tmp_path / "cat" / "1.bmp")
    assert (tmp_path / "cat" / "1.bmp").stat().st_size == size and folder.fingerprint() != before


def test_a_large_file_is_known_by_parts_of_it_all(tmp_path: Path, monkeypatch):
    content = bytearray(os.urandom(68 << 20))
    (tmp_path / "rows.jsonl").write_bytes(content)
    before = hub_rows.content(str(tmp_path))
    content[30 << 20 : 33 << 20] = bytes(3 << 20)
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert hub_rows.content(str(tmp_path)) != before


METHOD = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Own:
    label: str
    {}
"""


def test_a_class_of_ones_own_that_is_edited_is_another_one(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    names = []
    for comment in ("# wrong", "# right"):
        (tmp_path / "own_method.py").write_text(METHOD.format(comment))
        sys.modules.pop("own_method", None)
        names.append(identity.class_of(importlib.import_module("own_method").Own("own")))
    assert names[0] != names[1] and all(name.startswith("own_method.Own ") for name in names)
    assert identity.class_of(folder_of_images := ImageFolder("a", None, "folder", None, 0.2)) == (
        f"{type(folder_of_images).__module__}.ImageFolder"
    )


def test_a_method_of_ones_own_beside_ours_does_not_change_our_code(tmp_path: Path, monkeypatch):
    folder = tmp_path / "ablation_sweeps"
    monkeypatch.setattr(environment, "__file__", str(folder / "base" / "environment.py"))
    (folder / "methods").mkdir(parents=True)
    (folder / "base").mkdir()

    def after(name: str) -> str:
        (folder / name).write_text(f"{name} is edited")
        return environment.code.__wrapped__()

    codes = [after(name) for name in ("base/job.py", "methods/mean.py", "methods/mine.py")]
    assert codes[0] != codes[1] == codes[2]


def test_the_list_of_our_modules_is_whole():
    package = Path(environment.__file__).parents[1]
    for folder, names in environment.PLUGINS.items():
        assert {file.stem for file in (package / folder).glob("*.py")} == {*names, "__init__"}


@pytest.mark.parametrize("folder", ["models", "datasets", "methods", "selections"])
def test_a_module_that_a_user_puts_beside_ours_is_not_ours(folder: str):
    ours, *_ = environment.PLUGINS[folder]
    assert environment.is_ours(f"ablation_sweeps.{folder}.{ours}")
    assert not environment.is_ours(f"ablation_sweeps.{folder}.mine")


def test_a_package_of_ones_own_that_is_called_as_ours_is_not_ours(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "mean.py").write_text(METHOD.format(""))
    assert identity.class_of(importlib.import_module("methods.mean").Own("own")).startswith("methods.mean.Own ")


@pytest.mark.parametrize(
    "name", ["README.md", ".git/HEAD", ".cache/huggingface/download/config.json.metadata", "results/a/multirun.yaml"]
)
def test_what_no_model_reads_does_not_change_its_fingerprint(tmp_path: Path, name: str):
    """Hydra writes its multirun.yaml before a launch with results in a model's folder is refused."""
    folder = tmp_path / ".models" / "one"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    before = fingerprint(str(folder))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("no weights")
    assert fingerprint(str(folder)) == before
    (folder / "generation_config.json").write_text("{}")
    assert fingerprint(str(folder)) != before
