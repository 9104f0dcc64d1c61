"""What a server module offers, and what a running store says of itself.

A module of this folder has `serve(folder, **options)`, a context manager that starts its server,
waits until it answers, gives a description that JSON can carry, and stops what it started.
Everything it writes lies in `folder`, where a later `serve` finds again what its server keeps
across restarts. It runs in a process of its own, the keeper, so nobody calls it directly: the
module's other functions do, through `keeper.kept`.

Where it needs something installed it also has `install()`, which `serve` begins with: it gets what
is missing where that is possible, and raises ServerError that says how to get it where not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BUCKET = "kvstore"
REGION = "us-east-1"


class ServerError(Exception):
    """A server could not start, or ended by itself; the message says what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """A running store, and a bucket in it that was empty at first. What `serve` of an S3 server describes.

    bucket          value for KVSTORE_BUCKET
    endpoint_urls   of each gateway to it; none for a store that is no server
    tls_url         its endpoint over TLS; empty if it has none
    ca_bundle       file of the certificate authority that vouches for `tls_url`
    virtual_domain  it takes `<bucket>.<virtual_domain>` as the host of a URL; empty if it cannot.
                    This machine may not know such names
    """

    bucket: str = BUCKET
    endpoint_urls: tuple[str, ...] = ()
    tls_url: str = ""
    ca_bundle: str = ""
    virtual_domain: str = ""
    access_key: str = ""
    secret_key: str = ""

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Store:
        """The store that a `serve` described by its fields."""
        return cls(**{**description, "endpoint_urls": tuple(description["endpoint_urls"])})

    def environment(self, *, tls: bool = False) -> dict[str, str]:
        """What points a kvstore process at the bucket."""
        found = {"KVSTORE_BUCKET": self.bucket}
        if not self.endpoint_urls:
            return found
        found |= {
            "KVSTORE_ENDPOINT_URL": self.tls_url if tls else self.endpoint_urls[0],
            "KVSTORE_REGION": REGION,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            # No proxy of this machine can reach a server on it.
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return found | ({"AWS_CA_BUNDLE": self.ca_bundle} if tls else {})
