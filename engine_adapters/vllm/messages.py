"""What the scheduler's side tells the workers of a step, and what they tell it back.

Both are pickled between processes each step: hashes instead of keys, no tokens, no objects of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvstore.keys import ChunkKey, PrefixChain
from kvstore.namespace import Namespace

_HASH_BYTES = 32
Key = TypeVar("Key", int, str)


@dataclass(frozen=True)
class Variant:
    """What sets a request's namespace apart from the engine's own.

    lora        names the LoRA adapter, empty for none
    generation  how often, and when, the engine's cache was reset; empty for never
    """

    lora: str = ""
    generation: str = ""


@dataclass(frozen=True)
class ChunkRun:
    """Keys of consecutive chunks of one chain.

    depth   of the first chunk
    parent  hash of the one before it
    hashes  of the chunks, 32 bytes each
    """

    variant: Variant
    depth: int
    parent: bytes
    hashes: bytes

    @classmethod
    def of(cls, keys: Sequence[ChunkKey], variant: Variant) -> ChunkRun:
        """The run of `keys`, of which there is at least one."""
        return cls(variant, keys[0].depth, keys[0].parent, b"".join(key.hash for key in keys))

    def __len__(self) -> int:
        return len(self.hashes) // _HASH_BYTES

    def chain(self, namespace: Namespace) -> PrefixChain:
        """The keys again, as a chain that begins with the run's first chunk."""
        keys, parent = [], self.parent
        for index in range(len(self)):
            own = self.hashes[index * _HASH_BYTES : (index + 1) * _HASH_BYTES]
            keys.append(ChunkKey(namespace.digest, own, parent, self.depth + index))
            parent = own
        return PrefixChain(namespace, tuple(keys))


@dataclass(frozen=True)
class LoadOrder:
    """Load chunks into blocks of the engine. `serial` is the order's own.

    run          None: the load could not be planned, and is to be reported as failed
    block_ids    the blocks to fill, in token order
    first_block  which block of the run's first chunk `block_ids` begins with: those before it hold
                 their KV already, and are not to be touched
    awaited      whether the step itself waits for it; otherwise it goes on across steps
    new_tokens   tokens of the request that the first step behind it computes, at most
    """

    serial: int
    request_id: str
    run: ChunkRun | None
    block_ids: tuple[int, ...]
    first_block: int
    awaited: bool
    new_tokens: int


@dataclass(frozen=True)
class SaveOrder:
    """Save chunks that are whole in `block_ids`, computed in earlier steps. `serial` is the order's own."""

    serial: int
    request_id: str
    run: ChunkRun
    block_ids: tuple[int, ...]


@dataclass
class StepOrders(KVConnectorMetadata):
    """Everything the workers have to do about one step.

    tokens        how many the step computes
    preempted     requests whose blocks others may use from this step on; their saves come first
    finished      requests that are over
    held          those of them whose blocks the engine keeps until they are reported
    released      requests that may compute on a load that has not ended on some worker
    failed_loads  requests with a load that fell short on some worker: the engine computes in its blocks,
                  or gives them to others, once every worker has told of theirs
    """

    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    preempted: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    released: tuple[str, ...] = ()
    failed_loads: tuple[str, ...] = ()
    tokens: int = 0


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What came of orders since the last report, of one worker or of several.

    gathered  by serial of a save order: how many workers are done with its blocks
    taken     and how many of them took every chunk of it for upload
    uploaded  by serial of a save order: how many workers know what became of its uploads
    stored    and how many of its leading chunks all of those have in the bucket
    ended     by request: how many workers' loads have ended
    failed    by request: the first chunk of the load's run that some worker could not load
    """

    gathered: dict[int, int] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    uploaded: dict[int, int] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.gathered or self.uploaded or self.ended or self.failed)

    def aggregate(self, other: WorkerReport) -> WorkerReport:
        """Both reports in one."""
        return WorkerReport(
            gathered=_sum(self.gathered, other.gathered),
            taken=_sum(self.taken, other.taken),
            uploaded=_sum(self.uploaded, other.uploaded),
            stored=_least(self.stored, other.stored),
            ended=_sum(self.ended, other.ended),
            failed=_least(self.failed, other.failed),
        )


def _least(one: dict[Key, int], other: dict[Key, int]) -> dict[Key, int]:
    return {key: min(each[key] for each in (one, other) if key in each) for key in one | other}


def _sum(one: dict[Key, int], other: dict[Key, int]) -> dict[Key, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in one | other}
