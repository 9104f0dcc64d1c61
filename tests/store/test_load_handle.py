import asyncio
import concurrent.futures
import random
import threading

import pytest
from samples import (
    FORM,
    LAYER_BY_LAYER,
    LAYOUT,
    PATIENCE_S,
    Gate,
    Pages,
    ScriptedBackend,
    assert_no_slot_lost,
    chain_of,
    name_of,
    settle,
    store_of,
    stored_chunks,
)

import kvstore.assembly
from kvstore.codecs import registry
from kvstore.errors import MisconfiguredError, MissReason, RetryableError

LAYERS = LAYOUT.layers
CHAIN = chain_of(4)
CODECS = ["none", "zstd"]


@pytest.fixture
def layer_by_layer(monkeypatch):
    """Every layer of every chunk is a request of its own."""
    monkeypatch.setattr(kvstore.assembly, "FetchLimits", lambda: LAYER_BY_LAYER)


def layer_of(call):
    """The layer a raw object's ranged read is for; the first read takes the header and layer 0."""
    return max(0, (call.offset - FORM.header_bytes) // FORM.stride)


def in_another_thread(function):
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("codec", CODECS)
def test_each_layer_can_be_used_while_later_ones_are_still_on_their_way(opened, codec):
    backend = ScriptedBackend(stored_chunks(CHAIN, codec=codec))
    gates = [Gate() for _ in range(LAYERS)]
    store, pages = opened(backend), Pages(4)
    seen = {}

    async def by_layer(call):
        # Reads of one chunk come in layer order, one a layer, so counting tells which this is.
        seen[call.name] = layer = seen.get(call.name, -1) + 1
        await gates[layer].enter()

    backend.when("get", by_layer)
    gates[0].open()
    load = store.load(CHAIN, range(4), pages)
    for layer in range(LAYERS):
        assert load.wait_layer(layer, PATIENCE_S) == 4
        pages.assert_holds(range(4), layers=range(layer + 1))
        if layer + 1 < LAYERS:
            with pytest.raises(TimeoutError):
                load.wait_layer(layer + 1, 0)
            with pytest.raises(TimeoutError):
                load.wait(0)
            gates[layer + 1].open()
    assert load.wait(PATIENCE_S).chunks == 4


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("concurrency", [1, 3])
def test_layer_0_of_every_chunk_is_asked_for_before_layer_1_of_any(opened, monkeypatch, codec, concurrency):
    chain = chain_of(8)
    backend = ScriptedBackend(stored_chunks(chain, codec=codec))
    store = opened(backend, fetch_concurrency=concurrency)

    async def at_once(function, *arguments):
        return function(*arguments)

    # Without threads the order of everything is that of the loop's turns.
    monkeypatch.setattr(store._loop, "work", at_once)
    assert store.load(chain, range(8), Pages(8)).wait(PATIENCE_S).chunks == 8
    index = {name_of(key): i for i, key in enumerate(chain.keys)}
    asked, layers = {}, []
    for call in backend.calls:
        if call.operation == "get":
            asked[call.name] = asked.get(call.name, -1) + 1
            layers.append((asked[call.name], index[call.name]))
    assert len(layers) == 8 * LAYERS
    # A chunk whose layer has just arrived may be late by as many as are asked for together.
    in_order = sorted(layers)
    assert all(abs(layers.index(step) - in_order.index(step)) < concurrency for step in layers)
    if concurrency == 1:
        assert layers == in_order


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_no_more_reads_are_in_flight_than_set(opened, codec, concurrency):
    backend = ScriptedBackend(stored_chunks(chain_of(8), codec=codec))
    inside, most = 0, 0

    async def count(call):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        for _ in range(3):
            await asyncio.sleep(0)
        inside -= 1

    backend.when("get", count)
    store = opened(backend, fetch_concurrency=concurrency)
    assert store.load(chain_of(8), range(8), Pages(8)).wait(PATIENCE_S).chunks == 8
    assert most <= concurrency


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("codec", CODECS)
def test_with_memory_for_few_of_the_chunks_layer_0_of_all_still_comes_before_layer_1_of_any(opened, codec):
    chain = chain_of(8)
    backend, gate = ScriptedBackend(stored_chunks(chain, codec=codec)), Gate()
    seen = {}

    async def hold_from_layer_1_on(call):
        seen[call.name] = seen.get(call.name, -1) + 1
        if seen[call.name]:
            await gate.enter()

    backend.when("get", hold_from_layer_1_on)
    store, pages = opened(backend, memory_bytes=2 * 8192), Pages(8)
    load = store.load(chain, range(8), pages)
    assert load.wait_layer(0, PATIENCE_S) == 8
    pages.assert_holds(range(8), layers=range(1))
    gate.open()
    assert load.wait(PATIENCE_S).chunks == 8
    pages.assert_holds(range(8))
    # Those that had memory of their own are kept, in it.
    assert len(store._parts.memory) == 2
    assert_no_slot_lost(store)


@pytest.mark.parametrize("codec", CODECS)
def test_with_all_memory_in_use_chunks_pass_through_to_pages_and_are_not_kept(opened, codec):
    backend = ScriptedBackend(stored_chunks(CHAIN, codec=codec))
    store = opened(backend, memory_bytes=2 * 8192)
    held = [store._parts.memory.arena.try_acquire() for _ in range(2)]
    loads = [(store.load(CHAIN, range(4), pages), pages) for pages in (Pages(4), Pages(4))]
    for load, pages in loads:
        assert load.wait(PATIENCE_S).chunks == 4
        pages.assert_holds(range(4))
    assert len(store._parts.memory) == 0
    for slot in held:
        slot.release()
    assert_no_slot_lost(store)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.usefixtures("layer_by_layer")
def test_memory_smaller_than_the_span_slows_a_load_down_and_never_stops_it(opened, codec, slots):
    chain = chain_of(12)
    backend = ScriptedBackend(stored_chunks(chain, codec=codec))
    store, pages = opened(backend, memory_bytes=slots * 8192), Pages(12)
    assert store._parts.memory.arena.slots == slots
    loads = [store.load(chain, range(12), page) for page in (pages, Pages(12), Pages(12))]
    assert [load.wait(PATIENCE_S).chunks for load in loads] == [12, 12, 12]
    pages.assert_holds(range(12))
    assert_no_slot_lost(store)


def test_the_sink_is_called_layer_by_layer_one_call_at_a_time(opened):
    backend = ScriptedBackend(stored_chunks(chain_of(8)))
    store, pages = opened(backend), Pages(8)
    busy = threading.Lock()

    def check(layer, indices):
        assert busy.acquire(blocking=False)
        assert list(indices) == sorted(set(indices))
        busy.release()

    pages.before_scatter = check
    assert store.load(chain_of(8), range(8), pages).wait(PATIENCE_S).chunks == 8
    done = [(layer, index) for layer, indices in pages.scattered for index in indices]
    assert sorted(done) == [(layer, index) for layer in range(LAYERS) for index in range(8)]


def test_a_layer_is_ready_when_it_is_in_pages_not_when_it_has_arrived(opened):
    backend, late, sink = ScriptedBackend(stored_chunks(CHAIN)), Gate(), [Gate(), Gate()]
    backend.when("get", late, applies=lambda call: call.name != name_of(CHAIN.keys[0]))
    store, pages = opened(backend), Pages(4)
    calls = iter(sink)
    pages.before_scatter = lambda layer, indices: next(calls, sink[1]).block()
    load = store.load(CHAIN, range(4), pages)
    sink[0].wait_arrivals()
    # The others arrive while the sink has the first chunk in hand.
    late.open()
    while any(key not in store._parts.memory for key in CHAIN.keys):
        settle(store)
    sink[0].open()
    sink[1].wait_arrivals()
    with pytest.raises(TimeoutError):
        load.wait_layer(0, 0)
    sink[1].open()
    assert load.wait_layer(0, PATIENCE_S) == 4
    pages.assert_holds(range(4), layers=range(1))


@pytest.mark.usefixtures("layer_by_layer")
def test_a_layer_is_counted_as_late_when_it_is_asked_for_before_it_is_there(opened):
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    backend.when("get", gate, applies=lambda call: layer_of(call) == 2)
    store = opened(backend)
    load = store.load(CHAIN, range(4), Pages(4))
    with pytest.raises(TimeoutError):
        load.wait_layer(2, 0)
    assert store.metrics.value("kvstore_late_layers_total") == 1
    gate.open()
    load.wait(PATIENCE_S)
    for layer in range(LAYERS):
        load.wait_layer(layer)
    assert store.metrics.value("kvstore_late_layers_total") == 1


@pytest.mark.parametrize("layer", [-1, LAYERS, 99])
def test_a_layer_there_is_not_is_an_index_error(opened, layer):
    store = opened(ScriptedBackend(stored_chunks(CHAIN)))
    with pytest.raises(IndexError):
        store.load(CHAIN, range(4), Pages(4)).wait_layer(layer)


@pytest.mark.usefixtures("layer_by_layer")
def test_the_count_a_layer_reports_never_grows_and_matches_the_pages(opened):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    gate = Gate()
    backend.when("get", gate, applies=lambda call: layer_of(call) == 2)
    store, pages = opened(backend), Pages(4)
    load = store.load(CHAIN, range(4), pages)
    assert [load.wait_layer(layer, PATIENCE_S) for layer in (0, 1)] == [4, 4]
    del backend.objects[name_of(CHAIN.keys[2])]
    gate.open()
    assert [load.wait_layer(layer, PATIENCE_S) for layer in range(LAYERS)][2:] == [2, 2]
    assert load.wait_layer(0) == 2
    assert load.wait(PATIENCE_S).chunks == 2
    pages.assert_holds(range(2))


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_miss_at_any_layer_lets_those_before_it_arrive(opened, layer):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    name = name_of(CHAIN.keys[1])
    at = FORM.header_bytes + layer * FORM.stride
    backend.replace(name, backend.data(name)[:at] + b"\xff\xee\xdd" + backend.data(name)[at + 3 :])
    store, pages = opened(backend), Pages(4)
    load = store.load(CHAIN, range(4), pages)
    assert load.wait(PATIENCE_S).chunks == 1
    assert [load.wait_layer(i) for i in range(LAYERS)] == [1] * LAYERS
    pages.assert_holds([0])
    pages.assert_never_wrong()
    assert_no_slot_lost(store)


def assert_nothing_is_written_any_more(store, pages, *gates):
    """Let everything that was held back go; pages must stay as they are."""
    before = pages.snapshot()
    calls = len(pages.scattered)
    for gate in gates:
        gate.open()
    settle(store)
    assert pages.snapshot() == before
    assert len(pages.scattered) == calls
    pages.assert_never_wrong()


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("codec", CODECS)
def test_p13_at_the_deadline_what_is_missing_is_a_timeout_and_nothing_writes_any_more(
    opened, caplog, codec, layer
):
    backend = ScriptedBackend(stored_chunks(CHAIN, codec=codec))
    gate = Gate()
    reads = {}

    async def hold(call):
        reads[call.name] = reads.get(call.name, -1) + 1
        if reads[call.name] == layer and call.name != name_of(CHAIN.keys[0]):
            await gate.enter()

    backend.when("get", hold)
    store, pages = opened(backend), Pages(4)
    result = store.load(CHAIN, range(4), pages, timeout_s=0.1).wait(PATIENCE_S)
    # The first chunk was not held back; whether it made it is up to the machine.
    assert result.chunks in (0, 1)
    assert result.failures[1] in (MissReason.TIMEOUT, MissReason.BEHIND_A_MISS)
    assert MissReason.TIMEOUT in result.failures.values()
    pages.assert_holds(range(result.chunks))
    assert len(caplog.records) == 1
    assert store.metrics.value("kvstore_missed_chunks_total", reason="timeout") >= 1
    assert_nothing_is_written_any_more(store, pages, gate)
    assert_no_slot_lost(store)


def test_the_deadline_also_ends_the_wait_for_memory(opened):
    gate = Gate()
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend, memory_bytes=2 * 8192, fetch_concurrency=1)
    arenas = store._parts.memory.arena, store._parts.reads.flights._tiers.fetcher.transit
    held = [arena.try_acquire() for arena in arenas for _ in range(arena.slots)]
    result = store.load(CHAIN, range(4), Pages(4), timeout_s=0.05).wait(PATIENCE_S)
    assert result.chunks == 0
    assert set(result.failures.values()) == {MissReason.TIMEOUT}
    for slot in held:
        slot.release()
    assert gate.inside == 0
    assert_no_slot_lost(store)


