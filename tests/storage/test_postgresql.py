from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evalkit.storage import SQLStorage, Storage
from evalkit.testing.storage import StorageSuite


class TestPostgreSQL(StorageSuite):
    @pytest.fixture(autouse=True)
    def _database(self, new_database: Callable[[], str]) -> None:
        self.database = new_database()

    def open_storage(self, tmp_path: Path) -> Storage:
        return SQLStorage(self.database)
