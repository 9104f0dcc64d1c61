"""Commands about a bucket and a node on a real Ceph RGW, with the node's credentials and settings."""

import json

import boto3
import pytest
from chunk_samples import raw_object, tiny_keys, tiny_namespace
from typer.testing import CliRunner

from kvstore.keys import namespace_document_name

NAMESPACE = tiny_namespace("a-model-of-the-commands")
KEYS = tiny_keys(NAMESPACE, 6)
PREFIX = "commands"
CHUNKS = dict(raw_object(PREFIX, NAMESPACE, key) for key in KEYS)
OBJECTS = CHUNKS | {namespace_document_name(PREFIX, NAMESPACE.name): NAMESPACE.document()}


@pytest.fixture
def client(rgw, monkeypatch, tmp_path):
    """RGW's own client, of a bucket that the environment names and that has a few chunks."""
    for name, value in rgw.environment(tls=False).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KVSTORE_PREFIX", PREFIX)
    monkeypatch.setenv("KVSTORE_DISK_DIR", str(tmp_path / "disk"))
    client = boto3.client("s3", endpoint_url=rgw.endpoint_urls[0])
    for name, data in OBJECTS.items():
        client.put_object(Bucket=rgw.bucket, Key=name, Body=data)
    return client


@pytest.fixture
def names(client, rgw):
    """What there is under the prefix, but for the index, which commands write as they go."""

    def listed() -> set[str]:
        found = client.list_objects_v2(Bucket=rgw.bucket, Prefix=f"{PREFIX}/").get("Contents", ())
        return {each["Key"] for each in found if "/_index/" not in each["Key"]}

    return listed


def run(*arguments: str) -> list[dict]:
    from kvstore.cli.main import app

    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_node_is_warmed(client, tmp_path):
    warmed = run("warm", f"{NAMESPACE.name}/{KEYS[-1].hash.hex()}")[0]
    assert (warmed["chunks"], warmed["written"]) == (6, 6)
    files = [path for path in (tmp_path / "disk/v1").rglob("*") if path.is_file()]
    assert {file.read_bytes() for file in files} == set(CHUNKS.values())
    assert run("warm", f"{NAMESPACE.name}/{KEYS[-1].hash.hex()}")[0]["present"] == 6


def test_a_report_and_the_hottest_prefixes(client, tmp_path):
    out = tmp_path / "report.html"
    assert run("report", "--out", str(out))[0]["chunks"] == 6
    assert "a-model-of-the-commands @ rev-1" in out.read_text()
    assert run("top")[0]["key"] == f"{NAMESPACE.name}/{KEYS[-1].hash.hex()}"


def test_a_bench_leaves_nothing(client, names):
    before = names()
    rows = run("bench", "--seconds", "0.3", "--write-bytes", "168MiB", "--read-bytes", "256MiB")
    assert all(row["requests"] for row in rows if row["kind"] in ("latency", "flow"))
    assert names() == before
