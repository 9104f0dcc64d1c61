import asyncio
import dataclasses
import errno
import io
import json
import tarfile
from pathlib import Path

import pytest
from chunk_samples import raw_chunk, raw_object, tiny_keys, tiny_namespace
from fsck_samples import CHUNKS, PREFIX, RANKED, RANKS, chain_names, intact, verify

from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.chunk import decode_header
from kvstore.gc.names import Announcement, Span
from kvstore.gc.records import seal_hashes
from kvstore.keys import ObjectName, chunk_name, namespace_document_name, parse_object_name
from kvstore.layout import Shard

NAMESPACE = tiny_namespace()
KEYS = tiny_keys(NAMESPACE, 5)
OBJECTS = dict(raw_object("kvstore", NAMESPACE, key) for key in KEYS)
NAMES = list(OBJECTS)
DOCUMENT = {namespace_document_name("kvstore", NAMESPACE.name): NAMESPACE.document()}
BRANCH = dict(raw_object("kvstore", NAMESPACE, key) for key in tiny_keys(NAMESPACE, 2, first_token=900))
LAST = f"{NAMESPACE.name}/{KEYS[3].hash.hex()}"
DUE = dict(list(OBJECTS.items())[:4]) | DOCUMENT


def rows(output: str, kind: str) -> list[dict]:
    return [row for row in map(json.loads, output.splitlines()) if row["kind"] == kind]


def refused(ended) -> dict[str, str]:
    return {row["name"]: row["why"] for row in rows(ended.stdout, "object") if row["outcome"] == "refused"}


def objects_of(contents, prefix: str) -> dict[str, bytes]:
    """What lies under a prefix, but for what collectors keep."""

    async def read(backend):
        found = {}
        async for info in backend.list(f"{prefix}/v1/"):
            data = bytearray(info.object_bytes)
            await backend.read_into(info.name, 0, memoryview(data))
            found[info.name] = bytes(data)
        return found

    return asyncio.run(contents._with_backend(read))


def renamed(objects: dict[str, bytes], prefix: str) -> dict[str, bytes]:
    return {f"{prefix}{name.removeprefix('kvstore')}": data for name, data in objects.items()}


@pytest.fixture
def archive(kvstore, folder_contents, tmp_path):
    """An archive of four chunks, and a store without them."""
    folder_contents.put(OBJECTS | DOCUMENT | BRANCH)
    assert kvstore("export", LAST, str(tmp_path / "prefix.tar")).code == 0
    return tmp_path / "prefix.tar"


def test_a_prefix_goes_to_another_prefix_and_nothing_else_does(kvstore, contents):
    contents.put(OBJECTS | DOCUMENT | BRANCH)
    ended = kvstore("export", LAST, "--to-prefix", "copy", "--json")
    assert ended.code == 0, ended.all
    assert rows(ended.stdout, "summary")[0]["stored"] == 4
    assert objects_of(contents, "copy") == renamed(DUE, "copy")
    again = kvstore("export", LAST, "--to-prefix", "copy", "--json")
    assert (again.code, rows(again.stdout, "summary")[0]["present"]) == (0, 4)


def test_a_prefix_goes_to_a_file_and_back(kvstore, contents, tmp_path):
    contents.put(OBJECTS | DOCUMENT | BRANCH)
    path = tmp_path / "prefix.tar"
    assert kvstore("export", LAST, str(path)).code == 0
    with tarfile.open(path) as tar:
        assert tar.getnames() == [name.removeprefix("kvstore/") for name in [*DOCUMENT, *NAMES[:4]]]
    assert [entry.name for entry in tmp_path.iterdir() if "prefix" in entry.name] == ["prefix.tar"]
    ended = kvstore("import", str(path), "--prefix", "back", "--json")
    assert ended.code == 0, ended.all
    assert objects_of(contents, "back") == renamed(DUE, "back")


def test_a_prefix_goes_to_another_bucket(kvstore, folder_contents, tmp_path):
    folder_contents.put(OBJECTS | DOCUMENT)
    bucket = (tmp_path / "another").as_uri()
    assert kvstore("export", LAST, "--to-bucket", bucket).code == 0
    assert (
        rows(kvstore("ls", NAMESPACE.name, "--bucket", bucket, "--json").stdout, "summary")[0]["shown"] == 4
    )


