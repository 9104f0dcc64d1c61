"""A bucket that real stores filled, with several codecs and ranks, and faults of every kind for it."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import cache

import number_samples
from chunk_samples import raw_chunk, tiny_keys, tiny_namespace
from samples import PATIENCE_S, PREFIX, ScriptedBackend, chain_of, store_of, stored_chunks

from kvstore.backends.contract import Backend
from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.chunk import decode_header, encode_header
from kvstore.gc.pace import Pace
from kvstore.keys import ChunkKey, ObjectName, chunk_name, namespace_document_name, parse_object_name
from kvstore.layout import Shard
from kvstore.retries import Retries
from kvstore.upkeep.findings import Finding, Kind
from kvstore.upkeep.sample import Sample
from kvstore.upkeep.verifier import Scope, Verifier

CHUNKS = 6
CODECS = ("none", "lz4", "zstd", "planes+zstd")
RANKS = (Shard(0, 1), Shard(1, 2))
RANKED = tiny_namespace("of two ranks")
BARE = tiny_namespace("whose document is gone")
SPOILT = tiny_namespace("whose document is damaged")
ALL = Sample(1)

Told = set[tuple[Kind, str]]
Objects = dict[str, bytes]
Injection = Callable[["Faults"], Told]


@cache
def intact() -> Objects:
    """Chains of each lossless codec and of int8, one of two ranks, and namespaces to lose their documents."""
    objects: Objects = {}
    for number, codec in enumerate(3 * CODECS):
        chain = chain_of(CHUNKS, first_token=10_000 * number)
        objects |= {name: found.data for name, found in stored_chunks(chain, codec=codec).items()}
        objects[namespace_document_name(PREFIX, chain.namespace.name)] = chain.namespace.document()
    objects |= _rounded()
    for key in _ranked_keys():
        for rank in RANKS:
            name = chunk_name(PREFIX, ObjectName(RANKED.name, key.hash, rank))
            objects[name] = raw_chunk(RANKED, key, rank)
    for namespace in (BARE, SPOILT):
        for key in tiny_keys(namespace, 2):
            name = chunk_name(PREFIX, ObjectName(namespace.name, key.hash, namespace.layout.whole))
            objects[name] = raw_chunk(namespace, key)
    for namespace in (RANKED, BARE, SPOILT):
        objects[namespace_document_name(PREFIX, namespace.name)] = namespace.document()
    return objects


def _ranked_keys() -> list[ChunkKey]:
    return [key for first in (0, 10_000, 20_000) for key in tiny_keys(RANKED, CHUNKS, first_token=first)]


def _rounded() -> Objects:
    backend = ScriptedBackend()
    settings = {"codec": "int8+zstd", "memory_bytes": 1 << 22, "close_timeout_s": PATIENCE_S}
    with store_of(backend, number_samples.LAYOUT, **settings) as store:
        chain = number_samples.chain_of(store.fidelity, CHUNKS)
        number_samples.save(store, number_samples.Numbers(CHUNKS), chain)
    return {name: found.data for name, found in backend.objects.items() if name.startswith(f"{PREFIX}/v1/")}


def chain_names(objects: Objects) -> list[list[str]]:
    """Names of the chunks of each chain and rank, in its order."""
    chains: dict[tuple[object, ...], list[tuple[int, str]]] = {}
    firsts: dict[tuple[object, ...], bytes] = {}
    placed = []
    for name, data in objects.items():
        if parse_object_name(PREFIX, name) is not None:
            header = decode_header(data)
            placed.append((header.depth, name, header))
    for depth, name, header in sorted(placed, key=lambda each: each[:2]):
        place = header.namespace_digest, header.shard
        first = header.hash if depth == 0 else firsts[*place, header.parent]
        firsts[*place, header.hash] = first
        chains.setdefault((*place, first), []).append((depth, name))
    return [[name for _, name in chain] for chain in chains.values()]


class Faults:
    """Puts faults into objects, and no two where they would be a third one, or hide each other."""

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)
        self.objects = dict(intact())
        self._chains = [names for names in chain_names(self.objects) if len(names) == CHUNKS]
        self._fresh = [name for names in self._chains for name in names]
        self.source.shuffle(self._fresh)

    def take(self) -> str:
        """The name of a chunk with no fault yet."""
        return self._fresh.pop()

    def take_chain(self, *, ranked: bool) -> list[str]:
        """The names of a chain none of whose chunks has a fault yet, nor will."""
        whole = [
            names
            for names in self._chains
            if set(names) <= set(self._fresh) and (RANKED.name in names[0]) == ranked
        ]
        names = self.source.choice(whole)
        # With those of the other rank: a chunk that no rank can read is lacking in none.
        chunks = {name.rpartition(".")[0] for name in names}
        self._fresh = [name for name in self._fresh if name.rpartition(".")[0] not in chunks]
        return names

    def change(self, name: str, kind: Kind, change: Callable[[bytes], bytes]) -> Told:
        """Change an object's bytes."""
        self.objects[name] = change(self.objects[name])
        return {(kind, name)}

    def flip(self, data: bytes, start: int, stop: int) -> bytes:
        """Flip a bit of one of these bytes."""
        at = self.source.randrange(start, stop)
        return data[:at] + bytes([data[at] ^ 1 << self.source.randrange(8)]) + data[at + 1 :]

    def sections_at(self, data: bytes) -> int:
        return decode_header(data).extents[0].start


def damage_header(faults: Faults) -> Told:
    # Not the version: that would be an object of a later one.
    return faults.change(
        faults.take(),
        Kind.DAMAGED_HEADER,
        lambda data: faults.flip(data, 12, faults.sections_at(data)),
    )


