"""Words on a terminal or in a log."""

from __future__ import annotations

import logging
import sys
import sysconfig
import traceback
from typing import TYPE_CHECKING, Any

from ablation_sweeps.data import UserError

if TYPE_CHECKING:
    from rich.console import Console


class Handler(logging.Handler):
    """Writes above the progress bar, which it does not tear apart, to stderr: stdout holds the results alone."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def counted(number: int, what: str, ending: str = "s") -> str:
    return f"{number} {what}{ending if number != 1 else ''}"


def as_typed(value: Any) -> str:
    """As on the command line: null, true, [a,b]."""
    if isinstance(value, list):
        return f"[{','.join(as_typed(item) for item in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def encodable(text: str, console: Console) -> str:
    """A log file in ASCII gets question marks and not a traceback."""
    return text.encode(console.encoding, "replace").decode(console.encoding)


def plain(error: BaseException) -> str:
    """What went wrong in one line; of what nobody foresaw, also where."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.filename and error.strerror:
        reason = f"{error.strerror[0].lower()}{error.strerror[1:]}"
        return f"{error.filename}: {reason}; if it is the results that cannot be written there, set results_dir=FOLDER"
    name = f"{type(error).__name__}: {text}".removesuffix(": ")
    return f"{name}{_where(error)}" if isinstance(error, Exception) else name


def _where(error: Exception) -> str:
    """The last line that is no library's: it may be of a method or dataset that the reader has written."""
    libraries = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib"))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, "<"))]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