def test_the_same_prefix_makes_the_same_archive(kvstore, archive):
    assert kvstore("export", LAST, str(archive.with_name("again.tar"))).code == 0
    assert archive.read_bytes() == archive.with_name("again.tar").read_bytes()


def test_all_ranks_go_each_chunk_after_the_one_it_continues(kvstore, folder_contents):
    folder_contents.put(intact())
    chain = next(names for names in chain_names(intact()) if RANKED.name in names[0])
    hash_ = parse_object_name(PREFIX, chain[-1]).hash.hex()
    ended = kvstore("export", f"{RANKED.name}/{hash_}", "--prefix", PREFIX, "--to-prefix", "copy", "--json")
    names = [row["name"] for row in rows(ended.stdout, "object")]
    assert len(names) == CHUNKS * len(RANKS)
    depths = [decode_header(intact()[name]).depth for name in names]
    assert depths == sorted(depths)
    found = {
        name: StoredObject(data, name, 0.0) for name, data in objects_of(folder_contents, "copy").items()
    }
    moved = {name.replace("copy/", f"{PREFIX}/", 1): each for name, each in found.items()}
    assert asyncio.run(verify(MemoryBackend(moved))) == []


def test_a_rank_that_lacks_a_chunk_is_left_out_and_named(kvstore, folder_contents):
    shards = (Shard(0, 1), Shard(1, 2))
    objects = {
        chunk_name("kvstore", ObjectName(NAMESPACE.name, key.hash, shard)): raw_chunk(NAMESPACE, key, shard)
        for key in KEYS
        for shard in shards
    }
    missing = chunk_name("kvstore", ObjectName(NAMESPACE.name, KEYS[1].hash, shards[1]))
    del objects[missing]
    folder_contents.put(objects | DOCUMENT)
    ended = kvstore("export", LAST, "--to-prefix", "copy", "--json")
    assert ended.code == 1
    assert refused(ended) == {"rank 1-2": f"{missing} is missing"}
    assert sum(name.endswith(".0-1") for name in objects_of(folder_contents, "copy")) == 4


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_a_damaged_chunk_and_what_continues_it_are_left_out_and_named(kvstore, folder_contents):
    folder_contents.put(OBJECTS | DOCUMENT | {NAMES[1]: flipped(OBJECTS[NAMES[1]])})
    ended = kvstore("export", LAST, "--to-prefix", "copy", "--json")
    assert ended.code == 1
    assert list(refused(ended)) == NAMES[1:4]
    assert refused(ended)[NAMES[1]].startswith("it is damaged (damaged_section): layer 2")
    assert set(objects_of(folder_contents, "copy")) == set(renamed(DOCUMENT | {NAMES[0]: b""}, "copy"))


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (NAMES[3], "there is no chunk"),
        (NAMES[1], f"{NAMES[1]} is missing"),
        (next(iter(DOCUMENT)), "no namespace.json"),
    ],
)
def test_a_prefix_that_is_not_whole_is_told(kvstore, folder_contents, tmp_path, lost, said):
    folder_contents.put({name: data for name, data in (OBJECTS | DOCUMENT).items() if name != lost})
    ended = kvstore("export", LAST, str(tmp_path / "prefix.tar"))
    assert ended.code == 1
    assert said in ended.stderr
    assert not (tmp_path / "prefix.tar").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([LAST], 2, "name a FILE, or a bucket"),
        ([LAST, "x.tar", "--to-prefix", "copy"], 2, "name a FILE, or a bucket"),
        ([LAST, "--to-prefix", "kvstore"], 2, "source and destination are the same"),
        ([NAMESPACE.name, "x.tar"], 2, "is not NAMESPACE/HASH"),
        ([LAST, "/nowhere/x.tar"], 3, "/nowhere/x.tar cannot be written"),
    ],
)
def test_what_makes_no_sense_is_refused(kvstore, folder_contents, arguments, code, said):
    folder_contents.put(OBJECTS | DOCUMENT)
    ended = kvstore("export", *arguments)
    assert ended.code == code
    assert said in " ".join(ended.stderr.replace("│", "").split())


