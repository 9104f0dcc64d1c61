"""Both planes and both gateways are ways to the same objects."""

import asyncio
import uuid
from dataclasses import replace

import pytest
from integration.access import PLANES, Access, open_plane, options_of

from kvstore.backends.contract import PutStatus

WRITERS = 8
ROUNDS = 10
OBJECT_BYTES = 100_000


@pytest.mark.parametrize("style", ["path", "virtual"])
@pytest.mark.parametrize(
    ("server", "tls"), [("rgw", False), ("rgw", True), ("localstack", False), ("moto", False)]
)
def test_what_one_plane_put_the_other_reads_with_the_same_etag(server, tls, style, request, monkeypatch):
    access = Access(server, "socket", style, tls)
    options = options_of(access, request.getfixturevalue(server), monkeypatch)
    # Every kind of character that URLs, signatures and XML treat in ways of their own.
    name = f"parity-{uuid.uuid4().hex}/a b+c%2F&'\"<é>~(1)*!;:@=,$"

    async def scenario() -> None:
        planes = [open_plane(plane, options) for plane in PLANES]
        try:
            for writer, reader in (planes, reversed(planes)):
                put = await writer.put(name, [b"0123", b"456789"], if_absent=True)
                assert put.status is PutStatus.CREATED
                assert (await reader.put(name, [b"other"], if_absent=True)).status is PutStatus.EXISTS
                out = bytearray(4)
                read = await reader.read_into(name, 3, memoryview(out), if_match=put.etag)
                assert (bytes(out), read.length, read.object_bytes) == (b"3456", 4, 10)
                assert await reader.head(name) == await writer.head(name)
                assert [found.name async for found in reader.list(name)] == [name]
                await reader.delete([name])
                assert await writer.head(name) is None
        finally:
            for plane in planes:
                await plane.close()

    asyncio.run(scenario())


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
