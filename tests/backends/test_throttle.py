import asyncio
import math

import pytest
from virtual_time import run

from kvstore.backends.contract import ABSENT
from kvstore.backends.memory import MemoryBackend
from kvstore.backends.throttle import ThrottledBackend
from kvstore.errors import MisconfiguredError

SIZE = 1000


def throttled(**limits: float) -> ThrottledBackend:
    return ThrottledBackend(MemoryBackend(), **limits)


async def filled(**limits: float) -> ThrottledBackend:
    """A backend that holds `object`, SIZE bytes."""
    inner = MemoryBackend()
    await inner.put("object", [bytes(range(250)) * 4], if_absent=True)
    return ThrottledBackend(inner, **limits)


async def read(backend: ThrottledBackend, length: int = SIZE, offset: int = 0) -> float:
    """Read a range and tell when it had come."""
    out = bytearray(length)
    result = await backend.read_into("object", offset, memoryview(out))
    assert result is not ABSENT
    assert bytes(out[: result.length]) == (bytes(range(250)) * 4)[offset : offset + result.length]
    return now_s()


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_every_request_waits_for_its_first_byte():
    async def scenario() -> None:
        backend = await filled(first_byte_s=3)
        for number, call in enumerate(
            (
                backend.head("object"),
                backend.read_into("object", 0, memoryview(bytearray(1))),
                backend.read_into("nothing", 0, memoryview(bytearray(1))),
                backend.put("other", [b"x"], if_absent=True),
                backend.delete(["other"]),
                backend.clock_s(),
            ),
            start=1,
        ):
            await call
            assert now_s() == pytest.approx(3 * number)
        assert [info.name async for info in backend.list("")] == ["object"]
        assert now_s() == pytest.approx(21)

    run(scenario())


def test_a_long_listing_takes_a_request_for_every_thousand_names():
    async def scenario() -> None:
        inner = MemoryBackend()
        for number in range(2001):
            await inner.put(f"{number:04}", [b""], if_absent=True)
        backend = ThrottledBackend(inner, first_byte_s=1)
        assert len([info async for info in backend.list("")]) == 2001
        assert now_s() == pytest.approx(3)

    run(scenario())


def test_requests_wait_for_their_first_bytes_side_by_side():
    async def scenario() -> None:
        backend = await filled(first_byte_s=3)
        await asyncio.gather(*(backend.head("object") for _ in range(50)))
        assert now_s() == pytest.approx(3)

    run(scenario())


def test_a_transfer_goes_at_the_rate_of_its_connection_whatever_others_do():
    async def scenario() -> None:
        backend = await filled(connection_bytes_per_s=100)
        times = await asyncio.gather(read(backend), read(backend, 500), read(backend))
        assert times == pytest.approx([10, 5, 10])

    run(scenario())


def test_only_bytes_that_are_there_take_time():
    async def scenario() -> None:
        backend = await filled(connection_bytes_per_s=100)
        assert await read(backend, 5000, 800) == pytest.approx(2)
        assert await read(backend, 5000, 1000) == pytest.approx(2)
        refused = await backend.read_into("object", 0, memoryview(bytearray(SIZE)), if_match="another")
        assert refused is not ABSENT
        assert refused.length == 0
        assert now_s() == pytest.approx(2)

    run(scenario())


def test_all_transfers_share_the_link_evenly():
    async def scenario() -> None:
        backend = await filled(total_bytes_per_s=100)
        # Both at 50 a second until 6 s; then the other one has the link alone.
        times = await asyncio.gather(read(backend, 300), read(backend, 900))
        assert times == pytest.approx([6, 12])

    run(scenario())


def test_a_transfer_that_comes_later_slows_down_those_under_way():
    async def scenario() -> None:
        backend = await filled(total_bytes_per_s=100)
        first = asyncio.create_task(read(backend))
        await asyncio.sleep(5)
        second = asyncio.create_task(read(backend, 250))
        assert await second == pytest.approx(10)
        assert await first == pytest.approx(12.5)

    run(scenario())


def test_a_connection_is_no_faster_than_its_own_rate_when_the_link_has_room():
    async def scenario() -> None:
        backend = await filled(connection_bytes_per_s=40, total_bytes_per_s=100)
        # Five share 100: 20 each until the short ones are done; then 40, the most one takes.
        times = await asyncio.gather(*(read(backend, 200) for _ in range(4)), read(backend, 600))
        assert times == pytest.approx([10, 10, 10, 10, 20])

    run(scenario())


def test_a_cancelled_transfer_gives_its_share_to_the_others():
    async def scenario() -> None:
        backend = await filled(total_bytes_per_s=100)
        first = asyncio.create_task(read(backend))
        second = asyncio.create_task(read(backend))
        await asyncio.sleep(4)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert await first == pytest.approx(12)
        assert await read(backend, 100) == pytest.approx(13)

    run(scenario())


def test_a_put_takes_effect_at_its_end():
    async def scenario() -> None:
        backend = throttled(first_byte_s=1, connection_bytes_per_s=100)
        putting = asyncio.create_task(
            backend.put("object", [b"x" * 300, memoryview(b"y" * 700)], if_absent=True)
        )
        await asyncio.sleep(9)
        assert await backend.head("object") is None
        await putting
        assert now_s() == pytest.approx(11)
        info = await backend.head("object")
        assert info is not None
        assert info.object_bytes == SIZE

    run(scenario())


def test_a_put_cancelled_before_its_end_has_no_effect():
    async def scenario() -> None:
        backend = throttled(connection_bytes_per_s=100)
        putting = asyncio.create_task(backend.put("object", [bytes(SIZE)], if_absent=True))
        await asyncio.sleep(9)
        putting.cancel()
        await asyncio.gather(putting, return_exceptions=True)
        await asyncio.sleep(9)
        assert await backend.head("object") is None

    run(scenario())


def test_without_limits_nothing_takes_time():
    async def scenario() -> None:
        backend = await filled()
        await asyncio.gather(*(read(backend) for _ in range(5)))
        assert now_s() == 0

    run(scenario())


@pytest.mark.parametrize(
    "limits",
    [
        {"first_byte_s": -1},
        {"first_byte_s": math.inf},
        {"first_byte_s": math.nan},
        {"connection_bytes_per_s": 0},
        {"total_bytes_per_s": -5},
        {"total_bytes_per_s": math.nan},
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(limits):
    with pytest.raises(MisconfiguredError, match=next(iter(limits))):
        throttled(**limits)
