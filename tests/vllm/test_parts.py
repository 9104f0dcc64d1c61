"""Small parts alone: when to release, what failed lately, the queue of saves, weights, settings, geometry."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest
import torch
from samples import LAYOUT
from vllm_engines import some_prompt

from kvstore.engine_adapters.vllm.blocks import BlockMemory, BlockSink, BlockSource
from kvstore.engine_adapters.vllm.failed_keys import FAILED_FOR_S, FailedKeys
from kvstore.engine_adapters.vllm.geometry import Geometry, block_planes, head_shards
from kvstore.engine_adapters.vllm.messages import ChunkRun, SaveOrder, Variant
from kvstore.engine_adapters.vllm.release import ComputeSpeed, LoadProgress, keeps_ahead
from kvstore.engine_adapters.vllm.saves import SaveQueue
from kvstore.engine_adapters.vllm.settings import flags_of
from kvstore.engine_adapters.vllm.weights import folder_digest, weights_revision
from kvstore.errors import MisconfiguredError, UnsupportedModelError
from kvstore.keys import PrefixChain
from kvstore.layout import ChunkForm, DType, KVLayout, Shard
from kvstore.namespace import Namespace

KEYS = PrefixChain.of(Namespace("m", "r", LAYOUT, "a"), some_prompt(4 * LAYOUT.chunk_tokens)).keys


@pytest.mark.parametrize(
    ("ready", "elapsed_s", "compute_s", "released"),
    [
        (0, 0.0, 100.0, False),
        (32, 9.0, 0.0, True),
        (1, 0.1, 0.0, False),
        (1, 0.1, 32.0, True),
        (1, 0.1, 3.2, False),
        (16, 1.6, 3.2, True),
        (31, 3.1, 0.05, False),
        (31, 3.1, 0.2, True),
    ],
)
def test_a_request_goes_on_when_the_rest_of_its_load_keeps_ahead(ready, elapsed_s, compute_s, released):
    assert keeps_ahead(LoadProgress(ready, 32, elapsed_s), compute_s) is released


def test_speed_is_learned_from_prefills_alone():
    speed = ComputeSpeed()
    speed.note(1, 5.0)
    assert speed.expected_s(1000) == 0
    speed.note(1000, 2.0)
    assert speed.expected_s(500) == pytest.approx(1.0)


def test_what_failed_is_not_offered_for_a_while():
    now = [0.0]
    failed = FailedKeys(lambda: now[0])
    failed.add(KEYS[2])
    assert failed.leading(KEYS) == 2
    now[0] = FAILED_FOR_S + 1
    assert failed.leading(KEYS) == 4
    failed.add(KEYS[0])
    failed.remove(KEYS)
    assert failed.leading(KEYS) == 4


class Saves:
    """A save that waits until it is let go."""

    def __init__(self):
        self.go = threading.Event()
        self.began = threading.Event()
        self.serials = []
        self.taken = True

    def __call__(self, order, mark):
        self.began.set()
        assert self.go.wait(30)
        self.serials.append(order.serial)
        return self.taken


def order(serial, request_id="a"):
    return SaveOrder(serial, request_id, ChunkRun.of(KEYS[:1], Variant()), (1,))


@pytest.fixture
def saves():
    return Saves()


@pytest.fixture
def queue(saves):
    queue = SaveQueue(saves)
    yield queue
    saves.go.set()
    queue.close()


def test_blocks_are_needed_until_they_are_copied(queue, saves):
    queue.add([order(1), order(2, "b")], None)
    saves.began.wait(30)
    assert queue.busy("a")
    assert queue.busy("b")
    assert not queue.busy("c")
    saves.go.set()
    queue.flush(["a", "b"])
    assert not queue.busy("a")
    assert [(done.serial, done.taken) for done in queue.take_done()] == [(1, True), (2, True)]
    assert queue.take_done() == []


def test_copies_start_no_team_of_threads():
    counts = []
    queue = SaveQueue(lambda *_: counts.append(torch.get_num_threads()) or True)
    queue.add([order(1)], None)
    queue.flush(["a"])
    queue.close()
    assert counts == [1]


def test_those_that_a_step_waits_for_are_saved_first(queue, saves):
    queue.add([order(1), order(2), order(3, "b"), order(4), order(5, "b")], None)
    saves.began.wait(30)
    threading.Timer(0.1, saves.go.set).start()
    queue.flush(["b"])
    queue.flush(["a"])
    assert saves.serials == [1, 3, 5, 2, 4]


def test_behind_a_chunk_that_was_not_taken_others_of_its_request_are_left_out(queue, saves):
    saves.go.set()
    saves.taken = False
    queue.add([order(1)], None)
    queue.flush(["a"])
    saves.taken = True
    queue.add([order(2), order(3, "b")], None)
    queue.flush(["a", "b"])
    assert saves.serials == [1, 3]
    assert [done.taken for done in queue.take_done()] == [False, False, True]
    queue.forget(["a"])
    queue.add([order(4)], None)
    queue.flush(["a"])
    assert saves.serials == [1, 3, 4]


def test_discarded_orders_count_as_done_and_not_taken(queue, saves):
    queue.add([order(number) for number in range(5)], None)
    saves.began.wait(30)
    threading.Timer(0.1, saves.go.set).start()
    queue.discard()
    assert sorted((done.serial, done.taken) for done in queue.take_done()) == [
        (0, True),
        *((number, False) for number in range(1, 5)),
    ]


def test_extra_config_takes_settings_by_their_names():
    assert flags_of({"KVSTORE_BUCKET": "b", "KVSTORE_VLLM_LOAD": "whole"}) == {
        "bucket": "b",
        "vllm_load": "whole",
    }


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("KVSTORE_BUKET", "did you mean KVSTORE_BUCKET?"),
        ("bucket", "did you mean KVSTORE_BUCKET?"),
        ("lmcache", "`kvstore config` lists"),
    ],
)
def test_a_key_of_the_extra_config_that_is_no_setting_is_named(key, said):
    with pytest.raises(MisconfiguredError, match=f"'{key}'") as error:
        flags_of({key: "x"})
    assert said in str(error.value)


def model_config(place, commit=None):
    return SimpleNamespace(model=str(place), hf_config=SimpleNamespace(_commit_hash=commit))


def test_a_folder_is_named_by_its_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    first = weights_revision(model_config(tmp_path), "auto", "")
    assert first == folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("inert")
    assert folder_digest(tmp_path) == first
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert folder_digest(tmp_path) != first


def test_files_of_a_hub_cache_are_named_by_content_wherever_they_lie(tmp_path):
    digests = []
    for node in ("one", "two"):
        blob = tmp_path / node / "blobs" / ("ab" * 32)
        blob.parent.mkdir(parents=True)
        blob.write_bytes(b"weights")
        os.utime(blob, ns=(len(node), hash(node) % 1000))
        snapshot = tmp_path / node / "snapshots" / "commit"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(blob)
        digests.append(folder_digest(snapshot))
    assert digests[0] == digests[1]


def test_weights_are_never_nameless(tmp_path):
    assert weights_revision(model_config("org/name", "c0ffee"), "auto", "") == "commit c0ffee"
    assert weights_revision(model_config("s3://b/m"), "auto", " mine ") == "mine"
    for config, load_format in (
        (model_config("org/name"), "auto"),
        (model_config(tmp_path), "auto"),
        (model_config("org/name", "c0ffee"), "dummy"),
    ):
        with pytest.raises(MisconfiguredError, match="KVSTORE_WEIGHTS_REVISION"):
            weights_revision(config, load_format, "")


def test_ranks_hold_ranges_of_heads_or_share_one():
    assert head_shards(8, 1) == (Shard(0, 8),)
    assert head_shards(8, 4) == (Shard(0, 2), Shard(2, 4), Shard(4, 6), Shard(6, 8))
    assert head_shards(2, 4) == (Shard(0, 1), Shard(0, 1), Shard(1, 2), Shard(1, 2))
    assert head_shards(1, 2) == (Shard(0, 1), Shard(0, 1))


LAYOUTS = {
    "nhd": KVLayout(2, 2, 8, DType.BFLOAT16, "nhd", page_tokens=4, chunk_tokens=12),
    "nhd, narrow values": KVLayout(
        2, 2, 8, DType.BFLOAT16, "nhd", page_tokens=4, chunk_tokens=12, value_dim=6
    ),
    "mla": KVLayout(2, 1, 8, DType.BFLOAT16, "mla", page_tokens=4, chunk_tokens=12),
    "opaque": KVLayout(
        2, 2, 8, DType.BFLOAT16, "opaque:t", page_tokens=4, chunk_tokens=12, page_bytes=2 * 4 * 16 * 2
    ),
}
BLOCKS = 16


def engine_cache(layout):
    """Caches as vLLM registers them, by layer; heads innermost or not, as GPUs have it."""
    value_dim = 0 if layout.page_form == "mla" else layout.value_dim or layout.head_dim
    shape = (BLOCKS, layout.page_tokens, layout.kv_heads, layout.head_dim + value_dim)
    caches = {}
    for layer in range(layout.layers):
        cache = torch.randn(shape).to(torch.bfloat16).transpose(1, 2)
        caches[f"layer{layer}"] = cache.contiguous() if layout.is_opaque else cache
    return caches


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("first_block", [0, 1, 2])
@pytest.mark.parametrize("missing_at_the_end", [0, 2])
def test_blocks_go_to_sections_and_back_and_others_are_left_alone(layout, first_block, missing_at_the_end):
    form = ChunkForm(layout, layout.whole)
    geometry = Geometry(("layer0", "layer1"), layout, (layout.whole,))
    source_caches, target_caches = engine_cache(layout), engine_cache(layout)
    before = {name: cache.clone() for name, cache in target_caches.items()}
    source = BlockMemory(form, block_planes(source_caches, geometry, BLOCKS))
    target = BlockMemory(form, block_planes(target_caches, geometry, BLOCKS))
    taken, given = [3, 1, 7, 2, 9, 4], [15, 0, 5, 8, 6, 10]
    used = given[first_block : len(given) - missing_at_the_end]
    sink = BlockSink(target, used, first_block, None)
    sections = [[memoryview(bytearray(form.section_bytes)) for _ in range(layout.layers)] for _ in range(2)]
    for chunk in range(2):
        BlockSource(source, taken, None).gather(chunk, sections[chunk])
    for layer in range(layout.layers):
        sink.scatter(layer, [0, 1], [sections[0][layer], sections[1][layer]])
    for name, cache in target_caches.items():
        for block in range(BLOCKS):
            expected = before[name][block]
            if block in used:
                expected = source_caches[name][taken[given.index(block)]]
            assert torch.equal(cache[block], expected), (name, block)


def test_a_cache_of_another_shape_is_refused():
    layout = LAYOUTS["nhd"]
    geometry = Geometry(("layer0", "layer1"), layout, (layout.whole,))
    caches = engine_cache(layout)
    with pytest.raises(UnsupportedModelError, match="this adapter knows"):
        block_planes(caches, geometry, BLOCKS // 2)
    with pytest.raises(UnsupportedModelError, match="missing"):
        block_planes({"layer0": caches["layer0"]}, geometry, BLOCKS)
