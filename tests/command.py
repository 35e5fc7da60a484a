"""The command as a user types it, but in this process, since importing torch takes seconds; and small data for it."""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import ablation_sweeps.experiment.config  # noqa: F401  (its resolvers, before Hydra's state is kept and put back)
from ablation_sweeps.cli.launch import session
from ablation_sweeps.experiment import identity
from ablation_sweeps.experiment.session import Session
from ablation_sweeps.report import page, write

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch.py"
SMALL = ("fraction=half", "statistics.tokens=400", "eval.tokens=400", "eval.images=8", "eval.skip=5", "batch_tokens=99")
FAULTS = ("--config-dir", str(ROOT / "tests" / "faults" / "conf"))
NOISE = ("Error executing job", "HYDRA_FULL_ERROR", "hydra.cc", "full_key:", "object_type=", "Traceback")
SENTENCE = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "some", "dog", "run", "far", "away", "from", "it")

Launch = Callable[..., "Outcome"]


def last_of_each(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments without options that a later one replaces, which the command itself refuses: a test may then add
    what it changes to the options of a fixture."""
    keys = [argument.partition("=")[0] if "=" in argument else f"{place}" for place, argument in enumerate(arguments)]
    return tuple(x for place, x in enumerate(arguments) if keys[place] not in keys[place + 1 :])


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its one line of error: where there is none, or more, or anything of Hydra's or Python's, the test fails."""
        assert self.code != 0, f"no error\n{self.out}\n{self.err}"
        for noise in NOISE:
            assert noise not in self.out + self.err, self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.err.rstrip().endswith(line), f"more comes after the error:\n{self.err}"
        assert len(line) < 700, line
        return line


@pytest.fixture
def pictures() -> None:
    """Figures and charts are drawn. Tests that do not ask for it have empty ones: to draw takes longer than a small
    sweep."""


@pytest.fixture
def launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, request: pytest.FixtureRequest
) -> Launch:
    """`launch("-m", "seed=0,1")` does in `tmp_path` what `python launch.py -m seed=0,1` would."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*arguments: str) -> Outcome:
        # As in a process of its own, but that models stay loaded.
        identity.content.cache_clear()
        session()._start_anew()
        state, handlers, environment = Singleton.get_state(), logging.getLogger().handlers[:], dict(os.environ)
        GlobalHydra.instance().clear()
        capsys.readouterr()
        code: object = 0
        answers_ctrl_c = signal.getsignal(signal.SIGINT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(LAUNCH), *last_of_each(arguments)])
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(sys, "excepthook", sys.excepthook)
            if "pictures" not in request.fixturenames:
                patch.setattr(write, "draw", lambda *study: None)
                patch.setattr(write, "save", lambda figure, path, suffix: path.touch())
                patch.setattr(page, "figures", lambda study: {})
            try:
                runpy.run_path(str(LAUNCH), run_name="__main__")
            except SystemExit as left:
                code = left.code
            finally:
                Singleton.set_state(state)
                logging.getLogger().handlers[:] = handlers
                if signal.getsignal(signal.SIGINT) is not answers_ctrl_c:
                    signal.signal(signal.SIGINT, answers_ctrl_c)
                os.environ.clear()
                os.environ.update(environment)
        out, err = capsys.readouterr()
        if isinstance(code, str):  # what Python itself does with sys.exit("text")
            code, err = 1, f"{err}{code}\n"
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, out, err)

    return run


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test fails if a model is loaded, even if the program survives it."""
    from ablation_sweeps.models import causal_lm, image_classifier, masked_lm, timm

    loaded = []

    def load(*model: object) -> None:
        loaded.append(model)
        raise AssertionError("a model is loaded")

    for kind in (causal_lm.CausalLM, masked_lm.MaskedLM, image_classifier.ImageClassifier, timm.Timm):
        monkeypatch.setattr(kind, "load", load)
    monkeypatch.setattr(Session, "model", load)
    yield
    assert not loaded, "a model was loaded before the mistake was found"


