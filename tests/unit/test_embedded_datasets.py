"""The data that needs no download: splits hold, orders hold, contents are what they say."""

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from ablation_sweeps.base.hashing import unit_hash
from ablation_sweeps.data.batch import Document
from ablation_sweeps.datasets import python_docs
from ablation_sweeps.datasets.digits import Digits
from ablation_sweeps.datasets.python_docs import PythonCode, PythonDocs

SPLITS = ("train", "calibration", "evaluation")
DATASETS = [PythonDocs(label="python_docs"), PythonCode(label="python_code"), Digits(label="digits")]
SHARES = {"python_docs": (0.8, 0.1, 0.1), "python_code": (0.8, 0.1, 0.1), "digits": (0.7, 0.1, 0.2)}
every_dataset = pytest.mark.parametrize("dataset", DATASETS, ids=lambda d: d.label)


def names(dataset, split):
    return [example.name for example in dataset.examples(split)]


@every_dataset
def test_splits_are_disjoint_and_have_their_shares(dataset):
    by_split = [names(dataset, split) for split in SPLITS]
    everything = [name for found in by_split for name in found]
    assert len(everything) == len(set(everything)) > 300
    for found, share in zip(by_split, SHARES[dataset.label], strict=True):
        assert len(found) / len(everything) == pytest.approx(share, abs=0.04)


@every_dataset
@pytest.mark.parametrize("split", SPLITS)
def test_order_is_that_of_the_hash(dataset, split):
    hashes = [unit_hash(name.removeprefix("doc/").removeprefix("code/")) for name in names(dataset, split)]
    assert hashes == sorted(hashes)


def test_fingerprint_is_the_same_each_time_and_each_process():
    names = [(type(dataset).__module__, type(dataset).__name__) for dataset in DATASETS]
    program = "".join(
        f"from {module} import {name}; print({name}(label='other').fingerprint());" for module, name in names
    )
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for dataset, other in zip(DATASETS, elsewhere.stdout.split(), strict=True):
        assert dataset.fingerprint() == dataset.fingerprint() == other


@every_dataset
def test_a_field_that_does_not_exist_is_refused(dataset):
    with pytest.raises(ValidationError):
        type(dataset)(label="x", lable="y")


def test_fingerprint_sees_one_changed_letter():
    before, after = [Document("a", "text")], [Document("a", "test")]
    assert python_docs.content_hash(before) != python_docs.content_hash(after)


def test_a_document_stays_in_its_split_when_others_disappear():
    documents = python_docs.docs()
    for split in SPLITS:
        all_names = [d.name for d in python_docs.in_split(documents, split)]
        half = [d.name for d in python_docs.in_split(documents[::2], split)]
        kept = {d.name for d in documents[::2]}
        assert half == [name for name in all_names if name in kept]


def test_docs_and_code_of_a_module_are_in_the_same_split():
    """Docstrings stand in the code too: a model trained on the one must not be scored on the other."""
    for split in SPLITS:
        docs = {n.removeprefix("doc/") for n in names(DATASETS[0], split) if n.startswith("doc/")}
        for other in set(SPLITS) - {split}:
            assert not docs & {n.removeprefix("code/") for n in names(DATASETS[1], other)}


def test_no_paragraph_of_the_docs_stands_in_two_splits():
    paragraphs = {
        split: {
            key
            for document in DATASETS[0].examples(split)
            for paragraph in document.text.split("\n\n")
            if len(key := " ".join(paragraph.split())) >= python_docs.SHARED_PARAGRAPH
        }
        for split in SPLITS
    }
    assert not paragraphs["train"] & paragraphs["evaluation"]
    assert not paragraphs["train"] & paragraphs["calibration"]
    assert not paragraphs["calibration"] & paragraphs["evaluation"]


def test_the_docs_are_parsed_once_and_kept(tmp_path, monkeypatch):
    """Another process reads them; what is damaged, or of other sources, is parsed anew."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    some = python_docs.code()[:60]
    monkeypatch.setattr(python_docs, "code", lambda: some)
    once, parse = python_docs.docs.__wrapped__, python_docs.parsed
    times = []
    monkeypatch.setattr(python_docs, "parsed", lambda *args: times.append(1) or parse(*args))
    first = once()
    (file,) = (tmp_path / "ablation_sweeps").iterdir()
    assert first == once() and len(times) == 1
    file.write_text(file.read_text().replace("the", "teh", 1))
    assert once() == first and len(times) == 2
    changed = (*some, Document("code/new", '"""' + "New to this Python. " * 20 + '"""'))
    monkeypatch.setattr(python_docs, "code", lambda: changed)
    assert len(once()) == len(first) + 1 and len(times) == 3
    (other,) = set((tmp_path / "ablation_sweeps").iterdir()) - {file}
    other.write_bytes(file.read_bytes())  # whole, but those of another Python
    assert len(once()) == len(first) + 1 and len(times) == 4


@pytest.mark.parametrize("content", ["", "[1]", '{"documents": [["a"]], "sha256": ""}'])
def test_a_file_that_holds_no_docs_is_written_again(tmp_path, monkeypatch, content):
    known = list(python_docs.docs())
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr(python_docs, "parsed", lambda *_: known)
    first = python_docs.docs.__wrapped__()
    (file,) = (tmp_path / "ablation_sweeps").iterdir()
    good = file.read_text()
    file.write_text(content)
    assert python_docs.docs.__wrapped__() == first and file.read_text() == good


def test_docs_that_cannot_be_kept_are_there_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "a_file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "a_file"))
    assert python_docs.docs.__wrapped__() == python_docs.docs()


def test_docstrings_in_the_order_of_the_lines():
    text = '"""Module."""\nclass A:\n  "Class."\n  def f(self):\n    "Method."\nasync def g():\n  "Function."\n'
    assert python_docs.docstrings(text) == ["Module.", "Class.", "Method.", "Function."]


def test_tests_and_installed_packages_are_left_out():
    found = {name for split in SPLITS for name in names(DATASETS[1], split)}
    assert {"code/json/decoder", "code/queue"} <= found
    assert not [n for n in found if {"test", "tests", "site-packages"} & set(n.split("/"))]
    assert all(len(d.text) >= python_docs.MIN_CHARACTERS for d in python_docs.docs())


def test_digits_are_the_pictures_of_scikit_learn():
    from sklearn.datasets import load_digits

    data, seen = load_digits(), 0
    for split in SPLITS:
        for picture in DATASETS[2].examples(split):
            index = int(picture.name.removeprefix("digits/"))
            assert (picture.read().mode, picture.read().size) == ("L", (8, 8))
            np.testing.assert_allclose(np.asarray(picture.read()) / 255 * 16, data["images"][index], atol=0.04)
            assert picture.label == data["target"][index] and DATASETS[2].class_names()[picture.label]
            seen += 1
    assert seen == 1797
