import socket

import pytest
from real_servers import clean_environment, localstack, moto, rgw

__all__ = ["clean_environment", "localstack", "moto", "rgw"]


@pytest.fixture(autouse=True)
def _names_below_localhost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that end in .localhost are this machine, as RFC 6761 has it and not every system does."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *arguments, **options):
        local = isinstance(host, str) and host.endswith(".localhost")
        return resolve("127.0.0.1" if local else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