def test_a_timeout_of_zero_is_a_deadline_not_the_default(opened):
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    backend.when("get", gate)
    backend.when("head", gate)
    store = opened(backend)
    assert store.load(CHAIN, range(4), Pages(4), timeout_s=0).wait(PATIENCE_S).chunks == 0
    looked = in_another_thread(lambda: store.lookup(CHAIN, timeout_s=0))
    assert looked.result(PATIENCE_S).miss is MissReason.TIMEOUT


def test_p13_cancelling_returns_when_nothing_writes_any_more(opened):
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    backend.when("get", gate)
    store, pages = opened(backend), Pages(4)
    load = store.load(CHAIN, range(4), pages)
    gate.wait_arrivals(4)
    result = load.cancel()
    assert result.chunks == 0
    assert set(result.failures.values()) == {MissReason.CANCELLED}
    assert gate.inside == 0
    assert load.cancel() == load.wait() == result
    assert [load.wait_layer(layer) for layer in range(LAYERS)] == [0] * LAYERS
    assert store.metrics.value("kvstore_missed_chunks_total", reason="cancelled") == 4
    pages.assert_untouched(range(4))
    assert_nothing_is_written_any_more(store, pages, gate)
    assert_no_slot_lost(store)


def test_cancelled_before_it_begins_a_load_reads_nothing(opened):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    store = opened(backend)
    assert store.wait_connected(PATIENCE_S)
    held, free = threading.Event(), threading.Event()
    store._loop.call(lambda: (held.set(), free.wait(PATIENCE_S)))
    assert held.wait(PATIENCE_S)
    load = store.load(CHAIN, range(4), Pages(4))
    cancelled = in_another_thread(load.cancel)
    while not store._loop._loop._ready:
        pass
    free.set()
    assert set(cancelled.result(PATIENCE_S).failures.values()) == {MissReason.CANCELLED}
    assert backend.count("get") == 0


