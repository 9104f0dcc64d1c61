import json
import os
from pathlib import Path

import pytest
from chunk_samples import TINY_LAYOUT, raw_chunk, raw_object, tiny_keys, tiny_namespace
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from kvstore.backends.memory import MemoryBackend
from kvstore.keys import PrefixChain, namespace_document_name, object_name
from kvstore.layout import Shard
from kvstore.pages import PageSink
from kvstore.settings import Settings
from kvstore.store import KVStore

PATIENCE_S = 20.0
NAMESPACE = tiny_namespace()
SHARD = TINY_LAYOUT.whole
TOKENS = list(range(40))
KEYS = tiny_keys(NAMESPACE, 5)
OTHERS = tiny_keys(NAMESPACE, 3, first_token=900)
CHUNKS = dict(raw_object("kvstore", NAMESPACE, key) for key in (*KEYS, *OTHERS))
DOCUMENT = {namespace_document_name("kvstore", NAMESPACE.name): NAMESPACE.document()}
TARGET = f"{NAMESPACE.name}/{KEYS[3].hash.hex()}"
SALT = "pepper-and-salt"


@pytest.fixture
def disk(monkeypatch, tmp_path) -> Path:
    """The folder of the disk tier that the environment names."""
    monkeypatch.setenv("KVSTORE_DISK_DIR", str(tmp_path / "disk"))
    return tmp_path / "disk"


@pytest.fixture
def warm(kvstore, disk, folder_contents):
    """Warm from a store with `CHUNKS`; how it ended, and the rows of what became of prefixes."""
    folder_contents.put(CHUNKS | DOCUMENT)

    def run(*arguments: str) -> tuple[int, list[dict]]:
        ended = kvstore("warm", "--json", *arguments)
        rows = [json.loads(line) for line in ended.stdout.splitlines()]
        return ended.code, [row for row in rows if row["kind"] == "warmed"]

    return run


class Sections(PageSink):
    """Keeps what a load scatters."""

    def __init__(self) -> None:
        self.sections: dict[tuple[int, int], bytes] = {}

    def scatter(self, layer, indices, sections):
        for index, data in zip(indices, sections, strict=True):
            self.sections[index, layer] = bytes(data)


def found_by_a_store(disk: Path, chain: PrefixChain) -> tuple[dict, dict]:
    """What a store that opens the folder later, with a bucket that is empty, finds and loads."""
    settings = Settings(bucket="memory://", disk_dir=str(disk), memory_bytes=1 << 20)
    with KVStore.open(TINY_LAYOUT, settings=settings, backend=MemoryBackend()) as store:
        assert store.wait_connected(PATIENCE_S)
        store._loop.run(store._parts.disk.wait_scanned())
        found = store.lookup(chain)
        sections = Sections()
        assert store.load(chain, range(found.chunks), sections).wait(PATIENCE_S).failures == {}
        return dict(found.by_tier), sections.sections


def written(row: dict) -> tuple[int, int, int]:
    return row["chunks"], row["written"], row["present"]


def test_a_chunk_and_all_before_it_are_there_for_a_store_that_opens_later(warm, disk):
    code, (row,) = warm(TARGET)
    assert code == 0
    assert written(row) == (4, 4, 0)
    assert row["written_bytes"] == sum(len(raw_chunk(NAMESPACE, key)) for key in KEYS[:4])
    by_tier, sections = found_by_a_store(disk, PrefixChain.of(NAMESPACE, TOKENS))
    assert by_tier["disk"] == 4
    for (index, layer), data in sections.items():
        stored = raw_chunk(NAMESPACE, KEYS[index])
        assert data in stored, (index, layer)
    assert len(sections) == 4 * TINY_LAYOUT.layers


def test_what_is_there_is_not_fetched_again(warm):
    warm(TARGET)
    code, (row,) = warm(f"{NAMESPACE.name}/{KEYS[4].hash.hex()}")
    assert (code, written(row)) == (0, (5, 1, 4))


def test_what_was_warmed_counts_as_used_so_that_it_stays(warm, disk):
    warm(TARGET)
    files = list(disk.glob("v1/*/*/*"))
    assert len(files) == 4
    assert all(file.stat().st_atime_ns > file.stat().st_mtime_ns for file in files)


