import json
import time
from pathlib import Path

import pytest
from chunk_samples import raw_object, tiny_keys, tiny_namespace

from kvstore.gc import collector
from kvstore.gc.store_clock import StoreClock
from kvstore.keys import namespace_document_name

NAMESPACE = tiny_namespace()
KEYS = tiny_keys(NAMESPACE, 4)
CHUNKS = dict(raw_object("kvstore", NAMESPACE, key) for key in KEYS)
OTHERS = dict(raw_object("kvstore", NAMESPACE, key) for key in tiny_keys(NAMESPACE, 2, first_token=500))
DOCUMENT = {namespace_document_name("kvstore", NAMESPACE.name): NAMESPACE.document()}
TARGET = f"{NAMESPACE.name}/{KEYS[1].hash.hex()}"
CHUNK_BYTES = len(next(iter(CHUNKS.values())))


def rows(output: str, kind: str) -> list[dict]:
    return [row for row in map(json.loads, output.splitlines()) if row["kind"] == kind]


class LaterClock(StoreClock):
    """The store's clock, hours from now."""

    hours = 48.0

    @classmethod
    async def read(cls, backend):
        return cls(await backend.clock_s() + 3600 * cls.hours)


@pytest.fixture
def later(monkeypatch) -> type[LaterClock]:
    monkeypatch.setattr(LaterClock, "hours", 48.0)
    monkeypatch.setattr("kvstore.cli.collection.StoreClock", LaterClock)
    return LaterClock


@pytest.fixture
def old_folder(folder_contents, folder, later, monkeypatch) -> Path:
    """A store whose chunks were written two days ago, and collections that leave nodes no time."""
    monkeypatch.setattr(collector, "SETTLE_S", 0.0)
    folder_contents.put(CHUNKS | OTHERS | DOCUMENT | {"kvstore/v1/README": b""})
    return folder


def test_by_default_nothing_goes_and_it_is_said_what_would(kvstore, folder_contents, old_folder):
    ended = kvstore("gc", "--max-age", "1d", "--force")
    assert ended.code == 0
    assert "were stored too long ago (KVSTORE_GC_MAX_AGE)" in ended.stdout
    assert "6 of 6 chunks" in ended.stdout
    assert "1 foreign objects, never touched:\n  kvstore/v1/README" in ended.stdout
    assert set(CHUNKS) <= set(folder_contents.names())


def test_every_chunk_that_goes_can_be_named_with_its_reason(kvstore, old_folder):
    ended = kvstore("gc", "--max-bytes", f"{3 * CHUNK_BYTES}B", "--set", "gc_max_share=1", "--list", "--json")
    chunks = rows(ended.stdout, "chunk")
    assert {row["reason"] for row in chunks} == {"bucket_bytes"}
    assert len(chunks) == rows(ended.stdout, "summary")[0]["going"] == 3
    assert rows(ended.stdout, "going")[0]["object_bytes"] == 3 * CHUNK_BYTES


def test_one_run_takes_no_more_than_its_share(kvstore, old_folder):
    ended = kvstore("gc", "--max-bytes", f"{CHUNK_BYTES}B", "--json")
    summary = rows(ended.stdout, "summary")[0]
    assert (summary["going"], summary["wanted"]) == (1, 5)


def test_what_was_marked_goes_in_a_later_run(kvstore, folder_contents, old_folder, later):
    apply = ("gc", "--max-age", "1d", "--force", "--apply", "--json")
    first = rows(kvstore(*apply, "--set", "gc_grace=47h").stdout, "collected")[0]
    assert (first["marked"], first["swept"]) == (6, 0)
    later.hours = 46.0
    assert rows(kvstore(*apply, "--set", "gc_grace=47h").stdout, "collected")[0]["swept"] == 0
    later.hours = 50.0
    last = rows(kvstore(*apply).stdout, "collected")[0]
    assert (last["swept"], last["namespaces_removed"]) == (6, [NAMESPACE.name])
    assert [name for name in folder_contents.names() if name.startswith("kvstore/v1/")] == [
        "kvstore/v1/README"
    ]


