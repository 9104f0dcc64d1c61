"""What goes between scheduler and workers: small, and the same keys on both sides."""

from __future__ import annotations

import pickle

from samples import LAYOUT
from vllm_engines import some_prompt

from kvstore.engine_adapters.vllm.engine_namespace import Namespaces
from kvstore.engine_adapters.vllm.messages import ChunkRun, LoadOrder, StepOrders, Variant, WorkerReport
from kvstore.keys import PrefixChain
from kvstore.namespace import Namespace

NAMESPACE = Namespace("model", "revision", LAYOUT, "rope")
CHAIN = PrefixChain.of(NAMESPACE, some_prompt(8 * LAYOUT.chunk_tokens))


def test_a_run_gives_back_the_keys_it_was_made_of():
    for span in (slice(0, 8), slice(3, 5), slice(7, 8)):
        run = pickle.loads(pickle.dumps(ChunkRun.of(CHAIN.keys[span], Variant())))
        assert run.chain(NAMESPACE).keys == CHAIN.keys[span]
        assert len(run) == len(CHAIN.keys[span])


def test_orders_of_a_long_prompt_pickle_small():
    keys = CHAIN.keys * 512
    order = LoadOrder(
        serial=1,
        request_id="request",
        run=ChunkRun.of(keys, Variant()),
        block_ids=tuple(range(8192)),
        first_block=0,
        awaited=False,
        new_tokens=1,
    )
    assert len(pickle.dumps(StepOrders(loads=[order]))) < 40 * len(keys) + 8 * 8192
    assert len(pickle.dumps(StepOrders())) < 300


def test_reports_of_workers_add_up_and_the_first_failure_counts():
    one = WorkerReport(gathered={1: 1, 2: 1}, taken={1: 1, 2: 0}, ended={"a": 1}, failed={"a": 3, "b": 1})
    other = WorkerReport(gathered={1: 1}, taken={1: 1}, ended={"a": 1}, failed={"a": 2})
    both = one.aggregate(other)
    assert both.gathered == {1: 2, 2: 1}
    assert both.taken == {1: 2, 2: 0}
    assert both.ended == {"a": 2}
    assert both.failed == {"a": 2, "b": 1}
    assert both
    assert not WorkerReport()


def test_each_variant_has_a_namespace_of_its_own():
    namespaces = Namespaces(NAMESPACE)
    variants = [Variant(), Variant("lora"), Variant("", "1 ab"), Variant("lora", "1 ab"), Variant("", "2 cd")]
    assert len({namespaces.of(variant).digest for variant in variants}) == len(variants)
    assert namespaces.of(Variant()) is NAMESPACE


def test_namespaces_of_variants_long_gone_are_forgotten():
    namespaces = Namespaces(NAMESPACE)
    for number in range(1000):
        namespaces.of(Variant("", f"{number} ab"))
    assert namespaces._made.cache_info().currsize < 1000
    assert namespaces.of(Variant("", "0 ab")) == Namespaces(NAMESPACE).of(Variant("", "0 ab"))
