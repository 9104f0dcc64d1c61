"""An attached model's generate() says what it always says, and computes less of it."""

from __future__ import annotations

import asyncio
import copy
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attached_models import (
    CHUNK,
    NEW,
    Streamer,
    attached,
    fill,
    generate,
    intercept,
    prompt,
    same_bits,
    usable,
)
from tiny_models import CONFIGS, llama_config, make_model
from transformers import DynamicCache

from kvstore.backends.memory import MemoryBackend
from kvstore.engine_adapters.transformers import BypassReason
from kvstore.engine_adapters.transformers.cache import LoadingLayer


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_fresh_process_restores_and_continues_bit_equal_to_a_cache_that_never_left_memory(kind, objects):
    model = make_model(CONFIGS[kind]())
    ids = prompt()
    cold = generate(model, ids)
    kept = copy.deepcopy(cold.past_key_values)
    kept.crop(-(kept.get_seq_length() - 56))
    continued = generate(model, ids, past_key_values=kept)

    first = fill(model, objects, ids)
    assert (first.reused_tokens, first.queued_chunks) == (0, (61 + NEW - 1) // CHUNK)
    with attached(model, objects) as attachment:
        warm = generate(model, ids)
        last = attachment.last
    assert last.reused_tokens == 56
    assert last.bypass is None
    assert torch.equal(warm.sequences, cold.sequences)
    assert same_bits(warm.logits, continued.logits)


def test_half_precision_and_prefill_in_pieces_restore_bit_equal(objects):
    model = make_model(llama_config()).to(torch.bfloat16)
    cold = generate(model, prompt())
    fill(model, objects, prompt())
    with attached(model, objects) as attachment:
        warm = generate(model, prompt())
        pieces = generate(model, prompt(), prefill_chunk_size=3)
        # Older transformers start such a prefill from the first token, whatever the cache holds.
        last = attachment.last
        assert (last.reused_tokens, last.bypass) in ((56, None), (0, BypassReason.UNKNOWN_PREFILL))
    assert same_bits(warm.logits, cold.logits)
    assert torch.equal(pieces.sequences, cold.sequences)


def test_each_layer_waits_for_its_own_bytes_while_later_layers_are_in_flight(llama, objects, monkeypatch):
    cold = generate(llama, prompt())
    fill(llama, objects, prompt(), weights_revision="1")
    ran = [threading.Event() for _ in llama.model.layers]
    released = []

    def deliver_after_the_layer_before_has_run(layer, indices, sections):
        assert layer == 0 or ran[layer - 1].wait(5), f"the model waited for layer {layer} before it needed it"
        released.append(layer)

    def note(layer):
        return lambda *_: ran[layer].set()

    hooks = [layer.register_forward_hook(note(i)) for i, layer in enumerate(llama.model.layers)]
    with attached(llama, objects, weights_revision="1") as attachment:
        intercept(attachment.store, deliver_after_the_layer_before_has_run, monkeypatch)
        # attach runs the model, too.
        for event in ran:
            event.clear()
        warm = generate(llama, prompt())
        assert (attachment.last.reused_tokens, attachment.last.fell_short) == (56, False)
    for hook in hooks:
        hook.remove()
    assert sorted(set(released)) == [0, 1, 2, 3]
    assert torch.equal(warm.sequences, cold.sequences)


def test_what_is_loaded_decides_what_is_said(llama, objects, monkeypatch):
    """Control: with other bytes in the pages the other tests would fail."""
    cold = generate(llama, prompt())
    fill(llama, objects, prompt())
    with attached(llama, objects) as attachment:
        intercept(
            attachment.store,
            lambda layer, indices, sections: [
                memoryview(bytes(len(s))) if layer == 2 else s for s in sections
            ],
            monkeypatch,
        )
        poisoned = generate(llama, prompt())
        assert attachment.last.reused_tokens == 56
    assert not torch.equal(poisoned.sequences, cold.sequences)


def test_generated_tokens_are_restored_when_they_come_back_in_a_prompt(llama, objects):
    turn = generate(llama, prompt())
    fill(llama, objects, prompt())
    longer = torch.cat([turn.sequences, prompt(5, seed=9)], dim=1)
    cold = generate(llama, longer)
    with attached(llama, objects) as attachment:
        warm = generate(llama, longer)
        # 61 prompt tokens and 11 generated ones: the last was chosen, and not run through the model.
        assert attachment.last.reused_tokens == 72
    assert torch.equal(warm.sequences, cold.sequences)


def test_at_least_one_token_is_left_to_compute(llama, objects):
    ids = prompt(6 * CHUNK)
    cold = generate(llama, ids)
    fill(llama, objects, ids)
    with attached(llama, objects) as attachment:
        warm = generate(llama, ids)
        assert attachment.last.reused_tokens == 5 * CHUNK
    assert torch.equal(warm.sequences, cold.sequences)


def test_saving_does_not_wait_for_the_network(llama, objects):
    gate = threading.Event()

    class SlowPuts(MemoryBackend):
        async def put(self, name, parts, *, if_absent):
            await asyncio.to_thread(gate.wait)
            return await super().put(name, parts, if_absent=if_absent)

    with attached(llama, objects, backend=SlowPuts(objects)) as attachment:
        generate(llama, prompt())
        assert attachment.last.queued_chunks == 9
        assert not objects
        gate.set()
    assert sum(name.startswith("v1/") for name in objects) == 10


@pytest.mark.parametrize("mask", [False, True])
def test_rows_of_a_batch_are_restored_as_far_as_all_of_them_are_stored(mask, llama, objects):
    rows = prompt(rows=3)
    rows[2, :30] = rows[0, :30]
    fill(llama, objects, rows[:1])
    fill(llama, objects, rows[1:2, :50])
    cold = generate(llama, rows)
    with attached(llama, objects) as attachment:
        warm = generate(llama, rows, **({"attention_mask": torch.ones_like(rows)} if mask else {}))
        assert (attachment.last.reused_tokens, attachment.last.fell_short) == (3 * 24, False)
        assert attachment.last.prompt_tokens == 3 * 61
    assert torch.equal(warm.sequences, cold.sequences)
    for row in range(3):
        with attached(llama, objects) as attachment:
            generate(llama, rows[row : row + 1])
            assert attachment.last.reused_tokens == 56


class Collect:
    """A PageSink that keeps sections as float32, by (layer, chunk)."""

    def __init__(self):
        self.sections = {}

    def scatter(self, layer, indices, sections):
        for index, section in zip(indices, sections, strict=True):
            self.sections[layer, index] = torch.frombuffer(bytearray(section), dtype=torch.float32)


def assert_stored_as_a_prefill_makes_it(attachment, model, tokens):
    store = attachment.store
    chain = store.chain(attachment.namespace, tokens)
    stored = Collect()
    assert store.load(chain, range(len(chain)), stored).wait(5).chunks == len(chain)
    fresh = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([tokens]), past_key_values=fresh)
    for (layer, index), section in stored.sections.items():
        span = slice(index * CHUNK, (index + 1) * CHUNK)
        states = fresh.layers[layer].keys, fresh.layers[layer].values
        assert torch.allclose(torch.cat([s[0, :, span].reshape(-1) for s in states]), section, atol=1e-3)