def test_a_pinned_chunk_stays_and_an_unpinned_one_goes(kvstore, old_folder):
    assert kvstore("pin", TARGET).code == 0
    summary = rows(kvstore("gc", "--max-age", "1d", "--json").stdout, "summary")[0]
    assert (summary["wanted"], summary["pinned"]) == (4, 2)
    assert kvstore("unpin", TARGET).code == 0
    assert kvstore("unpin", TARGET).code == 1
    assert rows(kvstore("gc", "--max-age", "1d", "--force", "--json").stdout, "summary")[0]["wanted"] == 6


def test_what_is_not_there_is_not_pinned(kvstore, old_folder):
    ended = kvstore("pin", f"{NAMESPACE.name}/{'0' * 64}")
    assert ended.code == 1
    assert "not there, so not pinned" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--max-bytes", "1000000"], 3, "KVSTORE_GC_MAX_BYTES='1000000' (from flag): has no unit"),
        (["--max-age", "30"], 3, "KVSTORE_GC_MAX_AGE='30' (from flag): is no number with a unit"),
        (["--max-age", "1d"], 3, "lets all 6 chunks go"),
        (["--set", "gc_grace=5min"], 3, "KVSTORE_GC_GRACE='5min'"),
        (["--namespace", "0123456789abcdef"], 3, "there is no namespace 0123456789abcdef"),
        (["--namespace", "tiny"], 2, "is no namespace: 16 hex digits"),
    ],
)
def test_what_makes_no_sense_is_refused(kvstore, old_folder, arguments, code, said):
    ended = kvstore("gc", "--apply", *arguments)
    assert ended.code == code
    assert said in " ".join(ended.all.replace("│", "").split())
    assert len(list(old_folder.rglob("*.0-2"))) == 6


@pytest.mark.parametrize("text", ["", "xyz", NAMESPACE.name, KEYS[0].hash.hex()])
def test_only_a_whole_name_can_be_pinned(kvstore, old_folder, text):
    assert kvstore("pin", text).code == 2


def test_p10_a_clock_that_is_off_ends_the_command(kvstore, folder_contents, monkeypatch):
    monkeypatch.setattr("kvstore.backends.filesystem.FilesystemBackend.clock_s", _an_hour_ahead)
    ended = kvstore("gc", "--apply", "--max-age", "1d", "--force")
    assert ended.code == 3
    assert "the store's clock is 3600 s ahead of this one's" in ended.stderr


async def _an_hour_ahead(self) -> float:
    return time.time() + 3600


def test_an_empty_store_is_collected_in_no_time(kvstore, monkeypatch):
    monkeypatch.setenv("KVSTORE_BUCKET", "memory://")
    ended = kvstore("gc", "--apply")
    assert ended.code == 0
    assert "0 of 0 chunks" in ended.stdout


def test_a_namespace_is_removed_only_when_that_is_asked_for(kvstore, folder_contents, old_folder):
    look = kvstore("rm", NAMESPACE.name, "--json")
    assert look.code == 0
    assert rows(look.stdout, "removal")[0]["chunks"] == 6
    assert "6 chunks" in kvstore("rm", NAMESPACE.name).stdout
    assert set(CHUNKS) <= set(folder_contents.names())
    ended = kvstore("rm", NAMESPACE.name, "--apply", "--json")
    assert ended.code == 0
    assert rows(ended.stdout, "removed")[0]["gone"]
    left = [name for name in folder_contents.names() if name.startswith("kvstore/v1/")]
    assert left == ["kvstore/v1/README"]


@pytest.mark.parametrize(
    ("namespace", "code", "said"),
    [("tiny", 2, "is no namespace: 16 hex digits"), ("0123456789abcdef", 3, "there is no namespace")],
)
def test_only_a_namespace_that_is_there_is_removed(kvstore, old_folder, namespace, code, said):
    ended = kvstore("rm", namespace, "--apply")
    assert ended.code == code
    assert said in " ".join(ended.all.replace("│", "").split())


def test_a_namespace_with_pinned_chunks_is_removed_by_force_alone(kvstore, old_folder):
    kvstore("pin", TARGET)
    assert "1 chunks are pinned" in kvstore("rm", NAMESPACE.name).stdout
    refused = kvstore("rm", NAMESPACE.name, "--apply")
    assert (refused.code, len(list(old_folder.rglob("*.0-2")))) == (3, 6)
    assert kvstore("rm", NAMESPACE.name, "--apply", "--force").code == 0
    assert list(old_folder.rglob("*.0-2")) == []
