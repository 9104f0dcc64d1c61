"""The aiobotocore client that `S3Backend` uses. Importing this imports aiobotocore."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.exceptions import MissingDependencyException, NoCredentialsError
from botocore.httpsession import get_cert_path
from botocore.loaders import Loader, create_loader
from botocore.utils import parse_timestamp

from kvstore.backends.s3 import S3Options
from kvstore.backends.sigv4 import Credentials
from kvstore.errors import MisconfiguredError

_ANY_NAME = "object"


_locating: ContextVar[bool] = ContextVar("_locating", default=False)


class _Located(Exception):  # noqa: N818 no error: it carries what was to be known
    """Ends a request before it is signed and sent."""

    def __init__(self, url: str, region: str) -> None:
        super().__init__(url)
        self.url = url
        self.region = region


@asynccontextmanager
async def connect(options: S3Options) -> AsyncIterator[tuple[Any, AioSession]]:
    """A client for the running event loop, set up from `options` and the AWS configuration chain.

    With it the session that has its credentials.
    """
    session = AioSession()
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time_of)
    events = session.get_component("event_emitter")
    events.register("before-sign.s3.PutObject", _send_body_at_once)
    events.register("before-sign.s3.DeleteObjects", _add_md5)
    async with session.create_client(
        "s3",
        endpoint_url=options.endpoint_url or None,
        # botocore itself reads AWS_DEFAULT_REGION alone; other AWS SDKs set and read AWS_REGION.
        region_name=options.region or os.environ.get("AWS_REGION") or None,
        verify=options.ca_bundle or None,
        config=_config(options),
    ) as client:
        # TLS protects a body, over plain http the signature must. Only the client knows which it
        # is: the endpoint may come from the AWS chain.
        encrypted = client.meta.endpoint_url.startswith("https:")
        client.meta.events.register_first("needs-retry.s3", _leave_region)
        client.meta.config.s3 = {**client.meta.config.s3, "payload_signing_enabled": not encrypted}
        client.meta.events.register_first("before-sign.s3.HeadObject", _stop_if_locating)
        if options.ca_bundle or session.get_config_variable("ca_bundle"):
            # Every request reads it, plain ones too; one that cannot does not say which file it is.
            await asyncio.to_thread(tls_context, options)
        yield client, session


def _time_of(value: Any) -> datetime:
    """A time in an answer, as botocore has it, which takes four fifths of a listing's CPU to read them."""
    with contextlib.suppress(TypeError, ValueError):
        found = datetime.fromisoformat(value)
        if found.tzinfo is not None:
            return found
    return parse_timestamp(value)  # type: ignore[no-any-return]  # botocore has no annotations


async def address_of(client: Any, bucket: str) -> tuple[str, str]:
    """The URL of `bucket` and the region to sign for, as `client` would have them. Sends nothing."""
    locating = _locating.set(True)
    try:
        await client.head_object(Bucket=bucket, Key=_ANY_NAME)
    except _Located as located:
        return located.url.removesuffix(f"/{_ANY_NAME}"), located.region
    finally:
        _locating.reset(locating)
    raise MissingDependencyException(msg="botocore made a request without signing it")


async def credentials_of(session: AioSession) -> Credentials:
    """What to sign with now; credentials about to expire are refreshed. Raises NoCredentialsError."""
    credentials = await session.get_credentials()
    if credentials is None:
        raise NoCredentialsError
    frozen = await credentials.get_frozen_credentials()
    return Credentials(frozen.access_key, frozen.secret_key, frozen.token or "")


def _stop_if_locating(request: Any, region_name: str, **_: Any) -> None:
    if _locating.get():
        raise _Located(request.url, request.context.get("signing", {}).get("region") or region_name)


@cache
def _loader(data_path: str | None) -> Loader:
    """Reads and keeps the description of S3: a fifth of a second that only the first client takes."""
    return create_loader(data_path)


def _config(options: S3Options) -> Any:
    return AioConfig(
        s3={"addressing_style": options.addressing_style},
        signature_version="s3v4",
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        max_pool_connections=options.max_connections,
        retries={"total_max_attempts": 1, "mode": "standard"},
        # Chunks carry their own checksums, and some stores refuse the trailers that carry S3's.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        http_session_cls=_NoRedirects,
        # In a thread, so that the event loop keeps its deadlines meanwhile.
        warm_up_loader_caches=True,
    )


class _NoRedirects(AIOHTTPSession):  # type: ignore[misc]  # aiobotocore has no types
    """Leaves redirects to botocore; aiohttp would follow them itself, unsigned and to any host."""

    async def _get_session(self, proxy_url: str | None) -> Any:
        session = await super()._get_session(proxy_url)
        return SimpleNamespace(request=partial(session.request, allow_redirects=False))


def _send_body_at_once(request: Any, **_: Any) -> None:
    # botocore asks for '100 Continue' before every body that is not bytes. That costs a round
    # trip, and aiohttp waits without end for a server that does not know it.
    del request.headers["Expect"]


def _leave_region(request_dict: Any, **_: Any) -> None:
    # Else botocore asks for the bucket's region and sends the request there, and does so without
    # end when the answer is a redirect again. A wrong region is for a person to mend.
    request_dict["context"]["s3_redirect"]["redirected"] = True


def _add_md5(request: Any, **_: Any) -> None:
    # Many stores refuse DeleteObjects with the CRC32 that botocore sends in place of the MD5.
    digest = hashlib.md5(request.data, usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()


def tls_context(options: S3Options) -> ssl.SSLContext:
    """How to verify a server: by the certificates that boto takes, and the system's own.

    Raises MisconfiguredError for a bundle that cannot be read. Reads files.
    """
    bundle = options.ca_bundle or AioSession().get_config_variable("ca_bundle")
    try:
        context = ssl.create_default_context(cafile=bundle)
        if not bundle:
            context.load_verify_locations(get_cert_path(verify=True))
    except OSError as error:
        raise MisconfiguredError(
            f"cannot read certificate authorities from {bundle or get_cert_path(verify=True)}: "
            f"{error.strerror or error}; set KVSTORE_CA_BUNDLE or AWS_CA_BUNDLE to a file of PEM certificates"
        ) from error
    return context
