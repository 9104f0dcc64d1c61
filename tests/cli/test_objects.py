import dataclasses
import json
import random

import pytest
from chunk_samples import CREATED_S, TINY_LAYOUT, raw_chunk, raw_object, tiny_keys, tiny_namespace

from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.chunk import HEADER_REGION_BYTES_MAX, decode_header
from kvstore.cli import backend, objects
from kvstore.keys import namespace_document_name, object_name
from kvstore.layout import Shard
from kvstore.listing import DOCUMENT_BYTES_MAX

NAMESPACE = tiny_namespace()
OTHER = tiny_namespace("other-model")
CHUNKS = dict(raw_object("kvstore", NAMESPACE, key) for key in tiny_keys(NAMESPACE, 3))
NAME, DATA = next(iter(CHUNKS.items()))
HASH = tiny_keys(NAMESPACE, 1)[0].hash.hex()
HEADER = decode_header(DATA)
DOCUMENT = {namespace_document_name("kvstore", NAMESPACE.name): NAMESPACE.document()}


def rows(output: str, kind: str) -> list[dict]:
    return [row for row in map(json.loads, output.splitlines()) if row["kind"] == kind]


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def test_namespaces_are_listed_in_plain_words_with_what_they_take_up(kvstore, contents):
    others = dict(raw_object("kvstore", OTHER, key) for key in tiny_keys(OTHER, 1))
    contents.put(CHUNKS | DOCUMENT | others | {"kvstore/doctor/x": b"", "kvstore/v1x": b""})
    found = {row["namespace"]: row for row in rows(kvstore("ls", "--json").stdout, "namespace")}
    assert set(found) == {NAMESPACE.name, OTHER.name}
    own = found[NAMESPACE.name]
    assert (own["chunks"], own["stored_bytes"], own["foreign"]) == (3, 3 * len(DATA), 0)
    assert own["describes"] == NAMESPACE.describe()
    assert own["fault"] == ""
    assert (found[OTHER.name]["chunks"], found[OTHER.name]["fault"]) == (1, "no namespace.json")
    text = kvstore("ls").stdout
    assert "tiny-llama @ rev-1, bfloat16, 3 layers x 2 kv heads x 4, nhd, 8 tokens a chunk" in text
    assert "2 namespaces in " in text


def test_an_empty_store_has_no_namespaces(kvstore, contents):
    ended = kvstore("ls")
    assert ended.code == 0
    assert ended.stdout.startswith("0 namespaces in ")


def test_chunks_of_a_namespace_are_listed_in_order(kvstore, contents):
    contents.put(CHUNKS | DOCUMENT)
    ended = kvstore("ls", NAMESPACE.name, "--json")
    found = rows(ended.stdout, "chunk")
    assert [row["name"] for row in found] == sorted(CHUNKS)
    assert {row["object_bytes"] for row in found} == {len(DATA)}
    assert {row["shard"] for row in found} == {"0-2"}
    assert HASH in kvstore("ls", NAMESPACE.name).stdout


@pytest.mark.parametrize("digits", [0, 1, 2, 5, 64])
def test_chunks_are_narrowed_by_the_first_digits_of_their_hash(kvstore, folder_contents, digits):
    folder_contents.put(CHUNKS)
    found = rows(kvstore("ls", f"{NAMESPACE.name}/{HASH[:digits]}", "--json").stdout, "chunk")
    due = {name for name in CHUNKS if name.rpartition("/")[2].startswith(HASH[:digits])}
    assert {row["name"] for row in found} == due
    assert due


def test_a_limit_ends_the_listing_and_says_so(kvstore, folder_contents):
    folder_contents.put(CHUNKS)
    ended = kvstore("ls", NAMESPACE.name, "--json", "--limit", "2")
    assert len(rows(ended.stdout, "chunk")) == 2
    assert rows(ended.stdout, "summary") == [{"kind": "summary", "shown": 2, "foreign": 0, "complete": False}]
    assert rows(kvstore("ls", NAMESPACE.name, "--json", "--limit", "3").stdout, "summary")[0]["complete"]