def test_what_follows_the_end_of_a_row_is_not_stored(llama, objects):
    rows = prompt(40, rows=2)
    free = generate(llama, rows, max_new_tokens=40).sequences
    end = next(int(t) for t in free[0, 45:] if int(t) not in free[1] and int(t) not in free[0, :45])
    with attached(llama, objects) as attachment:
        out = generate(llama, rows, max_new_tokens=40, eos_token_id=end, pad_token_id=2).sequences
        ended = out[0].tolist().index(end) + 1
        assert (out[0, ended:] == 2).all()
        assert 40 < ended < out.shape[1] == 80
        assert attachment.last.queued_chunks == ended // CHUNK + 79 // CHUNK
        attachment.store.flush()
        assert_stored_as_a_prefill_makes_it(attachment, llama, out[0, :ended].tolist())
        assert_stored_as_a_prefill_makes_it(attachment, llama, out[1, :79].tolist())


def test_sampling_draws_the_same_tokens_as_unattached(llama, objects):
    fill(llama, objects, prompt())
    options = {"do_sample": True, "temperature": 1.5}
    torch.manual_seed(11)
    plain = generate(llama, prompt(), **options)
    with attached(llama, objects) as attachment:
        torch.manual_seed(11)
        warm = generate(llama, prompt(), **options)
        assert attachment.last.reused_tokens == 56
    assert torch.equal(warm.sequences, plain.sequences)


