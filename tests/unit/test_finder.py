import asyncio
from concurrent.futures import Future

import numpy as np
import pytest
from journal_samples import wait_until
from samples import LAYOUT, PREFIX, ScriptedBackend, chain_of, settings_of

from kvstore.backends.memory import MemoryBackend
from kvstore.errors import RetryableError, StoreClosedError
from kvstore.finder import ChunkFinder
from kvstore.gc.names import Announcement, Span, touches_folder
from kvstore.gc.records import read_hashes, seal_hashes
from kvstore.index.known import KnownSet, base_for, words_of
from kvstore.keys import object_name
from kvstore.layout import Shard

CHAIN = chain_of(6)
SHARDS = (Shard(0, 1), Shard(1, 3))
PATIENCE_S = 20.0


def objects_of(*counts):
    """What a bucket holds of the chain: so many leading chunks of each shard."""
    backend = MemoryBackend()
    for shard, count in zip(SHARDS, counts, strict=True):
        for key in CHAIN.keys[:count]:
            backend._objects[object_name(PREFIX, key, shard)] = b""
    return backend._objects


@pytest.fixture
def finder():
    """Make a finder over a backend; it is closed with the test."""
    made = []

    def make(backend, **settings):
        made.append(ChunkFinder(LAYOUT, SHARDS, settings_of(prefix=PREFIX, **settings), backend))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Listed(ScriptedBackend):
    """Answers HEAD for names in `names`, and counts."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.heads = 0
        self.broken = False

    async def head(self, name):
        self.heads += 1
        if self.broken:
            raise RetryableError("by a test")
        return object() if name in self.names else None


@pytest.mark.parametrize(("counts", "found"), [((6, 6), 6), ((6, 2), 2), ((0, 6), 0), ((3, 4), 3)])
def test_a_chunk_is_present_only_if_every_shard_of_it_is(finder, counts, found):
    assert finder(Listed(objects_of(*counts))).begin(CHAIN.keys).result(PATIENCE_S) == found


def test_a_repeated_lookup_asks_nobody_and_is_done_at_once(finder):
    backend = Listed(objects_of(6, 6))
    looked = finder(backend)
    assert looked.begin(CHAIN.keys).result(PATIENCE_S) == 6
    asked = backend.heads
    again: Future[int] = looked.begin(CHAIN.keys)
    assert again.done()
    assert again.result() == 6
    assert backend.heads == asked


def test_what_was_saved_just_now_is_present_until_a_load_misses_it(finder):
    backend = Listed(objects_of(0, 0))
    looked = finder(backend)
    looked.note_stored(CHAIN.keys[:4])
    assert looked.begin(CHAIN.keys[:4]).result() == 4
    looked.note_missed(CHAIN.keys[1:4])
    assert looked.begin(CHAIN.keys[:4]).result(PATIENCE_S) == 1


def test_trouble_with_the_backend_counts_as_absent(finder):
    backend = Listed(objects_of(6, 6))
    backend.broken = True
    assert finder(backend).begin(CHAIN.keys).result(PATIENCE_S) == 0


def test_after_closing_nothing_can_be_asked(finder):
    looked = finder(Listed(objects_of(6, 6)))
    looked.close()
    with pytest.raises(StoreClosedError):
        looked.begin(CHAIN.keys)


def announced(shard, keys, *, sweep):
    """What a collector has put down about chunks of one shard, as objects."""
    mark = Announcement(Span(CHAIN.namespace.name, shard, "0"), 1)
    found = {mark.name(PREFIX): seal_hashes(key.hash for key in keys)}
    return found | ({mark._replace(sweep=2).name(PREFIX): b""} if sweep else {})


def scripted(*announcements):
    """A backend that holds the whole chain in both shards, and announcements."""
    backend = ScriptedBackend()
    for each in (objects_of(6, 6), *announcements):
        for name, data in each.items():
            backend.replace(name, data)
    return backend


@pytest.mark.parametrize("shard", SHARDS)
def test_p6_what_a_collection_is_about_to_remove_of_any_shard_is_not_offered(finder, shard):
    looked = finder(scripted(announced(shard, CHAIN.keys[2:4], sweep=True)))
    wait_until(lambda: looked.begin(CHAIN.keys).result(PATIENCE_S) == 2)
    # Nor if somebody has saved it just now.
    looked.note_stored(CHAIN.keys)
    assert looked.begin(CHAIN.keys).result(PATIENCE_S) == 2


def test_p6_a_finder_that_began_without_its_backend_learns_of_collections_later(finder, monkeypatch):
    monkeypatch.setattr("kvstore.gc.watch.RETRY_S", 0.01)
    backend = scripted(announced(SHARDS[0], CHAIN.keys[2:4], sweep=True))
    backend.when("head", RetryableError("by a test"), name="namespace.json", times=1)
    looked = finder(backend)
    wait_until(lambda: looked.begin(CHAIN.keys).result(PATIENCE_S) == 2)


def told(backend, shard):
    """Hashes of chunks of a shard that the finder said it uses."""
    folder = f"{touches_folder(PREFIX)}{CHAIN.namespace.name}/{shard}/"
    names = [name for name in backend.objects if name.startswith(folder)]
    return {hash_ for name in names for hash_ in asyncio.run(read_hashes(backend, name))}


def test_p6_what_is_found_counts_as_used_in_every_shard_and_what_is_not_found_does_not(finder):
    # An engine may serve it from a cache of its own for weeks, and load it after a restart.
    marked = CHAIN.keys[2:5]
    backend = scripted(*(announced(shard, marked, sweep=False) for shard in SHARDS))
    looked = finder(backend)
    assert looked.begin(CHAIN.keys[:4]).result(PATIENCE_S) == 4
    for watch in looked._watches:
        looked._loop.run(watch.read())
    for shard in SHARDS:
        assert told(backend, shard) == {key.hash for key in marked[:2]}


def test_p6_what_is_known_to_be_present_counts_as_used_each_time(finder):
    backend = scripted()
    looked = finder(backend)
    assert looked.begin(CHAIN.keys).result(PATIENCE_S) == 6
    for watch in looked._watches:
        looked._loop.run(watch.read())
    for name, data in announced(SHARDS[1], CHAIN.keys[2:5], sweep=False).items():
        backend.replace(name, data)
    assert looked.begin(CHAIN.keys).done()
    for watch in looked._watches:
        looked._loop.run(watch.read())
    assert told(backend, SHARDS[1]) == {key.hash for key in CHAIN.keys[2:5]}
    assert not told(backend, SHARDS[0])


def test_p6_of_chunks_that_an_engine_has_and_will_not_load_the_index_is_not_believed(finder):
    backend = Listed(objects_of(6, 6))
    # Nothing replaces what it takes for known here.
    looked = finder(backend, index_bytes=0)
    for lookups in looked._lookups:
        base = base_for(6, 1 << 20)
        base.put(0, np.sort(words_of([key.hash for key in CHAIN.keys])))
        lookups.presence.hints.install(CHAIN.namespace.name, KnownSet(base, 1 << 20, complete=True))
    assert looked.begin(CHAIN.keys).result() == 6
    assert looked.begin(CHAIN.keys, 4).result(PATIENCE_S) == 6
    heads = backend.heads
    assert looked.begin(CHAIN.keys, 4).result() == 6
    assert backend.heads == heads
    for key in CHAIN.keys[2:]:
        del backend.names[object_name(PREFIX, key, SHARDS[1])]
    looked.note_missed(CHAIN.keys[5:])
    for lookups in looked._lookups:
        lookups.presence.forget(CHAIN.keys)
    assert looked.begin(CHAIN.keys[:5]).result() == 5
    assert looked.begin(CHAIN.keys[:5], 5).result(PATIENCE_S) == 2
