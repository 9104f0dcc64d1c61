"""A folder in the bucket of a real S3 server, for engines, and what a test asks of it."""

from __future__ import annotations

import time
from typing import Any

import boto3
import pytest
from aws_credentials import use_test_credentials
from vllm_engines import transfer_config

from kvstore.keys import format_folder
from localstack.contract import REGION, Store

PATIENCE_S = 60.0


class EngineBucket:
    """The chunks of one test module. `prefix`: its own, so that nothing else is counted."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def config(self, url: str = "", **settings: str) -> dict[str, Any]:
        """For --kv-transfer-config. `url`: asked in place of the server's own."""
        return transfer_config(
            self._store.bucket,
            KVSTORE_ENDPOINT_URL=url or self._store.endpoint_urls[0],
            KVSTORE_REGION=REGION,
            KVSTORE_PREFIX=self._prefix,
            **settings,
        )

    def use_credentials(self, patch: pytest.MonkeyPatch) -> None:
        """Put them into the environment of this process, and of those it starts."""
        use_test_credentials(patch)
        patch.setenv("AWS_ACCESS_KEY_ID", self._store.access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", self._store.secret_key)

    def chunks(self) -> int:
        """How many chunk objects there are, up to 1,000."""
        client = boto3.client(
            "s3",
            endpoint_url=self._store.endpoint_urls[0],
            region_name=REGION,
            aws_access_key_id=self._store.access_key,
            aws_secret_access_key=self._store.secret_key,
        )
        listing = client.list_objects_v2(Bucket=self._store.bucket, Prefix=format_folder(self._prefix))
        return sum(not each["Key"].endswith(".json") for each in listing.get("Contents", ()))

    def wait_until_holds(self, chunks: int) -> None:
        """Return when there are so many, and fail if there are more."""
        until_s = time.monotonic() + PATIENCE_S
        while (found := self.chunks()) < chunks:
            assert time.monotonic() < until_s, f"{found} of {chunks}"
            time.sleep(0.2)
        assert found == chunks
