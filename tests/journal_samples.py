"""Stores with a journal, for tests: backends that are down, saves, and what lies in the journal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from samples import FORM, PATIENCE_S, Gate, Pages, ScriptedBackend, chain_of, store_of

from kvstore.handles import Durability, SaveHandle, SaveOutcome
from kvstore.keys import PrefixChain
from kvstore.layout import ChunkForm, KVLayout
from kvstore.store import KVStore

ONE = chain_of(1)
STORED, PRESENT, QUEUED, JOURNALED, FAILED = (
    SaveOutcome.STORED,
    SaveOutcome.PRESENT,
    SaveOutcome.QUEUED,
    SaveOutcome.JOURNALED,
    SaveOutcome.FAILED,
)


def down() -> tuple[ScriptedBackend, Gate]:
    """A backend that answers no PUT until its gate is opened."""
    backend, gate = ScriptedBackend(), Gate()
    backend.when("put", gate)
    return backend, gate


def save(store: KVStore, until: Durability, chain: PrefixChain = ONE, form: ChunkForm = FORM) -> SaveHandle:
    return store.save(chain, range(len(chain)), Pages(len(chain), form, "a"), until=until)


def pending(root: Path) -> list[Path]:
    return sorted((root / "pending").glob("*/*/*.0-*"))


def occupy_the_only_place(store: KVStore, backend: ScriptedBackend) -> None:
    save(store, Durability.QUEUED, chain_of(1, first_token=50_000))
    wait_until(lambda: backend.count("put") > 0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def leave_in_journal(root: Path, chain: PrefixChain = ONE, layout: KVLayout = FORM.layout) -> None:
    """As a process that died before it could upload."""
    form = ChunkForm(layout, layout.whole)
    with store_of(down()[0], layout, disk_dir=str(root), memory_bytes=64 * form.raw_bytes) as store:
        assert set(save(store, Durability.JOURNALED, chain, form).wait(PATIENCE_S).values()) == {JOURNALED}