def test_foreign_objects_are_counted_and_never_shown_as_chunks(kvstore, contents):
    folder = f"kvstore/v1/{NAMESPACE.name}"
    foreign = {
        f"{folder}/notes.txt": b"x",
        f"{folder}/zz/{HASH}.0-2": b"x",
        f"{folder}/{HASH[:2]}/{HASH}.2-0": b"x",
        f"{folder}/{HASH[:2]}/{HASH.upper()}.0-2": b"x",
        "kvstore/v1/README": b"x",
        "kvstore/v1/NOT-A-DIGEST/x": b"x",
    }
    contents.put(CHUNKS | DOCUMENT | foreign)
    listed = kvstore("ls", "--json").stdout
    assert [row["foreign"] for row in rows(listed, "namespace")] == [4]
    assert rows(listed, "summary")[0]["foreign"] == 6
    chunks = kvstore("ls", NAMESPACE.name, "--json")
    assert chunks.code == 0
    assert {row["name"] for row in rows(chunks.stdout, "chunk")} == set(CHUNKS)
    assert rows(chunks.stdout, "summary")[0]["foreign"] == 4


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"[" * 60_000,
        b'{"format_version": 1}',
        NAMESPACE.document()[:-2],
        NAMESPACE.document() + b" ",
        OTHER.document(),
        NAMESPACE.document().replace(b'"layers": 3', b'"layers": "3"'),
        NAMESPACE.document().replace(b'"layers": 3', b'"layers": 1' + b"0" * 5000),
        NAMESPACE.document().replace(b'"tiny-llama"', b'{"a": 1}'),
    ],
)
def test_a_damaged_namespace_document_is_shown_as_damaged(kvstore, folder_contents, document):
    folder_contents.put(CHUNKS | dict.fromkeys(DOCUMENT, document))
    ended = kvstore("ls", "--json")
    row = rows(ended.stdout, "namespace")[0]
    assert ended.code == 0
    assert row["fault"].startswith("damaged: ")
    assert (row["chunks"], row["describes"]) == (3, None)


def test_a_namespace_document_too_large_to_be_one_is_told_by_its_size(kvstore, folder_contents):
    folder_contents.put(dict.fromkeys(DOCUMENT, NAMESPACE.document().ljust(70_000)))
    assert "damaged: namespace.json has 70000 bytes" in kvstore("ls").stdout


@pytest.mark.parametrize("target", ["xyz", "kvstore/v2/", f"{NAMESPACE.name}/xyz", "ABCDEF"])
def test_a_target_that_makes_no_sense_is_a_usage_error(kvstore, folder, target):
    assert kvstore("ls", target).code == 2


@pytest.mark.parametrize("target", ["0", NAMESPACE.name, f"kvstore/v1/{NAMESPACE.name}/"])
def test_a_target_that_is_not_there_is_a_finding(kvstore, folder, target):
    ended = kvstore("ls", target)
    assert ended.code == 1
    assert ended.stderr.startswith("kvstore: there is nothing ")


@pytest.mark.parametrize(
    "key",
    [
        NAME,
        f"{NAMESPACE.name}/{HASH}",
        f"{NAMESPACE.name}/{HASH[:12]}",
        f"{NAMESPACE.name}/{HASH[:2]}/{HASH}.0-2",
        HASH[:6],
        HASH,
        f"{HASH}.0-2",
    ],
)
def test_a_chunk_is_found_by_every_form_of_its_name(kvstore, folder_contents, key):
    folder_contents.put(CHUNKS | DOCUMENT)
    ended = kvstore("show", key, "--json")
    assert ended.code == 0
    assert [row["name"] for row in rows(ended.stdout, "header")] == [NAME]


def test_a_hash_is_found_in_any_namespace_among_foreign_objects(kvstore, contents):
    others = dict(raw_object("kvstore", OTHER, key) for key in tiny_keys(OTHER, 3))
    foreign = {"kvstore/v1/" + name: b"x" for name in ("0", "4x/y", "zz", f"{NAMESPACE.name}1", "README")}
    contents.put(CHUNKS | others | foreign)
    for name in (*CHUNKS, *others):
        digits = name.rpartition("/")[2][:10]
        assert rows(kvstore("show", digits, "--json").stdout, "header")[0]["name"] == name


def test_the_header_is_shown_as_it_is(kvstore, contents):
    contents.put(CHUNKS | DOCUMENT)
    ended = kvstore("show", NAME, "--json")
    [shown] = rows(ended.stdout, "header")
    assert shown["hash"] == HASH
    assert shown["parent"] == HEADER.parent.hex()
    assert (shown["depth"], shown["tokens"], shown["created_s"]) == (0, 8, CREATED_S)
    assert (shown["shard"], shown["writer"]) == ("0-2", HEADER.writer.hex())
    assert (shown["object_bytes"], shown["codecs"]) == (len(DATA), ["none"])
    sections = rows(ended.stdout, "section")
    assert [row["offset"] for row in sections] == [extent.start for extent in HEADER.extents]
    assert {row["verified"] for row in sections} == {"not read; see --verify"}
    text = kvstore("show", NAME).stdout
    assert all(
        word in text for word in (HASH, "tiny-llama @ rev-1", "2023-11-14 22:13:20 UTC", "kv heads 0-2")
    )


