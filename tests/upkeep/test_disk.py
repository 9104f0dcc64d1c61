"""What a check finds in a node's folder, while stores may be at work in it."""

import asyncio
import dataclasses
import os
import random
import shutil
from pathlib import Path

import pytest
from disk_samples import LIMITS, NAMESPACE, OBJECT_BYTES, SHARD, data_of, keys_of, name_of, put_all, run

from kvstore.chunk import decode_header
from kvstore.disk.folder import DiskFolder
from kvstore.disk.journal_folder import JournalFolder
from kvstore.disk.pending import Destination, Pending, PendingName
from kvstore.disk.tier import DiskTier
from kvstore.upkeep import disk as disk_check
from kvstore.upkeep import inspection
from kvstore.upkeep.disk import DiskCheck, DiskScope
from kvstore.upkeep.findings import MOVED, Finding, Kind
from kvstore.upkeep.ledger import Ledger
from kvstore.upkeep.sample import Sample

HERE = Destination("s3://bucket/", "kv")
ELSEWHERE = Destination("s3://bucket/", "another")
KEYS = keys_of(12)
SECTIONS_AT = decode_header(data_of(KEYS[0])).extents[0].start
NAMES = [PendingName.of(key, SHARD) for key in KEYS]


def check(root: Path, *, repair: bool = False, **scope: object) -> list[Finding]:
    told: list[Finding] = []
    folder = DiskFolder(root)
    journal = JournalFolder(folder, HERE, OBJECT_BYTES, lambda: None) if repair else None
    wanted = dataclasses.replace(DiskScope("", Sample(1), headers_only=False), **scope)
    DiskCheck(folder, wanted, Ledger(None, told.append), journal).run()
    return told


