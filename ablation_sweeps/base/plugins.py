"""Completes a class that a `_target_` names with the optional members of its protocol."""

from __future__ import annotations

import inspect


def required_members(protocol: type) -> list[str]:
    """Members that a class must have itself: methods are abstract in the protocol, attributes have no value there."""
    methods = [name for name, member in vars(protocol).items() if getattr(member, "__isabstractmethod__", False)]
    attributes = [name for name in inspect.get_annotations(protocol) if name not in vars(protocol)]
    return [*(f"{name}()" for name in methods), *attributes]


def missing_members(kind: type, protocol: type) -> list[str]:
    """Required members of the protocol that a class lacks."""
    has = _members(kind)
    return [member for member in required_members(protocol) if member.removesuffix("()") not in has]


def complete(kind: type, protocol: type) -> None:
    """Give a class the protocol's defaults for the optional members that it lacks.

    The class is changed, not inherited from: it keeps its name, its file and its signature. A dataclass that inherits
    the defaults would also take them as defaults of its own fields.
    """
    has = _members(kind)
    for name, member in vars(protocol).items():
        if not name.startswith("_") and f"{name}()" not in required_members(protocol) and name not in has:
            setattr(kind, name, member)


def _members(kind: type) -> set[str]:
    """Names of a class's attributes, methods and fields; a field without a default is no attribute of the class."""
    return {*dir(kind), *getattr(kind, "__dataclass_fields__", ())}