def damage_section(faults: Faults) -> Told:
    return faults.change(
        faults.take(),
        Kind.DAMAGED_SECTION,
        lambda data: faults.flip(data, faults.sections_at(data), len(data)),
    )


def truncate(faults: Faults) -> Told:
    return faults.change(
        faults.take(), Kind.TRUNCATED, lambda data: data[: faults.source.randrange(len(data))]
    )


def extend(faults: Faults) -> Told:
    return faults.change(faults.take(), Kind.EXTENDED, lambda data: data + b"\0")


def swap(faults: Faults) -> Told:
    name = faults.take()
    others = [other for other in intact() if other.endswith(name[-4:]) and other != name]
    return faults.change(name, Kind.MISPLACED, lambda _: intact()[faults.source.choice(others)])


def copy_to(faults: Faults, change: Callable[[ObjectName], str]) -> Told:
    """Copy a chunk to a name that is not its own; the chunk itself stays."""
    name = faults.take()
    parts = parse_object_name(PREFIX, name)
    assert parts is not None
    copied = change(parts)
    faults.objects[copied] = faults.objects[name]
    return {(Kind.MISPLACED, copied)}


def copy_to_namespace(faults: Faults) -> Told:
    return copy_to(faults, lambda parts: chunk_name(PREFIX, parts._replace(namespace_name=SPOILT.name)))


def copy_to_shard(faults: Faults) -> Told:
    return copy_to(faults, lambda parts: chunk_name(PREFIX, parts._replace(shard=Shard(5, 7))))


def copy_to_fan(faults: Faults) -> Told:
    def another(parts: ObjectName) -> str:
        folder, _, file = chunk_name(PREFIX, parts).rpartition("/")
        return f"{folder[:-2]}{int(folder[-2:], 16) ^ 1:02x}/{file}"

    return copy_to(faults, another)


def deform(faults: Faults) -> Told:
    name = next(each for each in faults.take_chain(ranked=True))
    parts = parse_object_name(PREFIX, name)
    assert parts is not None
    key = next(key for key in _ranked_keys() if key.hash == parts.hash)
    other = dataclasses.replace(RANKED, layout=dataclasses.replace(RANKED.layout, layers=2))
    return faults.change(name, Kind.WRONG_FORM, lambda _: raw_chunk(other, key, parts.shard))


def contradict(faults: Faults) -> Told:
    def deeper(data: bytes) -> bytes:
        header = decode_header(data)
        wrong = dataclasses.replace(header, depth=header.depth + 1)
        return encode_header(wrong) + data[header.extents[0].start :]

    # Of the last one, as it also contradicts whatever continues it.
    return faults.change(faults.take_chain(ranked=False)[-1], Kind.WRONG_DEPTH, deeper)


def tear_hole(faults: Faults) -> Told:
    names = faults.take_chain(ranked=False)
    hole = faults.source.randrange(CHUNKS - 1)
    del faults.objects[names[hole]]
    return {(Kind.UNREACHABLE, name) for name in names[hole + 1 :]}


def lose_rank(faults: Faults) -> Told:
    name = faults.take_chain(ranked=True)[-1]
    del faults.objects[name]
    return {(Kind.INCOMPLETE, name)}


def lose_document(faults: Faults) -> Told:
    name = namespace_document_name(PREFIX, BARE.name)
    del faults.objects[name]
    return {(Kind.NO_DOCUMENT, name)}


def damage_document(faults: Faults) -> Told:
    name = namespace_document_name(PREFIX, SPOILT.name)
    return faults.change(name, Kind.DAMAGED_DOCUMENT, lambda data: data[:-5])


def add_foreign(faults: Faults) -> Told:
    places = ("README", f"{RANKED.name}/notes", f"{RANKED.name}/00/notes", f"{RANKED.name}/zz/0-1", "zz/x")
    name = f"{PREFIX}/v1/{faults.source.choice(places)}.{faults.source.randrange(1 << 30)}"
    faults.objects[name] = b"x" * faults.source.randrange(9)
    return {(Kind.FOREIGN, name)}


def come_from_the_future(faults: Faults) -> Told:
    return faults.change(
        faults.take_chain(ranked=False)[-1], Kind.NEWER_VERSION, lambda data: data[:8] + b"\2" + data[9:]
    )


EVERY: Sequence[Injection] = (
    # Those that want a whole chain come first.
    deform,
    lose_rank,
    tear_hole,
    contradict,
    come_from_the_future,
    lose_document,
    damage_document,
    add_foreign,
    copy_to_namespace,
    copy_to_shard,
    copy_to_fan,
    swap,
    extend,
    truncate,
    damage_section,
    damage_header,
)


def with_faults(seed: int, injections: Sequence[Injection] = EVERY) -> tuple[Objects, Told]:
    """The bucket with these faults, and what is to be told of it."""
    faults = Faults(seed)
    told: Told = set()
    for inject in injections:
        told |= inject(faults)
    return faults.objects, told


async def verify(
    backend: Backend,
    *,
    only: str = "",
    sample: Sample = ALL,
    headers_only: bool = False,
    repair: bool = False,
) -> list[Finding]:
    """What a check of the bucket finds."""
    found: list[Finding] = []
    scope = Scope(only, sample, headers_only, repair)
    await Verifier(backend, PREFIX, Pace(100_000, 8, Retries()), scope, found.append).run()
    return found


def stored(objects: Objects, modified_s: float = 0.0) -> dict[str, StoredObject]:
    """Objects as a MemoryBackend keeps them."""
    return {name: StoredObject(data, f"{hash(data):x}", modified_s) for name, data in objects.items()}


def told_of(objects: Objects, **options: object) -> list[tuple[Kind, str]]:
    """Kinds and names that a check of these objects tells."""
    found = asyncio.run(verify(MemoryBackend(stored(objects)), **options))
    return [(finding.kind, finding.name) for finding in found]
