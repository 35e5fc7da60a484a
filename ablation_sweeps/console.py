"""Messages that do not tear a progress bar apart."""

from __future__ import annotations

import logging
import sys


class Handler(logging.Handler):
    """Writes above the progress bar, to stderr: stdout holds the results alone."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)