def test_a_file_that_is_there_stays_as_it_is(kvstore, archive):
    before = archive.read_bytes()
    ended = kvstore("export", LAST, str(archive))
    assert ended.code == 3
    assert "exists; remove it" in ended.stderr
    assert archive.read_bytes() == before


def test_a_disk_without_links_takes_an_archive(kvstore, folder_contents, tmp_path, monkeypatch):
    folder_contents.put(OBJECTS | DOCUMENT)
    path, link = tmp_path / "prefix.tar", Path.hardlink_to

    def refuse(self, target):
        if self.parent == tmp_path:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        link(self, target)

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert kvstore("export", LAST, str(path)).code == 0
    assert len(members(path)) == 5
    assert [entry.name for entry in tmp_path.iterdir() if "prefix" in entry.name] == ["prefix.tar"]


def members(path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def write(path, contents: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in contents:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def changed(path, change) -> None:
    write(path, change(list(members(path).items())))


def swapped(items, first, second):
    items = list(items)
    items[first], items[second] = (items[first][0], items[second][1]), (items[second][0], items[first][1])
    return items


@pytest.mark.parametrize(
    "case",
    [
        (lambda items: [*items[:2], (items[2][0], flipped(items[2][1])), *items[3:]], [1, 2, 3], 4),
        (lambda items: [*items[:2], (items[2][0], items[2][1][:-1]), *items[3:]], [1, 2, 3], 4),
        (lambda items: [*items[:2], (items[2][0], items[2][1] + b"x"), *items[3:]], [1, 2, 3], 4),
        (lambda items: [*items[:2], (items[2][0], b""), *items[3:]], [1, 2, 3], 4),
        (lambda items: swapped(items, 3, 4), [2, 3], 4),
        (lambda items: [*items[:2], *items[3:]], [2, 3], 1),
        (lambda items: [items[0], *reversed(items[1:])], [1, 2, 3], 4),
        (lambda items: items[1:], [0, 1, 2, 3], 4),
        (lambda items: [(items[0][0], items[0][1][:-2]), *items[1:]], ["namespace.json", 0, 1, 2, 3], 4),
        (lambda items: [*items, ("v1/../../etc/passwd", b"x")], ["v1/../../etc/passwd"], 4),
    ],
    ids=["flipped", "cut", "extended", "empty", "swapped", "hole", "reversed", "bare", "document", "foreign"],
)
def test_an_import_refuses_what_is_wrong_names_it_and_leaves_no_hole(kvstore, folder_contents, archive, case):
    change, left_out, stored_max = case
    changed(archive, change)
    ended = kvstore("import", str(archive), "--prefix", "back", "--json")
    assert ended.code == 1
    named = [name.removeprefix("back/").removeprefix("kvstore/") for name in refused(ended)]
    short = [name.removeprefix("kvstore/") for name in [*NAMES, *DOCUMENT]]
    due = [short[each] if isinstance(each, int) else each for each in left_out]
    assert sorted(named) == sorted(short[-1] if each == "namespace.json" else each for each in due)
    stored = [name for name in objects_of(folder_contents, "back") if not name.endswith(".json")]
    # All before the first that is wrong, or is not there at all.
    whole = min((each for each in left_out if isinstance(each, int)), default=4)
    assert set(stored) == set(list(renamed(OBJECTS, "back"))[: min(whole, stored_max)])


@pytest.mark.parametrize("length", [0, 100, 5000, -3000])
def test_an_archive_that_is_cut_off_is_told(kvstore, archive, length):
    data = archive.read_bytes()
    whole = archive.stat().st_size - 10240
    archive.write_bytes(data[: whole + length] if length < 0 else data[:length])
    ended = kvstore("import", str(archive), "--prefix", "back")
    assert ended.code == 1
    assert "is no archive of kvstore's, or not whole" in ended.stderr or "left out" in ended.stdout


@pytest.mark.parametrize("member", [1, 2, 4])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data, at: data[:at] + b"x" + data[at + 1 :],
        lambda data, at: data[:at] + bytes(512) + data[at + 512 :],
        lambda data, at: data[:at],
        lambda data, at: data[: at + 100],
    ],
    ids=["flipped", "blank", "cut before", "cut within"],
)
def test_an_archive_with_a_damaged_header_is_told(kvstore, folder_contents, archive, member, damage):
    data = archive.read_bytes()
    with tarfile.open(archive) as tar:
        at = tar.getmembers()[member].offset
    archive.write_bytes(damage(data, at))
    ended = kvstore("import", str(archive), "--prefix", "back", "--json")
    assert ended.code == 1
    assert "is no archive of kvstore's, or not whole" in ended.stderr
    stored = [name for name in objects_of(folder_contents, "back") if not name.endswith(".json")]
    assert set(stored) == set(list(renamed(OBJECTS, "back"))[: member - 1])


