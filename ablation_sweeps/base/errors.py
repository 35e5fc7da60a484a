"""Errors that a user can fix."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class UserError(ValueError):
    """An error that the user can fix. The message is one line that names the option and the remedy."""