# Processes of their own are forked off one that has imported these, which takes seconds, and has done nothing else.
IMPORTED = (
    "ablation_sweeps.cli.launch", "ablation_sweeps.cli.commands", "ablation_sweeps.experiment.run",
    "ablation_sweeps.report.write", "ablation_sweeps.tracking.publish", "ablation_sweeps.models.causal_lm",
    "ablation_sweeps.datasets.text_files", "hydra", "pandas", "torch", "scipy.special", "pyarrow.parquet",
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf", "matplotlib.backends.backend_svg",
    "plotly.graph_objects", "plotly.offline", "safetensors.torch", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
)  # fmt: skip
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(list(IMPORTED))


class Command:
    """`python *arguments` in a forked process; its output lies in files."""

    def __init__(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        environment = dict(os.environ if env is None else env)
        given = (last_of_each(arguments), str(cwd), environment, [str(file) for file in self._files])
        self._process = _forks.Process(target=_run_python, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"not over after {timeout} seconds"
        return self._process.exitcode

    @property
    def output(self) -> list[str]:
        """What it has written so far: to stdout, and to stderr."""
        return [file.read_text() for file in self._files]


def run_python(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Outcome:
    """What `python *arguments` does there, in a process of its own."""
    command = Command(*arguments, cwd=cwd, env=env)
    return Outcome(command.wait(), *command.output)


def _run_python(arguments: tuple[str, ...], cwd: str, environment: dict[str, str], outputs: list[str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<command>", "exec"), {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            sys.path.insert(0, cwd)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def text(number: int, words: int = 30) -> str:
    picked = (SENTENCE[(number * 7 + place * (number + 3)) % len(SENTENCE)] for place in range(words))
    return f"{' '.join(picked)} {number}."


def write_texts(folder: Path, n: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i}.txt").write_text(text(i))
    return folder


def write_images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), n: int = 8) -> Path:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (len(classes), n, 16, 16, 3), dtype=np.uint8)
    for name, images in zip(classes, pixels, strict=True):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "images")


@pytest.fixture(scope="session")
def on_text(saved: Callable[[str], Path], texts: Path) -> tuple[str, ...]:
    """Options of the smallest job there is: a random Llama on twelve short texts."""
    model = ("model=causal_lm", f"model.path={saved('llama')}", "model.label=tiny")
    return (*model, "dataset=text_files", f"dataset.path={texts}", "tracking=none", *SMALL)


@pytest.fixture(scope="session")
def on_images(saved: Callable[[str], Path], images: Path) -> tuple[str, ...]:
    """The same for a random timm ViT."""
    model = ("model=timm", f"model.path={saved('timm_vit')}", "model.label=tiny")
    return (*model, "dataset=image_folder", f"dataset.path={images}", "tracking=none", *SMALL)


@pytest.fixture(scope="session")
def broken(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That Llama with NaN in its weights."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(saved("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][:] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """method=kills and the like (tests/faults) can be chosen with `*FAULTS`; the folder in which they leave marks."""
    marks = tmp_path / "marks"
    marks.mkdir()
    folder = ROOT / "tests" / "faults"
    monkeypatch.setenv("FAULTS", str(marks))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(folder)]))  # of the processes of the packs
    monkeypatch.syspath_prepend(str(folder))
    return marks


def same_bits(one: Path, other: Path) -> None:
    """Every finished run of one sweep is in the other one, byte by byte."""
    runs = sorted(path.parent for path in one.glob("*/rows.parquet"))
    assert runs
    for run in runs:
        for file in ("rows.parquet", "documents.parquet"):
            assert (run / file).read_bytes() == (other / run.name / file).read_bytes(), run.name


def states(sweep: Path) -> dict[str, str]:
    """How each run of a sweep ended."""
    return {path.parent.name: json.loads(path.read_text())["state"] for path in sorted(sweep.glob("*/status.json"))}