def test_a_file_that_is_not_there_is_told(kvstore, folder, tmp_path):
    ended = kvstore("import", str(tmp_path / "nothing.tar"))
    assert ended.code == 3
    assert "nothing.tar cannot be read" in ended.stderr


def test_an_import_goes_on_behind_what_is_there(kvstore, folder_contents, archive):
    folder_contents.put(renamed(dict(list(OBJECTS.items())[:2]), "back"))
    changed(archive, lambda items: [items[0], *items[3:]])
    ended = kvstore("import", str(archive), "--prefix", "back", "--json")
    assert ended.code == 0
    assert objects_of(folder_contents, "back") == renamed(DUE, "back")


def test_what_lies_there_damaged_is_not_built_upon(kvstore, folder_contents, archive):
    first = renamed({NAMES[0]: OBJECTS[NAMES[0]][:-1]}, "back")
    folder_contents.put(first)
    ended = kvstore("import", str(archive), "--prefix", "back", "--json")
    assert ended.code == 1
    assert "`kvstore verify --repair` moves it" in refused(ended)[next(iter(first))]
    assert len(objects_of(folder_contents, "back")) == 2


def test_p6_nothing_is_imported_behind_what_is_about_to_be_removed(kvstore, folder_contents, archive):
    folder_contents.put(renamed(dict(list(OBJECTS.items())[:3]), "back"))
    span = Span(NAMESPACE.name, NAMESPACE.layout.whole, KEYS[0].hash.hex()[0])
    mark = Announcement(span, 1)
    announced = {mark.name("back"): seal_hashes([KEYS[2].hash]), mark._replace(sweep=2).name("back"): b""}
    folder_contents.put(announced)
    ended = kvstore("import", str(archive), "--prefix", "back", "--json")
    assert ended.code == 1
    assert list(refused(ended)) == list(renamed(OBJECTS, "back"))[2:4]
    assert "a garbage collection is about to remove it" in next(iter(refused(ended).values()))


def test_what_an_import_builds_upon_is_told_to_collections(kvstore, folder_contents, archive):
    folder_contents.put(renamed(dict(list(OBJECTS.items())[:3]), "back"))
    span = Span(NAMESPACE.name, NAMESPACE.layout.whole, KEYS[0].hash.hex()[0])
    folder_contents.put({Announcement(span, 1).name("back"): seal_hashes([KEYS[2].hash])})
    assert kvstore("import", str(archive), "--prefix", "back").code == 0
    [record] = [name for name in folder_contents.names() if name.startswith("back/gc/touches/")]
    assert NAMESPACE.name in record


def test_a_chunk_of_another_form_is_refused(kvstore, folder_contents, archive):
    other = dataclasses.replace(NAMESPACE, layout=dataclasses.replace(NAMESPACE.layout, layers=2))
    wrong = raw_chunk(other, KEYS[1])
    changed(archive, lambda items: [*items[:2], (items[2][0], wrong), *items[3:]])
    ended = kvstore("import", str(archive), "--prefix", "back", "--json")
    assert "it is damaged (wrong_form)" in next(iter(refused(ended).values()))