def test_verify_reads_every_section(kvstore, contents):
    contents.put(CHUNKS | DOCUMENT)
    ended = kvstore("show", NAME, "--verify", "--json")
    assert ended.code == 0
    assert [row["verified"] for row in rows(ended.stdout, "section")] == ["ok"] * TINY_LAYOUT.layers
    assert rows(ended.stdout, "header")[0]["verified"] == "header and every section"


@pytest.mark.parametrize("layer", range(TINY_LAYOUT.layers))
def test_p15_verify_names_the_damaged_section(kvstore, folder_contents, layer):
    folder_contents.put({NAME: flipped(DATA, HEADER.extents[layer].stop - 1)})
    assert kvstore("show", NAME).code == 0
    ended = kvstore("show", NAME, "--verify", "--json")
    assert ended.code == 1
    assert [row["verified"] for row in rows(ended.stdout, "section")].index("bad_checksum") == layer
    assert f"(bad_checksum): section {layer}" in ended.stderr
    assert [row["reason"] for row in rows(ended.stdout, "damage")] == ["bad_checksum"]


def with_faults(number: int) -> tuple[dict[str, bytes], set[str]]:
    """Forty objects, and the names of those, as many as asked for, that have one fault each."""
    source = random.Random(number)
    whole = dict(raw_object("kvstore", NAMESPACE, key) for key in tiny_keys(NAMESPACE, 40))
    names = source.sample(sorted(whole), number)
    faults = [
        lambda data: flipped(data, source.randrange(HEADER.extents[0].start)),
        lambda data: flipped(data, source.randrange(HEADER.extents[0].start, len(data))),
        lambda data: data[: source.randrange(len(data))],
        lambda data: data + b"\0",
        lambda _: source.choice([other for name, other in whole.items() if name not in names]),
    ]
    spoiled = {name: source.choice(faults)(whole[name]) for name in names}
    return whole | spoiled, set(names)


def told_by_verify(kvstore, contents, stored: dict[str, bytes]) -> set[str]:
    contents.put(stored | DOCUMENT)
    return {name for name in stored if kvstore("show", name, "--verify").code}


@pytest.mark.parametrize("number", [0, 1, 20])
def test_p15_verify_tells_all_faults_and_nothing_else(kvstore, folder_contents, number):
    stored, damaged = with_faults(number)
    assert told_by_verify(kvstore, folder_contents, stored) == damaged


def test_p15_a_checker_that_does_not_check_would_be_seen(kvstore, folder_contents, monkeypatch):
    async def nothing(*_):
        return
        yield

    stored, damaged = with_faults(20)
    monkeypatch.setattr(objects, "section_faults", nothing)
    assert told_by_verify(kvstore, folder_contents, stored) < damaged


OTHER_CHUNK = list(CHUNKS.values())[1]
FOREIGN_NAMESPACE_CHUNK = raw_chunk(OTHER, tiny_keys(OTHER, 1)[0])
WRONG_LAYOUT_CHUNK = raw_chunk(
    dataclasses.replace(NAMESPACE, layout=dataclasses.replace(TINY_LAYOUT, layers=2)),
    tiny_keys(NAMESPACE, 1)[0],
)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (DATA[:100], "truncated"),
        (DATA[:-1], "truncated"),
        (DATA + b"x", "trailing_bytes"),
        (flipped(DATA, 0), "bad_magic"),
        (flipped(DATA, 8), "bad_version"),
        (flipped(DATA, 50), "bad_checksum"),
        (b"x" * len(DATA), "bad_magic"),
        (OTHER_CHUNK, "wrong_key"),
        (FOREIGN_NAMESPACE_CHUNK, "wrong_key"),
        (raw_chunk(NAMESPACE, tiny_keys(NAMESPACE, 1)[0], Shard(0, 1)), "wrong_key"),
        (WRONG_LAYOUT_CHUNK, "bad_header"),
    ],
)
def test_a_damaged_object_is_told_with_its_reason(kvstore, folder_contents, data, reason):
    folder_contents.put({NAME: data} | DOCUMENT)
    ended = kvstore("show", NAME)
    assert ended.code == 1
    assert f"{NAME} is damaged ({reason}): " in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert rows(kvstore("show", NAME, "--json").stdout, "damage")[0]["reason"] == reason