def test_several_misses_of_one_load_count_each_chunk_once(opened):
    backend, gates = ScriptedBackend(stored_chunks(chain_of(6))), {1: Gate(), 4: Gate()}
    names = [name_of(key) for key in chain_of(6).keys]
    for index, gate in gates.items():
        backend.when("get", gate, name=names[index])
        del backend.objects[names[index]]
    store = opened(backend)
    load = store.load(chain_of(6), range(6), Pages(6))
    for index in (4, 1):
        gates[index].wait_arrivals()
        gates[index].open()
        settle(store)
    failures = load.wait(PATIENCE_S).failures
    assert set(failures) == {1, 2, 3, 4, 5}
    counted = sum(
        store.metrics.value("kvstore_missed_chunks_total", reason=reason.value) for reason in MissReason
    )
    assert counted == 5


def test_sinks_that_hang_leave_the_store_to_other_loads(opened):
    store, gate = opened(ScriptedBackend(stored_chunks(CHAIN, codec="zstd"))), Gate()
    stuck = []
    for _ in range(12):
        pages = Pages(4)
        pages.before_scatter = lambda layer, indices: gate.block()
        stuck.append(store.load(CHAIN, range(4), pages))
    gate.wait_arrivals(12)
    store._parts.memory.clear()
    assert store.load(CHAIN, range(4), Pages(4)).wait(PATIENCE_S).chunks == 4
    gate.open()
    assert all(load.wait(PATIENCE_S).chunks == 4 for load in stuck)


