"""The conformance suites that backends and storages are held to; a plugin's test file only subclasses one."""

from evalkit.testing.backend import BackendSuite
from evalkit.testing.storage import StorageSuite

__all__ = ["BackendSuite", "StorageSuite"]
