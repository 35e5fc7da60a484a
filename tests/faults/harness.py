"""The real command on small data, in processes that can be killed, and what must be true of what it leaves.

Importing torch takes most of such a command's time. This module imports everything once, and a command is a fork of
it: the same code from launch.py on. Nothing here may start a thread or compute with torch or pyarrow, since a fork
takes no threads along.
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import importlib
import os
import pty
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch.py"
METHODS = ("zero", "mean", "peak")  # without statistics; with moments; with counts, too
SMALL = (
    *("fraction=half", "statistics.tokens=600", "eval.tokens=1200", "eval.skip=5", "batch_tokens=128"),
    *("model.max_tokens=64", "tracking=none", "sweep=s"),
)
OPTIONS = ("-m", f"method={','.join(METHODS)}", "dataset=text_files", "dataset.path=../texts", *SMALL)
PACKS = ("hydra/launcher=local", "hydra.launcher.gpus=[]")
HANGS = 300.0  # seconds after which a command is taken to hang; machines may be busy
TABLES = ("rows.parquet", "documents.parquet")
OF_SWEEP = ("summary.csv", "comparisons.csv", "curves.parquet")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "some", "dog", "run", "far", "away", "if", "for", "while")

Tree = dict[str, bytes]


def prepare(base: Path) -> None:
    """Sets the environment of all commands, and imports all that they need."""
    environment = {
        **{"HF_HOME": str(base / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        **{"COLUMNS": "200", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
    }
    os.environ.update(environment)
    for name in ("HYDRA_FULL_ERROR", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = False
    import ablation_sweeps.cli.commands
    import ablation_sweeps.dispatch.launcher
    import ablation_sweeps.experiment.job  # noqa: F401


def workplace(parser: argparse.ArgumentParser, keep: Path | None, prefix: str) -> Path:
    """An empty folder for the sweeps, with the texts that they run on; the environment of all commands is set.

    Args:
        keep: the folder, as `--keep` gives it; None for a temporary one whose name begins with `prefix`.
    """
    base = (keep or Path(tempfile.mkdtemp(prefix=prefix))).absolute()
    if base.exists() and any(base.iterdir()):
        parser.error(f"--keep={base}: is not empty; remove it, or name another folder")
    base.mkdir(parents=True, exist_ok=True)
    prepare(base)
    write_texts(base / "texts")
    return base


@contextmanager
def importing_the_same(base: Path) -> Iterator[None]:
    """Imports all modules that commands import meanwhile, so that later ones need not."""
    names = base / "modules.txt"
    os.environ["LIST_OF_MODULES"] = str(names)
    yield
    del os.environ["LIST_OF_MODULES"]
    for name in names.read_text().split():
        if name not in sys.modules and not name.startswith("_"):
            with suppress(Exception):
                importlib.import_module(name)


def write_texts(folder: Path, seed: int = 0) -> None:
    picked = random.Random(seed)
    folder.mkdir(parents=True)
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"{' '.join(picked.choice(WORDS) for _ in range(40))} {i}.")


@dataclass
class Command:
    """A command that runs; its folder, and the file that holds what it prints."""

    pid: int
    cwd: Path
    output: Path
    master: int | None = None  # the other end of its terminal, where it has one
    code: int | None = None  # its exit status, or minus the signal that ended it

    def poll(self) -> int | None:
        self._drain()
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self._drain()
                self.hang_up()
        return self.code

    def wait(self, seconds: float = HANGS) -> bool:
        """Whether it ended within this time; if not, it is killed."""
        until = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                while self.poll() is None:
                    time.sleep(0.01)
                return False
            time.sleep(0.003)
        return True

    def hang_up(self) -> None:
        """Closes its terminal, as when a window is closed or a connection is lost."""
        if self.master is not None:
            os.close(self.master)
            self.master = None

    def type_ctrl_c(self) -> None:
        """SIGINT to all of the terminal's foreground process group."""
        if self.master is not None:
            os.write(self.master, b"\x03")

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def _drain(self) -> None:
        if self.master is None:
            return
        try:
            while content := os.read(self.master, 1 << 16):
                with open(self.output, "ab") as file:
                    file.write(content)
        except OSError:  # nothing more for now, or its other end is closed
            pass