def test_p13_cancelling_waits_for_a_sink_that_is_at_work(opened):
    store, pages = opened(ScriptedBackend(stored_chunks(CHAIN))), Pages(4)
    gate = Gate()
    pages.before_scatter = lambda layer, indices: gate.block()
    load = store.load(CHAIN, range(4), pages)
    gate.wait_arrivals()
    cancelled = in_another_thread(load.cancel)
    again = in_another_thread(load.cancel)
    settle(store)
    assert not cancelled.done()
    assert not again.done()
    gate.open()
    assert cancelled.result(PATIENCE_S).chunks == again.result(PATIENCE_S).chunks == 0
    assert_nothing_is_written_any_more(store, pages)
    assert_no_slot_lost(store)


def test_cancelling_a_finished_load_changes_nothing(opened):
    store, pages = opened(ScriptedBackend(stored_chunks(CHAIN))), Pages(4)
    load = store.load(CHAIN, range(4), pages)
    assert load.wait(PATIENCE_S).chunks == 4
    assert load.cancel().chunks == 4
    assert load.wait_layer(LAYERS - 1) == 4
    assert store.metrics.value("kvstore_missed_chunks_total", reason="cancelled") == 0


class Moment:
    """Comes when so many reads and scatters of a load have begun; reads take a few turns of the loop."""

    def __init__(self, source):
        self.came = threading.Event()
        self._left = source.randrange(6 * LAYERS + 8)
        self._turns = source.randrange(4)

    def tick(self):
        self._left -= 1
        if self._left <= 0:
            self.came.set()

    async def read(self, call):
        self.tick()
        for _ in range(self._turns):
            await asyncio.sleep(0)


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("codec", CODECS)
def test_p13_cancelled_at_any_moment_pages_are_right_and_no_slot_is_lost(opened, codec):
    chain = chain_of(6)
    objects = stored_chunks(chain, codec=codec)
    backend = ScriptedBackend(dict(objects))
    store = opened(backend, memory_bytes=4 * 8192, fetch_concurrency=3)
    for seed in range(80):
        source = random.Random(seed)
        moment, pages = Moment(source), Pages(6)
        backend.forget()
        backend.when("get", moment.read)
        pages.before_scatter = lambda layer, indices, moment=moment: moment.tick()
        store._parts.memory.clear()
        if seed % 3 == 0:
            del backend.objects[name_of(chain.keys[source.randrange(1, 6)])]
        load = store.load(chain, range(6), pages)
        in_another_thread(lambda load=load, moment=moment: (load.wait(PATIENCE_S), moment.came.set()))
        assert moment.came.wait(PATIENCE_S)
        result = load.cancel()
        pages.assert_holds(range(result.chunks))
        assert_nothing_is_written_any_more(store, pages)
        scratch = store._parts.reads.flights._tiers.fetcher.scratch
        settle(store)
        assert scratch.free == scratch.slots
        assert store._parts.memory.arena.free + len(store._parts.memory) == store._parts.memory.arena.slots
        backend.objects.update(objects)
    assert_no_slot_lost(store)


