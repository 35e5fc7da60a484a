"""Damages each kind of file that a sweep reads again, in each way, and compares what the next command gives.

    python tests/faults/damaged_files.py --seed 0            # every kind in every way
    python tests/faults/damaged_files.py --ways 1            # every kind in one way, chosen at random

A sweep is copied, a file of it is truncated, emptied, deleted, given another bit, or replaced by a whole one of another
sweep or of another type. `status` must not fail, and the same command must give what an undisturbed sweep gives, bit by
bit, and leave no other files. Ends with status 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
from harness import OPTIONS, PACKS, SMALL, Expected

WAYS = ("truncated", "emptied", "flipped", "replaced", "deleted", "another type")
ON_MEDIANS = ("-m", "method=median", *OPTIONS[2:])
ON_DOCS = ("-m", "method=zero", "dataset=python_docs", *SMALL)
ROWS = ("dataset=hub_text", "dataset.column=text", "dataset.streaming=true", "dataset.evaluation_split=train")


def other(options: tuple[str, ...]) -> tuple[str, ...]:
    """Options of another sweep, of the same shapes."""
    shared = (option for option in options if not option.startswith("statistics.tokens="))
    return (*shared, "seed=1", "statistics.tokens=500")


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        of: the folder that is copied, and damaged.
        file: a glob below it, or an absolute one; of what it finds, one file is damaged.
        other: the folder of another sweep, whose file of this kind takes its place.
        options: of the command.
        without: what is removed before: the runs, say, so that the statistics are read again.
    """

    name: str
    of: str
    file: str
    other: str
    options: tuple[str, ...] = OPTIONS
    without: tuple[str, ...] = ()


RUNS = ("results/s",)
PEAK = "results/s/*-peak-*"
KINDS = (
    Kind("moments", "plain", "results/.cache/*/moments.safetensors", "other", without=RUNS),
    Kind("counts", "plain", "results/.cache/*/counts-100.safetensors", "other", without=RUNS),
    Kind(
        "moments and fine counts",
        "one_pass",
        "results/.cache/*/moments-and*.safetensors",
        "other_pass",
        (*OPTIONS, "statistics.passes=1"),
        RUNS,
    ),
    Kind("medians", "medians", "results/.cache/*/medians-*.safetensors", "other_medians", ON_MEDIANS, RUNS),
    Kind("note of little memory", "halved", "results/.cache/*/halved.txt", "halved", without=RUNS),
    Kind("progress", "half", f"{PEAK}/progress-*.parquet", "other_half"),
    *(
        Kind(f"{name}, half", "half", f"{PEAK}/{name}", "other_half")
        for name in ("status.json", "environment.json", "config.yaml", "log", ".lock")
    ),
    *(
        Kind(f"{name}, finished", "plain", f"{PEAK}/{name}", "other")
        for name in ("status.json", "environment.json", "config.yaml", "rows.parquet", "documents.parquet", "log")
    ),
    *(
        Kind(name, "plain", f"results/s/{name}", "other")
        for name in ("curves.parquet", "summary.csv", "report.html", "figures/.written.json", "multirun.yaml")
    ),
    *(
        Kind(f".dispatch/{name}", "packs", f"results/s/.dispatch/{name}", "other_packs", (*OPTIONS, *PACKS), (PEAK,))
        for name in ("how.json", "launcher", "launch.lock", "pack-0.log")
    ),
    Kind("python_docs", "docs", "{hf}/ablation_sweeps/python_docs-*.json", "other_docs", ON_DOCS, RUNS),
    Kind(
        "streamed rows",
        "rows",
        "{hf}/datasets/ablation_sweeps/*/*.parquet",
        "other_rows",
        ("-m", "method=mean", *ROWS, "dataset.path=../rows_data", *SMALL),
        RUNS,
    ),
)


def damaged(content: bytes, way: str, other: bytes, picked: random.Random, name: str) -> bytes | None:
    """None: the file is deleted."""
    if way == "truncated":
        return content[: picked.randrange(len(content))] if content else b""
    if way == "flipped":
        place = picked.randrange(len(content)) if content else 0
        return (
            content[:place] + bytes([content[place] ^ 1 << picked.randrange(8)]) + content[place + 1 :]
            if content
            else b"\0"
        )
    if way == "another type":
        texts = [
            b"[1, 2]",
            b'{"state": 3, "sha256": [], "names": 4, "notes": "x", "options": 0}',
            b"null",
            b"\xff\xfe",
            b"a: [",
        ]
        return picked.choice(texts)
    return {"emptied": b"", "replaced": other, "deleted": None}[way]


