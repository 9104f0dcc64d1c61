"""Making the bucket of a store that has just started."""

from __future__ import annotations

import contextlib
import http.client
from urllib.parse import urlsplit

from localstack.contract import REGION, ServerError, Store


def make_bucket(store: Store, *, signed: bool) -> None:
    """Make `store.bucket` unless it is there. Raises ServerError with the server's answer if it says no.

    signed: for servers that check it. It takes botocore, which is slow to import.
    """
    url = f"{store.endpoint_urls[0]}/{store.bucket}"
    headers = _signed_headers(store, url) if signed else {}
    where = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(where.netloc)) as connection:
        connection.request("PUT", where.path, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
    if answer.status != http.HTTPStatus.OK:
        raise ServerError(f"the bucket {store.bucket} cannot be made: HTTP {answer.status} {text}")


def _signed_headers(store: Store, url: str) -> dict[str, str]:
    # Without boto3, which would read the user's configuration files and follow what they say.
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    request = AWSRequest("PUT", url, data=b"")
    S3SigV4Auth(Credentials(store.access_key, store.secret_key), "s3", REGION).add_auth(request)
    return dict(request.headers)
