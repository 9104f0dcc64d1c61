"""Calls that the store cannot serve run as if the model were not attached."""

from __future__ import annotations

import pytest
import torch
from attached_models import attached, chunks_in, fill, generate, prompt, same_bits
from tiny_models import CONFIGS, llama_config, make_model
from transformers import DynamicCache

from kvstore.engine_adapters.transformers import BypassReason

BYPASSES = {
    "padding": (
        BypassReason.PADDING,
        lambda model, ids: {"attention_mask": (torch.arange(61) > 2).long()[None]},
    ),
    "pad tokens": (BypassReason.PADDING, lambda model, ids: {"pad_token_id": int(ids[0, 0])}),
    "beams": (BypassReason.SEARCH, lambda model, ids: {"num_beams": 2}),
    "two sequences": (BypassReason.SEARCH, lambda model, ids: {"num_return_sequences": 2, "do_sample": True}),
    "prompt lookup": (
        BypassReason.ASSISTED,
        lambda model, ids: {"prompt_lookup_num_tokens": 2, "output_logits": False},
    ),
    "assistant": (
        BypassReason.ASSISTED,
        lambda model, ids: {"assistant_model": make_model(llama_config(num_hidden_layers=1), seed=3)},
    ),
    "own cache": (
        BypassReason.PASSED_CACHE,
        lambda model, ids: {"past_key_values": DynamicCache(config=model.config)},
    ),
    "embeds": (
        BypassReason.INPUTS_EMBEDS,
        lambda model, ids: {"inputs_embeds": model.get_input_embeddings()(ids).detach()},
    ),
    "static cache": (BypassReason.CACHE_KIND, lambda model, ids: {"cache_implementation": "static"}),
    "no cache": (BypassReason.NO_CACHE, lambda model, ids: {"use_cache": False}),
    "positions": (BypassReason.POSITION_IDS, lambda model, ids: {"position_ids": torch.arange(61)[None] + 3}),
    "hidden states": (BypassReason.FULL_OUTPUTS, lambda model, ids: {"output_hidden_states": True}),
    "custom": (
        BypassReason.CUSTOM_GENERATE,
        lambda model, ids: {
            "custom_generate": lambda model, *args, **kwargs: type(model)._sample(model, *args, **kwargs)
        },
    ),
}


@pytest.mark.parametrize("kind", BYPASSES)
def test_a_call_the_store_cannot_serve_runs_as_if_not_attached(kind, llama, objects, caplog):
    reason, options = BYPASSES[kind]
    ids = prompt()
    fill(llama, objects, ids)
    torch.manual_seed(5)
    plain = generate(llama, ids, **options(llama, ids))
    stored = dict(objects)
    with attached(llama, objects) as attachment:
        for _ in range(2):
            torch.manual_seed(5)
            out = generate(llama, ids, **options(llama, ids))
        assert attachment.last.bypass is reason
        assert attachment.bypasses == {reason: 2}
    assert torch.equal(out.sequences, plain.sequences)
    if getattr(plain, "hidden_states", None):
        assert [h[-1].shape for h in out.hidden_states] == [h[-1].shape for h in plain.hidden_states]
    assert objects == stored
    assert caplog.text.count("went without the store") == 1


def test_weights_changed_after_attach_go_unserved_and_unsaved(objects, caplog):
    model = make_model(llama_config(), seed=1)
    ids = prompt()
    fill(model, objects, ids)
    stored = dict(objects)
    with attached(model, objects) as attachment:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(2)
        changed = generate(model, ids)
        assert attachment.last.bypass is BypassReason.WEIGHTS_CHANGED
    assert "attach the model again" in caplog.text
    assert same_bits(changed.logits, generate(model, ids).logits)
    assert objects == stored
    assert fill(model, objects, ids).reused_tokens == 0


def test_training_mode_and_autocast_are_bypassed(objects):
    model = make_model(llama_config(), seed=1)
    with attached(model, objects) as attachment:
        model.model.layers[2].train()
        generate(model, prompt())
        assert attachment.last.bypass is BypassReason.TRAINING_MODE
        model.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            generate(model, prompt())
        assert attachment.last.bypass is BypassReason.AUTOCAST
    assert not chunks_in(objects)


def test_a_call_inside_a_call_is_one_of_its_own(llama, objects):
    """What a logits processor generates is no part of the outer call, be it with or without the store."""
    fill(llama, objects, prompt())

    def ask_again(ids, scores):
        if ids.shape[1] == 61:
            inner.append(generate(llama, prompt(20, seed=4), position_ids=shifted).sequences)
            inner.append(generate(llama, prompt(20, seed=5)).sequences)
        return scores

    inner, shifted = [], torch.arange(20)[None] + 3
    plain = generate(llama, prompt(), logits_processor=[ask_again])
    with attached(llama, objects) as attachment:
        out = generate(llama, prompt(), logits_processor=[ask_again])
        assert (attachment.last.prompt_tokens, attachment.last.reused_tokens) == (61, 56)
        assert attachment.bypasses == {BypassReason.POSITION_IDS: 1}
    assert same_bits(inner[:2], inner[2:])
    assert torch.equal(out.sequences, plain.sequences)


def test_inputs_that_this_adapter_does_not_know_are_bypassed(objects):
    model = make_model(CONFIGS["gpt2"]())
    ids = prompt()
    types = {"token_type_ids": torch.ones_like(ids)}
    plain = generate(model, ids, **types)
    with attached(model, objects) as attachment:
        out = generate(model, ids, **types)
        assert attachment.last.bypass is BypassReason.OTHER_INPUTS
    assert torch.equal(out.sequences, plain.sequences)
    assert not chunks_in(objects)