class Workshop:
    """The sweeps that are copied, each made when it is first needed."""

    def __init__(self, base: Path):
        self.base, self.hf = base, base / "hf"
        self.made: set[str] = set()
        self.hf_of: dict[str, Path] = {}

    def sweep(self, name: str, options: tuple[str, ...] = OPTIONS) -> Path:
        folder = self.base / name
        if name in self.made:
            return folder
        self.made.add(name)
        getattr(self, f"_{name}", lambda: self._run(folder, options))()
        if self.hf.exists():
            self.hf_of[name] = self.base / f"{name}.hf"
            shutil.copytree(self.hf, self.hf_of[name])
        return folder

    def _run(self, folder: Path, options: tuple[str, ...]) -> None:
        folder.mkdir()
        command = harness.run(folder, *options)
        assert command.code == 0, command.said

    def _other(self) -> None:
        self._run(self.base / "other", other(OPTIONS))

    def _other_pass(self) -> None:
        self._run(self.base / "other_pass", other((*OPTIONS, "statistics.passes=1")))

    def _other_medians(self) -> None:
        self._run(self.base / "other_medians", other(ON_MEDIANS))

    def _other_packs(self) -> None:
        self._run(self.base / "other_packs", other((*OPTIONS, *PACKS, "hydra.launcher.max_parallel=2")))

    def _halved(self) -> None:
        shutil.copytree(self.sweep("plain"), self.base / "halved")
        (cache,) = (self.base / "halved" / "results" / ".cache").iterdir()
        (cache / "halved.txt").write_text("statistics: batches were halved")

    def _half(self) -> None:
        self._killed(self.base / "half", OPTIONS)

    def _other_half(self) -> None:
        self._killed(self.base / "other_half", other(OPTIONS))

    def _killed(self, folder: Path, options: tuple[str, ...]) -> None:
        """In the middle of its last curve."""
        folder.mkdir()
        command = harness.start(folder, *options)
        while len(list(folder.glob(f"{PEAK}/progress-*.parquet"))) < 4:
            assert command.poll() is None, command.said
            time.sleep(0.001)
        os.kill(command.pid, signal.SIGKILL)
        command.wait()

    def _docs(self) -> None:
        shutil.rmtree(self.hf / "ablation_sweeps", ignore_errors=True)
        self._run(self.base / "docs", ON_DOCS)

    def _other_docs(self) -> None:
        """What another version of Python has left: documents of its own, whole."""
        if not os.fork():
            code = 1
            try:
                from ablation_sweeps.datasets import python_docs

                shutil.rmtree(self.hf / "ablation_sweeps", ignore_errors=True)
                sys.version = "of another Python"
                parsed = python_docs.parsed
                python_docs.parsed = lambda *arguments: parsed(*arguments)[::2]
                python_docs.docs()
                code = 0
            finally:
                os._exit(code)
        assert os.wait()[1] == 0

    def _rows(self) -> None:
        self._of_rows("rows", seed=0)

    def _other_rows(self) -> None:
        self._of_rows("other_rows", seed=1)

    def _of_rows(self, name: str, seed: int) -> None:
        shutil.rmtree(self.hf / "datasets" / "ablation_sweeps", ignore_errors=True)
        data = self.base / f"{name}_data"
        harness.write_texts(self.base / f"{name}_texts", seed)
        data.mkdir()
        import json

        texts = [path.read_text() for path in sorted((self.base / f"{name}_texts").iterdir())]
        (data / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        self._run(self.base / name, ("-m", "method=mean", *ROWS, f"dataset.path=../{name}_data", *SMALL))

    def with_hf_of(self, name: str) -> None:
        """Puts back what the hub's libraries had kept when this sweep was made."""
        if name in self.hf_of:
            shutil.rmtree(self.hf, ignore_errors=True)
            shutil.copytree(self.hf_of[name], self.hf)


def files_of(kind: Kind, folder: Path, hf: Path) -> list[Path]:
    pattern = kind.file.format(hf=hf)
    return sorted(Path("/").glob(pattern[1:]) if pattern.startswith("/") else folder.glob(pattern))


def one(shop: Workshop, kind: Kind, way: str, picked: random.Random, expected: Callable[[Kind], Expected]) -> list[str]:
    reference = expected(kind)
    shop.sweep(kind.of, kind.options)
    other_folder = shop.sweep(kind.other, kind.options)
    others = files_of(kind, other_folder, shop.hf_of.get(kind.other, shop.hf))
    shop.with_hf_of(kind.of)
    cwd = shop.base / "damaged"
    harness.remove(cwd)
    shutil.copytree(shop.base / kind.of, cwd)
    for pattern in kind.without:
        for folder in cwd.glob(pattern):
            shutil.rmtree(folder)
    file = picked.choice(files_of(kind, cwd, shop.hf))
    other = picked.choice(others)
    content = damaged(file.read_bytes(), way, other.read_bytes(), picked, kind.name)
    file.unlink()
    if content is not None:
        place = file.with_name(other.name) if way == "replaced" and kind.name == "progress" else file
        place.write_bytes(content)
    faults = []
    if list(cwd.glob("results/s/*/status.json")):
        told = harness.run(cwd, "ablation_sweeps", "status", "results/s")
        if told.code:
            faults.append(f"status: exit {told.code}: {told.said.strip()[-500:]}")
    if kind.name.startswith(".dispatch"):
        retried = harness.run(cwd, "ablation_sweeps", "retry", "results/s")
        if retried.code and (retried.code != 1 or "Traceback" in retried.said):
            faults.append(f"retry: exit {retried.code}: {retried.said.strip()[-500:]}")
    command = harness.run(cwd, *kind.options)
    if command.code:
        faults.append(f"the same command: exit {command.code}: {command.said.strip()[-1200:]}")
    return faults + reference.faults(cwd, lambda name: "/.dispatch/" in name or name.endswith("halved.txt"))


def recording(shop: Workshop, picked: random.Random, reference: Expected) -> list[str]:
    """Flips a bit of the recorded calibration pass, a file without a name, while the sweep runs."""
    cwd = shop.base / "damaged"
    harness.remove(cwd)
    cwd.mkdir()
    command, hit = harness.start(cwd, *OPTIONS), False
    while command.poll() is None and not hit:
        if list(cwd.glob("results/.cache/*/moments.safetensors")) and not list(cwd.glob("results/.cache/*/counts-*")):
            for link in Path(f"/proc/{command.pid}/fd").iterdir():
                if link.exists() and "results/.cache" in os.readlink(link) and "(deleted)" in os.readlink(link):
                    with open(link, "r+b", buffering=0) as file:
                        place = picked.randrange(os.fstat(file.fileno()).st_size)
                        byte = os.pread(file.fileno(), 1, place)
                        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), place)
                    hit = True
        time.sleep(0.001)
    command.wait()
    faults = [] if hit else ["its file was not found"]
    if command.code:
        if "does not give back" not in command.said or "Traceback" in command.said:
            faults.append(f"exit {command.code}: {command.said[-600:]}")
        command = harness.run(cwd, *OPTIONS)
        faults += [f"exit {command.code}: {command.said[-600:]}"] if command.code else []
    return faults + reference.faults(cwd)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", type=int, default=len(WAYS), help="in which each kind is damaged, of six")
    parser.add_argument("--kinds", default="", help="only those whose name has this in it")
    parser.add_argument("--keep", type=Path, help="a folder for the sweeps")
    options = parser.parse_args()
    base = harness.workplace(parser, options.keep, "damage-")
    picked, began, shop = random.Random(options.seed), time.monotonic(), Workshop(base)
    with harness.importing_the_same(base):
        shop.sweep("plain")
    known: dict[str, Expected] = {}

    def expected(kind: Kind) -> Expected:
        name = {"half": "plain", "halved": "plain"}.get(kind.of, kind.of)
        if name not in known:
            known[name] = Expected.of(shop.sweep(name, kind.options))
        return known[name]

    count = wrong = 0
    kinds = [kind for kind in KINDS if options.kinds in kind.name]
    for kind in kinds:
        ways = picked.sample(WAYS, options.ways)
        results = {}
        for way in ways:
            try:
                results[way] = one(shop, kind, way, picked, expected)
            except Exception as error:
                results[way] = [f"{type(error).__name__}: {error}"]
            count, wrong = count + 1, wrong + bool(results[way])
        print(
            f"{kind.name:<28}" + ", ".join(f"{way}: {'WRONG' if faults else 'ok'}" for way, faults in results.items()),
            flush=True,
        )
        for way, faults in results.items():
            for fault in faults:
                print(f"    {way}: {fault}", flush=True)
    if options.kinds in "recording":
        faults = recording(shop, picked, Expected.of(shop.sweep("plain")))
        count, wrong = count + 1, wrong + bool(faults)
        print(
            f"{'recording':<28}flipped: {'WRONG' if faults else 'ok'}\n"
            + "".join(f"    {fault}\n" for fault in faults),
            end="",
        )
    print(f"{count} damaged files, {wrong} with a fault; {time.monotonic() - began:.0f} s; seed {options.seed}")
    if not options.keep:
        shutil.rmtree(base)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
