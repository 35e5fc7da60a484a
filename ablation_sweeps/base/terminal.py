"""Messages on a terminal or in a log."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablation_sweeps.base.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)


class Handler(logging.Handler):
    """Log handler that writes to stderr, since stdout is for results only, and does not tear progress bars apart."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def terminal() -> Console:
    """Console for stdout. If its reader has gone (`| head`), output is dropped and the program continues, since it may
    still have files to write."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            lose_output()

    return Terminal()


def lose_output() -> None:
    """Drop whatever is printed to stdout from now on, without an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def counted(number: int, what: str, ending: str = "s") -> str:
    """A number with its noun: "1 job", "2 jobs"."""
    return f"{number} {what}{ending if number != 1 else ''}"


def typed_command() -> str:
    """The command that launches, as it was typed in this process."""
    script = Path(sys.argv[0])
    if script.name == "launch.py":
        return "python launch.py"
    is_module = script.parts[-2:] == ("ablation_sweeps", "__main__.py")
    return "python -m ablation_sweeps" if is_module else "ablation-sweeps"


def typed_subcommand(name: str) -> str:
    """A subcommand, as typed with the present command; `launch.py` itself has none."""
    return f"{typed_command().replace('launch.py', '-m ablation_sweeps')} {name}"


def as_typed(value: Any) -> str:
    """The value as written on the command line: null, true, [a,b]."""
    if isinstance(value, list):
        return f"[{','.join(as_typed(item) for item in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def encodable(text: str, console: Console) -> str:
    """Text with question marks for characters that the console, such as a log file in ASCII, cannot encode."""
    return text.encode(console.encoding, "replace").decode(console.encoding)


def plain(error: BaseException) -> str:
    """One line that says what went wrong; for an unforeseen error, also where."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.filename and error.strerror:
        reason = f"{error.strerror[0].lower()}{error.strerror[1:]}"
        return f"{os.fsdecode(error.filename)}: {reason}{remedy(os.fsdecode(error.filename))}"
    name = f"{type(error).__name__}: {text}".removesuffix(": ")
    return f"{name}{_where(error)}" if isinstance(error, Exception) else name


FOLDERS: dict[str, str] = {}  # the option that named each folder or file of this command, for `remedy`


def remedy(path: str) -> str:
    """End of a message about a file that cannot be read or written: the option that says where it is, if known."""
    named = {**_folders_of_the_environment(), **FOLDERS}
    around = [folder for folder in named if os.path.commonpath([os.path.abspath(path), folder]) == folder]
    if not around:
        return ""
    folder = max(around, key=len)
    option = named[folder]
    if option.startswith(("model.", "dataset.")):
        return f"; it belongs to {option}={folder}"
    return f"; if that folder cannot be written to, set {option}=FOLDER to another one"


def _folders_of_the_environment() -> dict[str, str]:
    """Folders in which libraries keep downloads or write files, with the variable that sets each."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    hub = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    folders = {hub: "HF_HOME"}
    for variable in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "WANDB_DIR", "TMPDIR"):
        if os.environ.get(variable):
            folders[os.environ[variable]] = variable
    return {os.path.abspath(os.path.expanduser(folder)): variable for folder, variable in folders.items()}


def _where(error: Exception) -> str:
    """Place of an error outside of libraries, which may be in a user's own method or dataset."""
    libraries = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib"))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, "<"))]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
