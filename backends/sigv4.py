"""Signing requests for S3: AWS Signature Version 4 in the authorization header.

Spec: docs.aws.amazon.com, "Authenticating Requests: Using the Authorization Header". Bodies are
not signed: chunks carry checksums of their own, and hashing a body costs more than sending it.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote

UNSIGNED_BODY = "UNSIGNED-PAYLOAD"
_ALGORITHM = "AWS4-HMAC-SHA256"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What signs a request. Its repr shows nothing."""

    access_key: str
    secret_key: str
    token: str = ""

    def __repr__(self) -> str:
        return "Credentials(****)"


class _Second(NamedTuple):
    """What all signatures of one second have in common."""

    clock_s: int
    credentials: Credentials
    stamp: str
    scope: str
    key: hmac.HMAC


class Signer:
    """Signs requests to one host and region. Thread-safe: it only caches what anyone would compute.

    host    the Host header, with a port unless it is the scheme's own
    clock   seconds since 1970
    """

    def __init__(self, host: str, region: str, *, clock: Callable[[], float] = time.time) -> None:
        self._host = host
        self._region = region
        self._clock = clock
        self._latest: _Second | None = None

    def lines(
        self,
        method: str,
        path: str,
        credentials: Credentials,
        headers: Sequence[tuple[str, str]] = (),
    ) -> str:
        """All header lines that the request must have, each `name:value` and a newline; the signature last.

        path     percent-encoded, as it is sent, without a query
        headers  further ones to sign, names in lower case, values without spaces around them
        """
        second = self._second(credentials)
        fields = [
            ("host", self._host),
            ("x-amz-content-sha256", UNSIGNED_BODY),
            ("x-amz-date", second.stamp),
            *headers,
        ]
        if credentials.token:
            fields.append(("x-amz-security-token", credentials.token))
        fields.sort()
        names = ";".join([name for name, _ in fields])
        lines = "".join([f"{name}:{value}\n" for name, value in fields])
        request = f"{method}\n{path}\n\n{lines}\n{names}\n{UNSIGNED_BODY}"
        digest = hashlib.sha256(request.encode()).hexdigest()
        signing = second.key.copy()
        signing.update(f"{_ALGORITHM}\n{second.stamp}\n{second.scope}\n{digest}".encode())
        return (
            f"{lines}authorization:{_ALGORITHM} Credential={credentials.access_key}/{second.scope}, "
            f"SignedHeaders={names}, Signature={signing.hexdigest()}\n"
        )

    def _second(self, credentials: Credentials) -> _Second:
        now_s = int(self._clock())
        latest = self._latest
        if latest is not None and latest.clock_s == now_s and latest.credentials is credentials:
            return latest
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
        day = stamp[:8]
        key = f"AWS4{credentials.secret_key}".encode()
        for part in (day, self._region, "s3", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        scope = f"{day}/{self._region}/s3/aws4_request"
        self._latest = _Second(now_s, credentials, stamp, scope, hmac.new(key, digestmod="sha256"))
        return self._latest


@lru_cache(maxsize=1024)
def encoded_path(folder: str, name: str) -> str:
    """The path of object `name` below the path `folder`, percent-encoded once as S3 wants it.

    Cached: chunks are read in many ranges.
    """
    return f"{folder}/{quote(name, safe='/-_.~')}"
