"""Both planes and both gateways are ways to the same objects."""

import asyncio
import uuid
from dataclasses import replace

import pytest
from integration.access import Access, options_of
from s3_planes import PLANES, PlaneParity, open_plane

from kvstore.backends.contract import PutStatus

WRITERS = 8
ROUNDS = 10
OBJECT_BYTES = 100_000
WAYS = [
    Access(server, style=style, tls=tls)
    for server, tls in (("rgw", False), ("rgw", True), ("localstack", False), ("moto", False))
    for style in ("path", "virtual")
    if (server, style) != ("moto", "path")  # in the tests that need nothing installed
]


class TestPlanesOnRealServers(PlaneParity):
    @pytest.fixture(autouse=True, params=WAYS, ids=str)
    def _store(self, request, monkeypatch):
        access = request.param
        self.options = options_of(access, request.getfixturevalue(access.server), monkeypatch)


@pytest.mark.parametrize("plane", PLANES)
def test_a_race_over_two_gateways_has_one_winner(rgw, plane, monkeypatch):
    options = options_of(Access("rgw", plane), rgw, monkeypatch)

    async def scenario() -> None:
        gateways = [open_plane(plane, replace(options, endpoint_url=url)) for url in rgw.endpoint_urls]
        assert len(gateways) == 2
        try:
            for _ in range(ROUNDS):
                name = f"race-{uuid.uuid4().hex}"
                results = await asyncio.gather(
                    *(
                        gateways[i % 2].put(name, [bytes([i]) * OBJECT_BYTES], if_absent=True)
                        for i in range(WRITERS)
                    )
                )
                winners = [i for i, put in enumerate(results) if put.status is PutStatus.CREATED]
                assert len(winners) == 1
                for gateway in gateways:
                    out = bytearray(OBJECT_BYTES)
                    await gateway.read_into(name, 0, memoryview(out))
                    same = out == bytes(winners) * OBJECT_BYTES
                    assert same
        finally:
            for gateway in gateways:
                await gateway.close()

    asyncio.run(scenario())
