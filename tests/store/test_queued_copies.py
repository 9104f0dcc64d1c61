"""Loads whose sink leaves copies under way, as one for a GPU does."""

import pytest
from samples import PATIENCE_S, Gate, Pages, ScriptedBackend, assert_no_slot_lost, chain_of, stored_chunks

from kvstore.errors import MissReason

CHAIN = chain_of(4)


class QueueingPages(Pages):
    """Copies only when it is waited for, as late as that may be. By layer, a gate before that.

    begun   layers that copies have begun of, in order
    failing  layers whose copies fail
    """

    def __init__(self, chunks=4):
        super().__init__(chunks)
        self.begun = []
        self.gates = {}
        self.failing = set()

    def scatter(self, layer, indices, sections):
        self.begun.append(layer)
        return Copying(self, layer, indices, sections)


class Copying:
    done = False

    def __init__(self, pages, layer, indices, sections):
        self._pages = pages
        self._layer = layer
        self._copy = lambda: Pages.scatter(pages, layer, indices, sections)

    def wait(self):
        gate = self._pages.gates.get(self._layer)
        if gate is not None:
            gate.block()
        if self._layer in self._pages.failing:
            raise OSError("no such device")
        self._copy()


@pytest.fixture
def stored(opened):
    """A store whose memory tier has all chunks, and another that has none."""
    backend = ScriptedBackend(stored_chunks(CHAIN))
    warm = opened(backend)
    assert warm.load(CHAIN, range(4), Pages(4)).wait(PATIENCE_S).chunks == 4
    return {"warm": warm, "cold": opened(backend)}


def test_the_next_copy_begins_before_the_last_is_waited_for_and_no_layer_is_ready_before(stored):
    pages = QueueingPages()
    pages.gates[0] = Gate()
    handle = stored["warm"].load(CHAIN, range(4), pages)
    pages.gates[0].wait_arrivals()
    assert pages.begun == [0, 1]
    with pytest.raises(TimeoutError):
        handle.wait_layer(0, 0.05)
    pages.gates[0].open()
    assert handle.wait_layer(0, PATIENCE_S) == 4
    pages.assert_holds(range(4), layers=range(1))
    assert handle.wait(PATIENCE_S).chunks == 4
    assert pages.begun == sorted(pages.begun)
    pages.assert_holds(range(4))


@pytest.mark.parametrize("tiers", ["warm", "cold"])
def test_what_is_left_under_way_is_waited_for_to_the_last(stored, tiers):
    pages = QueueingPages()
    assert stored[tiers].load(CHAIN, range(4), pages).wait(PATIENCE_S).chunks == 4
    pages.assert_holds(range(4))
    assert_no_slot_lost(stored[tiers])


def test_p13_cancel_returns_when_nothing_is_copied_any_more(stored):
    store, pages = stored["warm"], QueueingPages()
    arena = store._parts.memory.arena
    pages.gates = {0: Gate(), 1: Gate()}
    handle = store.load(CHAIN, range(4), pages)
    pages.gates[0].wait_arrivals()
    handle._cancel()
    pages.gates[0].open()
    # Begun before, it goes on: what it reads is nobody else's.
    pages.gates[1].wait_arrivals()
    store._parts.memory.clear()
    others = list(iter(arena.try_acquire, None))
    for slot in others:
        slot.memory[:] = bytes(len(slot.memory))
    with pytest.raises(TimeoutError):
        handle.wait(0.05)
    pages.gates[1].open()
    assert handle.cancel().failures[0] is MissReason.CANCELLED
    pages.assert_never_wrong()
    for slot in others:
        slot.release()
    assert_no_slot_lost(store)
    assert pages.begun == [0, 1]


@pytest.mark.parametrize("tiers", ["warm", "cold"])
def test_a_copy_that_fails_is_a_miss_of_its_chunks(stored, tiers):
    pages = QueueingPages()
    pages.failing = {2}
    result = stored[tiers].load(CHAIN, range(4), pages).wait(PATIENCE_S)
    assert result.chunks == 0
    assert result.failures[0] is MissReason.SINK_FAILED
    pages.assert_never_wrong()
    assert_no_slot_lost(stored[tiers])


def test_p8_a_load_out_of_time_ends_when_its_last_copy_does(stored):
    pages = QueueingPages()
    pages.gates[1] = Gate()
    handle = stored["warm"].load(CHAIN, range(4), pages, timeout_s=0.2)
    pages.gates[1].wait_arrivals()
    with pytest.raises(TimeoutError):
        handle.wait(0.4)
    pages.gates[1].open()
    assert handle.wait(PATIENCE_S).failures[0] is MissReason.TIMEOUT
    pages.assert_never_wrong()
    assert_no_slot_lost(stored["warm"])


def test_p8_a_load_out_of_time_does_not_wait_for_the_sinks_of_others(stored):
    store, gates = stored["warm"], [Gate() for _ in range(2)]
    late, hanging = Pages(4), Pages(4)
    late.before_scatter = lambda layer, indices: gates[0].block()
    hanging.before_scatter = lambda layer, indices: gates[1].block()
    load = store.load(CHAIN, range(4), late, timeout_s=0.3)
    gates[0].wait_arrivals()
    # More than there are threads for: the next call of the first sink is queued behind them.
    others = [store.load(CHAIN, range(4), hanging) for _ in range(20)]
    gates[1].wait_arrivals(10)
    gates[0].open()
    assert load.wait(PATIENCE_S).failures[0] is MissReason.TIMEOUT
    assert gates[1].inside
    gates[1].open()
    for other in others:
        assert other.wait(PATIENCE_S).chunks == 4


def test_a_copy_that_is_done_makes_its_layer_ready_before_the_next_begins(stored, monkeypatch):
    monkeypatch.setattr(Copying, "done", True)
    pages, seen = QueueingPages(), []
    scatter = pages.scatter

    def noting(layer, indices, sections):
        seen.append(handle_of[0]._layers_ready if handle_of else 0)
        copy = scatter(layer, indices, sections)
        copy.wait()
        return copy

    handle_of: list = []
    pages.scatter = noting
    gate = pages.gates[0] = Gate()
    handle_of.append(stored["warm"].load(CHAIN, range(4), pages))
    gate.open()
    assert handle_of[0].wait(PATIENCE_S).chunks == 4
    assert seen == list(range(len(seen)))


def test_a_copy_that_cannot_say_whether_it_is_done_is_waited_for(stored, monkeypatch):
    def broken(self):
        raise OSError("device lost")

    monkeypatch.setattr(Copying, "done", property(broken))
    pages = QueueingPages()
    pages.gates[0] = Gate()
    handle = stored["warm"].load(CHAIN, range(4), pages)
    pages.gates[0].wait_arrivals()
    assert not handle._done
    pages.gates[0].open()
    assert handle.wait(PATIENCE_S).failures[0] is MissReason.SINK_FAILED
    assert_no_slot_lost(stored["warm"])


def test_p13_a_store_that_was_closed_ends_no_load_before_its_copies(stored, monkeypatch):
    monkeypatch.setattr("kvstore.store.ENGINE_TIMEOUT_S", 0.1)
    pages = QueueingPages()
    pages.gates = {0: Gate(), 1: Gate()}
    handle = stored["warm"].load(CHAIN, range(4), pages)
    pages.gates[0].wait_arrivals()
    stored["warm"].close()
    pages.gates[0].open()
    pages.gates[1].wait_arrivals()
    with pytest.raises(TimeoutError):
        handle.wait(0.1)
    pages.gates[1].open()
    assert handle.wait(PATIENCE_S).chunks == 0
    pages.assert_never_wrong()
