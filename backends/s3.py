"""Objects in a bucket of S3 or of a store that speaks its protocol, through aiobotocore."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal

from kvstore.backends import s3_answers
from kvstore.backends.arguments import check_name, check_range
from kvstore.backends.contract import (
    ABSENT,
    Absent,
    Buffer,
    Capabilities,
    ObjectInfo,
    PutResult,
    PutStatus,
    ReadResult,
    UnfinishedUpload,
)
from kvstore.backends.s3_body import PartsBody
from kvstore.backends.sigv4 import Credentials
from kvstore.errors import MisconfiguredError, RetryableError
from kvstore.masking import without_user

DELETE_BATCH = 1000


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where a bucket is and how to talk to it.

    endpoint_url, region  empty for what the AWS configuration chain says
    addressing_style      where the bucket's name stands in URLs; auto: in the host where that works
    ca_bundle             file of certificate authorities for https; empty for AWS_CA_BUNDLE or the usual ones
    connect_timeout_s     to set up a connection
    read_timeout_s        between two pieces of an answer
    max_connections       requests in flight; more wait for one of them to end
    """

    bucket: str
    endpoint_url: str = ""
    region: str = ""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    ca_bundle: str = ""
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 15.0
    max_connections: int = 64

    @property
    def location(self) -> str:
        """The bucket's URL, without what an endpoint URL may hold of user and password."""
        if not self.endpoint_url:
            return f"s3://{self.bucket}"
        return f"{without_user(self.endpoint_url).rstrip('/')}/{self.bucket}"


@dataclass(frozen=True, slots=True)
class Located:
    """Where requests for a bucket's objects go, by boto's own rules.

    url          of the bucket, its name in the host or the path
    region       the one to sign for
    credentials  gives those to sign with now, refreshed when they are about to expire
    """

    url: str
    region: str
    credentials: Callable[[], Awaitable[Credentials]]


class OtherRegionError(Exception):
    """The bucket is in another region than the request was signed for."""

    def __init__(self, region: str) -> None:
        super().__init__(region)
        self.region = region


