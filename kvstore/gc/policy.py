"""What a garbage collection is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

HALF_LIFE_S = 7 * 86_400.0
# Nodes tell of a use ten minutes after another at the latest, and sweeps take their time.
GRACE_S_MIN = 1800.0


class Reason(IntEnum):
    """Why a chunk goes. Of several reasons the first counts."""

    STAYS = 0
    ORPHAN = 1
    AGE = 2
    IDLE = 3
    TENANT_BYTES = 4
    NAMESPACE_BYTES = 5
    BUCKET_BYTES = 6


REASON_WORDS = {
    Reason.ORPHAN: "a chunk before it is missing, so nobody can use it",
    Reason.AGE: "it and all that continue it were stored too long ago (KVSTORE_GC_MAX_AGE)",
    Reason.IDLE: "it and all that continue it were not used for too long (KVSTORE_GC_MAX_IDLE)",
    Reason.TENANT_BYTES: "its tenant has too much (KVSTORE_GC_MAX_TENANT_BYTES)",
    Reason.NAMESPACE_BYTES: "its namespace has too much (KVSTORE_GC_MAX_NAMESPACE_BYTES)",
    Reason.BUCKET_BYTES: "the bucket has too much (KVSTORE_GC_MAX_BYTES)",
}


@dataclass(frozen=True)
class Policy:
    """Limits that combine: each is judged by itself, and what any of them lets go goes.

    So what goes can only grow when a limit is tightened or added. None: no such limit. Orphans,
    chunks behind one that is missing, always go.

    max_bytes            of all namespaces together
    max_namespace_bytes  of each namespace
    max_tenant_bytes     of each tenant salt in a namespace
    max_age_s            since a chunk was stored, and all that continue it were
    max_idle_s           since a chunk was used, and all that continue it were
    grace_s              what was stored or used so lately stays, whatever the limits say
    max_share            of objects, and of bytes, that go in one run at most
    half_life_s          a chunk not used for so long is worth half of one used now
    """

    max_bytes: int | None = None
    max_namespace_bytes: int | None = None
    max_tenant_bytes: int | None = None
    max_age_s: float | None = None
    max_idle_s: float | None = None
    grace_s: float = 6 * 3600.0
    max_share: float = 1.0
    half_life_s: float = HALF_LIFE_S
