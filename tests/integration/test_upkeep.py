"""Checks, repairs, copies and removals of a bucket that a real server keeps."""

import asyncio
from unittest import mock

import pytest
from fsck_samples import PREFIX, RANKED, chain_names, intact, verify, with_faults
from integration.access import Access, options_of

from kvstore.backends.s3_socket import S3SocketBackend
from kvstore.gc import collector
from kvstore.gc.lease import Leases
from kvstore.gc.pace import Pace
from kvstore.gc.store_clock import StoreClock
from kvstore.keys import namespace_folder, parse_object_name
from kvstore.retries import Retries
from kvstore.upkeep import verifier
from kvstore.upkeep.findings import MOVED
from kvstore.upkeep.inspection import read_whole
from kvstore.upkeep.intake import Intake
from kvstore.upkeep.prefix import find_prefix
from kvstore.upkeep.quarantine import quarantine_folder
from kvstore.upkeep.removal import Removal


@pytest.fixture
def run(rgw, monkeypatch):
    """Do something with these objects, in a bucket that has nothing else below their prefix."""
    options = options_of(Access("rgw"), rgw, monkeypatch)
    monkeypatch.setattr(verifier, "SETTLED_S", -3600.0)

    def run(objects, work):
        async def opened():
            backend = S3SocketBackend(options)
            try:
                for name, data in objects.items():
                    await backend.put(name, [data], if_absent=False)
                return await work(backend)
            finally:
                for folder in (f"{PREFIX}/", "copy/"):
                    await backend.delete(await names_of(backend, folder))
                await backend.close()

        return asyncio.run(opened())

    return run


async def names_of(backend, folder: str) -> list[str]:
    return [info.name async for info in backend.list(folder)]


def test_p15_all_faults_are_told_and_nothing_else(run):
    objects, told = with_faults(1)
    findings = run(objects, verify)
    assert sorted((each.kind, each.name) for each in findings) == sorted(told)
    assert run(intact(), verify) == []


def test_a_repair_moves_what_readers_refuse_and_nothing_else(run):
    objects, told = with_faults(2)

    async def repair(backend):
        findings = await verify(backend, repair=True)
        return findings, await names_of(backend, PREFIX)

    findings, left = run(objects, repair)
    moved = {name for kind, name in told if kind in MOVED}
    assert {each.name for each in findings if each.outcome.startswith("moved to ")} == moved
    copies = {name for name in left if name.startswith(quarantine_folder(PREFIX))}
    assert len(copies) == len(moved)
    assert set(left) - copies == set(objects) - moved


def test_a_prefix_is_copied_whole(run):
    name = next(names[-1] for names in chain_names(intact()) if RANKED.name in names[0])

    async def copy(backend):
        found = await find_prefix(backend, PREFIX, RANKED.name, parse_object_name(PREFIX, name).hash)
        intake = Intake(backend, "copy", found.namespace)
        await intake.describe()
        for parts, read in found.objects:
            assert await intake.take(
                parts, await read_whole(backend, read.name, read.object_bytes, read.etag)
            )
        return [read.name for _, read in found.objects], await names_of(backend, "copy/v1/")

    due, copied = run(intact(), copy)
    assert {each.removeprefix("copy") for each in copied if not each.endswith(".json")} == {
        each.removeprefix(PREFIX) for each in due
    }


def test_a_namespace_goes_and_nothing_else_does(run):
    async def remove(backend):
        clock, retried = await StoreClock.read(backend), Retries()
        leases = Leases(backend, PREFIX, clock, retried)
        pace = Pace(10_000, 8, retried)
        removal = Removal(backend, PREFIX, RANKED.name, clock=clock, pace=pace, leases=leases)
        with mock.patch.object(collector, "SETTLE_S", 0.0):
            removed = await removal.run(lambda _: None, force=False)
        return removed, await names_of(backend, f"{PREFIX}/v1/")

    removed, left = run(intact(), remove)
    assert (removed.gone, removed.failed) == (True, {})
    assert set(left) == {
        name for name in intact() if not name.startswith(namespace_folder(PREFIX, RANKED.name))
    }
