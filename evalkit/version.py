"""The version of evalkit, in the one place that packaging and plugins read."""

__all__ = ["__version__"]

__version__ = "0.1.0"
