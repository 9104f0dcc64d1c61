"""Whose a chunk is: tenants by the roots of their prefixes, which are hashes of namespace and salt."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvstore.gc.chunks import HASH_BYTES, NONE, Chunks, Int32s
from kvstore.gc.forest import Forest


class Tenants(NamedTuple):
    """Tenants by number.

    of_row  the tenant of each row, NONE where it cannot be known
    roots   of each tenant
    """

    of_row: Int32s
    roots: list[bytes]

    @classmethod
    def of(cls, chunks: Chunks, forest: Forest, tops: Int32s) -> Tenants:
        """Tell tenants apart by the parents of first chunks. `tops`: see Forest.tops."""
        first = np.unique(tops)
        first = first[(chunks.depth[first] == 0) & ~forest.doubtful[first]]
        parents = np.ascontiguousarray(chunks.parent[first]).view(f"V{HASH_BYTES}").ravel()
        roots, numbers = np.unique(parents, return_inverse=True)
        tenant = np.full(len(chunks), NONE, np.int32)
        tenant[first] = numbers
        return cls(tenant[tops], [root.tobytes() for root in roots])
