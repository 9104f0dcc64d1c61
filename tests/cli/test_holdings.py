import json
import time

import pytest
from chunk_samples import TINY_LAYOUT, raw_object, tiny_namespace
from fsck_samples import PREFIX, chain_names, intact

from kvstore.gc.names import touch_name
from kvstore.gc.records import seal_hashes
from kvstore.keys import PrefixChain, namespace_document_name

NAMESPACE = tiny_namespace()
OTHER = tiny_namespace("other-model")
STEP = TINY_LAYOUT.chunk_tokens


def keys(namespace=NAMESPACE, chunks=4, salt="", first_token=0):
    tokens = range(first_token, first_token + chunks * STEP)
    return PrefixChain.of(namespace, tokens, tenant_salt=salt).keys


OBJECTS = {
    name: data
    for namespace, chain in (
        (NAMESPACE, keys()),
        (NAMESPACE, keys(chunks=2, salt="ours")),
        (NAMESPACE, keys(chunks=1, salt="theirs")),
        (OTHER, keys(OTHER, 3)),
    )
    for name, data in (raw_object("kvstore", namespace, key) for key in chain)
} | {namespace_document_name("kvstore", each.name): each.document() for each in (NAMESPACE, OTHER)}
CHUNK_BYTES = len(raw_object("kvstore", NAMESPACE, keys()[0])[1])


def rows(output: str, kind: str) -> list[dict]:
    return [row for row in map(json.loads, output.splitlines()) if row["kind"] == kind]


def held(ended, kind: str) -> dict[str, tuple[int, int]]:
    assert ended.code == 0, ended.all
    return {row["name"]: (row["chunks"], row["object_bytes"]) for row in rows(ended.stdout, kind)}


@pytest.mark.parametrize(
    ("by", "due"),
    [
        ("namespace", {NAMESPACE.name: 7, OTHER.name: 3}),
        ("model", {"tiny-llama": 7, "other-model": 3}),
        ("age", {"under an hour": 10}),
        ("codec", {"none": 10}),
    ],
)
def test_holdings_are_told_apart(kvstore, contents, by, due):
    contents.put(OBJECTS | {"kvstore/v1/README": b"", f"kvstore/v1/{NAMESPACE.name}/notes": b""})
    began_s = time.time() - 2
    ended = kvstore("du", "--by", by, "--json")
    assert held(ended, by) == {name: (chunks, chunks * CHUNK_BYTES) for name, chunks in due.items()}
    [total] = rows(ended.stdout, "summary")
    assert (total["chunks"], total["object_bytes"], total["foreign"]) == (
        10,
        10 * CHUNK_BYTES,
        1 + (by != "x"),
    )
    assert began_s - 600 < total["oldest_s"] <= total["newest_s"] < time.time() + 600
    assert abs(sum(row["share"] for row in rows(ended.stdout, by)) - 1) < 1e-3


def test_tenants_are_told_apart_by_their_salt_which_is_never_shown(kvstore, contents, monkeypatch):
    monkeypatch.setenv("KVSTORE_TENANT_SALT", "ours")
    contents.put(OBJECTS)
    ended = kvstore("du", "--by", "tenant", "--namespace", NAMESPACE.name, "--json")
    found = held(ended, "tenant")
    theirs = keys(salt="theirs")[0].parent.hex()[:16]
    assert {name: chunks for name, (chunks, _) in found.items()} == {
        "no salt": 4,
        "this node's salt": 2,
        theirs: 1,
    }
    assert "ours" not in ended.all.replace("hours", "")


def test_what_is_behind_a_hole_has_no_known_tenant(kvstore, folder_contents):
    first = raw_object("kvstore", OTHER, keys(OTHER)[0])[0]
    folder_contents.put({name: data for name, data in OBJECTS.items() if name != first})
    found = held(kvstore("du", "--by", "tenant", "--namespace", OTHER.name, "--json"), "tenant")
    assert found == {"unknown: a chunk before them is missing": (2, 2 * CHUNK_BYTES)}


def test_codecs_are_what_headers_say_of_all_or_of_a_sample(kvstore, folder_contents):
    folder_contents.put(intact())
    flags = ("du", "--prefix", PREFIX, "--by", "codec", "--json")
    found = held(kvstore(*flags), "codec")
    assert {"lz4", "zstd", "planes1+zstd", "none"} <= set(found)
    assert any("int8+zstd" in name for name in found)
    chunks = sum(map(len, chain_names(intact())))
    assert sum(count for count, _ in found.values()) == chunks
    sampled = kvstore(*flags, "--sample", "30%", "--seed", "3")
    assert 0 < sum(count for count, _ in held(sampled, "codec").values()) < chunks
    [total] = rows(sampled.stdout, "summary")
    assert (total["chunks"], total["sample"], total["seed"]) == (chunks, True, 3)


