"""A store on a bucket that is collected: what its nodes' watch is for, seen from outside."""

import asyncio
import time

from samples import FORM, PATIENCE_S, PREFIX, Pages, ScriptedBackend, chain_of, name_of, store_of

from kvstore import Durability
from kvstore.errors import RetryableError
from kvstore.gc import watch
from kvstore.gc.names import Announcement, Span, touches_folder
from kvstore.gc.records import read_hashes, seal_hashes
from kvstore.handles import SaveOutcome

CHAIN = chain_of(3)
SPAN = Span(CHAIN.namespace.name, FORM.shard, "0")


def announce(backend: ScriptedBackend, *announced: Announcement) -> None:
    for each in announced:
        body = b"" if each.sweep else seal_hashes([CHAIN.keys[1].hash])
        asyncio.run(backend.put(each.name(PREFIX), [body], if_absent=True))


def save(store) -> dict[int, SaveOutcome]:
    return store.save(CHAIN, range(3), Pages(3, FORM, "a"), until=Durability.REMOTE).wait(PATIENCE_S)


def test_p6_nothing_that_continues_a_doomed_chunk_is_stored():
    backend = ScriptedBackend()
    announce(backend, Announcement(SPAN, 1), Announcement(SPAN, 1, 2))
    with store_of(backend) as store:
        assert save(store) == {0: SaveOutcome.STORED, 1: SaveOutcome.FAILED, 2: SaveOutcome.FAILED}
        assert [name_of(key) in backend.objects for key in CHAIN.keys] == [True, False, False]


def test_p6_a_lookup_counts_no_doomed_chunk():
    backend = ScriptedBackend()
    with store_of(backend) as store:
        save(store)
    with store_of(backend) as store:
        announce(backend, Announcement(SPAN, 1), Announcement(SPAN, 1, 2))
        store.load(CHAIN, range(1), Pages(3)).wait(PATIENCE_S)
        store._loop.run(store._parts.watch.read())
        store._parts.memory.clear()
        assert store.lookup(CHAIN).chunks == 1


def test_what_a_store_uses_of_a_mark_it_tells():
    backend = ScriptedBackend()
    with store_of(backend) as store:
        save(store)
    announce(backend, Announcement(SPAN, 1))
    with store_of(backend) as store:
        store.load(CHAIN, range(3), Pages(3)).wait(PATIENCE_S)
        store._loop.run(store._parts.watch.read())
    told = [name for name in backend.objects if name.startswith(touches_folder(PREFIX))]
    assert asyncio.run(read_hashes(backend, *told)) == {CHAIN.keys[1].hash}


def test_a_store_whose_backend_was_down_when_it_opened_tells_too(monkeypatch):
    monkeypatch.setattr(watch, "RETRY_S", 0.01)
    backend = ScriptedBackend()
    with store_of(backend) as store:
        save(store)
    announce(backend, Announcement(SPAN, 1))
    backend.when("list", RetryableError("not now"), times=1)
    with store_of(backend) as store:
        assert not store.wait_connected(PATIENCE_S)
        store.load(CHAIN, range(3), Pages(3)).wait(PATIENCE_S)
        until_s = time.monotonic() + PATIENCE_S
        while not any(name.startswith(touches_folder(PREFIX)) for name in list(backend.objects)):
            assert time.monotonic() < until_s
            time.sleep(0.01)
