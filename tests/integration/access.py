"""Ways to a bucket: which server, how its URLs are written, which of our two planes asks if one does."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

import pytest

from kvstore.backends.s3 import S3Options
from localstack.contract import REGION, Store


@dataclass(frozen=True)
class Access:
    """One way. `server`: name of the fixture that runs it."""

    server: str
    plane: str = "both"
    style: Literal["path", "virtual"] = "path"
    tls: bool = False

    def __str__(self) -> str:
        return f"{self.server}-{'tls' if self.tls else 'http'}-{self.style}-{self.plane}"


def options_of(access: Access, store: Store, monkeypatch: pytest.MonkeyPatch, *, url: str = "") -> S3Options:
    """Options for it, and its credentials in the environment.

    url  asked in place of the server's own

    TLS is trusted by the setting in path style, by AWS_CA_BUNDLE in virtual-hosted style.
    """
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store.secret_key)
    url = url or (store.tls_url if access.tls else store.endpoint_urls[0])
    if access.style == "virtual":
        url = url.replace(urlsplit(url).hostname or "", store.virtual_domain)
        if access.tls:
            monkeypatch.setenv("AWS_CA_BUNDLE", store.ca_bundle)
    by_setting = access.tls and access.style == "path"
    return S3Options(
        store.bucket,
        url,
        region=REGION,
        addressing_style=access.style,
        ca_bundle=store.ca_bundle if by_setting else "",
    )
