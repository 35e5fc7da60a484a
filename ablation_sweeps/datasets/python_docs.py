"""Text that is included in every Python: documentation and source code of its standard library."""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from ablation_sweeps.base.errors import UserError
from ablation_sweeps.base.files import read_json, write_json
from ablation_sweeps.base.hashing import fingerprint_of_file, sha256_at, signature, unit_hash
from ablation_sweeps.data.batch import Document, Modality, Split

MIN_CHARACTERS = 200  # shorter documents are left out
SHARED_PARAGRAPH = 60  # minimum length of a paragraph that is a copy, not a common phrase, if it is in two documents

# Tests, installed packages, generated tables, and the documentation itself, which PythonDocs already has.
SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test"),
    *("site-packages", "dist-packages", "_bundled"),
    *("encodings", "pydoc_data"),
}
SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # these differ between machines


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PythonDocs:
    """English: the topics of `help()`, and the docstrings of the standard library, one document per topic or module."""

    label: str
    modality: ClassVar[Modality] = "text"

    def examples(self, split: Split) -> Iterator[Document]:
        return in_split(docs(), split)

    def fingerprint(self) -> str:
        return content_hash(docs())


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PythonCode:
    """Python: the source code of the standard library, one document per module."""

    label: str
    modality: ClassVar[Modality] = "text"

    def examples(self, split: Split) -> Iterator[Document]:
        return in_split(code(), split)

    def fingerprint(self) -> str:
        return content_hash(code())


@cache
def docs() -> tuple[Document, ...]:
    """Documents of PythonDocs. Parsing the standard library takes seconds, so they are cached in the hub's folder."""
    from huggingface_hub.constants import HF_HOME

    topics = [Document(f"topic/{key}", text.strip()) for key, text in help_topics().items()]
    made_of = [sys.version, fingerprint_of_file(Path(__file__)), content_hash(topics), content_hash(code())]
    file = Path(HF_HOME) / "ablation_sweeps" / f"python_docs-{signature(made_of)[:16]}.json"
    documents = _kept(file)
    if documents is None:
        documents = parsed(topics, code())
        with suppress(OSError, UserError):  # the disk is read-only or full
            pairs = [(document.name, document.text) for document in documents]
            write_json(file, {"sha256": sha256_at(file, content_hash(documents)), "documents": pairs})
    return tuple(documents)


class Kept(TypedDict):
    """Content of the cache file: hash of the documents, their names and texts."""

    sha256: str
    documents: list[tuple[str, str]]


def _kept(file: Path) -> list[Document] | None:
    """Cached documents; None if the file is missing, or its checksum does not match."""
    kept = read_json(file, Kept)
    documents = [Document(*pair) for pair in kept["documents"]] if kept else []
    return documents if kept and sha256_at(file, content_hash(documents)) == kept["sha256"] else None


def parsed(topics: Iterable[Document], modules: Iterable[Document]) -> list[Document]:
    """Help topics, and the docstrings of each module as one document, without copies and short ones."""
    documents = list(topics)
    gc.disable()  # it would scan millions of new nodes again and again, which takes longer than parsing
    try:
        for document in modules:
            text = "\n\n".join(docstrings(document.text))
            documents.append(Document(f"doc/{document.name.removeprefix('code/')}", text))
    finally:
        gc.enable()
    return [d for d in without_copies(documents) if len(d.text) >= MIN_CHARACTERS]


@cache
def code() -> tuple[Document, ...]:
    """Documents of PythonCode."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(modules(root)):
        module = path.relative_to(root).with_suffix("")
        if module.name in SKIPPED_FOLDERS or module.name.startswith(SKIPPED_FILES):
            continue
        if not all(part.isidentifier() for part in module.parts):  # not importable: a build script
            continue
        text = source(path)
        if len(text) >= MIN_CHARACTERS:
            documents.append(Document(f"code/{module.as_posix()}", text))
    if not documents:
        raise UserError("dataset=python_docs: this Python has no source of its standard library; use another dataset")
    return tuple(documents)


def modules(root: Path) -> Iterator[Path]:
    """Paths of all Python files, without looking into skipped folders, which may hold many thousands of files."""
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def help_topics() -> dict[str, str]:
    """The texts of `help()`, by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("dataset=python_docs: this Python has no pydoc_data; use another dataset") from None
    return topics


def source(path: Path) -> str:
    """Source code of a Python file."""
    with tokenize.open(path) as file:  # uses the encoding that the file declares
        return file.read().strip()


def docstrings(text: str) -> list[str]:
    """The docstrings of a module, in the order of its lines. The module is parsed, never run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in somebody else's strings
        tree = ast.parse(text)
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((n for n in statements(tree) if isinstance(n, kinds)), key=lambda n: n.lineno)
    return [doc for node in (tree, *nodes) if (doc := ast.get_docstring(node))]


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements inside a node, at any depth. Expressions, which are many more, contain no docstrings."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for inside in getattr(node, field, ()):
            yield inside
            yield from statements(inside)


def without_copies(documents: Iterable[Document]) -> list[Document]:
    """Keep each paragraph only in the shortest document that has it.

    `help("compound")` repeats `help("if")` word for word: otherwise, two splits could contain the same text.
    """
    seen: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda d: (len(d.text), d.name)):
        paragraphs = []
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key not in seen:
                paragraphs.append(paragraph)
            if len(key) >= SHARED_PARAGRAPH:
                seen.add(key)
        kept.append(Document(document.name, "\n\n".join(paragraphs).strip()))
    return kept


def split_of(name: str) -> Split:
    """Split of a document. It depends on the module alone: docstrings in `code/json` are also in `doc/json`."""
    position = split_position(name)
    return "train" if position < 0.8 else "calibration" if position < 0.9 else "evaluation"


def split_position(name: str) -> float:
    """Hash in [0, 1) of the module of a document."""
    return unit_hash(name.removeprefix("doc/").removeprefix("code/"))


def in_split(documents: Iterable[Document], split: Split) -> Iterator[Document]:
    """Documents of a split, ordered by hash, so that the first n are a random sample."""
    return iter(sorted((d for d in documents if split_of(d.name) == split), key=lambda d: split_position(d.name)))


def content_hash(documents: Iterable[Document]) -> str:
    """sha256 of the names and texts of some documents."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()
