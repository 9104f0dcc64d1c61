"""The aiobotocore client that `S3Backend` uses. Importing this imports aiobotocore."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.loaders import Loader, create_loader

from kvstore.backends.s3 import S3Options


@asynccontextmanager
async def connect(options: S3Options) -> AsyncIterator[Any]:
    """A client for the running event loop, set up from `options` and the AWS configuration chain."""
    session = AioSession()
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    events = session.get_component("event_emitter")
    events.register("before-sign.s3.PutObject", _send_body_at_once)
    events.register("before-sign.s3.DeleteObjects", _add_md5)
    async with session.create_client(
        "s3",
        endpoint_url=options.endpoint_url or None,
        # botocore itself reads AWS_DEFAULT_REGION alone; other AWS SDKs set and read AWS_REGION.
        region_name=options.region or os.environ.get("AWS_REGION") or None,
        config=_config(options),
    ) as client:
        # TLS protects a body, over plain http the signature must. Only the client knows which it
        # is: the endpoint may come from the AWS chain.
        encrypted = client.meta.endpoint_url.startswith("https:")
        client.meta.events.register_first("needs-retry.s3", _leave_region)
        client.meta.config.s3 = {**client.meta.config.s3, "payload_signing_enabled": not encrypted}
        yield client


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