def test_prompts_as_tokens(warm, tmp_path, disk):
    prompts = tmp_path / "tokens.jsonl"
    prompts.write_text(f"{TOKENS[:20]}\n\n{list(range(900, 924))}\n[1, 2]\n")
    code, rows = warm(NAMESPACE.name, "--tokens", str(prompts))
    assert code == 0
    assert [(row["source"], *written(row)) for row in rows] == [
        ("line 1", 2, 2, 0),
        ("line 3", 3, 3, 0),
        ("line 4", 0, 0, 0),
    ]
    assert found_by_a_store(disk, PrefixChain.of(NAMESPACE, range(900, 924)))[0]["disk"] == 3


def test_what_is_not_stored_is_a_finding(warm, tmp_path):
    prompts = tmp_path / "tokens.jsonl"
    prompts.write_text(f"{[*TOKENS[:16], *range(500, 524)]}\n{list(range(700, 716))}\n")
    code, rows = warm(NAMESPACE.name, "--tokens", str(prompts))
    assert code == 1
    assert [(row["written"], row["absent"] + row["behind"]) for row in rows] == [(2, 3), (0, 2)]


def test_a_tenants_prompts_take_its_salt(warm, folder_contents, tmp_path, monkeypatch):
    salted = PrefixChain.of(NAMESPACE, TOKENS, tenant_salt=SALT).keys
    folder_contents.put(dict(raw_object("kvstore", NAMESPACE, key) for key in salted[:2]))
    prompts = tmp_path / "tokens.jsonl"
    prompts.write_text(f"{TOKENS}\n")
    monkeypatch.setenv("KVSTORE_TENANT_SALT", SALT)
    _, (row,) = warm(NAMESPACE.name, "--tokens", str(prompts))
    assert (row["written"], row["absent"] + row["behind"]) == (2, 3)


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """A folder of a model whose words are its tokens."""
    words = {f"w{number}": number for number in range(50)}
    made = Tokenizer(WordLevel(words | {"[UNK]": 50}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    (tmp_path / "model").mkdir()
    made.save(str(tmp_path / "model/tokenizer.json"))
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_prompts_as_text(warm, tmp_path, tokenizer, name):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(" ".join(f"w{number}" for number in range(17))) + "\n")
    code, (row,) = warm(NAMESPACE.name, "--prompts", str(prompts), "--tokenizer", str(tokenizer / name))
    assert (code, written(row)) == (0, (2, 2, 0))


def test_every_shard_is_warmed_or_one(warm, folder_contents, disk):
    halves = [Shard(0, 1), Shard(1, 2)]
    folder_contents.put(
        {
            object_name("kvstore", key, half): raw_chunk(NAMESPACE, key, half)
            for key in KEYS
            for half in halves
        }
    )
    code, rows = warm(TARGET, "--shard", "1-2")
    assert [(row["shard"], row["written"]) for row in rows] == [("1-2", 4)]
    code, rows = warm(TARGET)
    assert [(row["shard"], row["written"], row["present"]) for row in rows] == [
        ("0-1", 4, 0),
        ("0-2", 4, 0),
        ("1-2", 0, 4),
    ]
    assert code == 0


def test_p3_a_damaged_object_is_not_copied_nor_what_is_behind_it(warm, folder_contents, disk):
    name = object_name("kvstore", KEYS[1], SHARD)
    damaged = bytearray(CHUNKS[name])
    damaged[-1] ^= 1
    folder_contents.put({name: bytes(damaged)})
    code, (row,) = warm(TARGET)
    assert code == 1
    assert row["damaged"] == 1
    assert not list(disk.rglob(f"{KEYS[1].hash.hex()}*"))


def test_p4_an_object_under_another_name_is_not_copied(warm, folder_contents, disk):
    folder_contents.put({object_name("kvstore", KEYS[0], SHARD): raw_chunk(NAMESPACE, OTHERS[0])})
    code, rows = warm(TARGET)
    assert (code, rows) == (1, [])
    assert not list(disk.rglob("*.0-2"))


def test_no_more_is_written_than_the_tier_may_hold(warm, monkeypatch, disk):
    size = len(CHUNKS[object_name("kvstore", KEYS[0], SHARD)])
    monkeypatch.setenv("KVSTORE_DISK_BYTES", str(2 * size + 100))
    code, (row,) = warm(TARGET)
    assert code == 1
    assert row["no_room"] + row["behind"] >= 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2", "line 1: is no JSON"),
        ('["a secret"]', "line 1: is no list of token ids"),
        ("[-1]", "line 1: is no list of token ids"),
        ("[true]", "line 1: is no list of token ids"),
        ("[4294967296]", "line 1: is no list of token ids"),
        ("\n" + "[" * 100_000, "line 2: is no JSON"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_without_showing_it(warm, kvstore, tmp_path, text, said):
    prompts = tmp_path / "tokens.jsonl"
    prompts.write_text(text)
    ended = kvstore("warm", NAMESPACE.name, "--tokens", str(prompts))
    assert ended.code == 3
    assert said in ended.stderr
    assert "secret" not in ended.all


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tiny"], 2, "is neither NAMESPACE/HASH nor NAMESPACE"),
        ([NAMESPACE.name], 2, "give NAMESPACE/HASH, or NAMESPACE with one of --tokens and --prompts"),
        ([TARGET, "--tokens", "x"], 2, "give NAMESPACE/HASH, or NAMESPACE with one of"),
        ([NAMESPACE.name, "--prompts", "x"], 2, "--prompts and --tokenizer belong together"),
        ([TARGET, "--shard", "all"], 2, "'all' is no range of kv heads, such as 0-8"),
        ([TARGET, "--shard", "2-1"], 3, "needs 0 <= start < stop"),
        ([f"{NAMESPACE.name}/{'0' * 64}"], 1, f"no chunk {'0' * 64}"),
        (["0" * 16, "--tokens", "x"], 1, "no namespace.json"),
        ([NAMESPACE.name, "--tokens", "/no/such/file"], 3, "/no/such/file cannot be read: No such file"),
        ([TARGET, "--set", "disk_dir="], 3, "KVSTORE_DISK_DIR is not set: there is no disk tier to warm"),
    ],
)
def test_what_cannot_be_done_is_said(warm, kvstore, arguments, code, said):
    ended = kvstore("warm", *arguments)
    assert ended.code == code
    assert said in " ".join(ended.all.replace("│", "").split())


