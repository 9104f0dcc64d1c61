import asyncio

import pytest

from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.testing import BackendConformance


class TestMemoryBackend(BackendConformance):
    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.objects: dict[str, StoredObject] = {}

    def make_backend(self) -> MemoryBackend:
        return MemoryBackend(self.objects)


def test_instances_share_nothing_by_default() -> None:
    async def scenario() -> None:
        await MemoryBackend().put("name", [b"x"], if_absent=True)
        assert await MemoryBackend().head("name") is None

    asyncio.run(scenario())