def test_people_see_sizes_and_times(kvstore, folder_contents):
    folder_contents.put(OBJECTS)
    text = kvstore("du").stdout
    assert NAMESPACE.name in text
    assert "70.0%" in text
    assert text.endswith(f"10 chunks, {10 * CHUNK_BYTES / 1024:.1f} KiB\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--by", "colour"], "is none of namespace, model, tenant, codec, age"),
        (["--namespace", "x"], "is no namespace: 16 hex digits"),
        (["--sample", "1%"], "only --by codec"),
        (["--by", "codec", "--sample", "100"], "is no share, such as 1%"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(kvstore, folder, arguments, said):
    ended = kvstore("du", *arguments)
    assert ended.code == 2
    assert said in " ".join(ended.stderr.replace("│", "").split())


@pytest.mark.parametrize("by", ["namespace", "tenant", "codec"])
def test_a_namespace_that_is_not_there_is_a_finding(kvstore, contents, by):
    contents.put(OBJECTS)
    ended = kvstore("du", "--by", by, "--namespace", "0123456789abcdef")
    assert ended.code == 1
    assert "there is no namespace 0123456789abcdef under kvstore/v1/" in ended.stderr


def test_an_empty_store_holds_nothing(kvstore, contents):
    ended = kvstore("du")
    assert (ended.code, ended.stdout.splitlines()[-1]) == (0, "0 chunks, 0 B")


def branching() -> dict[str, bytes]:
    """Two chunks that four conversations of three chunks begin with."""
    objects = {namespace_document_name("kvstore", NAMESPACE.name): NAMESPACE.document()}
    for turn in range(4):
        tokens = [*range(2 * STEP), *range(1000 * turn, 1000 * turn + 3 * STEP)]
        for key in PrefixChain.of(NAMESPACE, tokens).keys:
            objects |= [raw_object("kvstore", NAMESPACE, key)]
    return objects


def test_a_tree_shows_what_prefixes_share(kvstore, contents):
    contents.put(branching())
    ended = kvstore("tree", NAMESPACE.name, "--json")
    assert ended.code == 0
    found = rows(ended.stdout, "node")
    assert [(row["level"], row["run"], row["chunks"]) for row in found] == [(0, 2, 14), *[(1, 3, 3)] * 4]
    assert found[0]["object_bytes"] == 14 * CHUNK_BYTES
    assert {row["tree"] for row in found} == {"prefixes without a salt"}
    few = rows(kvstore("tree", NAMESPACE.name, "--limit", "3", "--json").stdout, "node")
    assert [row["hidden"] for row in few] == [2, 0, 0]
    text = kvstore("tree", NAMESPACE.name, "--depth", "1").stdout
    assert "2 chunks, from depth 0: " in text
    assert "    4 more: " in text


def test_a_tree_can_begin_at_a_chunk_and_says_what_was_used(kvstore, folder_contents):
    folder_contents.put(branching())
    key = keys()[1]
    record = touch_name("kvstore", NAMESPACE.name, TINY_LAYOUT.whole, "ab")
    folder_contents.put({record: seal_hashes([key.hash])})
    target = f"{NAMESPACE.name}/{key.hash.hex()}"
    ended = kvstore("tree", target, "--json")
    found = rows(ended.stdout, "node")
    assert [(row["hash"], row["run"], row["touches"]) for row in found[:1]] == [(key.hash.hex(), 1, 1)]
    assert "used 1 times, last " in kvstore("tree", target[:30]).stdout


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [
        ("tiny", 2, "is neither a namespace nor NAMESPACE/HASH"),
        ("0123456789abcdef", 1, "there is no chunk of 0123456789abcdef"),
        (f"{NAMESPACE.name}/000000", 1, "no chunk begins with 000000"),
    ],
)
def test_a_target_that_is_not_there_is_told(kvstore, folder_contents, target, code, said):
    folder_contents.put(OBJECTS)
    ended = kvstore("tree", target)
    assert ended.code == code
    assert said in " ".join(ended.stderr.replace("│", "").split())
