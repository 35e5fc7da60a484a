"""Paths from the user, made absolute once, in the folder where the command was typed."""

from __future__ import annotations

import glob
import os
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

if TYPE_CHECKING:
    pass


def absolute(path: str) -> str:
    """Absolute path: `~` is the user's home folder; relative paths and patterns begin in the current folder."""
    given = os.path.expanduser(path)
    if os.path.isabs(given) or os.path.lexists(given) or not glob.has_magic(given):
        return os.path.join(os.getcwd(), given)
    return os.path.join(glob.escape(os.getcwd()), given)


def _local(path: str) -> str:
    if not path:
        raise ValueError("must be a path, or null for none")
    return absolute(path)


# Types of options.
LocalPath = Annotated[str, AfterValidator(_local)]  # made absolute when the command is read: a job may change folder
