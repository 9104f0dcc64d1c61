"""Whatever fails below an attached model, generate() says what it always says."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest
import torch
from attached_models import CHUNK, Streamer, attached, fill, generate, intercept, prompt, same_bits, usable
from tiny_models import llama_config, make_model

from kvstore.backends.memory import MemoryBackend
from kvstore.engine_adapters.transformers import BypassReason
from kvstore.errors import RetryableError
from kvstore.keys import object_name


@pytest.mark.parametrize("failing", [0, 2, 3])
def test_a_load_that_fails_at_a_layer_is_not_seen(failing, llama, objects, monkeypatch):
    cold = generate(llama, prompt())
    fill(llama, objects, prompt(), weights_revision="1")

    def fail(layer, indices, sections):
        if layer == failing:
            raise OSError("no more of it")

    streamer = Streamer()
    prefills = []

    def note(layer, inputs, output):
        prefills.append(inputs[0].shape[1])

    hook = llama.model.layers[failing].register_forward_hook(note)
    with attached(llama, objects, weights_revision="1") as attachment:
        prefills.clear()  # attach runs the model, too
        intercept(attachment.store, fail, monkeypatch)
        warm = generate(llama, prompt(), streamer=streamer)
        hook.remove()
        assert attachment.last.fell_short
        assert attachment.last.reused_tokens == 0
        assert attachment.last.bypass is None
    assert same_bits(warm.logits, cold.logits)
    streamer.check(warm.sequences)
    assert usable(llama, warm.past_key_values)
    # The layer ran in the cold prefill alone: the attempt ended where the bytes were missing.
    assert prefills[0] == 61
    assert set(prefills[1:]) == {1}


def test_a_call_that_ends_by_an_error_leaves_no_load_behind(llama, objects, monkeypatch):
    fill(llama, objects, prompt(), weights_revision="1")
    gate, scattered, handles, failing = threading.Event(), [], [], threading.Event()

    def hold(layer, indices, sections):
        if layer > 1:
            gate.wait(10)
        scattered.append(layer)

    def fail(*_):
        if not failing.is_set():
            return
        # Released so late that a load which nobody ends would still be under way.
        threading.Timer(0.2, gate.set).start()
        raise RuntimeError("out of something")

    hook = llama.model.layers[0].register_forward_hook(fail)
    with attached(llama, objects, weights_revision="1") as attachment:
        intercept(attachment.store, hold, monkeypatch)
        load = attachment.store.load

        def keep(*args, **options):
            handles.append(load(*args, **options))
            return handles[-1]

        monkeypatch.setattr(attachment.store, "load", keep)
        failing.set()
        with pytest.raises(RuntimeError, match="out of something"):
            generate(llama, prompt())
        hook.remove()
        done = list(scattered)
        assert handles[0].wait(0).chunks < 7
        time.sleep(0.1)
        assert scattered == done


def test_what_arrived_before_a_damaged_chunk_is_used_and_the_chunk_is_stored_anew(llama, objects):
    cold = generate(llama, prompt())
    fill(llama, objects, prompt())
    with attached(llama, objects) as attachment:
        chain = attachment.store.chain(attachment.namespace, prompt()[0].tolist())
        name = object_name("", chain.keys[3], attachment.store.shard)
        sound = objects[name]
        flipped = sound.data[:-1] + bytes([sound.data[-1] ^ 1])
        objects[name] = replace(sound, data=flipped, etag="damaged")
        streamer = Streamer()
        warm = generate(llama, prompt(), streamer=streamer)
        assert attachment.last.fell_short
        assert attachment.last.reused_tokens == 3 * CHUNK
        attachment.store.flush()
        assert objects[name].data != flipped
    assert torch.equal(warm.sequences, cold.sequences)
    streamer.check(warm.sequences)
    with attached(llama, objects) as attachment:
        generate(llama, prompt())
        assert attachment.last.reused_tokens == 56


class BadReads(MemoryBackend):
    """Answers lookups, and fails reads: at once, or never answering."""

    def __init__(self, objects, *, hang):
        super().__init__(objects)
        self.hang = hang

    async def read_into(self, name, offset, out, *, if_match=None):
        if self.hang:
            await asyncio.sleep(60)
        raise RetryableError("the server is on fire")


@pytest.mark.parametrize("hang", [False, True])
def test_a_backend_that_fails_or_hangs_costs_its_deadline_and_nothing_else(hang, llama, objects):
    cold = generate(llama, prompt())
    fill(llama, objects, prompt())
    backend = BadReads(objects, hang=hang)
    with attached(llama, objects, backend=backend, load_timeout_s=0.3) as attachment:
        warm = generate(llama, prompt())
        assert attachment.last.fell_short
        assert attachment.last.reused_tokens == 0
    assert same_bits(warm.logits, cold.logits)


def test_a_prefill_that_does_not_go_on_from_its_cache_is_done_again_without(objects, caplog):
    model = make_model(llama_config())
    cold = generate(model, prompt())
    fill(model, objects, prompt())
    stored = dict(objects)

    def prefill_from_the_first_token(input_ids, generation_config, model_kwargs, **options):
        generation_config._mask_length = -1
        return type(model)._prefill(model, input_ids, generation_config, model_kwargs, **options)

    model._prefill = prefill_from_the_first_token
    with attached(model, objects) as attachment:
        warm = generate(model, prompt())
        assert attachment.last.bypass is BypassReason.UNKNOWN_PREFILL
        assert attachment.last.reused_tokens == 0
    assert same_bits(warm.logits, cold.logits)
    # The log may tell that the first chunks were loaded.
    assert {name: found for name, found in objects.items() if name.startswith("v1/")} == {
        name: found for name, found in stored.items() if name.startswith("v1/")
    }
    assert "computed again" in caplog.text


def test_a_store_that_is_closed_is_bypassed(llama, objects, caplog):
    cold = generate(llama, prompt())
    with attached(llama, objects) as attachment:
        attachment.store.close()
        assert same_bits(generate(llama, prompt()).logits, cold.logits)
        assert attachment.last.bypass is BypassReason.STORE_FAILED
    assert "the store is closed" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("method", ["chain", "lookup", "load", "save"])
def test_a_defect_in_the_store_is_bypassed_and_logged(method, llama, objects, monkeypatch, caplog):
    cold = generate(llama, prompt())
    fill(llama, objects, prompt())
    with attached(llama, objects) as attachment:
        monkeypatch.setattr(attachment.store, method, lambda *_, **__: 1 / 0)
        out = generate(llama, prompt())
        assert attachment.bypasses == {BypassReason.STORE_FAILED: 1}
    assert torch.equal(out.sequences, cold.sequences)
    assert "ZeroDivisionError" in caplog.text
