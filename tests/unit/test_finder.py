from concurrent.futures import Future

import pytest
from samples import LAYOUT, PREFIX, ScriptedBackend, chain_of, settings_of

from kvstore.backends.memory import MemoryBackend
from kvstore.errors import RetryableError, StoreClosedError
from kvstore.finder import ChunkFinder
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
