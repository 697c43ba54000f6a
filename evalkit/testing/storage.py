"""StorageSuite: the tests that every storage is held to."""

from __future__ import annotations

import pytest

# Before they are imported, so that a failure shows the values in its assertion.
pytest.register_assert_rewrite("evalkit.testing.storage_records", "evalkit.testing.storage_sharing")

from evalkit.testing.storage_records import StorageRecords, StorageValues  # noqa: E402
from evalkit.testing.storage_sharing import StorageQueue, StorageSharing  # noqa: E402

__all__ = ["StorageSuite"]


class StorageSuite(StorageRecords, StorageValues, StorageQueue, StorageSharing):
    """The conformance suite of :class:`evalkit.storage.Storage`.

    A storage's test file subclasses it::

        class TestMyStorage(StorageSuite):
            def open_storage(self, tmp_path):
                return MyStorage.from_url(f"mine://{tmp_path}/place")

    Attributes:
        shared: whether opening the same place again, here or in another process, leads to the same records. Another
            process opens it with ``type(storage).from_url(self.url_of(storage))``.
        keeps_jobs: whether records of jobs are kept at all; if not, the tests that read them are skipped.
    """
