import pytest
from integration.access import Access, options_of
from s3_planes import open_plane
from uploads_in_parts import UploadPromises

from kvstore.backends.contract import Backend


class TestUploadsInPartsOnRealServers(UploadPromises):
    @pytest.fixture(autouse=True, params=["rgw", "localstack"])
    def _store(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        server = request.getfixturevalue(request.param)
        self.options = options_of(Access(request.param), server, monkeypatch)

    def make_backend(self) -> Backend:
        return open_plane("socket", self.options)
