"""Ends a command on Ctrl-C with one line and no traceback.

Ctrl-C may come while modules are imported, so this module is imported first, and itself imports little.
"""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType

LINE = "interrupted; the same command continues where it stopped"


def say_in_one_line() -> None:
    """Show one line for a Ctrl-C that nothing else handles, unless HYDRA_FULL_ERROR=1 asks for tracebacks."""
    if os.environ.get("HYDRA_FULL_ERROR") != "1":
        sys.excepthook = _show


def end_at_the_next() -> None:
    """Let another Ctrl-C end the process at once, since the cleanup of libraries at exit would show a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        end_at_the_next()
        print(LINE, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