def test_plain_calls_return_tensors_and_stream_each_token_once(llama, objects):
    fill(llama, objects, prompt())
    plain = llama.generate(prompt(), max_new_tokens=NEW, do_sample=False)
    streamer = Streamer()
    with attached(llama, objects) as attachment:
        warm = llama.generate(inputs=prompt(), max_new_tokens=NEW, do_sample=False, streamer=streamer)
        assert attachment.last.reused_tokens == 56
        with torch.inference_mode():
            again = llama.generate(prompt(), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(warm, plain)
    assert torch.equal(again, plain)
    streamer.check(warm)


def test_a_returned_cache_is_plain_and_complete(llama, objects):
    cold = generate(llama, prompt())
    fill(llama, objects, prompt())
    with attached(llama, objects):
        warm = generate(llama, prompt())
    assert usable(llama, warm.past_key_values)
    for a, b in zip(cold.past_key_values.layers, warm.past_key_values.layers, strict=True):
        assert torch.equal(a.keys[:, :, :56], b.keys[:, :, :56])
        assert torch.allclose(a.values, b.values, atol=1e-4)


@pytest.fixture
def loaded_keys(monkeypatch):
    """The keys that layers of a restore were made with: a weak reference, and where they lie."""
    keys, make = [], LoadingLayer.__init__

    def note(layer, own_keys, *others):
        keys.append((weakref.ref(own_keys), own_keys.data_ptr()))
        make(layer, own_keys, *others)

    monkeypatch.setattr(LoadingLayer, "__init__", note)
    return keys


def test_what_is_restored_is_not_copied_to_append_the_rest_of_the_prompt(llama, objects, loaded_keys):
    fill(llama, objects, prompt())
    with attached(llama, objects):
        cache = generate(llama, prompt(), max_new_tokens=1).past_key_values
    assert [layer.keys.data_ptr() for layer in cache.layers] == [place for _, place in loaded_keys]


def test_a_layer_s_loaded_copy_is_let_go_once_the_model_has_its_own(llama, objects, loaded_keys):
    fill(llama, objects, prompt(), weights_revision="1")
    held = []
    hook = llama.model.layers[3].register_forward_hook(lambda *_: held.append([r() for r, _ in loaded_keys]))
    with attached(llama, objects, weights_revision="1"):
        held.clear()  # attach runs the model, too
        generate(llama, prompt(), max_new_tokens=1, prefill_chunk_size=2)
        hook.remove()
    assert len(loaded_keys) == 4
    assert held[0] == [None] * 4


def test_threads_share_an_attached_model(llama, objects):
    prompts = [prompt(seed=seed) for seed in range(4)]
    plain = [generate(llama, ids).sequences for ids in prompts]
    for ids in prompts[:2]:
        fill(llama, objects, ids)
    with attached(llama, objects), ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda ids: generate(llama, ids).sequences, prompts))
    assert same_bits(outs, plain)