def told(findings: list[Finding]) -> list[tuple[Kind, str]]:
    return sorted((finding.kind, finding.name) for finding in findings)


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with chunks in the tier, and pending ones for two buckets, that stores left in good order."""
    run(tmp_path, lambda tier: put_all(tier, KEYS[:6]))

    async def leave() -> None:
        for destination, keys in ((HERE, KEYS[6:10]), (ELSEWHERE, KEYS[10:])):
            tier = DiskTier(tmp_path, 1 << 30, SHARD, limits=LIMITS)
            journal = tier.journal(destination, 1 << 30, OBJECT_BYTES)
            await tier.open()
            for key in keys:
                pending = await journal.write(
                    PendingName.of(key, SHARD), NAMESPACE.document(), [data_of(key)]
                )
                assert isinstance(pending, Pending)
                await journal.close(pending)
            await tier.close()

    asyncio.run(leave())
    return tmp_path


def tier_path(root: Path, index: int) -> Path:
    return root / name_of(KEYS[index])


def pending_path(root: Path, index: int, destination: Destination = HERE) -> Path:
    return root / "pending" / destination.name / NAMES[index].namespace_name / NAMES[index].file_name


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def spoil(root: Path, source: random.Random) -> list[tuple[Kind, str]]:
    """One fault of every kind."""
    places = {
        Kind.DAMAGED_FILE: [tier_path(root, index) for index in range(4)],
        Kind.DAMAGED_PENDING: [
            pending_path(root, 6),
            pending_path(root, 7),
            pending_path(root, 10, ELSEWHERE),
        ],
        Kind.NEWER_VERSION: [tier_path(root, 4), pending_path(root, 8)],
        Kind.STRAY_FILE: [
            root / "pending" / "notes",
            root / "pending" / HERE.name / "notes",
            pending_path(root, 6).parent / "notes",
            pending_path(root, 6).parent / f"{KEYS[0].hash.hex()}.2-0",
            pending_path(root, 10, ELSEWHERE).parent / "namespace.json",
        ],
        Kind.FOREIGN_FILE: [
            root / "v1" / "notes",
            tier_path(root, 0).parent / "notes",
            root / ".tmp" / "notes",
        ],
        Kind.LEFTOVER_FILE: [root / ".tmp" / f"{source.getrandbits(128):032x}"],
        Kind.QUARANTINED_FILE: [root / "quarantine" / "something"],
    }
    (root / "quarantine").mkdir()
    flip(tier_path(root, 0), source.randrange(12, SECTIONS_AT))
    flip(tier_path(root, 1), source.randrange(SECTIONS_AT, OBJECT_BYTES))
    os.truncate(tier_path(root, 2), source.randrange(OBJECT_BYTES))
    shutil.copy(tier_path(root, 5), tier_path(root, 3))
    flip(pending_path(root, 6), source.randrange(SECTIONS_AT, OBJECT_BYTES))
    pending_path(root, 7).write_bytes(data_of(KEYS[7]) + b"\0")
    flip(pending_path(root, 10, ELSEWHERE), source.randrange(SECTIONS_AT, OBJECT_BYTES))
    for path in places[Kind.NEWER_VERSION]:
        path.write_bytes(path.read_bytes()[:8] + b"\2" + path.read_bytes()[9:])
    for kind in (Kind.STRAY_FILE, Kind.FOREIGN_FILE, Kind.LEFTOVER_FILE, Kind.QUARANTINED_FILE):
        for path in places[kind]:
            path.write_bytes(b"x")
    return sorted((kind, str(path)) for kind, paths in places.items() for path in paths)


def test_p15_a_folder_in_good_order_has_no_findings(root):
    assert check(root) == []
    assert check(root / "not there") == []


@pytest.mark.parametrize("seed", range(5))
def test_p15_all_faults_are_told_and_nothing_else(root, seed):
    due = spoil(root, random.Random(seed))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert told(check(root)) == due
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


MUTANTS = {
    "headers": (inspection, "fault_of_miss", lambda miss: None),
    "names and sizes": (inspection, "fault_of", lambda *_: None),
    "sections": (inspection.SectionChecks, "_verdict", lambda self, section: None),
    "locks": (disk_check, "_is_left", lambda path: False),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_p15_a_checker_that_does_not_check_would_be_seen(root, monkeypatch, mutant):
    due = spoil(root, random.Random(1))
    monkeypatch.setattr(*MUTANTS[mutant])
    assert told(check(root)) != due


def test_a_repair_moves_what_is_damaged_or_stray_and_nothing_else(root):
    due = spoil(root, random.Random(1))
    elsewhere = str(pending_path(root, 10, ELSEWHERE))
    findings = check(root, repair=True)
    assert told(findings) == due
    moved = {name for kind, name in due if kind in MOVED and name != elsewhere}
    assert {each.name for each in findings if each.outcome == "moved to quarantine/"} == moved
    assert not any(Path(name).exists() for name in moved)
    assert all(Path(name).exists() for _, name in due if name not in moved)
    assert len(list((root / "quarantine").iterdir())) == len(moved) + 1
    [left] = [each.outcome for each in findings if each.name == elsewhere]
    assert left == "left to a process with the settings of its bucket and prefix"


def test_what_somebody_has_in_hand_is_not_moved(root):
    flip(pending_path(root, 6), OBJECT_BYTES - 1)
    held = JournalFolder(DiskFolder(root), HERE, OBJECT_BYTES, lambda: None).take(NAMES[6])
    assert isinstance(held, Pending)
    [finding] = check(root, repair=True)
    assert finding.outcome == "left: it is busy"
    held.close()
    [finding] = check(root, repair=True)
    assert finding.outcome == "moved to quarantine/"


def test_what_is_being_written_is_no_leftover(root):
    file = DiskFolder(root).create(lambda: None)
    assert check(root) == []
    file.close()


def test_checking_counts_as_no_use_of_a_file(root):
    before = [tier_path(root, index).stat().st_atime_ns for index in range(6)]
    check(root)
    assert [tier_path(root, index).stat().st_atime_ns for index in range(6)] == before


def test_headers_only_leaves_sections_unread(root):
    flip(tier_path(root, 1), OBJECT_BYTES - 1)
    assert check(root, headers_only=True) == []
    assert told(check(root)) == [(Kind.DAMAGED_FILE, str(tier_path(root, 1)))]


def test_one_namespace_can_be_checked_alone(root):
    due = spoil(root, random.Random(1))
    assert check(root, only="0123456789abcdef") == []
    own = [each for each in due if f"/{NAMESPACE.name}/" in each[1]]
    assert told(check(root, only=NAMESPACE.name)) == own


def test_a_file_that_may_not_be_read_is_told(root, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(1, "not yours", str(path))

    monkeypatch.setattr(disk_check.os, "open", refuse)
    assert {finding.kind for finding in check(root)} == {Kind.UNREAD}
