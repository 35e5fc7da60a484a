"""torch and pandas, imported when something of them is first used: a sweep is planned without them, seconds sooner."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import torch
else:

    class Lazy(ModuleType):
        """Stands for a module, and is none: `sys.modules` and everybody else's imports are as ever."""

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self.__name__), name)

    torch, pd = Lazy("torch"), Lazy("pandas")


__all__ = ["pd", "torch"]