@pytest.mark.parametrize("data", [OTHER_CHUNK, FOREIGN_NAMESPACE_CHUNK])
def test_a_renamed_object_is_damaged_also_where_the_namespace_is_unknown(kvstore, folder_contents, data):
    folder_contents.put({NAME: data})
    ended = kvstore("show", NAME)
    assert ended.code == 1
    assert "(wrong_key)" in ended.stderr


def test_an_absent_key_is_told(kvstore, contents):
    contents.put(CHUNKS)
    absent = object_name("kvstore", tiny_keys(OTHER, 1)[0], Shard(0, 2))
    for key in (absent, f"{OTHER.name}/ab", "abcdef012345"):
        ended = kvstore("show", key)
        assert ended.code == 1
        assert ended.stderr.startswith(("kvstore: there is no object ", "kvstore: no chunk "))


def test_an_ambiguous_key_is_told_with_what_fits(kvstore, folder_contents):
    half = NAME.replace(".0-2", ".0-1")
    folder_contents.put({NAME: DATA, half: DATA})
    ended = kvstore("show", HASH[:8])
    assert ended.code == 1
    assert NAME in ended.stderr
    assert half in ended.stderr
    assert kvstore("show", f"{HASH}.0-2").code == 0


@pytest.mark.parametrize("key", ["abcde", "not-hex", "kvstore/v1/x", NAME + "/x", NAME.upper(), ""])
def test_a_key_that_makes_no_sense_is_a_usage_error(kvstore, folder, key):
    assert kvstore("show", key).code == 2


def test_an_unreachable_store_is_told_by_the_exit_code(kvstore_process, s3):
    ended = kvstore_process("ls", "--endpoint-url", "http://127.0.0.1:1")
    assert ended.code == 4
    assert len(ended.stderr.splitlines()) == 1
    assert "KVSTORE_ENDPOINT_URL" in ended.stderr


def test_a_missing_bucket_is_told_by_the_exit_code(kvstore, s3):
    for command in (["ls"], ["show", NAME]):
        ended = kvstore(*command, "--bucket", "no-such-bucket")
        assert ended.code == 3
        assert "NoSuchBucket" in ended.stderr


def test_text_from_the_bucket_cannot_steer_the_terminal(kvstore, folder_contents):
    hostile = tiny_namespace("[bold red]:smile: \x1b[2J\x9b\u202e\x7f\r\nmodel")
    key = tiny_keys(hostile, 1)[0]
    name, data = raw_object("kvstore", hostile, key)
    folder_contents.put({namespace_document_name("kvstore", hostile.name): hostile.document(), name: data})
    for command in (["ls"], ["ls", hostile.name], ["show", name], ["ls", "--json"], ["show", name, "--json"]):
        ended = kvstore(*command)
        assert ended.code == 0
        assert not {"\x1b", "\x9b", "\u202e", "\x7f", "\r"} & set(ended.stdout)
        assert "[bold red]:smile: " in ended.stdout


def test_a_huge_object_is_not_read_whole(kvstore, monkeypatch):
    reads = []

    class Recording(MemoryBackend):
        async def read_into(self, name, offset, out, *, if_match=None):
            reads.append(len(out))
            return await super().read_into(name, offset, out, if_match=if_match)

    stored = StoredObject(DATA + bytes(1 << 22), "e", 0.0)
    monkeypatch.setattr(backend, "open_backend", lambda _: Recording({NAME: stored}))
    assert kvstore("show", NAME, "--bucket", "memory://").code == 1
    assert sum(reads) <= HEADER_REGION_BYTES_MAX + DOCUMENT_BYTES_MAX


def test_an_object_replaced_while_it_is_verified_is_never_called_ok(kvstore, monkeypatch):
    stored = {NAME: StoredObject(DATA, "first", 0.0)}

    class Replacing(MemoryBackend):
        async def read_into(self, name, offset, out, *, if_match=None):
            result = await super().read_into(name, offset, out, if_match=if_match)
            if name == NAME:
                stored[NAME] = StoredObject(DATA, "second", 0.0)
            return result

    monkeypatch.setattr(backend, "open_backend", lambda _: Replacing(stored))
    ended = kvstore("show", NAME, "--verify", "--json", "--bucket", "memory://")
    assert ended.code == 1
    assert {row["verified"] for row in rows(ended.stdout, "section")} == {"changed"}
