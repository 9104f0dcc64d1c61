"""Promises about uploads in parts, of backends whose store takes them.

`UploadPromises` wants a subclass with a fixture that sets `options`, for a bucket that is there, and
with `make_backend`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

import boto3
from botocore.config import Config
from gc_bucket import EVERYTHING, NAMESPACE, SHARD, Bucket, chain

from kvstore.backends.contract import Backend, UnfinishedUpload, UploadsInParts
from kvstore.backends.s3 import S3Options
from kvstore.gc.policy import Policy
from kvstore.keys import namespace_folder, object_name

T = TypeVar("T")
CLOCK_TOLERANCE_S = 30.0


def begin_uploads(options: S3Options, names: list[str]) -> list[str]:
    """Begin an upload of each of `names`, and send one part of it; the store's ids."""
    client = boto3.client(
        "s3",
        endpoint_url=options.endpoint_url,
        region_name=options.region or "us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    ids = []
    for name in names:
        ids.append(client.create_multipart_upload(Bucket=options.bucket, Key=name)["UploadId"])
        client.upload_part(Bucket=options.bucket, Key=name, UploadId=ids[-1], PartNumber=1, Body=b"part")
    return ids


class UploadPromises:
    options: S3Options
    knows_begin = True
    """Whether the server knows when an upload was begun: moto says 2010 of all of them."""

    def make_backend(self) -> Backend:
        raise NotImplementedError

    def run(self, work: Callable[[UploadsInParts], Awaitable[T]]) -> T:
        async def opened() -> T:
            backend = self.make_backend()
            assert isinstance(backend, UploadsInParts)
            try:
                return await work(backend)
            finally:
                await backend.close()

        return asyncio.run(opened())

    def unfinished(self, prefix: str) -> list[UnfinishedUpload]:
        async def listed(backend: UploadsInParts) -> list[UnfinishedUpload]:
            return [upload async for upload in backend.unfinished_uploads(prefix)]

        return self.run(listed)

    def test_unfinished_uploads_under_a_prefix_are_listed_and_no_others(self):
        folder = uuid.uuid4().hex
        names = [f"{folder}/a", f"{folder}/a", f"{folder}/b/c"]
        ids = begin_uploads(self.options, [*names, f"{folder}x"])
        found = self.unfinished(f"{folder}/")
        assert sorted((each.name, each.upload_id) for each in found) == sorted(
            zip(names, ids[:3], strict=True)
        )
        if self.knows_begin:
            assert all(abs(each.begun_s - time.time()) < CLOCK_TOLERANCE_S for each in found)

    def test_an_aborted_upload_is_gone_and_aborting_it_again_is_no_error(self):
        folder = uuid.uuid4().hex
        begin_uploads(self.options, [f"{folder}/a", f"{folder}/b"])
        first, second = self.unfinished(f"{folder}/")

        async def abort(backend: UploadsInParts) -> None:
            await backend.abort_upload(first)
            await backend.abort_upload(first)

        self.run(abort)
        assert self.unfinished(f"{folder}/") == [second]

    def test_a_collection_aborts_what_was_begun_before_the_grace_and_nothing_foreign(self):
        bucket = Bucket(self.make_backend)
        bucket.fill(chain(1))
        folder = namespace_folder("kvstore", NAMESPACE.name)
        abandoned = object_name("kvstore", chain(2)[1], SHARD)
        begin_uploads(self.options, [abandoned, f"{folder}00/foreign", "elsewhere"])
        if self.knows_begin:
            report = bucket.collect(Policy(grace_s=3600.0))
            assert (report.aborted.uploads, report.aborted.fault) == ((), "")
            assert len(self.unfinished(folder)) == 2
        report = bucket.collect(EVERYTHING)
        assert [each.name for each in report.aborted.uploads] == [abandoned]
        assert [each.name for each in self.unfinished(folder)] == [f"{folder}00/foreign"]
        assert len(self.unfinished("elsewhere")) == 1

    def test_a_look_aborts_nothing(self):
        bucket = Bucket(self.make_backend)
        bucket.fill(chain(1))
        abandoned = object_name("kvstore", chain(2)[1], SHARD)
        begin_uploads(self.options, [abandoned])
        assert [each.name for each in bucket.look().abandoned.uploads] == [abandoned]
        assert len(self.unfinished(abandoned)) == 1
