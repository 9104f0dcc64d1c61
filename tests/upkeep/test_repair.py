"""What a repair moves, what it leaves, and that it does no harm beside engines and collections."""

import asyncio
import dataclasses

import pytest
from fsck_samples import (
    EVERY,
    PREFIX,
    chain_names,
    intact,
    stored,
    told_of,
    verify,
    with_faults,
)

from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.errors import MisconfiguredError, RetryableError
from kvstore.upkeep import namespace_check, verifier
from kvstore.upkeep.findings import MOVED, Kind
from kvstore.upkeep.quarantine import Quarantine, quarantine_folder
from kvstore.upkeep.sample import Sample

CHAIN = next(names for names in chain_names(intact()) if names[0].endswith(".0-3"))
NAME = CHAIN[2]
QUARANTINE = quarantine_folder(PREFIX)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def repair(backend: MemoryBackend):
    return asyncio.run(verify(backend, repair=True))


def test_without_repair_nothing_changes():
    objects, _ = with_faults(1)
    found = stored(objects)
    asyncio.run(verify(MemoryBackend(found)))
    assert {name: each.data for name, each in found.items()} == objects


@pytest.mark.parametrize("seed", range(5))
def test_a_repair_moves_what_readers_refuse_and_nothing_else(seed):
    objects, told = with_faults(seed, EVERY)
    found = stored(objects)
    findings = repair(MemoryBackend(found))
    assert sorted((each.kind, each.name) for each in findings) == sorted(told)
    moved = {name for kind, name in told if kind in MOVED}
    assert {each.name for each in findings if each.outcome.startswith("moved to ")} == moved
    left = {name: each.data for name, each in found.items() if not name.startswith(QUARANTINE)}
    assert left == {name: data for name, data in objects.items() if name not in moved}
    copies = sorted(each.data for name, each in found.items() if name.startswith(QUARANTINE))
    assert copies == sorted(objects[name] for name in moved)


def test_what_was_moved_is_told_as_such_from_then_on():
    found = stored(intact() | {NAME: flipped(intact()[NAME])})
    repair(MemoryBackend(found))
    told = sorted((each.kind, each.name) for each in asyncio.run(verify(MemoryBackend(found))))
    holes = [(Kind.UNREACHABLE, name) for name in CHAIN[3:]]
    copy = next(name for name in found if name.startswith(QUARANTINE))
    assert told == sorted([*holes, (Kind.QUARANTINED, copy)])
    # Saved again, as by the next engine that computes it.
    asyncio.run(MemoryBackend(found).put(NAME, [intact()[NAME]], if_absent=True))
    assert [each.kind for each in asyncio.run(verify(MemoryBackend(found)))] == [Kind.QUARANTINED]


class Meddling(MemoryBackend):
    """Lets somebody do something right before the first call of an operation on a name."""

    def __init__(self, objects, operation, name, meddle):
        super().__init__(objects)
        self._when, self._meddle = (operation, name), meddle

    def _come(self, operation, name):
        if (operation, name) == self._when:
            self._when = None
            self._meddle()

    async def read_into(self, name, offset, out, *, if_match=None):
        self._come("read" if offset else "read header", name)
        return await super().read_into(name, offset, out, if_match=if_match)

    async def head(self, name):
        self._come("head", name)
        return await super().head(name)

    async def put(self, name, parts, *, if_absent):
        self._come("put", name)
        return await super().put(name, parts, if_absent=if_absent)


def place_of(etag: str) -> str:
    return Quarantine(MemoryBackend(), PREFIX).place_of(NAME, etag)


@pytest.mark.parametrize("operation", ["read header", "read", "head", "put"])
def test_what_an_engine_replaces_meanwhile_is_not_moved(operation):
    found = stored(intact() | {NAME: flipped(intact()[NAME])})
    whole = StoredObject(intact()[NAME], "whole", 0.0)
    name = place_of(found[NAME].etag) if operation == "put" else NAME
    findings = repair(Meddling(found, operation, name, lambda: found.update({NAME: whole})))
    assert found[NAME] == whole
    assert [each.name for each in findings if each.outcome.startswith("moved")] == []


def test_what_is_removed_while_it_is_read_is_no_finding():
    found = stored(intact())
    last = CHAIN[-1]
    assert asyncio.run(verify(Meddling(found, "read", last, lambda: found.pop(last)))) == []


def test_nothing_is_removed_where_its_copy_cannot_be_written():
    class Full(MemoryBackend):
        async def put(self, name, parts, *, if_absent):
            raise RetryableError("no room today")

    found = stored(intact() | {NAME: flipped(intact()[NAME])})
    [finding] = repair(Full(found))
    assert finding.outcome == "left: no room today"
    assert NAME in found


def test_nothing_is_removed_where_its_copy_reads_back_differently():
    found = stored(intact() | {NAME: flipped(intact()[NAME])})
    place = place_of(found[NAME].etag)
    found[place] = StoredObject(b"another", "x", 0.0)
    finding = repair(MemoryBackend(found))[-1]
    assert finding.outcome == f"left: what is in {place} is another object; remove it"
    assert NAME in found


def test_a_repair_goes_on_where_one_was_interrupted():
    found = stored(intact() | {NAME: flipped(intact()[NAME])})
    place = place_of(found[NAME].etag)
    found[place] = StoredObject(found[NAME].data, "copy", 0.0)
    assert repair(MemoryBackend(found))[-1].outcome == f"moved to {place}"
    assert NAME not in found


