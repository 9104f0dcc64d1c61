"""The policies and rules in docs/ allow what the code does, and no more."""

import json
import re
from pathlib import Path

import boto3
import pytest
from moto_buckets import moto_bucket, moto_url
from samples import PATIENCE_S, Pages, chain_of, store_of

from kvstore.backends.memory import MemoryBackend
from kvstore.gc.names import gc_folder
from kvstore.handles import Durability
from kvstore.keys import format_folder
from kvstore.store import KVStore

__all__ = ["moto_bucket", "moto_url"]
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BUCKET = "arn:aws:s3:::my-bucket"
UNDER_PREFIX = f"{BUCKET}/kvstore/*"
# What AWS asks permission for, by the call of boto's client that needs it; and where that is granted.
ACTIONS = {
    "get_object": ("s3:GetObject", UNDER_PREFIX),
    "head_object": ("s3:GetObject", UNDER_PREFIX),
    "put_object": ("s3:PutObject", UNDER_PREFIX),
    "delete_objects": ("s3:DeleteObject", UNDER_PREFIX),
    "abort_multipart_upload": ("s3:AbortMultipartUpload", UNDER_PREFIX),
    "list_objects_v2": ("s3:ListBucket", BUCKET),
    "head_bucket": ("s3:ListBucket", BUCKET),
    "list_multipart_uploads": ("s3:ListBucketMultipartUploads", BUCKET),
}
# The calls behind what a store's meter counts.
OPERATIONS = {"get": "get_object", "head": "head_object", "put": "put_object", "list": "list_objects_v2"}


def allowed(policy: str) -> set[tuple[str, str]]:
    document = json.loads((DOCS / policy).read_text())
    assert document["Version"] == "2012-10-17"
    found = set()
    for statement in document["Statement"]:
        assert statement.keys() == {"Sid", "Effect", "Action", "Resource"}
        assert statement["Effect"] == "Allow"
        found |= {(action, statement["Resource"]) for action in statement["Action"]}
    return found


def test_administrators_may_do_what_the_s3_backend_does_and_no_more():
    made = set(re.findall(r"await client\.(\w+)\(", (ROOT / "backends/s3.py").read_text()))
    assert made == ACTIONS.keys()
    assert allowed("iam-admin.json") == set(ACTIONS.values())


def used_operations(store: KVStore) -> set[str]:
    chain = chain_of(3)
    assert store.wait_connected(PATIENCE_S)
    store.save(chain, range(2), Pages(3, text="a"), until=Durability.REMOTE).wait(PATIENCE_S)
    store._parts.presence.forget(chain.keys)
    store._parts.memory.clear()
    assert store.lookup(chain).chunks == 2
    store.load(chain, range(2), Pages(3)).wait(PATIENCE_S)
    store._loop.run(store._parts.watch.read())
    counted = store.metrics.registry.collect()
    samples = [sample for metric in counted for sample in metric.samples]
    requests = [sample for sample in samples if sample.name == "kvstore_backend_requests_total"]
    return {sample.labels["operation"] for sample in requests if sample.value}


def test_a_node_may_do_what_stores_do_and_no_more():
    with store_of(MemoryBackend()) as store:
        operations = used_operations(store)
    assert operations == OPERATIONS.keys()
    assert allowed("iam-node.json") == {ACTIONS[OPERATIONS[name]] for name in operations}


def test_the_documented_actions_are_those_of_the_policies():
    permissions = re.search(r"## Permissions\n(.*?)\n## ", (DOCS / "operations.md").read_text(), re.DOTALL)
    assert permissions is not None
    assert set(re.findall(r"s3:[A-Z]\w+", permissions[1])) == {action for action, _ in ACTIONS.values()}


def test_no_lifecycle_rule_expires_what_collections_keep():
    for rule in json.loads((DOCS / "lifecycle.json").read_text())["Rules"]:
        if "Expiration" in rule:
            assert rule["Filter"]["Prefix"] == format_folder("kvstore")
            assert not gc_folder("kvstore").startswith(rule["Filter"]["Prefix"])


@pytest.fixture
def client(moto_url, moto_bucket):
    return boto3.client("s3", endpoint_url=moto_url, region_name="us-east-1")


def test_a_server_takes_the_lifecycle_rules(client, moto_bucket):
    rules = json.loads((DOCS / "lifecycle.json").read_text())
    client.put_bucket_lifecycle_configuration(Bucket=moto_bucket, LifecycleConfiguration=rules)
    kept = client.get_bucket_lifecycle_configuration(Bucket=moto_bucket)["Rules"]
    assert [rule["ID"] for rule in kept] == [rule["ID"] for rule in rules["Rules"]]
