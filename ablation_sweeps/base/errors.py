"""Errors that a user can mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class UserError(ValueError):
    """Something the user can mend. The message is one line: it names the option and the remedy."""
