import logging

import pytest

from kvstore.backends.guarded import GuardedBackend
from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.metrics import Metrics
from kvstore.testing import BackendConformance
from kvstore.warn import WarnRarely


class TestGuardedBackend(BackendConformance):
    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.objects: dict[str, StoredObject] = {}

    def make_backend(self) -> GuardedBackend:
        return GuardedBackend(
            MemoryBackend(self.objects),
            "no-object",
            metrics=Metrics(),
            warn=WarnRarely(logging.getLogger("kvstore")),
        )
