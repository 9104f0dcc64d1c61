"""Keys come from tokens, adapters, images and salts, and from nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import LAYOUT
from vllm_engines import some_prompt

from kvstore.engine_adapters.vllm.messages import Variant
from kvstore.engine_adapters.vllm.request_keys import (
    LoraNames,
    RequestKeys,
    bypass,
    multimodal_keys,
    request_salt,
)
from kvstore.keys import PrefixChain
from kvstore.namespace import Namespace

NAMESPACE = Namespace("model", "revision", LAYOUT, "rope")
STEP = LAYOUT.chunk_tokens


def request(tokens, *, salt=None, features=(), **changes):
    fields = {
        "all_token_ids": tokens,
        "cache_salt": salt,
        "mm_features": list(features),
        "prompt_embeds": None,
        "pooling_params": None,
    }
    return SimpleNamespace(**fields | changes)


def image(identifier, offset, length):
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


def keys_of(asked, tenant_salt=""):
    return RequestKeys(asked, NAMESPACE, Variant(), tenant_salt).upto(len(asked.all_token_ids))


def test_keys_are_those_of_the_chain_of_all_tokens():
    tokens = some_prompt(5 * STEP + 3)
    assert tuple(keys_of(request(tokens))) == PrefixChain.of(NAMESPACE, tokens).keys


@given(st.lists(st.integers(0, 6 * STEP), max_size=8))
def test_keys_that_grow_are_those_that_were_made_at_once(lengths):
    tokens = some_prompt(6 * STEP)
    growing = RequestKeys(request(tokens), NAMESPACE, Variant(), "")
    whole = PrefixChain.of(NAMESPACE, tokens).keys
    for length in lengths:
        assert tuple(growing.upto(length)) == whole[: length // STEP]


def test_p12_salts_never_meet():
    pairs = [("", None), ("", ""), ("a", None), ("", "a"), ("a", ""), ("a", "b"), ("ab", ""), ("", "a\0b")]
    assert len({request_salt(*pair) for pair in pairs}) == len(pairs)
    tokens = some_prompt(2 * STEP)
    keys = {keys_of(request(tokens, salt=salt), tenant)[1].hash for tenant, salt in pairs}
    assert len(keys) == len(pairs)


def test_an_image_changes_the_chunks_it_lies_in_and_those_behind():
    tokens = some_prompt(4 * STEP)
    plain = keys_of(request(tokens))
    seen = keys_of(request(tokens, features=[image("one", STEP + 1, STEP)]))
    other = keys_of(request(tokens, features=[image("two", STEP + 1, STEP)]))
    assert seen[0] == other[0] == plain[0]
    for index in (1, 2, 3):
        assert len({seen[index], other[index], plain[index]}) == 3


def test_images_count_where_their_tokens_are():
    features = [image("a", 10, 5)]
    assert multimodal_keys(features, 0, 10) == []
    assert multimodal_keys(features, 15, 10) == []
    assert multimodal_keys(features, 14, 10) == [b"mm", b"a", b"10", b"5"]


def test_adapters_are_named_by_their_files_and_as_first_seen(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"1")
    lora = SimpleNamespace(lora_name="a", lora_int_id=1, lora_path=str(folder), load_inplace=False)
    names = LoraNames()
    first = names.name(lora)
    (folder / "adapter_model.safetensors").write_bytes(b"22")
    assert names.name(lora) == first
    assert LoraNames().name(lora) != first
    lora.load_inplace = True
    assert names.name(lora) != first
    assert names.name(None) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"prompt_embeds": object()}, "prompt_embeds"),
        ({"prompt_is_token_ids": [True]}, "prompt_embeds"),
        ({"pooling_params": object()}, "pooling"),
        ({"resumable": True}, "streaming_input"),
    ],
)
def test_requests_whose_tokens_are_not_the_whole_truth_go_without_the_store(changes, reason):
    assert bypass(request([], **changes)) == reason
