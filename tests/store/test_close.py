import asyncio
import concurrent.futures
import contextlib
import threading
import time

import pytest
from samples import (
    FORM,
    LAYOUT,
    PATIENCE_S,
    Gate,
    Pages,
    ScriptedBackend,
    chain_of,
    name_of,
    namespace_of,
    settle,
    store_of,
    stored_chunks,
)

import kvstore.assembly
from kvstore.errors import MissReason, RetryableError, StoreClosedError
from kvstore.handles import Durability, LookupResult, SaveOutcome

CHAIN = chain_of(3)


def in_another_thread(function, *arguments):
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_closing_stores_what_was_saved_and_closes_the_backend():
    backend = ScriptedBackend()
    store = store_of(backend, close_timeout_s=PATIENCE_S)
    handle = store.save(CHAIN, range(3), Pages(3, text="a"))
    report = store.close()
    assert (report.chunks_left, report.bytes_left) == (0, 0)
    assert handle.outcomes() == dict.fromkeys(range(3), SaveOutcome.STORED)
    assert all(name_of(key) in backend.objects for key in CHAIN.keys)
    assert backend.closed


def test_p8_closing_with_a_stalled_backend_ends_at_its_deadline_and_says_what_is_left(caplog):
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate)
    store = store_of(backend, close_timeout_s=0.1)
    handle = store.save(CHAIN, range(3), Pages(3, text="a"), until=Durability.REMOTE)
    gate.wait_arrivals()
    report = in_another_thread(store.close).result(PATIENCE_S)
    assert (report.chunks_left, report.bytes_left) == (3, 3 * FORM.raw_bytes)
    assert "KVSTORE_CLOSE_TIMEOUT_S" in caplog.text
    assert handle.wait(PATIENCE_S) == dict.fromkeys(range(3), SaveOutcome.FAILED)
    assert gate.inside == 0
    assert backend.closed


def test_a_backend_that_never_closes_does_not_keep_the_engine_from_ending(monkeypatch):
    monkeypatch.setattr(kvstore.assembly, "DISCONNECT_TIMEOUT_S", 0.05)
    backend, gate = ScriptedBackend(), Gate()
    backend.when("close", gate)
    store = store_of(backend)
    closed = in_another_thread(store.close)
    gate.wait_arrivals()
    try:
        closed.result(PATIENCE_S)
    finally:
        gate.open()


def test_a_backend_that_fails_to_close_is_no_error_of_the_engine(caplog):
    backend = ScriptedBackend()
    backend.when("close", RetryableError("connection lost"))
    store = store_of(backend)
    threads = threading.active_count()
    assert store.close().chunks_left == 0
    assert threading.active_count() < threads
    assert len(caplog.records) == 1


def test_closing_twice_does_nothing_the_second_time():
    backend = ScriptedBackend()
    store = store_of(backend)
    store.close()
    assert store.close().chunks_left == 0
    assert backend.count("close") == 1


def test_two_threads_may_close_at_once():
    backend = ScriptedBackend()
    store = store_of(backend)
    closing = [in_another_thread(store.close) for _ in range(4)]
    assert [each.result(PATIENCE_S).chunks_left for each in closing] == [0] * 4
    assert backend.count("close") == 1


def test_after_closing_every_call_says_that_the_store_is_closed():
    store = store_of(ScriptedBackend())
    store.close()
    for call in (
        lambda: store.lookup(CHAIN),
        lambda: store.load(CHAIN, range(3), Pages(3)),
        lambda: store.save(CHAIN, range(3), Pages(3)),
        store.flush,
    ):
        with pytest.raises(StoreClosedError):
            call()


def test_what_needs_no_store_still_works_after_closing():
    store = store_of(ScriptedBackend(stored_chunks(CHAIN)))
    load = store.load(CHAIN, range(3), Pages(3))
    result = load.wait(PATIENCE_S)
    saved = store.save(CHAIN, range(3), Pages(3))
    store.close()
    assert load.wait() == load.cancel() == result
    assert load.wait_layer(0) == 3
    assert set(saved.wait().values()) == {SaveOutcome.PRESENT}
    assert len(store.chain(namespace_of(), range(9))) == 1
    assert store.metrics.value("kvstore_loaded_chunks_total", tier="backend") == 3


