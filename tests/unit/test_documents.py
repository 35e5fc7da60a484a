"""Files of text: each kind is read, and what cannot be read is named with its row."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from PIL import Image

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.datasets.hub_text import HubText
from ablation_sweeps.datasets.image_folder import ImageFolder
from ablation_sweeps.datasets.text_files import TextFiles
from ablation_sweeps.experiment.config import _label_of

TEXTS = [f'text {i}, with "quotes",\na second line, and {"ä" * i}' for i in range(12)]
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress, ".zst": lambda content: b"".join(
    zstandard.ZstdCompressor().compress(part) for part in (content[:50], content[50:]))}  # fmt: skip


def parquet(texts: list) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), sink)
    return sink.getvalue().to_pybytes()


def table(texts: list[str], delimiter: str) -> bytes:
    quoted = ['"{}"'.format(text.replace('"', '""')) for text in texts]
    return "\r\n".join([f"id{delimiter}text", *(f"{i}{delimiter}{q}" for i, q in enumerate(quoted))]).encode()


WRITE = {
    ".jsonl": lambda texts: "\n\n".join(json.dumps({"text": text}) for text in texts).encode(),
    ".JSON": lambda texts: json.dumps([{"id": 1, "text": text} for text in texts], indent=2).encode(),
    ".csv": lambda texts: table(texts, ","),
    ".tsv": lambda texts: table(texts, "\t"),
    ".Parquet": parquet,
}


def text_files(path: object, start: str | None = None) -> TextFiles:
    return TextFiles("texts", str(path), None, 0.3, start, "text")


def found(data: TextFiles) -> list[str]:
    data.check("text")
    return sorted(document.text for split in ("calibration", "evaluation") for document in data.examples(split))


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("bom", [False, True])
def test_each_kind_gives_the_same_texts(tmp_path: Path, kind: str, packing: str, bom: bool):
    content = b"\xef\xbb\xbf" * (bom and kind != ".Parquet") + WRITE[kind](TEXTS)
    (tmp_path / f"x{kind}{packing}").write_bytes(PACK[packing](content))
    assert found(text_files(tmp_path)) == found(text_files(tmp_path / f"x{kind}{packing}")) == sorted(TEXTS)
    assert _label_of(None, str(tmp_path / f"x{kind}{packing}")) == "x"


@pytest.mark.parametrize("packing", PACK)
def test_plain_text_is_read_whatever_the_case_of_its_suffix(tmp_path: Path, packing: str):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.Txt{packing}").write_bytes(PACK[packing](text.encode()))
    assert found(text_files(tmp_path)) == sorted(TEXTS)


ROWS = [json.dumps({"text": text}) for text in TEXTS]


def rows(wrong: str, encoding: str = "utf-8") -> bytes:
    return "\n".join([*ROWS[:3], wrong, *ROWS[3:]]).encode(encoding)


WRONG = {
    "a row that breaks off": ("x.jsonl", rows('{"text": "half'), ["dataset.path", "line 4", "not complete JSON"]),
    "a row that is a list": ("x.jsonl", rows("[1, 2]"), ["line 4", "a list, not an object"]),
    "a row nested too deep": ("x.jsonl", rows("[" * 100_000), ["line 4", "not complete JSON"]),
    "a field that is missing": ("x.jsonl", rows('{"content": ""}'), ["column=text", "line 4", "it has content"]),
    "a field that is no text": ("x.jsonl", rows('{"text": {"a": 1}}'), ["dataset.column=text", "line 4", "an object"]),
    "half a letter": ("x.jsonl", rows('{"text": "\\ud800"}'), ["line 4", "not UTF-8"]),
    "another encoding": ("x.jsonl", rows('{"text": "é"}', "latin1"), ["dataset.path", "line 4", "iconv"]),
    "another encoding in csv": ("x.csv", "text\na\né\nb".encode("latin1"), ["line 3", "not UTF-8"]),
    "a csv without the column": ("x.csv", b"id;text\n1;a", ["dataset.column=text", "no such column; it has id;text"]),
    "a comma that is not quoted": ("x.csv", b"text\na, b\n", ["line 2", "2 fields", "double quotes"]),
    "a quote that is not closed": ("x.csv", b'text\n"a, b\n', ["x.csv", "line 2"]),
    "an object": ("x.json", b'{"text": "a"}', ["an object, not an array of objects", ".jsonl"]),
    "a json that breaks off": ("x.json", b'[{"text": "a"},\n{"te', ["x.json", "not complete JSON", "line 2"]),
    "no parquet": ("x.parquet", b"PAR1 not a table PAR1", ["dataset.path", "x.parquet cannot be read"]),
    "a parquet of numbers": ("x.parquet", parquet([1, 2]), ["dataset.column=text", "row 1", "int"]),
    "a gz that breaks off": ("x.jsonl.gz", gzip.compress(rows("{}"))[:-20], ["x.jsonl.gz cannot be read"]),
    "a zst that breaks off": ("x.txt.zst", PACK[".zst"](rows("{}"))[:-9], ["x.txt.zst cannot be read"]),
    "no gz": ("x.txt.gz", b"plain", ["x.txt.gz cannot be read"]),
    "a picture": ("x.bin", bytes(range(256)) * 9, ["x.bin is not UTF-8", ".jsonl, .parquet, .csv, .tsv, .json"]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path, name: str, content: bytes, words: list[str]):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        text_files(tmp_path / name).check("text")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    for word in words:
        assert word in str(error.value)


def test_other_files_of_a_folder_are_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    before = text_files(tmp_path).fingerprint()
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "scores.csv").write_text("name,score\na,1")
    (tmp_path / "paper.PDF").write_text("")
    (tmp_path / "folder.txt").mkdir()
    assert found(text_files(tmp_path)) == sorted(TEXTS)
    assert text_files(tmp_path).fingerprint() == before
    said = "\n".join(caplog.messages)
    for name in ("package.json", "scores.csv", ".pdf (1)"):
        assert name in said
    (tmp_path / "more.csv").write_bytes(table(["one more text"], ","))
    assert "one more text" in found(text_files(tmp_path)) and text_files(tmp_path).fingerprint() != before


MAKE = {
    "pipe": os.mkfifo,
    "ring": lambda path: path.symlink_to(path),
    "dangling": lambda path: path.symlink_to("/no/where"),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("data", ["text", "image", "hub"])
def test_what_is_no_regular_file_is_never_opened(tmp_path: Path, kind: str, inside: bool, data: str):
    (tmp_path / "data").mkdir()
    for i in range(4):
        (tmp_path / "data" / f"{i}.txt").write_text(TEXTS[i])
        Image.new("L", (4, 4), i).save(tmp_path / "data" / f"{i}.png")
    odd = tmp_path / "data" / ("odd.png" if data == "image" else "odd.txt")
    MAKE[kind](odd)
    path = str(odd.parent if inside else odd)
    hub = (None, path, None, None, None, True, "train", "test", 0.3, "text", None, None, None, None)
    made = {"text": lambda: text_files(path), "hub": lambda: HubText("hub", *hub),
            "image": lambda: ImageFolder("images", path, "folder", None, 0.2)}[data]()  # fmt: skip
    with pytest.raises(UserError, match=r"dataset\.path.*(odd.*(no regular file|cannot be read)|no such folder)"):
        made.check("image" if data == "image" else "text")
    assert _label_of(None, path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read, even by root")
def test_a_file_that_cannot_be_read_is_named():
    with pytest.raises(UserError, match=r"dataset\.path: /proc/self/mem cannot be read"):
        text_files("/proc/self/mem").check("text")
