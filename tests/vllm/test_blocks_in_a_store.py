"""Blocks through a store and back, on every device there is: what the engine does before and after counts."""

import pytest
import torch
from samples import PATIENCE_S, settings_of

from kvstore.engine_adapters.vllm.blocks import BlockMemory, BlockSink, BlockSource
from kvstore.keys import PrefixChain
from kvstore.layout import ChunkForm, DType, KVLayout
from kvstore.namespace import Namespace
from kvstore.store import KVStore

BLOCKS, CHUNKS = 64, 5
LAYOUT = KVLayout(
    layers=6,
    kv_heads=4,
    head_dim=64,
    dtype=DType.BFLOAT16,
    page_form="nhd",
    page_tokens=16,
    chunk_tokens=64,
)
FORM = ChunkForm(LAYOUT, LAYOUT.whole)
CHAIN = PrefixChain.of(Namespace("m", "r", LAYOUT, "a"), range(CHUNKS * LAYOUT.chunk_tokens))
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def caches(device: str, seed: int) -> list[torch.Tensor]:
    """As vLLM allocates them: blocks, heads, tokens, keys then values."""
    torch.manual_seed(seed)
    shape = (BLOCKS, LAYOUT.page_tokens, LAYOUT.kv_heads, 2 * LAYOUT.head_dim)
    return [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(LAYOUT.layers)]


def memory_of(layers: list[torch.Tensor]) -> BlockMemory:
    return BlockMemory(FORM, [cache.split(LAYOUT.head_dim, dim=3) for cache in layers])


def engine_at_work(device: str) -> None:
    """Keep the engine's stream busy for a while, so that what comes after it in order comes late."""
    if device == "cuda":
        torch.cuda._sleep(100_000_000)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("first_block", "missing_at_the_end"), [(0, 0), (3, 1), (1, 3)])
def test_what_the_engine_queued_before_is_saved_and_what_it_queues_after_sees_the_load(
    device, first_block, missing_at_the_end
):
    choose = torch.Generator().manual_seed(first_block)
    ids = torch.randperm(BLOCKS, generator=choose)[: CHUNKS * LAYOUT.pages].tolist()
    layers, final = caches(device, 1), caches(device, 2)
    saved, target = memory_of(layers), caches(device, 3)
    loaded, before = memory_of(target), [cache.clone() for cache in target]
    # An arena that page-locks memory and one of these chunks beside it; nothing is left in it by the save.
    with KVStore.open(LAYOUT, settings=settings_of(memory_bytes=8 << 20, fetch_concurrency=4)) as store:
        engine_at_work(device)
        for cache, values in zip(layers, final, strict=True):
            cache.copy_(values)
        save = store.save(CHAIN, range(CHUNKS), BlockSource(saved, ids, saved.mark()))
        save.wait(PATIENCE_S)
        used = ids[first_block : len(ids) - missing_at_the_end]
        engine_at_work(device)
        for cache in target:
            # The engine's last work on blocks that it then gave to the load.
            cache[used] = 0
        load = store.load(CHAIN, range(CHUNKS), BlockSink(loaded, used, first_block, loaded.mark()))
        seen = []
        for layer in range(LAYOUT.layers):
            assert load.wait_layer(layer, PATIENCE_S) == CHUNKS
            seen.append(target[layer].clone())
        assert load.wait(PATIENCE_S).chunks == CHUNKS
    for layer, cache in enumerate(seen):
        expected = before[layer]
        expected[used] = final[layer][used]
        assert torch.equal(cache, expected), layer
