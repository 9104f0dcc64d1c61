import json
import os

import boto3
import pytest
from fsck_samples import PREFIX, RANKED, chain_names, intact, with_faults

from kvstore.upkeep import verifier
from kvstore.upkeep.findings import MOVED, NOTES, Kind
from kvstore.upkeep.quarantine import quarantine_folder


def rows(output: str, kind: str) -> list[dict]:
    return [row for row in map(json.loads, output.splitlines()) if row["kind"] == kind]


@pytest.fixture
def verify(kvstore, monkeypatch):
    """The command, to which objects that were just stored have been there for a while."""
    monkeypatch.setattr(verifier, "SETTLED_S", -3600.0)
    return lambda *arguments: kvstore("verify", "--prefix", PREFIX, *arguments)


def told(ended) -> list[tuple[str, str]]:
    return sorted((row["finding"], row["name"]) for row in rows(ended.stdout, "finding"))


def test_p15_an_intact_bucket_ends_well(verify, contents):
    contents.put(intact())
    ended = verify("--json")
    assert (ended.code, told(ended)) == (0, [])
    [summary] = rows(ended.stdout, "summary")
    assert summary["checked"] == summary["listed"] == sum(map(len, chain_names(intact())))
    assert summary["checked_bytes"] == sum(
        len(data) for name, data in intact().items() if not name.endswith(".json")
    )
    assert verify().stdout.endswith("; 0 faults\n")


def test_p15_all_faults_are_told_and_end_with_1(verify, contents):
    objects, due = with_faults(1)
    contents.put(objects)
    ended = verify("--json")
    assert ended.code == 1
    assert told(ended) == sorted(due)
    [summary] = rows(ended.stdout, "summary")
    assert summary["faults"] == sum(kind not in NOTES for kind, _ in due)
    assert sum(summary["findings"].values()) == len(due)
    assert sorted(contents.names()) == sorted(objects)


def test_a_repair_moves_what_readers_refuse(verify, contents):
    objects, due = with_faults(2)
    contents.put(objects)
    ended = verify("--repair", "--json")
    moved = {name for kind, name in due if kind in MOVED}
    assert {row["name"] for row in rows(ended.stdout, "finding") if "moved to" in row["outcome"]} == moved
    left = contents.names()
    copies = [name for name in left if name.startswith(quarantine_folder(PREFIX))]
    assert len(copies) == len(moved)
    assert set(left) - set(copies) == set(objects) - moved


@pytest.mark.parametrize("name", ["", f"{RANKED.name}/a0/", "a//b", "x\x01y"])
@pytest.mark.parametrize("arguments", [(), ("--repair",)])
def test_names_that_others_tools_make_are_foreign_and_stay(verify, s3_contents, moto_url, name, arguments):
    s3_contents.put(intact())
    name = f"{PREFIX}/v1/{name}"
    boto3.client("s3", endpoint_url=moto_url).put_object(Bucket=os.environ["KVSTORE_BUCKET"], Key=name)
    ended = verify("--json", *arguments)
    assert (ended.code, told(ended)) == (0, [("foreign", name)])
    assert name in s3_contents.names()


def test_findings_are_explained_to_people(verify, folder_contents):
    objects, due = with_faults(3)
    folder_contents.put(objects)
    text = verify().stdout
    assert all(name in text and f"\n{kind}: " in text for kind, name in due)


def test_notes_alone_end_well(verify, folder_contents):
    folder_contents.put(intact() | {f"{PREFIX}/v1/README": b""})
    ended = verify("--json")
    assert (ended.code, told(ended)) == (0, [(Kind.FOREIGN, f"{PREFIX}/v1/README")])


def test_fsck_is_the_same(kvstore, folder_contents):
    folder_contents.put(intact())
    assert kvstore("fsck", "--prefix", PREFIX, "--namespace", RANKED.name).code == 0


def test_a_sample_says_how_to_draw_it_again(verify, folder_contents):
    folder_contents.put(intact())
    [summary] = rows(verify("--sample", "5", "--headers-only", "--json").stdout, "summary")
    assert (summary["checked"], summary["sample"]) == (5, True)
    assert "--seed 7 draws it again" in verify("--sample", "20%", "--seed", "7").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--sample", "0%"], 2, "neither a share such as 1%"),
        (["--sample", "101%"], 2, "neither a share such as 1%"),
        (["--sample", "x"], 2, "neither a share such as 1%"),
        (["--sample", "0"], 2, "neither a share such as 1%"),
        (["--bytes-per-s", "100"], 2, "has no unit"),
        (["--namespace", "tiny"], 2, "is no namespace: 16 hex digits"),
        (["--part", "tape"], 2, "neither all, bucket nor disk"),
        (["--namespace", "0123456789abcdef"], 3, "there is no namespace 0123456789abcdef"),
        (["--part", "disk"], 3, "KVSTORE_DISK_DIR is not set"),
    ],
)
def test_what_makes_no_sense_is_refused(verify, folder_contents, arguments, code, said):
    folder_contents.put(intact())
    ended = verify(*arguments)
    assert ended.code == code
    assert said in " ".join(ended.all.replace("│", "").split())


def test_an_unreachable_store_is_told_by_the_exit_code(kvstore_process, s3):
    ended = kvstore_process("verify", "--endpoint-url", "http://127.0.0.1:1")
    assert ended.code == 4
    assert "KVSTORE_ENDPOINT_URL" in ended.stderr


def test_the_disk_tier_is_checked_as_well(verify, folder_contents, tmp_path, monkeypatch):
    monkeypatch.setenv("KVSTORE_DISK_DIR", str(tmp_path / "disk"))
    folder_contents.put(intact())
    file = tmp_path / "disk" / "v1" / "0123456789abcdef" / "notes"
    file.parent.mkdir(parents=True)
    file.write_text("x")
    ended = verify("--json")
    assert told(ended) == [(Kind.FOREIGN_FILE, str(file))]
    assert [row["part"] for row in rows(ended.stdout, "summary")] == ["bucket", "disk"]
    assert [row["part"] for row in rows(verify("--part", "disk", "--json").stdout, "summary")] == ["disk"]
