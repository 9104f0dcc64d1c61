from pathlib import Path

import pytest

from kvstore.backends.filesystem import FilesystemBackend
from kvstore.testing import BackendConformance


class TestFilesystemBackend(BackendConformance):
    objects_may_be_folders = False

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.root = tmp_path / "made" / "by the first put"

    def make_backend(self) -> FilesystemBackend:
        return FilesystemBackend(self.root)
