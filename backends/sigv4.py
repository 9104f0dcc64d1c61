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


class Signer:
    """Signs requests to one host and region. Thread-safe: it only caches what anyone would compute.

    host    the Host header, with a port unless it is the scheme's own
    clock   seconds since 1970
    """

    def __init__(self, host: str, region: str, *, clock: Callable[[], float] = time.time) -> None:
        self._host = host
        self._region = region
        self._clock = clock
        self._key: tuple[str, Credentials, bytes] | None = None

    def headers(
        self,
        method: str,
        path: str,
        credentials: Credentials,
        headers: Sequence[tuple[str, str]] = (),
    ) -> list[tuple[str, str]]:
        """All headers the request must have, the signature among them.

        path     percent-encoded, as it is sent, without a query
        headers  further ones to sign, names in lower case, values without spaces around them
        """
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._clock()))
        signed = [
            ("host", self._host),
            ("x-amz-content-sha256", UNSIGNED_BODY),
            ("x-amz-date", stamp),
            *headers,
        ]
        if credentials.token:
            signed.append(("x-amz-security-token", credentials.token))
        signed.sort()
        names = ";".join(name for name, _ in signed)
        lines = "".join(f"{name}:{value}\n" for name, value in signed)
        request = f"{method}\n{path}\n\n{lines}\n{names}\n{UNSIGNED_BODY}"
        scope = f"{stamp[:8]}/{self._region}/s3/aws4_request"
        digest = hashlib.sha256(request.encode()).hexdigest()
        key = self._signing_key(stamp[:8], credentials)
        signature = hmac.digest(key, f"{_ALGORITHM}\n{stamp}\n{scope}\n{digest}".encode(), "sha256").hex()
        proof = f"Credential={credentials.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
        return [*signed, ("authorization", f"{_ALGORITHM} {proof}")]

    def _signing_key(self, day: str, credentials: Credentials) -> bytes:
        """Derived from the secret, the same for a day."""
        cached = self._key
        if cached is not None and cached[0] == day and cached[1] == credentials:
            return cached[2]
        key = f"AWS4{credentials.secret_key}".encode()
        for part in (day, self._region, "s3", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        self._key = (day, credentials, key)
        return key


def encoded_path(folder: str, name: str) -> str:
    """The path of object `name` below the path `folder`, percent-encoded once as S3 wants it."""
    return f"{folder}/{quote(name, safe='/-_.~')}"
