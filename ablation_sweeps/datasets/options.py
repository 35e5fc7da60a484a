"""Types of options that several datasets have."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator

if TYPE_CHECKING:
    pass


def _compiles(pattern: str | None) -> str | None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    return pattern


def _pairs(mapping: Any) -> Any:
    return tuple(sorted(mapping.items())) if isinstance(mapping, dict) else mapping


Pattern = Annotated[str | None, AfterValidator(_compiles)]  # a regular expression
Pairs = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_pairs)]  # a mapping, in a form that can be hashed
