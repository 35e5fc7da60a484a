"""The same content under two names is one example, and is never both calibrated on and evaluated."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from command import Launch, text, write_images, write_texts
from PIL import Image

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.hashing import fingerprint_of_file, signature
from ablation_sweeps.data.batch import SPLITS, Document, Picture
from ablation_sweeps.datasets.dataset import Dataset
from ablation_sweeps.datasets.text_files import TextFiles
from ablation_sweeps.experiment import job
from ablation_sweeps.experiment.session import Session

N = 24
TEXTS = [text(i % 14) + (" \n" if i % 3 else "") for i in range(N)]  # ten are copies, but for white space at their end
PIXELS = np.random.default_rng(0).integers(0, 256, (14, 8, 8, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Own(Dataset):
    """A dataset of a user: nothing but examples."""

    modality: str
    label: str = "own"

    def fingerprint(self) -> str:
        return self.modality

    def class_names(self) -> list[str]:
        return list("abcde")

    def examples(self, split):
        for i in range(N):
            if (i % 3 == 0) == (split == "calibration"):
                name = f"e{i}"
                read = partial(Image.fromarray, PIXELS[i % 14])
                yield Document(name, TEXTS[i]) if self.modality == "text" else Picture(name, read, i % 5)


def text_files(folder: Path) -> list[str]:
    for i, words in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(words)
    return ["dataset=text_files", f"dataset.path={folder}"]


def rows_of_a_file(folder: Path) -> list[str]:
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": words}) for words in TEXTS))
    return ["dataset=text_files", f"dataset.path={folder / 'x.jsonl'}"]


def separate_calibration(folder: Path) -> list[str]:
    write_texts(folder / "evaluated", n=14)
    write_texts(folder / "calibrated", n=5)
    (folder / "calibrated" / "0.txt").rename(folder / "calibrated" / "other name.txt")
    calibrated = f"dataset.calibration_path={folder / 'calibrated'}"
    return ["dataset=text_files", f"dataset.path={folder / 'evaluated'}", calibrated]


def saved_text(folder: Path, *more: str) -> list[str]:
    from datasets import Dataset

    Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)
    return ["dataset=hub_text", f"dataset.path={folder}", *more]


def saved_images(folder: Path) -> list[str]:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    rows = {"image": [Image.fromarray(PIXELS[i % 14]) for i in range(N)], "label": [i % 5 for i in range(N)]}
    Dataset.from_dict(rows, Features({"image": ImageColumn(), "label": ClassLabel(5)})).save_to_disk(folder)
    return ["dataset=hub_images", f"dataset.path={folder}"]


def image_folder(folder: Path) -> list[str]:
    """Copies are of another class and of another format."""
    for i in range(N):
        (folder / "abcde"[i % 5]).mkdir(exist_ok=True)
        Image.fromarray(PIXELS[i % 14]).save(folder / "abcde"[i % 5] / f"{i}.{'png' if i < 14 else 'BMP'}")
    return ["dataset=image_folder", f"dataset.path={folder}"]


KINDS = [text_files, rows_of_a_file, separate_calibration, saved_text, saved_images, image_folder]


def content(example: Document | Picture) -> object:
    return example.text.strip() if isinstance(example, Document) else example.read().convert("RGB").tobytes()


@pytest.fixture
def given(job_of, saved, tmp_path) -> Callable[..., job.Job]:
    def given(kind: Callable, *options: str) -> job.Job:
        (tmp_path / "data").mkdir(exist_ok=True)
        chosen = kind(tmp_path / "data")
        images = "image" in chosen[0]
        kind_of_model, family = ("timm", "timm_vit") if images else ("causal_lm", "llama")
        model = (f"model={kind_of_model}", f"model.path={saved(family)}")
        return job_of(*model, *chosen, "batch_tokens=60", f"results_dir={tmp_path / 'results'}", *options)

    return given


def names(session: Session, made: job.Job, split: str) -> list[str]:
    batches = session.batches(made, split)
    placed = sorted((place, name) for batch in batches for place, name in zip(batch.index, batch.names, strict=True))
    return [name for _, name in placed]


def check_each_once(made: job.Job, caplog) -> None:
    examples = {split: list(made.dataset.examples(split)) for split in SPLITS}
    expected, seen = {}, set()
    for split in SPLITS:
        first = {content(e): e.name for e in reversed(examples[split])}
        expected[split] = [e.name for e in examples[split] if first[content(e)] == e.name and content(e) not in seen]
        seen |= set(first)
    dropped = {split: len(examples[split]) - len(expected[split]) for split in SPLITS}
    assert dropped["evaluation"] and all(expected.values()), "the data of this test hold no copies"
    with caplog.at_level(logging.WARNING):
        session = Session()
        found = {split: names(session, made, split) for split in reversed(SPLITS)}
    assert found == expected
    said = [record.message for record in caplog.records if "counts once" in record.message]
    assert len(said) == sum(map(bool, dropped.values()))
    for split, number in dropped.items():
        words = " ".join(line for line in said if f"its {split} split" in line)
        assert sum(int(word) for word in words.split() if word.isdecimal()) == number


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_content_is_in_one_split_once(given, kind, caplog):
    check_each_once(given(kind), caplog)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_also_for_a_dataset_of_ones_own(given, modality, caplog):
    made = given(text_files if modality == "text" else image_folder)
    check_each_once(replace(made, dataset=Own(modality)), caplog)


def test_only_what_is_calibrated_on_is_not_evaluated(given):
    """One document gives all the statistics; copies of further ones are evaluated."""
    made = given(separate_calibration, "statistics.documents=1")
    calibrated, evaluated = (names(Session(), made, split) for split in SPLITS)
    assert len(calibrated) == 1 and len(evaluated) == 13


def test_a_stream_is_read_no_further_than_before(given, monkeypatch):
    read = []
    rows_in_order = type(given(saved_text).dataset).in_order

    def in_order(self, *arguments):
        for name, row in rows_in_order(self, *arguments):
            read.append(name)
            yield name, row

    made = given(lambda folder: saved_text(folder, "dataset.calibration_share=0.5"), "statistics.documents=2")
    monkeypatch.setattr(type(made.dataset), "in_order", in_order)
    names(Session(), made, "calibration")
    assert 2 <= len(read) < N / 2


def test_results_from_before_are_those_of_data_without_copies(tmp_path):
    """The fingerprint is as it always was; where copies once counted, it is another one."""
    folder = write_texts(tmp_path / "texts")
    data = TextFiles("texts", str(folder), None, 0.3, None, "text")
    as_ever = [{"path": [(f.name, fingerprint_of_file(f)) for f in sorted(folder.iterdir())]}, 0.3, None, "text"]
    assert data.fingerprint() == signature(as_ever)
    shutil.copy(folder / "1.txt", folder / "other.txt")
    as_ever[0]["path"] = [(f.name, fingerprint_of_file(f)) for f in sorted(folder.iterdir())]
    assert data.fingerprint() != signature(as_ever)


@pytest.mark.parametrize("on", ["text", "images"])
def test_nothing_but_copies_is_refused(launch: Launch, on_text, on_images, no_weights, tmp_path, on):
    if on == "text":
        for file in write_texts(tmp_path / "data", n=24).iterdir():
            file.write_text("the same text, again and again")
        error = launch(*on_text, f"dataset.path={tmp_path / 'data'}").error
        assert "its 24 documents are one and the same text" in error and "give other documents" in error
        shutil.copytree(tmp_path / "data", tmp_path / "again")
        options = (f"dataset.path={tmp_path / 'data'}", f"dataset.calibration_path={tmp_path / 'again'}")
    else:
        folder = write_images(tmp_path / "data", n=8)
        for file in folder.rglob("*.png"):
            shutil.copy(folder / "cat" / "0.png", file) if file.name + file.parent.name != "0.pngcat" else None
        options = (f"dataset.path={folder}",)
    error = launch(*(on_text if on == "text" else on_images), *options).error
    assert "nothing is left of its evaluation split" in error and "also in the calibration data" in error


@pytest.mark.parametrize("n", [1, 2])
def test_equal_pictures_in_two_class_folders(given, n, caplog):
    """One line names a pair of files, and is recorded with the run."""

    def relabelled(folder: Path) -> list[str]:
        write_images(folder, n=12)
        for place in range(n):
            shutil.copy(folder / "cat" / f"{place}.png", folder / "dog" / f"cat {place}.png")
        return ["dataset=image_folder", f"dataset.path={folder}"]

    made, session = given(relabelled), Session()
    with caplog.at_level(logging.WARNING):
        left_out = session.left_out(made)
    (sentence,) = [line for lines in left_out.values() for line in lines if "labels" in line][:1]
    match = re.search(r"different labels, such as (.*) and (.*); only the first of a pair is used$", sentence)
    assert match and {match[1], match[2]} in ({f"cat/{place}.png", f"dog/cat {place}.png"} for place in range(n))
    assert sentence in caplog.text
    assert sum(int(line[0]) for lines in left_out.values() for line in lines if "labels" in line) == n


def test_equal_pictures_of_one_class_are_no_conflict(given):
    def repeated(folder: Path) -> list[str]:
        write_images(folder)
        shutil.copy(folder / "cat" / "0.png", folder / "cat" / "again.png")
        return ["dataset=image_folder", f"dataset.path={folder}"]

    said = [line for lines in Session().left_out(given(repeated)).values() for line in lines]
    assert len(said) == 1 and re.match("1 (copy of an earlier example|example that is also in the calibration data) is "
                                       "left out", said[0])  # fmt: skip


def test_copies_of_all_that_is_calibrated_on_are_refused_before_a_pass(given):
    """Which texts are calibrated on is known once they are counted in tokens."""
    made = given(lambda folder: [*separate_calibration(folder)])
    for number in range(5, 14):
        (Path(made.dataset.path) / f"{number}.txt").unlink()
    with pytest.raises(UserError, match="nothing is left of its evaluation split: 5 examples that are also in"):
        names(Session(), made, "evaluation")
