"""An engine with the documented policy of a node, on a server that enforces policies."""

import urllib.request
from pathlib import Path

import boto3
import pytest
from aws_credentials import use_test_credentials
from samples import PATIENCE_S, Pages, chain_of, store_of

from kvstore.backends.s3 import S3Options
from kvstore.backends.s3_socket import S3SocketBackend
from kvstore.errors import MisconfiguredError
from kvstore.handles import Durability, SaveOutcome
from localstack.moto import moto_server

# As in the policy.
BUCKET, PREFIX = "my-bucket", "kvstore"
POLICY = Path(__file__).parents[2] / "docs/iam-node.json"


@pytest.fixture
def enforcing(monkeypatch):
    """A bucket on a moto that checks who may do what; the environment is a node's."""
    use_test_credentials(monkeypatch)
    with moto_server() as url:
        boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket=BUCKET)
        iam = boto3.client("iam", endpoint_url=url, region_name="us-east-1")
        iam.create_user(UserName="node")
        iam.put_user_policy(UserName="node", PolicyName="node", PolicyDocument=POLICY.read_text())
        key = iam.create_access_key(UserName="node")["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        # From the next request on.
        wanted = urllib.request.Request(
            f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}, method="POST"
        )
        urllib.request.urlopen(wanted).close()
        yield S3Options(BUCKET, url, region="us-east-1")


def test_an_engine_saves_finds_and_loads_with_the_policy_of_a_node(enforcing):
    chain = chain_of(3)
    with store_of(S3SocketBackend(enforcing), prefix=PREFIX) as saver:
        assert saver.wait_connected(PATIENCE_S)
        saved = saver.save(chain, range(2), Pages(3, text="a"), until=Durability.REMOTE).wait(PATIENCE_S)
        assert set(saved.values()) == {SaveOutcome.STORED}
    with store_of(S3SocketBackend(enforcing), prefix=PREFIX) as loader:
        # One that is absent must not look like one that may not be read.
        found = loader.lookup(chain)
        assert (found.chunks, loader.metrics.value("kvstore_lookup_failures_total")) == (2, 0)
        pages = Pages(3)
        assert loader.load(chain, range(2), pages).wait(PATIENCE_S).failures == {}
        pages.assert_holds(range(2))


def test_with_it_nothing_is_deleted_nor_written_elsewhere(enforcing):
    with store_of(S3SocketBackend(enforcing), prefix=PREFIX) as store:
        backend = store._parts.backend
        with pytest.raises(MisconfiguredError, match="AccessDenied"):
            store._loop.run(backend.put("elsewhere/object", [b""], if_absent=True))
        store._loop.run(backend.put(f"{PREFIX}/object", [b""], if_absent=True))
        with pytest.raises(MisconfiguredError, match="AccessDenied"):
            store._loop.run(backend.delete([f"{PREFIX}/object"]))
