"""Words on a terminal or in a log."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Handler(logging.Handler):
    """Writes above the progress bar, which it does not tear apart, to stderr: stdout holds the results alone."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def encodable(text: str, console: Console) -> str:
    """A log file in ASCII gets question marks and not a traceback."""
    return text.encode(console.encoding, "replace").decode(console.encoding)
