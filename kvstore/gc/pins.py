"""Pins: a pinned chunk, and all before it in its prefix, is never collected."""

from __future__ import annotations

import asyncio

from kvstore.backends.contract import Backend
from kvstore.errors import RetryableError
from kvstore.gc.lease import MARGIN_S
from kvstore.gc.names import announced_folder, parse_announcement, pin_name
from kvstore.gc.watch import SWEEP_S
from kvstore.keys import namespace_folder

_LOOK_S = 5.0


async def pin(backend: Backend, prefix: str, namespace_name: str, hash_: bytes, *, timeout_s: float) -> bool:
    """Keep a chunk, of all shards. False: it is not there, and no pin is left.

    Sweeps that are under way may not have seen the pin, so their end is waited for first. Raises
    RetryableError when they have not ended within `timeout_s`; then the pin stays, for later ones.
    """
    name = pin_name(prefix, namespace_name, hash_)
    await backend.put(name, [b""], if_absent=False)
    try:
        async with asyncio.timeout(timeout_s):
            while await _is_swept(backend, prefix, namespace_name):  # noqa: ASYNC110 elsewhere
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise RetryableError(
            f"a garbage collection is removing chunks of {namespace_name} and has not ended within "
            f"{timeout_s:g} s; pin again to know whether this one is still there"
        ) from None
    digits = hash_.hex()
    async for _ in backend.list(f"{namespace_folder(prefix, namespace_name)}{digits[:2]}/{digits}."):
        return True
    await backend.delete([name])
    return False


async def unpin(backend: Backend, prefix: str, namespace_name: str, hash_: bytes) -> bool:
    """Let a chunk go when its time comes. False: it was not pinned."""
    name = pin_name(prefix, namespace_name, hash_)
    pinned = await backend.head(name) is not None
    await backend.delete([name])
    return pinned


async def _is_swept(backend: Backend, prefix: str, namespace_name: str) -> bool:
    now_s = await backend.clock_s()
    async for info in backend.list(announced_folder(prefix)):
        found = parse_announcement(prefix, info.name)
        if found is None or not found.sweep or found.span.namespace_name != namespace_name:
            continue
        # Those of collectors that died stay longer.
        if now_s - info.modified_s < SWEEP_S + MARGIN_S:
            return True
    return False
