"""Uploads in parts that somebody began and left: their parts take room, and no listing shows them."""

from __future__ import annotations

from typing import NamedTuple

from kvstore.backends.contract import Backend, UnfinishedUpload, UploadsInParts
from kvstore.errors import KVStoreError
from kvstore.gc.pace import Pace
from kvstore.keys import format_folder, namespace_folder, parse_object_name


class AbandonedUploads(NamedTuple):
    """What was begun too long ago to be finished; `fault` says why that could not be found out."""

    uploads: tuple[UnfinishedUpload, ...] = ()
    fault: str = ""


NO_UPLOADS = AbandonedUploads()


async def find_abandoned(
    backend: Backend, pace: Pace, prefix: str, before_s: float, *, only: str = ""
) -> AbandonedUploads:
    """Unfinished uploads of chunks that were begun before a time by the store's clock.

    only  name of the one namespace whose chunks they are of; empty for all

    Not to be able to list them is a fault that keeps nothing else from being collected: it takes a
    permission of its own.
    """
    if not isinstance(backend, UploadsInParts):
        return NO_UPLOADS
    store: UploadsInParts = backend

    async def listed() -> tuple[UnfinishedUpload, ...]:
        folder = namespace_folder(prefix, only) if only else format_folder(prefix)
        return tuple(
            [
                each
                async for each in store.unfinished_uploads(folder)
                if each.begun_s < before_s and parse_object_name(prefix, each.name) is not None
            ]
        )

    try:
        return AbandonedUploads(await pace(listed))
    except KVStoreError as error:
        return AbandonedUploads(fault=str(error))


async def abort(backend: Backend, pace: Pace, found: AbandonedUploads) -> AbandonedUploads:
    """Abort what was found; what was aborted, and why not all of it."""
    if not isinstance(backend, UploadsInParts):
        return found
    store: UploadsInParts = backend
    aborted: list[UnfinishedUpload] = []

    async def abort_one(upload: UnfinishedUpload) -> None:
        await pace(lambda: store.abort_upload(upload))
        aborted.append(upload)

    try:
        await pace.for_all(found.uploads, abort_one)
    except KVStoreError as error:
        return AbandonedUploads(tuple(aborted), str(error))
    return AbandonedUploads(tuple(aborted), found.fault)
