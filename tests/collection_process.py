"""Engines and collectors as processes, which live sixty times as fast as in earnest.

`python -m collection_process node FILE SEED` serves prompts with a store of its own, and
`python -m collection_process collector FILE SEED` runs `kvstore gc --apply` again and again, both on
the bucket that the environment names, until there is a FILE. A node writes a JSON line of what it did
for each prompt; it fails where the store lied, or lost what was stored or used a moment ago.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from node_process import Prompt, content
from samples import FORM, LAYOUT, Pages

import kvstore.setting_types
from kvstore.cli.main import app
from kvstore.gc import collector, lease, pins, watch
from kvstore.handles import Durability, SaveOutcome
from kvstore.keys import ChunkKey, object_name
from kvstore.store import KVStore

HURRY = 60.0
GRACE_S = 18.0
PROMPTS = [Prompt(tenant, branch, 6) for tenant in ("", "other") for branch in range(10)]
# As the bucket holds about a hundred of them, and a collection is to have something to do.
LIMIT_BYTES = 10 * FORM.raw_bytes
# The store's clock shows whole seconds, and a request takes its time.
SLACK_S = 2.0


def hurry() -> None:
    """Let a minute of the protocol between nodes and collectors be a second."""
    kvstore.setting_types.GRACE_S_MIN = 1.0
    for module in (watch, collector, lease, pins):
        for name in (
            "WATCH_S",
            "STALE_S",
            "SETTLE_S",
            "SWEEP_S",
            "RETELL_S",
            "RETRY_S",
            "LEASE_S",
            "MARGIN_S",
        ):
            if hasattr(module, name):
                setattr(module, name, getattr(module, name) / HURRY)
    # What a killed collector holds is free again while the test goes on.
    lease.LEASE_S = 2 * lease.MARGIN_S


class Node:
    """One engine: it loads what is there of a prompt, compares it, and saves the whole."""

    def __init__(self, store: KVStore, source: random.Random) -> None:
        self._store = store
        self._source = source
        self._safe_until_s: dict[ChunkKey, float] = {}
        self.did: Counter[str] = Counter()

    def serve(self, prompt: Prompt) -> None:
        chain = prompt.chain
        # Its memory would answer everything soon.
        self._store._parts.memory.clear()
        found = self._store.lookup(chain).chunks
        pages = Pages(len(chain))
        loaded = self._store.load(chain, range(found), pages).wait().chunks
        for index in range(loaded):
            for layer in range(FORM.layers):
                assert pages.read(index, layer) == content(chain.keys[index], layer, ""), "wrong bytes"
        self.did.update(loaded=loaded, missed=len(chain) - loaded)
        # Of several uses the first is told.
        self._note_safe(chain.keys[:loaded], GRACE_S - watch.RETELL_S)
        self._check_kept()
        time.sleep(self._source.uniform(0, 0.3))
        for index, key in enumerate(chain.keys):
            for layer in range(FORM.layers):
                pages._section(index, layer)[:] = content(key, layer, "")
        outcomes = self._store.save(chain, range(len(chain)), pages, until=Durability.REMOTE).wait()
        self.did.update(outcome.value for outcome in outcomes.values())
        stored = [chain.keys[at] for at, outcome in outcomes.items() if outcome is SaveOutcome.STORED]
        self._note_safe(stored, GRACE_S)

    def _note_safe(self, keys: Sequence[ChunkKey], seconds: float) -> None:
        until_s = time.monotonic() + seconds - SLACK_S
        self._safe_until_s |= {key: max(until_s, self._safe_until_s.get(key, 0.0)) for key in keys}

    def _check_kept(self) -> None:
        """What this node stored or used within the grace must be there."""
        for key in self._safe_until_s:
            name = object_name(os.environ["KVSTORE_PREFIX"], key, FORM.shard)
            there = self._store._loop.run(self._store._parts.backend.head(name)) is not None
            assert there or time.monotonic() >= self._safe_until_s[key], f"{key} was lost"
            self.did["checked"] += 1
        now_s = time.monotonic()
        self._safe_until_s = {key: until_s for key, until_s in self._safe_until_s.items() if now_s < until_s}


def run_node(stop: Path, seed: int) -> None:
    source = random.Random(seed)
    with KVStore.open(LAYOUT) as store:
        store.wait_connected(timeout_s=60)
        node = Node(store, source)
        while not stop.exists():
            # What users ask for changes, so that something gets old.
            hour = int(time.time() / GRACE_S)
            fashion = random.Random(hour).sample(PROMPTS, 3)
            prompt = source.choice(PROMPTS if source.random() < 0.2 else fashion)
            node.serve(prompt._replace(chunks=source.randint(1, prompt.chunks)))
            sys.stdout.write(json.dumps(node.did) + "\n")
            sys.stdout.flush()
            node.did.clear()
            time.sleep(source.expovariate(2))


def run_collector(stop: Path, seed: int) -> None:
    source = random.Random(seed)
    command = ["gc", "--apply", "--force", "--json", "--set", f"gc_grace={GRACE_S:g}s"]
    command += ["--max-bytes", f"{LIMIT_BYTES}B", "--max-idle", f"{1.5 * GRACE_S:g}s"]
    while not stop.exists():
        code = app(command, standalone_mode=False)
        assert code in {0, 1}, code
        sys.stdout.flush()
        time.sleep(source.uniform(0, 2))


def main(arguments: Sequence[str]) -> None:
    role, stop, seed = arguments
    hurry()
    {"node": run_node, "collector": run_collector}[role](Path(stop), int(seed))


if __name__ == "__main__":
    main(sys.argv[1:])
