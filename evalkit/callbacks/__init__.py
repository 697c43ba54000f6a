"""Observers of an evaluator; each is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from evalkit.callbacks.base import Callback

if TYPE_CHECKING:
    from evalkit.callbacks.csv import CSVCallback
    from evalkit.callbacks.early_stopping import EarlyStopping
    from evalkit.callbacks.logger import LoggerCallback
    from evalkit.callbacks.progress import TqdmCallback

__all__ = ["CSVCallback", "Callback", "EarlyStopping", "LoggerCallback", "TqdmCallback"]

_MODULES = {
    "CSVCallback": "csv",
    "EarlyStopping": "early_stopping",
    "LoggerCallback": "logger",
    "TqdmCallback": "progress",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"evalkit.callbacks.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
