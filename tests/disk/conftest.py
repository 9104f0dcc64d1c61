import gc
import logging
from collections.abc import Iterator

import pytest
from disk_samples import Disk


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.heal()


@pytest.fixture(autouse=True)
def _no_lost_exceptions(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    gc.collect(1)  # what is young: a test made it
    assert [record for record in caplog.records if record.levelno > logging.WARNING] == []
