"""A node's side of a collection, in virtual time."""

import asyncio
import logging

import pytest
import virtual_time
from gc_bucket import NAMESPACE, PREFIX, SHARD, chain
from samples import ScriptedBackend

from kvstore.errors import MisconfiguredError, RetryableError
from kvstore.gc.names import Announcement, Span, announced_folder, touches_folder
from kvstore.gc.records import read_hashes, seal_hashes
from kvstore.gc.watch import RETELL_S, STALE_S, SWEEP_S, WATCH_S, DoomedError, MarkWatch
from kvstore.presence import Presence
from kvstore.warn import WarnRarely

KEYS = chain(4)
SPAN = Span(NAMESPACE.name, SHARD, "0")
MARK = Announcement(SPAN, 1)
SWEEP = Announcement(SPAN, 1, 3)


class Node:
    def __init__(self) -> None:
        self.backend = ScriptedBackend()
        self.presence = Presence(1e6, clock=asyncio.get_running_loop().time)
        warn = WarnRarely(logging.getLogger("test"))
        self.watch = MarkWatch(self.backend, PREFIX, SHARD, self.presence, warn)

    async def announce(self, *announced: Announcement) -> None:
        for each in announced:
            body = b"" if each.sweep else seal_hashes(key.hash for key in KEYS[1:3])
            await self.backend.put(each.name(PREFIX), [body], if_absent=True)

    async def withdraw(self, *announced: Announcement) -> None:
        await self.backend.delete([each.name(PREFIX) for each in announced])

    async def told(self) -> list[set[bytes]]:
        names = [name for name in self.backend.objects if name.startswith(touches_folder(PREFIX))]
        return [set(await read_hashes(self.backend, name)) for name in names]


def on_a_node(scenario):
    """Run a test as a coroutine with a node."""

    def test() -> None:
        async def run() -> None:
            await scenario(Node())

        virtual_time.run(run())

    test.__name__ = scenario.__name__
    return test


@on_a_node
async def test_what_is_used_of_a_mark_is_told_once(node):
    await node.announce(MARK)
    node.watch.note_used(KEYS[:2])
    await node.watch.read()
    assert await node.told() == [{KEYS[1].hash}]
    node.watch.note_used(KEYS[:2])
    await node.watch.read()
    assert len(await node.told()) == 1
    await asyncio.sleep(RETELL_S)
    node.watch.note_used(KEYS[:2])
    await node.watch.read()
    assert len(await node.told()) == 2


@on_a_node
async def test_what_could_not_be_told_is_told_next_time(node):
    await node.announce(MARK)
    node.watch.note_used(KEYS)
    node.backend.when("put", RetryableError("not now"), name="touches", times=1)
    with pytest.raises(RetryableError):
        await node.watch.read()
    await node.watch.read()
    assert await node.told() == [{KEYS[1].hash, KEYS[2].hash}]


@on_a_node
async def test_p6_what_is_doomed_counts_as_absent_and_is_not_continued(node):
    await node.announce(MARK, SWEEP)
    node.presence.note(KEYS, present=True)
    for doomed in KEYS[1:]:
        # The last one is not marked, but continues what is.
        with pytest.raises(DoomedError):
            await node.watch.check_upload(doomed)
    await node.watch.check_upload(KEYS[0])
    assert node.presence.bounds(KEYS, 0) == (1, 1)
    assert [node.presence.get(key) for key in KEYS] == [True, False, False, True]


@on_a_node
async def test_p6_after_a_sweep_what_was_seen_before_it_is_forgotten(node):
    await node.announce(MARK, SWEEP)
    node.presence.note(KEYS, present=True)
    node.watch.note_used(KEYS[:1])
    await node.watch.read()
    await node.withdraw(MARK, SWEEP)
    await node.watch.read()
    assert [node.presence.get(key) for key in KEYS] == [True, None, None, True]
    await node.watch.check_upload(KEYS[2])


@on_a_node
async def test_a_collector_that_died_dooms_nothing_for_ever(node):
    await node.announce(MARK, SWEEP)
    with pytest.raises(DoomedError):
        await node.watch.check_upload(KEYS[1])
    await asyncio.sleep(SWEEP_S)
    await node.watch.check_upload(KEYS[1])


@on_a_node
async def test_uploads_ask_no_more_than_they_must(node):
    for key in KEYS:
        await node.watch.check_upload(key)
    assert node.backend.count("list") == 1
    await asyncio.sleep(STALE_S)
    await node.watch.check_upload(KEYS[0])
    assert node.backend.count("list") == 2


@on_a_node
async def test_a_node_asks_once_a_minute(node):
    await node.watch.start()
    await asyncio.sleep(10 * WATCH_S - 1.0)
    assert node.backend.count("list", announced_folder(PREFIX)) == len(node.backend.calls) == 10
    node.watch._running.cancel()


@on_a_node
async def test_of_namespaces_not_in_use_only_what_is_swept_is_read(node):
    await node.announce(MARK)
    await node.watch.read()
    assert node.backend.count("get") == 0
    await node.announce(SWEEP)
    await node.watch.read()
    assert node.presence.get(KEYS[1]) is False


@on_a_node
async def test_where_listing_is_forbidden_saving_goes_on(node):
    node.backend.when("list", MisconfiguredError("allow s3:ListBucket"))
    await node.watch.check_upload(KEYS[0])


@on_a_node
async def test_a_damaged_mark_is_none(node):
    await node.backend.put(MARK.name(PREFIX), [b"nonsense"], if_absent=True)
    await node.announce(SWEEP)
    await node.watch.check_upload(KEYS[1])