def test_leaving_a_with_block_closes():
    backend = ScriptedBackend()
    with store_of(backend) as store:
        pass
    assert backend.closed
    with pytest.raises(StoreClosedError):
        store.lookup(CHAIN)


def test_a_load_under_way_ends_when_the_store_closes():
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    backend.when("get", gate)
    store, pages = store_of(backend), Pages(3)
    load = store.load(CHAIN, range(3), pages)
    gate.wait_arrivals(3)
    in_another_thread(store.close).result(PATIENCE_S)
    result = load.wait(PATIENCE_S)
    assert result.chunks == 0
    assert set(result.failures) == {0, 1, 2}
    assert result.failures[0] is MissReason.CANCELLED
    assert load.wait_layer(LAYOUT.layers - 1, PATIENCE_S) == 0
    pages.assert_untouched(range(3))


def test_a_load_that_had_not_begun_ends_when_the_store_closes():
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    store, pages = store_of(backend), Pages(3)

    async def hold_the_loop():
        gate.block()

    store._loop.submit(hold_the_loop())
    gate.wait_arrivals()
    load = store.load(CHAIN, range(3), pages)
    closed = in_another_thread(store.close)
    gate.open()
    closed.result(PATIENCE_S)
    result = load.wait(PATIENCE_S)
    assert result.chunks + len(result.failures) == 3
    pages.assert_holds(range(result.chunks))


def test_closing_waits_for_a_sink_that_is_at_work_and_nothing_writes_afterwards():
    store, pages, gate = store_of(ScriptedBackend(stored_chunks(CHAIN))), Pages(3), Gate()
    pages.before_scatter = lambda layer, indices: gate.block()
    store.load(CHAIN, range(3), pages)
    gate.wait_arrivals()
    closed = in_another_thread(store.close)
    while not store._loop._closed:
        time.sleep(0.001)
    # Closing cancels whatever runs on the loop, this too.
    with contextlib.suppress(concurrent.futures.CancelledError, StoreClosedError):
        settle(store)
    assert not closed.done()
    gate.open()
    closed.result(PATIENCE_S)
    before = pages.snapshot()
    assert pages.snapshot() == before
    assert len(pages.scattered) == 1


@pytest.mark.parametrize("operation", ["lookup", "flush"])
def test_a_call_that_waits_when_the_store_closes_ends_as_promised(operation):
    # From another thread of the engine: an answer, or the error that says that the store was closed.
    backend, gate = ScriptedBackend(), Gate()
    backend.when("head", gate)
    backend.when("put", gate)
    store = store_of(backend)
    if operation == "lookup":
        waiting = in_another_thread(store.lookup, CHAIN)
    else:
        store.save(CHAIN, range(3), Pages(3, text="a"))
        waiting = in_another_thread(store.flush, 600.0)
    gate.wait_arrivals()
    settle(store)
    in_another_thread(store.close).result(PATIENCE_S)
    try:
        answer = waiting.result(PATIENCE_S)
    except StoreClosedError:
        return
    assert answer.chunks == 0 if isinstance(answer, LookupResult) else answer.chunks_left == 3


CALLS = {
    "lookup": lambda store: store.lookup(CHAIN),
    "load": lambda store: store.load(CHAIN, range(3), Pages(3)).wait(PATIENCE_S),
    "save": lambda store: store.save(CHAIN, range(3), Pages(3, text="a"), until=Durability.REMOTE).wait(
        PATIENCE_S
    ),
    "flush": lambda store: store.flush(600.0),
}


