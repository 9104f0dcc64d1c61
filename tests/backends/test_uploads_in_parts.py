import asyncio

import pytest
from aws_credentials import use_test_credentials
from canned_server import CannedServer, answer, canned_server, error
from moto_buckets import moto_bucket, moto_url
from s3_planes import PLANES, open_plane
from uploads_in_parts import UploadPromises

from kvstore.backends.contract import Backend, UnfinishedUpload
from kvstore.backends.s3 import S3Backend, S3Options
from kvstore.errors import MisconfiguredError, RetryableError
from kvstore.gc.pace import Pace
from kvstore.gc.uploads import find_abandoned
from kvstore.retries import Retries

__all__ = ["moto_bucket", "moto_url"]


class TestUploadsInPartsOnMoto(UploadPromises):
    knows_begin = False

    @pytest.fixture(autouse=True, params=PLANES)
    def _store(self, request: pytest.FixtureRequest, moto_url: str, moto_bucket: str) -> None:
        self.plane = request.param
        self.options = S3Options(moto_bucket, moto_url)

    def make_backend(self) -> Backend:
        return open_plane(self.plane, self.options)

    def test_a_bucket_that_is_not_there_is_said(self):
        self.options = S3Options("no-such-bucket", self.options.endpoint_url)
        with pytest.raises(MisconfiguredError, match="make the bucket"):
            self.unfinished("")


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    use_test_credentials(monkeypatch)


def listing(*names: str, more: str = "") -> bytes:
    uploads = "".join(
        f"<Upload><Key>{name}</Key><UploadId>id-{name}</UploadId>"
        "<Initiated>2026-01-01T00:00:00.000Z</Initiated></Upload>"
        for name in names
    )
    body = f"<ListMultipartUploadsResult>{uploads}{more}</ListMultipartUploadsResult>"
    return answer("200 OK", body.encode(), content_type="application/xml")


def listed(*answers: bytes) -> tuple[list[UnfinishedUpload], CannedServer]:
    async def run() -> tuple[list[UnfinishedUpload], CannedServer]:
        async with canned_server(*answers) as server:
            backend = S3Backend(S3Options("my-bucket", server.url, region="us-east-1"))
            try:
                return [upload async for upload in backend.unfinished_uploads("a")], server
            finally:
                await backend.close()

    return asyncio.run(run())


def test_a_listing_of_several_pages_is_read_to_its_end():
    markers = "<NextKeyMarker>k</NextKeyMarker><NextUploadIdMarker>u</NextUploadIdMarker>"
    more = f"<IsTruncated>true</IsTruncated>{markers}"
    found, server = listed(listing("a", more=more), listing("ab"))
    assert [(each.name, each.upload_id, each.begun_s) for each in found] == [
        ("a", "id-a", 1_767_225_600.0),
        ("ab", "id-ab", 1_767_225_600.0),
    ]
    assert "key-marker=k" in server.requests[1].target
    assert "upload-id-marker=u" in server.requests[1].target


def test_a_listing_that_does_not_say_how_it_goes_on_is_retryable():
    with pytest.raises(RetryableError):
        listed(listing("a", more="<IsTruncated>true</IsTruncated>"))


def test_uploads_that_a_store_lists_without_being_asked_for_are_left_out():
    found, _ = listed(listing("a", "b"))
    assert [each.name for each in found] == ["a"]


def test_a_store_without_uploads_in_parts_has_none_to_show():
    assert listed(error("501 Not Implemented", "NotImplemented"))[0] == []


def test_a_permission_that_is_missing_is_a_fault_and_not_the_end_of_a_collection():
    async def run() -> tuple[tuple[UnfinishedUpload, ...], str]:
        async with canned_server(error("403 Forbidden", "AccessDenied")) as server:
            backend = S3Backend(S3Options("my-bucket", server.url, region="us-east-1"))
            try:
                return await find_abandoned(backend, Pace(1000, 1, Retries()), "a", 2e9)
            finally:
                await backend.close()

    uploads, fault = asyncio.run(run())
    assert uploads == ()
    assert "AccessDenied" in fault
    assert "s3:ListBucketMultipartUploads" in fault
