"""Whatever the store does, the engine says the same tokens, and goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import urlparse

import pytest
from bucket_folders import chunk_files, flip_sections
from vllm_engines import engine, some_prompt, transfer_config

import kvstore.chunk_fetch

pytestmark = pytest.mark.usefixtures("layers_apart")

MODES = [("auto", "true"), ("layerwise", "true"), ("layerwise", "false"), ("whole", "false")]


def config_for(mode, bucket="memory://", **settings):
    load, asynchronous = mode
    return transfer_config(
        bucket,
        KVSTORE_VLLM_LOAD=load,
        KVSTORE_VLLM_ASYNC=asynchronous,
        KVSTORE_LOAD_TIMEOUT_S="3",
        **settings,
    )


def damage_all(bucket):
    for path in chunk_files(Path(urlparse(bucket).path)):
        flip_sections(path)


@pytest.fixture(scope="module")
def stored(model, prompts, tmp_path_factory):
    """A bucket that holds the prompts' chunks, to be copied."""
    folder = tmp_path_factory.mktemp("stored") / "bucket"
    with engine(model, transfer_config(folder.as_uri())) as first:
        first.generate(prompts)
    return folder


@pytest.fixture
def filled(stored, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(stored, tmp_path / "filled").as_uri()


@pytest.mark.parametrize("mode", MODES)
def test_p3_a_poisoned_store_changes_nothing(model, prompts, answers, filled, mode):
    damage_all(filled)
    with engine(model, config_for(mode, filled)) as one:
        assert one.generate(prompts) == answers
        assert one.missed_chunks
        # What was damaged has been replaced, and is not offered until then.
        one.forget()
        one.scheduler._failed._until.clear()
        one.scheduler._finder._lookups[0].presence._known.clear()
        assert one.generate(prompts) == answers
        assert one.loaded_chunks


def test_loads_matter_as_a_poisoned_store_with_checksums_off_changes_tokens(
    model, prompts, answers, filled, monkeypatch
):
    damage_all(filled)
    monkeypatch.setattr(kvstore.chunk_fetch, "verify_section", lambda *_: None)
    with engine(model, config_for(MODES[0], filled)) as one:
        poisoned = one.generate(prompts)
        assert one.loaded_chunks
    assert all(bad != good for bad, good in zip(poisoned, answers, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trouble", ["failing", "hanging"])
def test_a_store_that_fails_at_each_call(*, model, prompts, answers, mood, mode, trouble):
    with engine(model, config_for(mode)) as one:
        assert one.generate(prompts) == answers
        one.forget()
        for operation in ("read", "head", "put"):
            setattr(mood, trouble, {operation})
            assert one.generate(prompts) == answers
            setattr(mood, trouble, set())
            assert one.core.scheduler.kv_cache_manager.reset_prefix_cache()
            one.worker._store._parts.memory.clear()
            one.scheduler._failed._until.clear()
            for lookups in one.scheduler._finder._lookups:
                lookups.presence._known.clear()
        loaded = one.loaded_chunks
        assert one.generate(prompts) == answers
        assert one.loaded_chunks > loaded


def test_a_store_that_is_down_at_start_and_comes_back(model, prompts, answers, mood):
    mood.failing = {"read", "head", "put"}
    with engine(model, config_for(MODES[0])) as one:
        assert one.generate(prompts) == answers
        assert one.generate(prompts) == answers
        mood.failing = set()
    with engine(model, config_for(MODES[0])) as two:
        assert two.generate(prompts) == answers
        two.forget()
        assert two.generate(prompts) == answers
        assert two.loaded_chunks


@pytest.mark.parametrize("mode", MODES)
def test_a_slow_store_is_waited_for_layer_by_layer(model, prompts, answers, mood, mode):
    with engine(model, config_for(mode)) as one:
        assert one.generate(prompts) == answers
        one.forget()
        mood.late_s = 0.15
        assert one.generate(prompts) == answers
        assert one.loaded_chunks == 7
        assert one.missed_chunks == 0


@pytest.mark.parametrize("mode", MODES)
def test_nobody_computes_on_blocks_of_a_load_that_another_request_failed(model, mood, mode):
    shared = some_prompt(1000, 50)
    prompts = [shared + some_prompt(30, seed) for seed in range(4)]
    # A piece of a prefill at a time, and room for others beside it: the first of those that share
    # blocks takes several steps to compute them again.
    options = {"long_prefill_token_threshold": 64, "max_num_batched_tokens": 512}
    with engine(model, **options) as plain:
        expected = plain.generate(prompts)
    with engine(model, config_for(mode), **options) as one:
        one.generate([shared], tokens=1)
        one.forget()
        # Lookups find what then cannot be read.
        mood.failing = {"read"}
        assert one.generate(prompts) == expected
        assert one.missed_chunks
        mood.failing = set()
        assert one.generate(prompts) == expected
