import pytest
from integration.access import Access, options_of
from s3_planes import PLANES, open_plane

from kvstore.backends.contract import Backend
from kvstore.testing import BackendConformance

# Path-style on moto is in the tests that need nothing installed; RGW over TLS path-style in test_parity.
WAYS = [
    Access(server, plane, style, tls)
    for server, style, tls in (
        ("rgw", "path", False),
        ("rgw", "virtual", False),
        ("rgw", "virtual", True),
        ("localstack", "path", False),
        ("localstack", "virtual", False),
        ("moto", "virtual", False),
    )
    for plane in PLANES
]


class TestS3OnRealServers(BackendConformance):
    @pytest.fixture(autouse=True, params=WAYS, ids=str)
    def _store(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        access = request.param
        self.plane = access.plane
        self.options = options_of(access, request.getfixturevalue(access.server), monkeypatch)

    def make_backend(self) -> Backend:
        return open_plane(self.plane, self.options)