def start(cwd: Path, *arguments: str, terminal: bool = False, fresh: bool = False) -> Command:
    """`launch.py` with these arguments, or `python -m ablation_sweeps` if the first one is that.

    Args:
        terminal: it is the foreground process of a terminal of its own.
        fresh: a new Python, which imports everything.
    """
    output = cwd.parent / f"{cwd.name}.out"
    output.write_bytes(b"")
    temporary = cwd.parent / f"{cwd.name}.tmp"
    temporary.mkdir(exist_ok=True)
    master = slave = None
    if terminal:
        master, slave = pty.openpty()
        os.set_blocking(master, False)
    if not (pid := os.fork()):
        try:
            _become(cwd, output, temporary, master, slave)
            if fresh:
                command = ["-m", *arguments] if arguments[0] == "ablation_sweeps" else [str(LAUNCH), *arguments]
                os.execv(sys.executable, [sys.executable, *command])
            _run(arguments)
        finally:
            os._exit(99)
    if slave is not None:
        os.close(slave)
    return Command(pid, cwd, output, master)


def _become(cwd: Path, output: Path, temporary: Path, master: int | None, slave: int | None) -> None:
    os.setsid()
    if slave is None:
        stdin, file = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_APPEND)
    else:
        os.close(master)  # type: ignore[arg-type]
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        stdin = file = slave
    for place, of in enumerate((stdin, file, file)):
        os.dup2(of, place)
    os.chdir(cwd)
    os.environ["TMPDIR"] = str(temporary)
    tempfile.tempdir = None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


def _run(arguments: tuple[str, ...]) -> None:
    """What Python does with a script, up to its end."""
    code: object = 0
    try:
        if arguments[0] == "ablation_sweeps":
            sys.argv = list(arguments)
            runpy.run_module("ablation_sweeps", run_name="__main__", alter_sys=True)
        else:
            sys.argv = [str(LAUNCH), *arguments]
            runpy.run_path(str(LAUNCH), run_name="__main__")
    except SystemExit as left:
        code = left.code
    except KeyboardInterrupt:
        code = 130
        import traceback

        traceback.print_exc()
    except BaseException:
        code = 1
        import traceback

        traceback.print_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    if modules := os.environ.get("LIST_OF_MODULES"):
        Path(modules).write_text("\n".join(sys.modules))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))  # type: ignore[call-overload]


def processes_in(cwd: Path) -> list[int]:
    """The packs that run there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (
                    os.readlink(entry / "cwd") == str(cwd)
                    and b"ablation_sweeps.dispatch.packs" in (entry / "cmdline").read_bytes()
                ):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def run(cwd: Path, *arguments: str) -> Command:
    """To its end."""
    command = start(cwd, *arguments)
    if not command.wait():
        raise AssertionError(f"{arguments}: hangs\n{command.said[-2000:]}")
    return command


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@dataclass
class Expected:
    """What an undisturbed command leaves: its tables, and which files there are."""

    folder: Path
    tables: Tree = field(default_factory=dict)
    files: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: Path) -> Expected:
        sweep = folder / "results" / "s"
        paths = [path for name in TABLES for path in sorted(sweep.glob(f"*/{name}"))] + [sweep / f for f in OF_SWEEP]
        tables = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        return cls(folder, tables, files_in(folder))

    def faults(self, folder: Path, also: Callable[[str], bool] = lambda _: False) -> list[str]:
        """What is wrong with what a disturbed sweep has left in the end.

        Args:
            also: files that may be there, or be missing.
        """
        found = []
        for name, content in self.tables.items():
            if not (folder / name).exists():
                found.append(f"lost: {name}")
            elif (folder / name).read_bytes() != content:
                found.append(f"differs: {name}")
        there = files_in(folder)
        found += [f"stays: {name}" for name in sorted(there - self.files) if not also(name)]
        found += [
            f"missing: {name}" for name in sorted(self.files - there) if not also(name) and name not in self.tables
        ]
        temporary = folder.parent / f"{folder.name}.tmp"
        if temporary.exists():
            found += [f"stays in TMPDIR: {name}" for name in sorted(files_in(temporary))]
        return found


def states_told(cwd: Path) -> dict[str, tuple[str, str]]:
    """State and reason of each run, as `status` says them."""
    told = run(cwd, "ablation_sweeps", "status", "results/s")
    if told.code:
        raise AssertionError(f"status: exit {told.code}: {told.said[-600:]}")
    found = {}
    for path in sorted((cwd / "results" / "s").glob("*/status.json")):
        lines = [line for line in told.said.splitlines() if line.strip().startswith(path.parent.name)]
        if len(lines) != 1:
            raise AssertionError(f"status: {len(lines)} lines for {path.parent.name}: {told.said[-600:]}")
        columns = re.split(r"\s{2,}", lines[0].strip())
        found[path.parent.name] = columns[1], columns[-1]
    return found


def remove(folder: Path) -> None:
    for path in (folder, folder.parent / f"{folder.name}.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    (folder.parent / f"{folder.name}.out").unlink(missing_ok=True)


def as_exit(code: int | None) -> str:
    return "runs" if code is None else signal.Signals(-code).name if code < 0 else f"exit {code}"
