# ruff: noqa: D102 S311  tests are described by their names; their random bytes protect nothing
"""What a backend promises of one object: bytes, ranges, versions, races, cancellation."""

from __future__ import annotations

import asyncio
import random

import pytest

from kvstore.backends.contract import Buffer, PutStatus
from kvstore.errors import MisconfiguredError, RetryableError
from kvstore.testing.scene import Scene, finished, promise

LARGE_BYTES = (8 << 20) + 13
WRITERS = 8


class ObjectPromises:
    """Tests; see BackendConformance."""

    @promise
    async def test_absence_is_a_value(self, scene: Scene) -> None:
        assert await scene.read("nothing") is None
        assert await scene.read("nothing", 5, 5, if_match="an-etag") is None
        assert await scene.backend.head(scene.name("nothing")) is None
        assert await scene.labels() == []
        await scene.backend.delete([scene.name("nothing")])

    @promise
    async def test_an_object_comes_back_as_it_was_put(self, scene: Scene) -> None:
        for size in (0, 1, 4096, 100_001):
            data = random.Random(size).randbytes(size)
            result = await scene.put(str(size), data)
            assert result.status is PutStatus.CREATED
            reading = await scene.read(str(size))
            assert reading is not None
            assert (reading.data, reading.object_bytes, reading.etag) == (data, size, result.etag)

    @promise
    async def test_a_large_object_comes_back_as_it_was_put(self, scene: Scene) -> None:
        data = random.Random(1).randbytes(LARGE_BYTES)
        third = LARGE_BYTES // 3
        await scene.put("large", data[:third], data[third:])
        reading = await scene.read("large", length=LARGE_BYTES)
        assert reading is not None
        # Compared apart from the assert, which would take minutes to explain a difference.
        same = reading.data == data
        assert same

    @promise
    async def test_parts_of_every_kind_are_joined_in_order(self, scene: Scene) -> None:
        memory = bytearray(b"--view--")
        array, view = bytearray(b"array"), memoryview(memory)[2:6]
        parts: list[Buffer] = [b"bytes", b"", array, view, memoryview(b"frozen")[1:], bytearray()]
        for if_absent in (True, False):
            name = f"parts-{if_absent}"
            await scene.backend.put(scene.name(name), parts, if_absent=if_absent)
            reading = await scene.read(name)
            assert reading is not None
            assert reading.data == b"bytesarrayviewrozen"
        await scene.backend.put(scene.name("none"), [], if_absent=True)
        assert (await scene.data("none")) == b""

    @promise
    async def test_a_ranged_read_gives_exactly_its_range(self, scene: Scene) -> None:
        data = bytes(range(256)) * 4
        size = len(data)
        await scene.put("object", data)
        for offset, length in (
            (0, 1), (0, size), (0, size + 1), (1, 10), (100, 500), (size - 1, 1), (size - 1, 2),
            (size - 10, 10), (size - 10, 1000), (size, 1), (size + 1, 1), (10 * size, size),
        ):  # fmt: skip
            reading = await scene.read("object", offset, length)
            assert reading is not None
            assert (reading.data, reading.object_bytes) == (data[offset : offset + length], size)

    @promise
    async def test_any_range_of_an_empty_object_is_empty(self, scene: Scene) -> None:
        result = await scene.put("empty", b"")
        for offset in (0, 1):
            reading = await scene.read("empty", offset, 10)
            assert reading is not None
            assert (reading.data, reading.object_bytes, reading.etag) == (b"", 0, result.etag)

    @promise
    async def test_if_match_reads_only_the_version_asked_for(self, scene: Scene) -> None:
        old = await scene.put("object", b"first")
        reading = await scene.read("object", 1, 3, if_match=old.etag)
        assert reading is not None
        assert reading.data == b"irs"
        new = await scene.put("object", b"second!", if_absent=False)
        for offset in (0, 1, 100):
            reading = await scene.read("object", offset, 3, if_match=old.etag)
            assert reading is not None
            assert (reading.data, reading.object_bytes, reading.etag) == (b"", 7, new.etag)

    @promise
    async def test_put_if_absent_never_replaces(self, scene: Scene) -> None:
        first = await scene.put("object", b"first")
        second = await scene.put("object", b"second")
        assert second.status is PutStatus.EXISTS
        assert second.etag in ("", first.etag)
        assert await scene.data("object") == b"first"

    @promise
    async def test_put_if_absent_has_one_winner(self, scene: Scene) -> None:
        instances = [scene.backend, scene.another_backend(), scene.another_backend()]
        for turn in range(3):
            name = scene.name(f"contended-{turn}")
            results = await asyncio.gather(
                *(
                    instances[i % len(instances)].put(name, [bytes([i]) * 10_000], if_absent=True)
                    for i in range(WRITERS)
                )
            )
            winners = [i for i, result in enumerate(results) if result.status is PutStatus.CREATED]
            assert len(winners) == 1
            assert await scene.data(f"contended-{turn}") == bytes(winners) * 10_000

    @promise
    async def test_a_replaced_object_is_seen_whole(self, scene: Scene) -> None:
        size = 300_000
        await scene.put("object", b"\0" * size)
        seen: dict[str, int] = {}

        async def read_on(label: str, writing: asyncio.Future[None]) -> None:
            while not writing.done():
                try:
                    reading = await scene.read(label, length=size)
                except RetryableError:
                    # Ceph answers 500 when it finds old parts gone; that shows no wrong byte.
                    continue
                assert reading is not None
                assert len(reading.data) == size
                assert len(set(reading.data)) == 1
                assert seen.setdefault(reading.etag, reading.data[0]) == reading.data[0]

        async def replace() -> None:
            for value in range(1, 10):
                await scene.put("object", bytes([value]) * size, if_absent=False)

        writing = asyncio.ensure_future(replace())
        await asyncio.gather(writing, *(read_on("object", writing) for _ in range(3)))
        assert await scene.data("object") == b"\x09" * size

    @promise
    async def test_equal_etags_mean_equal_bytes(self, scene: Scene) -> None:
        versions: dict[str, bytes] = {}
        for number in range(20):
            data = b"%04d" % number
            etag = (await scene.put("object", data, if_absent=False)).etag
            assert etag
            assert versions.setdefault(etag, data) == data
            reading = await scene.read("object")
            assert reading is not None
            assert (reading.etag, reading.data) == (etag, data)

    @promise
    async def test_a_cancelled_read_leaves_the_buffer_alone(self, scene: Scene) -> None:
        await scene.put("large", b"\xff" * LARGE_BYTES)
        out = bytearray(LARGE_BYTES)
        for wait_s in (0, 0, 0.001, 0.002, 0.005, 0.01, 0.02):
            reading = asyncio.ensure_future(scene.backend.read_into(scene.name("large"), 0, memoryview(out)))
            await asyncio.sleep(wait_s)
            reading.cancel()
            await finished(reading)
            out[:] = bytes(LARGE_BYTES)
            await asyncio.sleep(0.05)
            assert out.count(0) == LARGE_BYTES

    @promise
    async def test_a_cancelled_put_is_whole_or_without_effect(self, scene: Scene) -> None:
        data = bytearray(LARGE_BYTES)
        for turn, wait_s in enumerate((0, 0, 0.001, 0.005, 0.02, 0.05)):
            data[:] = bytes(LARGE_BYTES)
            writing = asyncio.ensure_future(
                scene.backend.put(scene.name(f"large-{turn}"), [data], if_absent=True)
            )
            await asyncio.sleep(wait_s)
            writing.cancel()
            ended = await finished(writing)
            data[:] = b"\xff" * LARGE_BYTES
            await asyncio.sleep(0.1)
            reading = await scene.read(f"large-{turn}", length=LARGE_BYTES)
            assert reading is not None or not ended
            if reading is not None:
                assert reading.data.count(0) == LARGE_BYTES

    @promise
    async def test_impossible_buffers_are_refused(self, scene: Scene) -> None:
        await scene.put("object", b"0123456789")
        good = memoryview(bytearray(8))
        for offset, out in (
            (-1, good), (0, good[:0]), (0, memoryview(b"frozen")), (0, good[::2]), (0, good.cast("I"))
        ):  # fmt: skip
            with pytest.raises(MisconfiguredError):
                await scene.backend.read_into(scene.name("object"), offset, out)