def test_what_was_damaged_on_its_way_alone_is_not_moved():
    class Noisy(MemoryBackend):
        async def read_into(self, name, offset, out, *, if_match=None):
            answer = await super().read_into(name, offset, out, if_match=if_match)
            if name == NAME and offset and not noise:
                noise.append(name)
                out[0] ^= 1
            return answer

    noise: list[str] = []
    found = stored(intact())
    [finding] = repair(Noisy(found))
    assert (finding.kind, finding.outcome) == (
        Kind.DAMAGED_SECTION,
        "left: read once more, it is whole",
    )
    assert NAME in found


def test_a_later_version_is_left_alone():
    newer = intact()[NAME][:8] + b"\2" + intact()[NAME][9:]
    found = stored(intact() | {NAME: newer})
    findings = repair(MemoryBackend(found))
    assert [(each.kind, each.outcome, each.is_fault) for each in findings] == [
        (Kind.NEWER_VERSION, "", False)
    ]
    assert found[NAME].data == newer


def test_what_is_being_stored_has_no_holes_yet():
    objects = dict(intact())
    del objects[CHAIN[1]]
    found = stored(objects, modified_s=0.0)
    now_s = asyncio.run(MemoryBackend().clock_s())
    for name in CHAIN[2:]:
        found[name] = dataclasses.replace(found[name], modified_s=now_s)
    assert asyncio.run(verify(MemoryBackend(found))) == []


@pytest.mark.parametrize("saved", [True, False])
def test_a_hole_that_closes_meanwhile_is_none(monkeypatch, saved):
    objects = dict(intact())
    data = objects.pop(CHAIN[1])
    found = stored(objects)
    meddle = (lambda: found.update(stored({CHAIN[1]: data}))) if saved else (lambda: found.pop(CHAIN[2]))
    # The hole is looked at again once more: it has closed, or a collection has removed what is behind it.
    assert asyncio.run(verify(Meddling(found, "head", CHAIN[1], meddle))) == []


def test_a_document_that_is_written_meanwhile_is_not_missing():
    objects = dict(intact())
    name = next(name for name in objects if name.endswith(".json"))
    data = objects.pop(name)
    found = stored(objects)
    backend = Meddling(found, "head", name, lambda: found.update(stored({name: data})))
    assert asyncio.run(verify(backend)) == []


def test_an_object_that_cannot_be_read_is_a_fault_and_others_are_checked():
    class Unreadable(MemoryBackend):
        async def read_into(self, name, offset, out, *, if_match=None):
            if name == NAME:
                raise RetryableError("the disk is on fire")
            return await super().read_into(name, offset, out, if_match=if_match)

    found = stored(intact() | {CHAIN[4]: flipped(intact()[CHAIN[4]])})
    findings = asyncio.run(verify(Unreadable(found)))
    assert sorted((each.kind, each.name) for each in findings) == [
        (Kind.DAMAGED_SECTION, CHAIN[4]),
        (Kind.UNREAD, NAME),
    ]


def test_headers_only_leaves_sections_unread():
    objects = intact() | {NAME: flipped(intact()[NAME]), CHAIN[4]: intact()[CHAIN[4]][:-1]}
    assert told_of(objects, headers_only=True) == [(Kind.TRUNCATED, CHAIN[4])]


def test_one_namespace_can_be_checked_alone():
    objects, told = with_faults(3)
    for namespace in {name.split("/")[2] for name in objects if "/v1/" in name and name.count("/") > 3}:
        own = [each for each in told if f"/v1/{namespace}/" in each[1]]
        assert sorted(told_of(objects, only=namespace)) == sorted(own)


def test_a_namespace_that_is_not_there_is_named():
    with pytest.raises(MisconfiguredError, match="no namespace 0123456789abcdef"):
        told_of(intact(), only="0123456789abcdef")


@pytest.mark.parametrize("text", ["10%", "7"])
def test_a_sample_is_drawn_at_random_and_again_by_its_seed(text):
    objects = {name: flipped(data) if name in all_chunks() else data for name, data in intact().items()}
    drawn = {tuple(sorted(told_of(objects, sample=Sample.parse(text, seed)))) for seed in range(20)}
    assert len(drawn) > 1
    assert (
        {len(each) for each in drawn} == {7} if text == "7" else max(map(len, drawn)) < len(all_chunks()) / 2
    )
    one = [sorted(told_of(objects, sample=Sample.parse(text, 5))) for _ in range(2)]
    assert one[0] == one[1]


def all_chunks() -> set[str]:
    return {name for names in chain_names(intact()) for name in names}


def test_a_sample_takes_no_hole_for_one_where_headers_are_not_read():
    for seed in range(20):
        assert told_of(intact(), sample=Sample.parse("30%", seed)) == []


def test_a_sample_knows_of_missing_ranks_by_names_alone():
    objects, told = with_faults(1, [next(each for each in EVERY if each.__name__ == "lose_rank")])
    assert set(told_of(objects, sample=Sample.parse("1", 0))) == told


def test_checks_that_are_left_out_here_would_be_seen():
    assert verifier.SETTLED_S > 0
    assert namespace_check._ATTEMPTS > 1
