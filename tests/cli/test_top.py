import asyncio
import json

import pytest
from chunk_samples import TINY_LAYOUT, raw_chunk, raw_object, tiny_keys, tiny_namespace

from kvstore.backends.memory import MemoryBackend
from kvstore.cli.stock import Stock, take_stock
from kvstore.errors import RetryableError
from kvstore.gc.names import pin_name, touch_name
from kvstore.gc.records import seal_hashes
from kvstore.keys import PrefixChain, namespace_document_name, object_name
from kvstore.layout import Shard
from kvstore.settings import Settings

NAMESPACE = tiny_namespace()
SHARD = TINY_LAYOUT.whole
# A system prompt of two chunks that two conversations continue, and a document of its own.
SYSTEM = list(range(16))
FIRST = PrefixChain.of(NAMESPACE, [*SYSTEM, *range(100, 116)]).keys
SECOND = PrefixChain.of(NAMESPACE, [*SYSTEM, *range(200, 208)]).keys
DOCUMENT = tiny_keys(NAMESPACE, 3, first_token=900)
CHUNKS = dict(raw_object("kvstore", NAMESPACE, key) for key in {*FIRST, *SECOND, *DOCUMENT})
NAMES = {namespace_document_name("kvstore", NAMESPACE.name): NAMESPACE.document()}
CHUNK_BYTES = len(next(iter(CHUNKS.values())))


def touched(*uses: tuple) -> dict[str, bytes]:
    """Records of prefixes in use, one each."""
    return {
        touch_name("kvstore", NAMESPACE.name, SHARD, f"{number:016x}"): seal_hashes(key.hash for key in keys)
        for number, keys in enumerate(uses)
    }


@pytest.fixture
def top(kvstore, folder_contents):
    """The prefixes that `top` prints of a store with these objects."""

    def run(objects: dict[str, bytes], *arguments: str) -> list[dict]:
        folder_contents.put(CHUNKS | NAMES | objects)
        ended = kvstore("top", "--json", *arguments)
        assert ended.code == 0
        rows = [json.loads(line) for line in ended.stdout.splitlines()]
        assert rows[-1]["kind"] == "summary"
        return [row for row in rows if row["kind"] == "prefix"]

    return run


def key_of(keys) -> str:
    return f"{NAMESPACE.name}/{keys[-1].hash.hex()}"


def test_prefixes_end_where_they_fork_or_end_and_those_used_most_come_first(top):
    rows = top(touched(FIRST, SECOND, SECOND))
    assert [(row["key"], row["touches"], row["continued"]) for row in rows] == [
        (key_of(FIRST[:2]), 3, 2),
        (key_of(SECOND), 2, 1),
        (key_of(FIRST), 1, 1),
        (key_of(DOCUMENT), 0, 1),
    ]
    assert [(row["depth"], row["tokens"], row["prefix_bytes"]) for row in rows] == [
        (1, 16, 2 * CHUNK_BYTES),
        (2, 24, 3 * CHUNK_BYTES),
        (3, 32, 4 * CHUNK_BYTES),
        (2, 24, 3 * CHUNK_BYTES),
    ]


def test_a_prefix_ends_where_it_is_used_less_from_there_on(top):
    rows = top(touched(DOCUMENT, DOCUMENT[:2], DOCUMENT[:2]))
    assert [(row["key"], row["touches"]) for row in rows[:2]] == [
        (key_of(DOCUMENT[:2]), 3),
        (key_of(DOCUMENT), 1),
    ]


def test_where_no_use_is_known_what_most_continue_comes_first(top):
    rows = top({})
    assert rows[0]["key"] == key_of(FIRST[:2])
    assert {row["touches"] for row in rows} == {0}


def test_shards_of_a_chunk_are_one_prefix(top):
    half = Shard(0, 1)
    other = {object_name("kvstore", key, half): raw_chunk(NAMESPACE, key, half) for key in DOCUMENT}
    rows = top(other | touched(DOCUMENT))
    (row,) = [row for row in rows if row["key"] == key_of(DOCUMENT)]
    assert row["touches"] == 1
    assert row["prefix_bytes"] == 3 * CHUNK_BYTES + sum(map(len, other.values()))


def test_a_limit_and_a_namespace_narrow_it(top, kvstore):
    assert len(top({}, "--limit", "2")) == 2
    assert len(top({}, "--namespace", NAMESPACE.name)) == 4
    assert kvstore("top", "--namespace", "0" * 16).code == 1
    assert kvstore("top", "--namespace", "tiny").code == 2


def test_pins_are_shown(top):
    rows = top({pin_name("kvstore", NAMESPACE.name, FIRST[1].hash): b""})
    assert [row["pinned"] for row in rows] == [True, False, False, False]


def test_what_has_a_chunk_missing_before_it_is_not_shown(kvstore, top, folder):
    top({})
    (folder / object_name("kvstore", DOCUMENT[0], SHARD)).unlink()
    assert key_of(DOCUMENT) not in kvstore("top").stdout


def test_people_are_told_of_how_much_use_is_known(kvstore, folder_contents):
    folder_contents.put(CHUNKS | NAMES | touched(DOCUMENT))
    text = kvstore("top").stdout
    assert f"use is known of 3 of {len(CHUNKS)} chunks" in text
    assert f"{NAMESPACE.name}: tiny-llama @ rev-1" in text
    assert key_of(DOCUMENT) in text


def test_a_request_for_a_document_that_fails_is_made_again():
    objects = {namespace_document_name("kvstore", NAMESPACE.name): NAMESPACE.document()}
    failed = []

    class Moody(MemoryBackend):
        async def read_into(self, name, offset, out, *, if_match=None):
            if name in objects and name not in failed:
                failed.append(name)
                raise RetryableError("not now")
            return await super().read_into(name, offset, out, if_match=if_match)

    async def look() -> Stock:
        backend = Moody()
        for name, data in objects.items():
            await backend.put(name, [data], if_absent=False)
        return await take_stock(backend, Settings(bucket="memory://", prefix="kvstore"))

    assert asyncio.run(look()).descriptions[NAMESPACE.name].fault == ""
    assert failed
