"""What becomes of saved chunks: when the engine is told that they are stored."""

from __future__ import annotations

import pytest
from samples import LAYOUT
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm_engines import engine, some_prompt, transfer_config

from kvstore.engine_adapters.vllm import uploads
from kvstore.engine_adapters.vllm.cache_events import CacheEvents
from kvstore.engine_adapters.vllm.uploads import EngineUploads, RankUploads
from kvstore.handles import Durability, SavedChunk, SaveHandle, SaveOutcome
from kvstore.keys import PrefixChain
from kvstore.namespace import Namespace

KEYS = PrefixChain.of(Namespace("m", "r", LAYOUT, "a"), some_prompt(4 * LAYOUT.chunk_tokens)).keys


def handle_of(*outcomes):
    """A save whose chunks have ended as said; None: it is under way."""
    handle = SaveHandle(Durability.QUEUED)
    chunks = [SavedChunk(key) for key, _ in zip(KEYS, outcomes, strict=False)]
    for index, (chunk, outcome) in enumerate(zip(chunks, outcomes, strict=True)):
        handle._follow(index, chunk)
        if outcome is not None:
            chunk.end(outcome)
    return handle, chunks


STORED, PRESENT, FAILED = SaveOutcome.STORED, SaveOutcome.PRESENT, SaveOutcome.FAILED


@pytest.mark.parametrize(
    ("outcomes", "leading"),
    [
        ((STORED, PRESENT, STORED), 3),
        ((STORED, FAILED, STORED), 1),
        ((FAILED,), 0),
        # The store was closed first: the next process uploads it.
        ((STORED, SaveOutcome.JOURNALED), 1),
        ((STORED, SaveOutcome.DROPPED_QUEUE_FULL), 1),
    ],
)
def test_leading_chunks_that_are_in_the_bucket_count(outcomes, leading):
    rank = RankUploads()
    rank.begun(7, handle_of(*outcomes)[0])
    assert rank.take_ended() == {}
    rank.gathered(7)
    assert rank.take_ended() == {7: leading}
    assert rank.take_ended() == {}


def test_an_order_is_open_until_the_last_of_its_chunks_has_ended():
    rank = RankUploads()
    handle, chunks = handle_of(STORED, None)
    rank.begun(1, handle)
    rank.gathered(1)
    assert rank.take_ended() == {}
    chunks[1].end(STORED)
    assert rank.take_ended() == {1: 2}


def test_an_order_that_never_began_has_stored_nothing():
    rank = RankUploads()
    rank.gathered(1)
    assert rank.take_ended() == {1: 0}


def test_many_uploads_are_looked_at_in_turn_and_the_oldest_given_up(monkeypatch):
    monkeypatch.setattr(uploads, "_LOOKED_AT", 2)
    monkeypatch.setattr(uploads, "_ORDERS_MAX", 4)
    rank = RankUploads()
    for serial in range(5):
        rank.begun(serial, handle_of(STORED if serial == 4 else None)[0])
        rank.gathered(serial)
    assert rank.take_ended() == {}
    assert rank.take_ended() == {4: 1}
    engine_wide = EngineUploads(1)
    for serial in range(5):
        engine_wide.begun(serial, KEYS, None)
    assert engine_wide.ended(0, 1, 4) is None
    assert engine_wide.ended(1, 1, 4).chunks == 4


def test_what_every_rank_has_stored_is_stored():
    engine_wide = EngineUploads(3)
    engine_wide.begun(1, KEYS, "event")
    assert engine_wide.ended(1, 1, 4) is None
    assert engine_wide.ended(2, 1, 4) is None
    upload = engine_wide.ended(1, 2, 3)
    assert (upload.keys, upload.event, upload.chunks) == (KEYS, "event", 3)
    assert engine_wide.ended(1, 1, 4) is None


def test_an_event_tells_of_the_chunks_that_are_stored_and_of_no_more():
    class Request:
        all_token_ids = some_prompt(4 * LAYOUT.chunk_tokens)
        lora_request = None

    events = CacheEvents(LAYOUT.chunk_tokens, enabled=True)
    events.stored(events.of_stored(KEYS[1:4], Request), 2)
    events.stored(events.of_stored(KEYS[:1], Request), 0)
    (event,) = events.take()
    assert event.block_hashes == [key.hash for key in KEYS[1:3]]
    assert event.parent_block_hash == KEYS[0].hash
    assert event.token_ids == Request.all_token_ids[LAYOUT.chunk_tokens : 3 * LAYOUT.chunk_tokens]


PUBLISHED = {"enable_kv_cache_events": True, "publisher": "null"}


def test_no_event_comes_before_chunks_are_in_the_bucket(model, mood, prompts, answers):
    mood.failing.add("put")
    with engine(model, transfer_config("memory://"), kv_events_config=PUBLISHED) as one:
        seen = []
        one.scheduler.events._events = seen
        one.scheduler.events.take = list
        assert one.generate(prompts) == answers
        one.settle()
        assert not seen
        mood.failing.clear()
        until_stored(one)
        assert sum(len(event.block_hashes) for event in seen if isinstance(event, BlockStored)) == 7


def test_chunks_that_were_not_uploaded_are_asked_for_before_they_are_offered(model, mood, prompts, answers):
    with engine(
        model,
        transfer_config("memory://", KVSTORE_UPLOAD_TIMEOUT_S="0.2"),
        kv_events_config=PUBLISHED,
    ) as one:
        seen = []
        one.scheduler.events._events = seen
        one.scheduler.events.take = list
        mood.hanging.add("put")
        assert one.generate(prompts) == answers
        until_stored(one)
        mood.hanging.clear()
        assert not [event for event in seen if isinstance(event, BlockStored)]
        # Whatever memory keeps no longer: a lookup that trusted it would cost a failed load.
        assert one.core.scheduler.kv_cache_manager.reset_prefix_cache()
        one.worker._store._parts.memory.clear()
        assert one.generate(prompts) == answers
        assert one.missed_chunks == 0
        assert not [event for event in seen if isinstance(event, BlockRemoved)]


def until_stored(one):
    """Take steps until it is known of every save whether it is in the bucket."""
    one.settle()
    for seed in range(100):
        if not one.scheduler._uploads._open:
            return
        one.flush()
        one.generate([some_prompt(5, 100 + seed)], tokens=1)
    raise AssertionError(f"nobody told of {list(one.scheduler._uploads._open)}")
