import pytest

from kvstore.backends.s3 import S3Options
from kvstore.backends.s3_socket import S3SocketBackend
from kvstore.testing import BackendConformance


class TestS3SocketBackendOnMoto(BackendConformance):
    @pytest.fixture(autouse=True)
    def _store(self, moto_url: str, moto_bucket: str) -> None:
        self.options = S3Options(moto_bucket, moto_url)

    def make_backend(self) -> S3SocketBackend:
        return S3SocketBackend(self.options)
