"""Blocking calls where the system has no more threads to give."""

import asyncio
import threading

import pytest

from kvstore.backends.blocking import BlockingCalls


def no_threads(self):
    raise RuntimeError("can't start new thread")


def test_without_any_thread_a_call_is_refused_and_never_runs(monkeypatch):
    async def scenario():
        calls, ran = BlockingCalls(2, "test"), []
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_threads)
            with pytest.raises(RuntimeError):
                await calls.run(lambda _: ran.append(1))
        assert await calls.run(lambda _: 7) == 7
        await calls.close()
        assert not ran

    asyncio.run(scenario())


def test_with_one_thread_where_more_are_wanted_calls_run_one_after_the_other(monkeypatch):
    async def scenario():
        calls = BlockingCalls(4, "test")
        assert await calls.run(lambda _: 1) == 1
        monkeypatch.setattr(threading.Thread, "start", no_threads)
        assert await asyncio.gather(*(calls.run(lambda _, n=n: n) for n in range(5))) == [*range(5)]
        assert await calls.close()

    asyncio.run(scenario())
