from pathlib import Path

from evalkit.storage import SQLStorage, Storage
from evalkit.testing.storage import StorageSuite


class TestSQLite(StorageSuite):
    def open_storage(self, tmp_path: Path) -> Storage:
        return SQLStorage(f"sqlite:///{tmp_path}/study.db")
