"""The store's event loop ends whole, whatever goes wrong when it ends."""

import asyncio
import threading

import pytest

from kvstore.errors import RetryableError, StoreClosedError
from kvstore.event_loop import EventLoopThread


async def fail():
    raise RetryableError("the backend could not be closed")


async def nothing():
    pass


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("kvstore-")}


def refuse() -> None:
    raise RuntimeError("the pool could not be closed")


@pytest.mark.parametrize("trouble", ["last", "workers", "engine"])
def test_when_something_fails_to_close_all_else_is_closed_and_the_error_raised(monkeypatch, trouble):
    before = threads()
    loop = EventLoopThread(workers=2)
    # So that every pool has a thread.
    assert loop.run(loop.work(int, "7")) == loop.run(loop.call_engine(int, "7")) == 7
    forever = loop.submit(asyncio.sleep(3600))
    if trouble != "last":
        pool = getattr(loop, f"_{trouble}")
        close = pool.close

        async def fail_closed(_: float):
            await close(0.0)
            refuse()

        monkeypatch.setattr(pool, "close", fail_closed)
    with pytest.raises(RetryableError if trouble == "last" else RuntimeError, match="could not be closed"):
        loop.close(fail() if trouble == "last" else nothing(), 20.0)
    assert threads() == before
    assert loop._loop.is_closed()
    assert forever.cancelled()
    with pytest.raises(StoreClosedError):
        loop.run(nothing())