SINK_ERRORS = [
    RuntimeError("device lost"),
    MisconfiguredError("shape"),
    RetryableError("later"),
    TimeoutError("slow"),
    KeyError(3),
    MemoryError(),
    # An exhausted iterator, an executor of the engine's that shut down, an interpreter that exits.
    StopIteration(),
    concurrent.futures.CancelledError(),
    asyncio.CancelledError(),
    SystemExit(),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", SINK_ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_sink_raises_is_a_miss_and_the_store_lives_on(error):
    # Not closed if it fails: with its loop gone it never would be.
    store, pages = store_of(ScriptedBackend(stored_chunks(CHAIN))), Pages(4)
    failing = True

    def scatter(layer, indices):
        if layer == 1 and failing:
            raise error

    pages.before_scatter = scatter
    load = store.load(CHAIN, range(4), pages)
    result = load.wait(PATIENCE_S)
    assert result.chunks == 0
    assert result.failures[0] is MissReason.SINK_FAILED
    assert store.metrics.value("kvstore_missed_chunks_total", reason="sink_failed") == 1
    failing = False
    assert store.load(CHAIN, range(4), pages).wait(PATIENCE_S).chunks == 4
    pages.assert_holds(range(4))
    assert_no_slot_lost(store)
    store.close()


@pytest.mark.usefixtures("layer_by_layer")
def test_a_sink_that_fails_ends_the_load_though_later_layers_never_come(opened):
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    backend.when("get", gate, applies=lambda call: layer_of(call) == 2)
    store, pages = opened(backend), Pages(4)

    def scatter(layer, indices):
        raise RuntimeError("device lost")

    pages.before_scatter = scatter
    assert store.load(CHAIN, range(4), pages).wait(PATIENCE_S).failures[0] is MissReason.SINK_FAILED
    assert_no_slot_lost(store)


def test_what_can_be_retried_is_retried_and_then_a_miss(opened, caplog):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    backend.when("get", RetryableError("503"), name=name_of(CHAIN.keys[0]), times=2)
    backend.when("get", RetryableError("503"), name=name_of(CHAIN.keys[2]))
    store, pages = opened(backend), Pages(4)
    result = store.load(CHAIN, range(4), pages).wait(PATIENCE_S)
    assert result.chunks == 2
    assert result.failures[2] is MissReason.UNREACHABLE
    assert backend.count("get", name_of(CHAIN.keys[0])) == 3
    assert backend.count("get", name_of(CHAIN.keys[2])) == 3
    pages.assert_holds(range(2))
    assert len(caplog.records) == 1
    # A backend out of reach says nothing about what it holds.
    assert store._parts.presence.get(CHAIN.keys[2]) is None


@pytest.mark.parametrize("error", [MisconfiguredError("denied"), OSError("a defect"), ValueError("a defect")])
def test_what_cannot_be_retried_is_a_miss_at_once_and_spares_the_chunks_before_it(opened, error):
    backend = ScriptedBackend(stored_chunks(CHAIN))
    gate = Gate()

    async def fail(call):
        await gate.enter()
        raise error

    backend.when("get", fail, name=name_of(CHAIN.keys[2]))
    store, pages = opened(backend), Pages(4)
    load = store.load(CHAIN, range(4), pages)
    while sum(2 not in indices and len(indices) for _, indices in pages.scattered) < 3 * LAYERS:
        settle(store)
    gate.open()
    result = load.wait(PATIENCE_S)
    assert result.chunks == 2
    assert result.failures[2] in (MissReason.UNREACHABLE, MissReason.INTERNAL_ERROR)
    assert backend.count("get", name_of(CHAIN.keys[2])) == 1
    pages.assert_holds(range(2))
    assert_no_slot_lost(store)


@pytest.mark.parametrize("error", [OSError("a defect"), MemoryError()])
def test_a_defect_met_by_one_chunk_spares_those_before_it_that_are_on_their_way(opened, error):
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    backend.when("get", gate, name=name_of(CHAIN.keys[0]))
    backend.when("get", error, name=name_of(CHAIN.keys[2]))
    store, pages = opened(backend), Pages(4)
    load = store.load(CHAIN, range(4), pages)
    gate.wait_arrivals()
    settle(store)
    gate.open()
    result = load.wait(PATIENCE_S)
    assert result.chunks == 2
    assert result.failures[2] in (MissReason.UNREACHABLE, MissReason.INTERNAL_ERROR)
    pages.assert_holds(range(2))
    assert_no_slot_lost(store)


class HeldCodec:
    """A decoder that waits at a gate in the middle of its work, then writes."""

    name = "zstd"

    def __init__(self, gate):
        self.gate = gate

    def decode(self, stored, out):
        self.gate.block()
        out[:] = bytes([0xEE]) * len(out)


def test_a_chunk_no_longer_wanted_keeps_its_memory_until_its_decoder_is_done(opened, monkeypatch):
    # Two misses, one after the other, each end the work on the chunks behind them. Were the slot
    # given back at the second, the decoder would write over whatever lies there next.
    decoding, gates = Gate(), {index: Gate() for index in (0, 1)}
    objects = stored_chunks(CHAIN, codec="zstd")
    backend = ScriptedBackend(objects)
    for index, gate in gates.items():
        backend.when("get", gate, name=name_of(CHAIN.keys[index]))
        del objects[name_of(CHAIN.keys[index])]
    del objects[name_of(CHAIN.keys[3])]
    monkeypatch.setitem(registry._DECODERS, "zstd", HeldCodec(decoding))
    store = opened(backend)
    load = store.load(CHAIN, range(4), Pages(4))
    decoding.wait_arrivals()
    for index in (1, 0):
        gates[index].wait_arrivals()
        gates[index].open()
        settle(store)
    arena, scratch = store._parts.memory.arena, store._parts.reads.flights._tiers.fetcher.scratch
    try:
        assert decoding.inside == 1
        assert arena.free == arena.slots - 1
        assert scratch.free == scratch.slots - 1
        with pytest.raises(TimeoutError):
            load.wait(0)
    finally:
        decoding.open()
    assert load.wait(PATIENCE_S).chunks == 0
    assert_no_slot_lost(store)


@pytest.mark.parametrize("end", ["cancel", "second miss"])
def test_a_chunk_no_longer_wanted_keeps_its_memory_until_the_sink_has_read_it(opened, end):
    objects = stored_chunks(CHAIN)
    backend, scattering = ScriptedBackend(objects), Gate()
    gates = {index: Gate() for index in (0, 1)}
    for index, gate in gates.items():
        backend.when("get", gate, name=name_of(CHAIN.keys[index]))
        del objects[name_of(CHAIN.keys[index])]
    store, pages = opened(backend), Pages(4)
    pages.before_scatter = lambda layer, indices: scattering.block()
    load = store.load(CHAIN, range(4), pages)
    scattering.wait_arrivals()
    for index in (1, 0) if end == "second miss" else (1,):
        gates[index].wait_arrivals()
        gates[index].open()
        settle(store)
    cancelled = in_another_thread(load.cancel) if end == "cancel" else None
    settle(store)
    store._parts.memory.clear()
    arena = store._parts.memory.arena
    try:
        read = len(pages.scattered)
        assert read == 0
        # The sink has the sections of at least one of the last two chunks in hand.
        assert arena.free < arena.slots
        with pytest.raises(TimeoutError):
            load.wait(0)
    finally:
        scattering.open()
    assert load.wait(PATIENCE_S).chunks == 0
    assert cancelled is None or cancelled.result(PATIENCE_S).chunks == 0
    assert_nothing_is_written_any_more(store, pages)
    assert_no_slot_lost(store)


@pytest.mark.usefixtures("layer_by_layer")
def test_two_loads_of_the_same_chunks_both_end_right(opened):
    store = opened(ScriptedBackend(stored_chunks(CHAIN, codec="zstd")))
    all_pages = [Pages(4) for _ in range(5)]
    loads = [store.load(CHAIN, range(4), pages) for pages in all_pages]
    for load, pages in zip(loads, all_pages, strict=True):
        assert load.wait(PATIENCE_S).chunks == 4
        pages.assert_holds(range(4))
    assert_no_slot_lost(store)
