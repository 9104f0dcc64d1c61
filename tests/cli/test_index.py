import json

import pytest
from chunk_samples import raw_object, tiny_keys, tiny_namespace

from kvstore.index.names import Place, snapshots_folder
from kvstore.keys import namespace_document_name, object_name

NAMESPACE = tiny_namespace()
SHARD = NAMESPACE.layout.whole
KEYS = tiny_keys(NAMESPACE, 5)
CHUNKS = dict(raw_object("kvstore", NAMESPACE, key) for key in KEYS)
DOCUMENT = {namespace_document_name("kvstore", NAMESPACE.name): NAMESPACE.document()}
FOLDER = snapshots_folder("kvstore", Place(NAMESPACE.name, SHARD))


def rows(output: str, kind: str = "index") -> list[dict]:
    return [row for row in map(json.loads, output.splitlines()) if row["kind"] == kind]


def test_an_empty_store_has_no_index(kvstore, folder):
    ended = kvstore("index")
    assert ended.code == 0
    assert "there is no index" in ended.stdout
    assert rows(kvstore("index", "--json", "--compact").stdout) == []


def test_it_is_built_from_a_listing_and_then_shown(kvstore, contents):
    contents.put(CHUNKS | DOCUMENT)
    assert rows(kvstore("index", "--json").stdout) == []
    ended = kvstore("index", "--rebuild", "--json")
    assert ended.code == 0
    (row,) = rows(ended.stdout)
    assert (row["namespace"], row["shard"], row["rows"]) == (NAMESPACE.name, str(SHARD), 5)
    assert (row["generations"], row["log_objects"]) == (1, 0)
    assert row["snapshot_bytes"] > 0
    text = kvstore("index").stdout
    assert NAMESPACE.name in text
    assert "UTC" in text


def test_compacting_needs_no_listing_of_chunks(kvstore, folder_contents):
    folder_contents.put(CHUNKS | DOCUMENT)
    kvstore("index", "--rebuild")
    more = dict(raw_object("kvstore", NAMESPACE, key) for key in tiny_keys(NAMESPACE, 2, first_token=500))
    folder_contents.put(more)
    (row,) = rows(kvstore("index", "--compact", "--json").stdout)
    assert (row["rows"], row["generations"]) == (5, 2)
    (row,) = rows(kvstore("index", "--rebuild", "--json").stdout)
    assert (row["rows"], row["generations"]) == (7, 3)


def test_a_damaged_snapshot_is_a_finding_that_a_rebuild_mends(kvstore, folder_contents):
    folder_contents.put(CHUNKS | DOCUMENT)
    kvstore("index", "--rebuild")
    (manifest,) = [name for name in folder_contents.names() if name.startswith(FOLDER) and "manifest" in name]
    folder_contents.put({manifest: b"nonsense"})
    ended = kvstore("index")
    assert ended.code == 1
    assert "counts as absent" in ended.stdout
    assert "no snapshot" in ended.stdout
    assert rows(kvstore("index", "--json").stdout, "refused")
    assert kvstore("index", "--rebuild").code == 0


def test_the_index_is_no_foreign_object(kvstore, folder_contents):
    folder_contents.put(CHUNKS | DOCUMENT)
    kvstore("index", "--rebuild")
    assert any(name.startswith(FOLDER) for name in folder_contents.names())
    assert [row["foreign"] for row in rows(kvstore("ls", "--json").stdout, "namespace")] == [0]
    assert rows(kvstore("gc", "--json").stdout, "summary")[0]["foreign"] == 0


def test_a_namespace_that_cannot_be_read_is_a_finding(kvstore, folder_contents, monkeypatch):
    folder_contents.put(CHUNKS | DOCUMENT)

    async def fail(self, name):
        from kvstore.errors import RetryableError

        raise RetryableError("the disk is on fire")

    monkeypatch.setattr("kvstore.gc.headers.Headers.read", fail)
    ended = kvstore("index", "--rebuild")
    assert ended.code == 1
    assert f"{NAMESPACE.name} was left alone: the disk is on fire" in ended.stdout


@pytest.mark.parametrize("arguments", [["--namespace", "tiny"], ["--compact", "--rebuild"]])
def test_what_makes_no_sense_is_refused(kvstore, folder, arguments):
    assert kvstore("index", *arguments).code == 2


def test_one_namespace_alone(kvstore, folder_contents):
    other = tiny_namespace("other")
    objects = dict(raw_object("kvstore", other, key) for key in tiny_keys(other, 3))
    folder_contents.put(CHUNKS | objects | DOCUMENT)
    (row,) = rows(kvstore("index", "--rebuild", "--namespace", other.name, "--json").stdout)
    assert (row["namespace"], row["rows"]) == (other.name, 3)
    assert object_name("kvstore", tiny_keys(other, 1)[0], SHARD) in folder_contents.names()
    assert len(rows(kvstore("index", "--rebuild", "--json").stdout)) == 2