class S3Backend:
    """See Backend. Credentials come from the standard AWS chain.

    The store must honour If-None-Match on PUT and send ETags; nothing else beyond the basics is
    relied on. Stores whose listings are unordered (S3 directory buckets) are refused when listing.
    Connects on first use. Never retries: the layer above does.
    """

    # s3_errors is imported in the methods: it imports botocore, which nothing needs before a call.

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self._open_client = AsyncExitStack()
        self._session: Any = None
        self._connecting: asyncio.Task[Any] | None = None
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """See Backend.capabilities."""
        return Capabilities(conditional_put=True, shared=True, persistent=True)

    @property
    def location(self) -> str:
        """See Backend.location."""
        return self._options.location

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        """See Backend.read_into."""
        check_name(name)
        check_range(offset, out)
        client = await self._connected()
        from kvstore.backends import s3_errors

        with s3_errors.translated(self._options, f"read {name!r}"):
            last = offset + len(out) - 1
            try:
                response = await client.get_object(
                    Bucket=self._options.bucket, Key=name, Range=f"bytes={offset}-{last}"
                )
            except s3_errors.ClientError as error:
                if s3_errors.is_absence(error):
                    return ABSENT
                if s3_errors.status_of(error) != s3_errors.RANGE_NOT_SATISFIABLE:
                    raise
            else:
                return await s3_answers.receive(response, offset, out, if_match)
        return await self._read_past_the_end(name, offset)

    async def _read_past_the_end(self, name: str, offset: int) -> ReadResult | Literal[Absent.ABSENT]:
        # The refusal of a range tells no ETag, and not every store tells the size.
        info = await self.head(name)
        if info is None:
            return ABSENT
        if offset < info.object_bytes:
            raise RetryableError(f"{name!r} grew while it was read; read it again")
        return ReadResult(0, info.object_bytes, info.etag)

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        """See Backend.put."""
        check_name(name)
        client = await self._connected()
        from kvstore.backends import s3_errors

        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with s3_errors.translated(self._options, f"write {name!r}"), PartsBody(parts) as body:
            try:
                response = await client.put_object(
                    Bucket=self._options.bucket,
                    Key=name,
                    Body=body,
                    ContentType="application/octet-stream",
                    **condition,
                )
            except s3_errors.ClientError as error:
                if if_absent and s3_errors.status_of(error) == s3_errors.PRECONDITION_FAILED:
                    return PutResult(PutStatus.EXISTS)
                raise
            return PutResult(PutStatus.CREATED, s3_answers.etag_of(response))

    async def head(self, name: str) -> ObjectInfo | None:
        """See Backend.head. A missing bucket looks like a missing object here."""
        check_name(name)
        client = await self._connected()
        from kvstore.backends import s3_errors

        with s3_errors.translated(self._options, f"look at {name!r}"):
            try:
                response = await client.head_object(Bucket=self._options.bucket, Key=name)
            except s3_errors.ClientError as error:
                if s3_errors.is_absence(error):
                    return None
                raise
            return s3_answers.describe(name, response, size_field="ContentLength")

    async def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        """See Backend.list. Holds one page of 1,000 objects at a time."""
        client = await self._connected()
        from kvstore.backends import s3_errors

        query = {"Bucket": self._options.bucket, "Prefix": prefix}
        if start_after:
            query["StartAfter"] = start_after
        last = start_after
        while True:
            with s3_errors.translated(self._options, f"list {prefix!r}"):
                response = await client.list_objects_v2(**query)
                page = [
                    s3_answers.describe(found["Key"], found, size_field="Size")
                    for found in response.get("Contents", ())
                ]
            for info in page:
                if info.name <= last:
                    raise MisconfiguredError(
                        f"{self.location} does not list objects in the order of their names; "
                        "set KVSTORE_BUCKET to a general purpose bucket"
                    )
                last = info.name
                yield info
            if not response.get("IsTruncated"):
                return
            query["ContinuationToken"] = s3_answers.field_of(response, "NextContinuationToken")

    async def delete(self, names: Sequence[str]) -> None:
        """See Backend.delete. One request for every 1,000 names; all are tried if none fails as a whole."""
        for name in names:
            check_name(name)
        client = await self._connected()
        from kvstore.backends import s3_errors

        refused = []
        for first in range(0, len(names), DELETE_BATCH):
            batch = names[first : first + DELETE_BATCH]
            with s3_errors.translated(self._options, f"delete {len(batch)} objects"):
                response = await client.delete_objects(
                    Bucket=self._options.bucket,
                    Delete={"Objects": [{"Key": name} for name in batch], "Quiet": True},
                )
            refused += response.get("Errors", ())
        s3_errors.raise_refused(self._options, refused)

    async def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        """See UploadsInParts.unfinished_uploads. A store that knows no such listing has none to show."""
        client = await self._connected()
        from kvstore.backends import s3_errors

        query = {"Bucket": self._options.bucket, "Prefix": prefix}
        while True:
            with s3_errors.translated(self._options, f"list unfinished uploads of {prefix!r}"):
                try:
                    response = await client.list_multipart_uploads(**query)
                except s3_errors.ClientError as error:
                    if s3_errors.status_of(error) == s3_errors.NOT_IMPLEMENTED:
                        return
                    raise
                page = [s3_answers.describe_upload(found) for found in response.get("Uploads", ())]
            for upload in page:
                if upload.name.startswith(prefix):
                    yield upload
            if not response.get("IsTruncated"):
                return
            for marker in ("KeyMarker", "UploadIdMarker"):
                query[marker] = s3_answers.field_of(response, f"Next{marker}")

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        """See UploadsInParts.abort_upload."""
        client = await self._connected()
        from kvstore.backends import s3_errors

        with s3_errors.translated(self._options, f"abort an upload of {upload.name!r}"):
            try:
                await client.abort_multipart_upload(
                    Bucket=self._options.bucket, Key=upload.name, UploadId=upload.upload_id
                )
            except s3_errors.ClientError as error:
                if not s3_errors.is_absence(error):
                    raise

    async def clock_s(self) -> float:
        """See Backend.clock_s. To the second."""
        client = await self._connected()
        from kvstore.backends import s3_errors

        with s3_errors.translated(self._options, "look at the bucket"):
            return s3_answers.date_of(await client.head_bucket(Bucket=self._options.bucket))

    async def close(self) -> None:
        """See Backend.close."""
        self._closed = True
        if self._connecting is not None:
            await asyncio.wait((self._connecting,))
        await self._open_client.aclose()

    async def _connected(self) -> Any:
        """The client. It belongs to the running event loop, so the first call makes it.

        That takes longer than some callers wait, so it goes on when they are cancelled.
        """
        if self._closed:
            raise MisconfiguredError(f"the backend of {self.location} was used after close(); open another")
        if self._connecting is None or has_failed(self._connecting):
            self._connecting = asyncio.create_task(self._connect())
            # Looks at its exception, which asyncio would report as lost if every caller has left.
            self._connecting.add_done_callback(has_failed)
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> Any:
        # In a thread: the import takes half a second, in which the event loop must keep its deadlines.
        await asyncio.to_thread(importlib.import_module, "kvstore.backends.s3_client")
        from kvstore.backends import s3_client, s3_errors

        with s3_errors.setting_up(self._options):
            client, self._session = await self._open_client.enter_async_context(
                s3_client.connect(self._options)
            )
            return client

    async def locate(self) -> Located:
        """Where and as whom boto would send a request for an object of the bucket."""
        client = await self._connected()
        from kvstore.backends import s3_client, s3_errors

        with s3_errors.setting_up(self._options):
            url, region = await s3_client.address_of(client, self._options.bucket)

        async def credentials() -> Credentials:
            with s3_errors.translated(self._options, "sign a request"):
                return await s3_client.credentials_of(self._session)

        return Located(url, region, credentials)


def has_failed(task: asyncio.Task[Any]) -> bool:
    """Whether a task has ended without a result."""
    return task.done() and (task.cancelled() or task.exception() is not None)
