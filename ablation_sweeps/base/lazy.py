"""torch and pandas, imported on first use: without them, planning a sweep starts seconds sooner."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import torch
else:

    class Lazy(ModuleType):
        """Stand-in for a module. It does not change `sys.modules`, or how others import the module."""

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self.__name__), name)

    torch, pd = Lazy("torch"), Lazy("pandas")


__all__ = ["pd", "torch"]
