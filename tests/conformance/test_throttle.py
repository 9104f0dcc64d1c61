import pytest

from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.backends.throttle import ThrottledBackend
from kvstore.testing import BackendConformance


class TestThrottledBackend(BackendConformance):
    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.objects: dict[str, StoredObject] = {}

    def make_backend(self) -> ThrottledBackend:
        return ThrottledBackend(
            MemoryBackend(self.objects),
            first_byte_s=0.0005,
            connection_bytes_per_s=1e9,
            total_bytes_per_s=2e9,
        )