class LateCaller:
    """A thread whose call has seen the store open, and pauses before it comes to its work."""

    def __init__(self, store, call):
        self._check_open, self._submit = store._check_open, store._loop.submit
        self._loop = store._loop._loop
        self._checked, self._go_on = threading.Event(), threading.Event()
        self._submitted = asyncio.Event()
        self._thread = None
        store._check_open, store._loop.submit = self._check_and_pause, self._submit_and_tell
        self.outcome = in_another_thread(self._run, store, call)
        assert self._checked.wait(PATIENCE_S)

    def go_on(self):
        self._go_on.set()

    async def go_on_and_submit(self, _):
        """Called on the store's loop, when all that was under way has been cancelled."""
        self._go_on.set()
        # A store may also keep the caller waiting until it is closed; then there is nothing to wait for.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._submitted.wait(), 1)

    def _run(self, store, call):
        self._thread = threading.current_thread()
        try:
            return call(store)
        finally:
            self._tell()

    def _check_and_pause(self):
        self._check_open()
        if threading.current_thread() is self._thread:
            self._checked.set()
            assert self._go_on.wait(PATIENCE_S)

    def _submit_and_tell(self, coroutine):
        try:
            return self._submit(coroutine)
        finally:
            if threading.current_thread() is self._thread:
                self._tell()

    def _tell(self):
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._submitted.set)


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("moment", ["while it shuts down", "after it has shut down"])
def test_a_call_that_races_with_closing_ends_as_promised(operation, moment):
    backend, gate = ScriptedBackend(stored_chunks(CHAIN)), Gate()
    for request in ("get", "head", "put"):
        backend.when(request, gate)
    store = store_of(backend)
    caller = LateCaller(store, CALLS[operation])
    if moment == "while it shuts down":
        backend.when("close", caller.go_on_and_submit)
    closed = in_another_thread(store.close)
    try:
        closed.result(PATIENCE_S)
    finally:
        caller.go_on()
    # An answer that claims nothing, or the error that says that the store was closed.
    with contextlib.suppress(StoreClosedError):
        answer = caller.outcome.result(PATIENCE_S)
        if operation == "load":
            assert answer.chunks == 0
        elif operation == "save":
            assert set(answer.values()) == {SaveOutcome.FAILED}


def test_what_is_saved_while_the_store_closes_is_refused_or_reported():
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate)
    store = store_of(backend, close_timeout_s=0.3)
    store.save(CHAIN, range(1), Pages(3, text="a"))
    flush, flushing = store._parts.writes.flush, threading.Event()

    def tell(*arguments):
        async def run():
            task = asyncio.ensure_future(flush(*arguments))
            await asyncio.sleep(0)
            flushing.set()
            return await task

        return run()

    store._parts.writes.flush = tell
    closed = in_another_thread(store.close)
    assert flushing.wait(PATIENCE_S)
    accepted = 1
    with contextlib.suppress(StoreClosedError):
        store.save(CHAIN, range(1, 3), Pages(3, text="a"))
        accepted += 2
    assert closed.result(PATIENCE_S).chunks_left == accepted


def test_what_is_gathered_while_the_store_closes_is_refused_or_reported():
    backend, gate, gathering = ScriptedBackend(), Gate(), Gate()
    backend.when("put", gate)
    store, pages = store_of(backend, close_timeout_s=0.3), Pages(3, text="a")
    store.save(CHAIN, range(1), pages)
    flush, flushing = store._parts.writes.flush, threading.Event()

    async def tell(*arguments):
        flushing.set()
        return await flush(*arguments)

    store._parts.writes.flush = tell
    pages.before_gather = lambda index: gathering.block()
    saving = in_another_thread(store.save, CHAIN, range(1, 2), pages)
    gathering.wait_arrivals()
    closed = in_another_thread(store.close)
    assert flushing.wait(PATIENCE_S)
    gathering.open()
    accepted = 1
    with contextlib.suppress(StoreClosedError):
        saving.result(PATIENCE_S)
        accepted += 1
    assert closed.result(PATIENCE_S).chunks_left == accepted


def test_closing_ends_every_thread_of_the_store():
    before = set(threading.enumerate())
    store = store_of(ScriptedBackend(stored_chunks(CHAIN)))
    store.load(CHAIN, range(3), Pages(3)).wait(PATIENCE_S)
    assert set(threading.enumerate()) > before
    store.close()
    assert not set(threading.enumerate()) - before


def test_a_store_refused_for_its_settings_leaves_no_thread_behind():
    before = set(threading.enumerate())
    for _ in range(3):
        with pytest.raises(Exception, match="KVSTORE_MEMORY_BYTES"):
            store_of(ScriptedBackend(), memory_bytes=1)
    assert not set(threading.enumerate()) - before