def test_root_makes_nothing_in_another_users_folder(warm, kvstore, disk, monkeypatch):
    disk.mkdir()
    if os.geteuid() == 0:
        os.chown(disk, 1234, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    ended = kvstore("warm", TARGET)
    assert ended.code == 3
    assert "run it as that user" in ended.stderr
    assert list(disk.iterdir()) == []


def test_a_tokenizer_that_is_none_is_refused(warm, kvstore, tmp_path):
    (tmp_path / "prompts").write_text('"w1"\n')
    (tmp_path / "tokenizer.json").write_text("{}")
    ended = kvstore(
        "warm", NAMESPACE.name, "--prompts", str(tmp_path / "prompts"), "--tokenizer", str(tmp_path)
    )
    assert ended.code == 3
    assert "is no tokenizer of the library tokenizers" in ended.stderr


def test_p9_a_disk_that_cannot_be_used_is_said(warm, kvstore, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    ended = kvstore("warm", TARGET, "--set", f"disk_dir={tmp_path / 'file'}")
    assert ended.code == 3
    assert f"the disk tier in {(tmp_path / 'file').as_uri()} cannot be used" in ended.stderr


def test_a_running_engine_finds_what_was_warmed(warm, disk, monkeypatch):
    settings = Settings(bucket="memory://", disk_dir=str(disk), memory_bytes=1 << 20)
    chain = PrefixChain.of(NAMESPACE, TOKENS)
    with KVStore.open(TINY_LAYOUT, settings=settings, backend=MemoryBackend()) as store:
        assert store.wait_connected(PATIENCE_S)
        store._loop.run(store._parts.disk.wait_scanned())
        assert store.lookup(chain).by_tier["disk"] == 0
        assert warm(TARGET)[0] == 0
        store._loop.run(_look(store))
        assert store.lookup(chain).by_tier["disk"] == 4


async def _look(store: KVStore) -> bool:
    return await store._parts.disk._look()
