"""What `kvstore doctor` says of engines that share a bucket, and share nothing in it."""

import asyncio
import dataclasses
import json

import pytest

from kvstore.backends.memory import MemoryBackend
from kvstore.cli import doctor, sharing
from kvstore.cli.differences import differences, facts, lines_of_group, lines_of_pair
from kvstore.keys import namespace_document_name, namespace_folder
from kvstore.layout import DType, KVLayout
from kvstore.namespace import Namespace

LAYOUT = KVLayout(4, 8, 64, DType.BFLOAT16, "nhd", page_tokens=16, chunk_tokens=256)
CONFIG = {"rope_theta": 10000.0, "implementation": {"engine": "vllm", "dtype": "torch.bfloat16"}}
OWN = Namespace("org/Model-1B", "commit aaaa", LAYOUT, json.dumps(CONFIG))
LAYOUTS = {
    "dtype": (dataclasses.replace(LAYOUT, dtype=DType.FLOAT16), "dtype: float16, not bfloat16"),
    "kv heads": (dataclasses.replace(LAYOUT, kv_heads=4), "kv heads: 4, not 8"),
    "page form": (dataclasses.replace(LAYOUT, page_form="hnd"), "page form: hnd, not nhd"),
    "chunk tokens": (
        dataclasses.replace(LAYOUT, chunk_tokens=512),
        "chunk tokens (KVSTORE_CHUNK_TOKENS): 512, not 256",
    ),
}
OTHERS = {
    "weights revision": (
        {"weights_revision": "commit bbbb"},
        "weights revision (KVSTORE_WEIGHTS_REVISION): commit bbbb, not commit aaaa",
    ),
    "LoRA adapter": ({"lora": "sql"}, "LoRA adapter: sql, not none"),
    "fidelity": (
        {"fidelity": "int8"},
        "fidelity (KVSTORE_CODEC and KVSTORE_LOSSLESS_LAYERS): int8, not lossless",
    ),
    "config": ({"attention": json.dumps({**CONFIG, "rope_theta": 5})}, "config's rope_theta: 5, not 10000.0"),
    "engine": (
        {"attention": json.dumps({**CONFIG, "implementation": {"engine": "transformers"}})},
        "engine's engine: transformers, not vllm",
    ),
    **{fact: ({"layout": layout}, said) for fact, (layout, said) in LAYOUTS.items()},
}


def objects_of(*found: Namespace, shards: tuple[str, ...] = ("0-8",)) -> dict[str, bytes]:
    objects = {}
    for each in found:
        objects[namespace_document_name("kvstore", each.name)] = each.document()
        for shard in shards:
            objects[f"{namespace_folder('kvstore', each.name)}ab/ab{'0' * 62}.{shard}"] = b"x"
    return objects


def outcome(ended) -> dict:
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    return next(row for row in rows if row.get("check") == "namespaces")


@pytest.mark.parametrize("changed", OTHERS)
def test_each_fact_that_sets_engines_apart_is_told_in_plain_words(changed):
    fields, said = OTHERS[changed]
    other = dataclasses.replace(OWN, **fields)
    assert said in lines_of_pair("a", OWN, "b", other)
    assert changed in " ".join(lines_of_group(differences({"a": OWN, "b": other})))


def test_no_fact_of_a_namespace_is_left_out():
    # What a digest depends on and no fact tells, no comparison could explain.
    told = " ".join(f"{fact} {value}" for fact, value in facts(OWN).items())
    described = OWN.describe()
    layout = described.pop("layout")
    del described["format_version"], described["attention"], described["lora"]
    for value in (*described.values(), *layout.values(), "rope_theta 10000.0", "engine vllm"):
        assert str(value) in told
    assert differences({"a": OWN, "b": dataclasses.replace(OWN)}) == {}


def test_the_doctor_says_in_what_namespaces_of_one_model_differ(kvstore, contents):
    # One name on a hub, another in a folder: nobody shares, and nobody would know why.
    other = dataclasses.replace(OWN, model="model-1b", weights_revision="commit bbbb")
    stranger = dataclasses.replace(OWN, model="org/Model-7B")
    contents.put(objects_of(OWN, other, stranger))
    found = outcome(kvstore("doctor", "--json"))
    assert found["status"] == "pass"
    (apart,) = found["differences"].values()
    assert set(apart) == {"model name", "weights revision"}
    assert apart["weights revision"] == {OWN.name: "commit aaaa", other.name: "commit bbbb"}
    assert "engines of one never load chunks of another" in found["detail"]
    assert f"commit bbbb ({other.name})" in found["detail"]
    assert stranger.name not in found["detail"]


def test_one_namespace_is_compared_with_each_other_of_its_model(kvstore, contents):
    others = [dataclasses.replace(OWN, **fields) for fields, _ in OTHERS.values()]
    contents.put(objects_of(OWN, dataclasses.replace(OWN, model="org/Model-7B"), *others))
    found = outcome(kvstore("doctor", "--json", "--namespace", OWN.name))
    assert found["status"] == "pass"
    assert set(found["differences"]) == {each.name for each in others}
    assert all(said in found["detail"] for _, said in OTHERS.values())
    assert OWN.summary in found["detail"]


def test_an_engine_that_is_alone_with_its_model_is_told_which_models_there_are(kvstore, folder_contents):
    folder_contents.put(objects_of(OWN, dataclasses.replace(OWN, model="org/Model-7B")))
    found = outcome(kvstore("doctor", "--json", "--namespace", OWN.name))
    assert "no other namespace of this model" in found["detail"]
    assert "org/Model-7B" in found["detail"]


