"""Callbacks: observers of one evaluator's events."""

from evalkit.callbacks.base import Callback
from evalkit.callbacks.csv import CSVCallback
from evalkit.callbacks.early_stopping import EarlyStopping
from evalkit.callbacks.logger import LoggerCallback
from evalkit.callbacks.progress import TqdmCallback

__all__ = ["CSVCallback", "Callback", "EarlyStopping", "LoggerCallback", "TqdmCallback"]
