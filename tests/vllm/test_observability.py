"""What vLLM publishes of the store: KV events."""

from __future__ import annotations

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm_engines import CHUNK_TOKENS, engine, transfer_config

from kvstore.engine_adapters.vllm.cache_events import MEDIUM


def test_events_tell_of_chunks_stored_and_found_to_be_gone(model, mood, prompts, answers):
    published = {"enable_kv_cache_events": True, "publisher": "null"}
    with engine(model, transfer_config("memory://"), kv_events_config=published) as one:
        seen, take = [], one.connector.take_events

        def noted():
            events = list(take())
            seen.extend(events)
            return events

        one.connector.take_events = noted
        assert one.generate(prompts) == answers
        one.forget()
        # Events come with a step, and the engine takes none when it has nothing to do.
        one.generate([[1, 2, 3]], tokens=1)
        stored = [event for event in seen if isinstance(event, BlockStored)]
        assert {event.medium for event in stored} == {MEDIUM}
        assert sum(len(event.block_hashes) for event in stored) == 7
        for event in stored:
            start = 0 if event.parent_block_hash is None else None
            assert len(event.token_ids) == CHUNK_TOKENS * len(event.block_hashes)
            assert start is None or event.token_ids in [p[: len(event.token_ids)] for p in prompts]
        gone = {name for name in mood.objects if not name.endswith(".json")}
        for name in gone:
            del mood.objects[name]
        # Lookups trust what was seen a moment ago.
        assert one.generate(prompts) == answers
        one.settle()
        removed = {each for event in seen if isinstance(event, BlockRemoved) for each in event.block_hashes}
        assert removed == {each for event in stored for each in event.block_hashes}


def test_without_events_no_tokens_are_kept_for_them(model, mood, prompts):
    with engine(model, transfer_config("memory://")) as one:
        one.generate(prompts)
        one.settle()
        assert one.scheduler.events.take() == []