def test_an_unknown_namespace_is_told_with_what_to_compare(kvstore, contents):
    contents.put(objects_of(OWN))
    ended = kvstore("doctor", "--json", "--namespace", "0123456789abcdef")
    found = outcome(ended)
    assert ended.code == 1
    assert found["status"] == "fail"
    assert "there is no namespace 0123456789abcdef" in found["detail"]
    assert "org/Model-1B" in found["detail"]
    assert "KVSTORE_BUCKET, KVSTORE_PREFIX" in found["fix"]


@pytest.mark.parametrize("name", ["0123", "x" * 16, OWN.name.upper(), "../0123456789abcd"])
def test_what_is_no_name_of_a_namespace_is_a_usage_error(kvstore, folder, name):
    ended = kvstore("doctor", "--namespace", name)
    assert ended.code == 2
    # In a box, folded.
    assert "16 hex digits" in " ".join(ended.stderr.replace("│", " ").split())


def test_a_namespace_whose_document_is_lost_is_told_apart_from_none(kvstore, folder_contents):
    objects = objects_of(OWN)
    del objects[namespace_document_name("kvstore", OWN.name)]
    folder_contents.put(objects)
    ended = kvstore("doctor", "--json", "--namespace", OWN.name)
    assert ended.code == 0
    assert outcome(ended)["status"] == "warn"
    assert "no namespace.json" in outcome(ended)["detail"]


@pytest.mark.parametrize("arguments", [(), ("--namespace", OWN.name)])
def test_tensor_parallel_degrees_that_share_a_namespace_share_no_chunks(kvstore, folder_contents, arguments):
    folder_contents.put(objects_of(OWN, shards=("0-8", "0-4", "4-8")))
    detail = outcome(kvstore("doctor", "--json", *arguments))["detail"]
    assert "several tensor-parallel degrees, by kv heads 0-4 + 4-8, 0-8" in detail


def test_one_degree_is_nothing_to_tell_of(kvstore, folder_contents):
    folder_contents.put(objects_of(OWN, shards=("0-4", "4-8")))
    assert "degrees" not in outcome(kvstore("doctor", "--json"))["detail"]


def test_p11_hostile_documents_begin_no_lines_and_are_cut(kvstore, folder_contents):
    forged = "x\nPASS  everything\x1b[2J" + "y" * 20_000
    deep = '{"a":' + "[" * 20_000 + "]" * 20_000 + "}"
    many = json.dumps({f"key{number}": number for number in range(4000)})
    hostile = [
        dataclasses.replace(OWN, weights_revision=forged),
        dataclasses.replace(OWN, attention=deep),
        dataclasses.replace(OWN, attention=many),
        dataclasses.replace(OWN, lora="l\u202egniht"),
        dataclasses.replace(OWN, model="Model\nPASS  forged/Model-1B"),
    ]
    objects = objects_of(OWN, *hostile)
    objects[namespace_document_name("kvstore", "0123456789abcdef")] = b"\x00" * 100_000
    folder_contents.put(objects)
    for arguments in ((), ("--namespace", OWN.name)):
        ended = kvstore("doctor", *arguments)
        assert ended.code == 0
        assert "weights revision" in ended.stdout
        assert not {"\x1b", "\u202e"} & set(ended.stdout)
        lines = ended.stdout.splitlines()
        assert not any(line.startswith(("PASS  everything", "PASS  forged")) for line in lines)
        assert len(lines) < 150
        assert max(map(len, lines)) < 1200


def test_of_many_namespaces_some_are_looked_at_and_that_is_said(kvstore, folder_contents, monkeypatch):
    monkeypatch.setattr(sharing, "NAMESPACES_MAX", 3)
    found = sorted(
        [dataclasses.replace(OWN, lora=f"adapter {number}") for number in range(5)], key=lambda n: n.name
    )
    folder_contents.put(objects_of(*found))
    all_of_them = outcome(kvstore("doctor", "--json"))
    assert (all_of_them["namespaces"], all_of_them["complete"]) == (3, False)
    assert "3 namespaces looked at (there are more), of 1 model" in all_of_them["detail"]
    # The one asked for is among those, wherever it stands.
    one = outcome(kvstore("doctor", "--json", "--namespace", found[-1].name))
    assert set(one["differences"]) == {each.name for each in found[:2]}
    assert "not all namespaces were looked at" in one["detail"]


class Endless(MemoryBackend):
    """Its listings begin anew, whatever they are to begin behind."""

    async def list(self, prefix, *, start_after=""):
        async for info in super().list(prefix):
            yield info


class Stalling(MemoryBackend):
    """Does not go on behind the first namespace."""

    async def list(self, prefix, *, start_after=""):
        if start_after.endswith("0"):
            await asyncio.Event().wait()
        async for info in super().list(prefix, start_after=start_after):
            yield info


@pytest.mark.parametrize("kind", [Endless, Stalling])
def test_a_store_whose_listing_does_not_end_is_left_in_time(kvstore, monkeypatch, kind):
    monkeypatch.setattr(sharing, "LOOK_S", 0.2)
    backend = kind()
    for name, data in objects_of(OWN, dataclasses.replace(OWN, lora="other")).items():
        asyncio.run(MemoryBackend.put(backend, name, [data], if_absent=True))
    monkeypatch.setattr(doctor, "open_backend", lambda _: backend)
    found = outcome(kvstore("doctor", "--json", "--bucket", "memory://", "--namespace", OWN.name))
    assert found["complete"] is False
    assert OWN.summary in found["detail"]
