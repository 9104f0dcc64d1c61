"""attach() refuses what it cannot restore exactly, names weights by what they are, and can be undone."""

from __future__ import annotations

import asyncio
import copy
import logging
from dataclasses import replace

import pytest
from attached_models import CHUNK, attached, fill, generate, prompt, settings_of
from tiny_models import llama_config, make_model

from kvstore.backends.memory import MemoryBackend
from kvstore.engine_adapters.transformers import attach
from kvstore.engine_adapters.transformers.geometry import observe_geometry
from kvstore.errors import LayoutMismatchError, MisconfiguredError, StoreClosedError
from kvstore.store import KVStore


def test_other_weights_or_another_revision_never_match(objects):
    ids = prompt()
    fill(make_model(llama_config(), seed=1), objects, ids)
    other = make_model(llama_config(), seed=2)
    assert fill(other, objects, ids).reused_tokens == 0
    for revision, reused in (("main", 0), ("next", 0), ("main", 56)):
        with attached(other, objects, weights_revision=revision) as attachment:
            generate(other, ids)
            assert attachment.last.reused_tokens == reused


def test_a_store_for_another_layout_is_refused_with_both_layouts(llama):
    layout = replace(observe_geometry(llama).layout(CHUNK), kv_heads=3)
    with (
        KVStore.open(layout, settings=settings_of(), backend=MemoryBackend()) as store,
        pytest.raises(LayoutMismatchError, match=r"(?s)model: .*kv_heads=2.*store: .*kv_heads=3"),
    ):
        attach(llama, store)


def test_settings_beside_a_store_are_refused(llama, objects):
    layout = observe_geometry(llama).layout(CHUNK)
    with (
        KVStore.open(layout, settings=settings_of(), backend=MemoryBackend(objects)) as store,
        pytest.raises(MisconfiguredError, match="settings"),
    ):
        attach(llama, store, settings=settings_of())


def test_without_a_store_one_is_opened_from_settings_and_closed_by_detach(llama, tmp_path):
    settings = settings_of(bucket=tmp_path.as_uri())
    reused = []
    for _ in range(2):
        with attach(llama, settings=settings) as attachment:
            generate(llama, prompt())
            reused.append(attachment.last.reused_tokens)
    assert reused == [0, 56]
    assert attachment.store.layout.chunk_tokens == CHUNK
    with pytest.raises(StoreClosedError):
        attachment.store.flush()


def test_detach_gives_the_model_its_own_generate_back(llama, objects):
    before = dict(vars(llama))
    with attached(llama, objects) as attachment:
        assert vars(llama) != before
        with pytest.raises(MisconfiguredError, match="attached already"):
            attach(llama, attachment.store)
        with pytest.raises(MisconfiguredError, match="cannot be copied or pickled"):
            copy.deepcopy(llama)
        wrapped = llama.generate
    assert vars(llama) == before
    attachment.detach()
    assert vars(llama) == before
    # Whoever kept the attached generate() goes on, without the store.
    assert wrapped(prompt(), max_new_tokens=2, do_sample=False).shape == (1, 63)


def test_a_wrapper_of_someone_else_is_kept(objects):
    model = make_model(llama_config(), seed=1)
    calls = []

    def theirs(*args, **kwargs):
        calls.append("theirs")
        return type(model).generate(model, *args, **kwargs)

    model.generate = theirs
    with attached(model, objects) as attachment:
        generate(model, prompt())
        assert attachment.last.queued_chunks == 9
    assert model.generate is theirs
    assert calls == ["theirs"]


def test_logs_and_reports_hold_no_token(llama, objects, caplog):
    caplog.set_level(logging.DEBUG, logger="kvstore")
    ids = prompt()
    fill(llama, objects, ids)
    with attached(llama, objects) as attachment:
        generate(llama, ids, num_beams=2)
        generate(llama, ids)
        said = caplog.text + repr(attachment.last) + repr(attachment.namespace)
    assert str(ids[0, :3].tolist())[1:-1] not in said


def test_a_store_that_attach_opens_is_connected_before_the_first_lookup(llama, monkeypatch):
    class SlowToConnect(MemoryBackend):
        async def list(self, prefix, *, start_after=""):
            await asyncio.sleep(0.3)
            async for info in super().list(prefix, start_after=start_after):
                yield info

    monkeypatch.setattr("kvstore.store.open_backend", lambda settings: SlowToConnect())
    with attach(llama, settings=settings_of()) as attachment:
        assert attachment.store.wait_connected(0)


@pytest.mark.parametrize("codec", ["int8+zstd", "int4:32", "fp8"])
def test_kv_that_is_quantized_is_kept_apart_and_restored_by_those_who_set_the_same(llama, objects, codec):
    ids = prompt()
    fill(llama, objects, ids)
    for reused in (0, 56):
        with attached(llama, objects, codec=codec, lossless_layers="0") as attachment:
            output = generate(llama, ids)
            assert attachment.last.reused_tokens == reused
            assert attachment.namespace.fidelity == attachment.store.fidelity
            assert attachment.namespace.fidelity.endswith(" lossless_tokens=4 lossless_layers=0")
            assert all(logits.isfinite().all() for logits in output.logits)
    with attached(llama, objects) as attachment:
        generate(llama, ids)
        assert (attachment.last.reused_tokens, attachment.namespace.fidelity) == (56, "lossless")


def test_a_codec_that_is_not_for_the_models_cache_is_refused_and_the_model_left_alone(llama):
    with pytest.raises(MisconfiguredError, match="KVSTORE_CODEC=int8: int8 does not shrink"):
        attach(llama, settings=settings_of(codec="int8", chunk_tokens=1))
    assert "generate" not in vars(llama)
