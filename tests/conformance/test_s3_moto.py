import pytest

from kvstore.backends.s3 import S3Backend, S3Options
from kvstore.testing import BackendConformance


class TestS3BackendOnMoto(BackendConformance):
    @pytest.fixture(autouse=True)
    def _store(self, moto_url: str, moto_bucket: str) -> None:
        self.options = S3Options(moto_bucket, moto_url)

    def make_backend(self) -> S3Backend:
        return S3Backend(self.options)
