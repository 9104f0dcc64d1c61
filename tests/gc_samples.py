"""Random prefix trees as columns, and what must hold of any plan for them."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

import numpy as np

from kvstore.gc.chunks import Chunks

NOW_S = 1_800_000_000.0
DAY_S = 86_400.0


def hash_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def random_chunks(seed: int, count: int = 60, *, holes: float = 0.1, unknown: float = 0.0) -> Chunks:
    """Trees of several tenants in two namespaces of two shards, some of their chunks missing."""
    source = random.Random(seed)
    rows: list[dict[str, object]] = []
    placed: list[tuple[int, int, bytes, int]] = []
    for number in range(count):
        place = source.choice(placed) if placed and source.random() < 0.8 else None
        namespace, shard = source.randrange(2), source.randrange(2)
        parent, depth = hash_of(f"tenant {source.randrange(3)} {namespace}"), 0
        if place is not None:
            namespace, shard, parent, depth = place[0], place[1], place[2], place[3] + 1
        own = hash_of(f"{seed} {number}")
        placed.append((namespace, shard, own, depth))
        if source.random() < holes:
            continue
        stored_s = NOW_S - source.uniform(0, 30 * DAY_S)
        rows.append(
            {
                "namespace": namespace,
                "shard": shard,
                "hash": own,
                "parent": parent,
                "parent_known": source.random() >= unknown,
                "depth": depth,
                "tokens": 256,
                "object_bytes": source.randrange(1, 1000),
                "stored_s": stored_s,
                "touched_s": source.uniform(stored_s, NOW_S),
                "touches": source.randrange(5),
                "pinned": source.random() < 0.05,
            }
        )
    return chunks_of(rows)


def chunks_of(rows: list[dict[str, object]]) -> Chunks:
    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype)

    def hashes(name: str) -> np.ndarray:
        return np.frombuffer(b"".join(row[name] for row in rows), np.uint8).reshape(-1, 32)

    return Chunks(
        namespace=column("namespace", np.int32),
        shard=column("shard", np.int32),
        hash=hashes("hash"),
        parent=hashes("parent"),
        parent_known=column("parent_known", np.bool_),
        depth=column("depth", np.int32),
        tokens=column("tokens", np.int32),
        object_bytes=column("object_bytes", np.int64),
        stored_s=column("stored_s", np.float64),
        touched_s=column("touched_s", np.float64),
        touches=column("touches", np.int32),
        pinned=column("pinned", np.bool_),
    )


def shuffled(chunks: Chunks, seed: int) -> tuple[Chunks, np.ndarray]:
    """The same rows in another order, and where each came from."""
    order = np.random.default_rng(seed).permutation(len(chunks))
    return replace(chunks, **{name: getattr(chunks, name)[order] for name in vars(chunks)}), order


def names_of(chunks: Chunks, rows: np.ndarray) -> set[tuple[int, int, bytes]]:
    return {(int(chunks.namespace[i]), int(chunks.shard[i]), chunks.hash[i].tobytes()) for i in rows}


def children_of(chunks: Chunks) -> dict[int, list[int]]:
    """By row the rows of the chunks that say they continue it."""
    forest = chunks.forest().tolist()
    rows = {(forest[i], chunks.hash[i].tobytes()): i for i in range(len(chunks))}
    children: dict[int, list[int]] = {}
    for i in range(len(chunks)):
        parent = rows.get((forest[i], chunks.parent[i].tobytes()))
        if parent is not None:
            children.setdefault(parent, []).append(i)
    return children
