"""The two ways to a bucket, and a suite that drives both with the same calls.

`PlaneParity` wants a subclass with a fixture that sets `options`, for a bucket that is there.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from kvstore.backends.contract import ABSENT, Backend, ObjectInfo, PutStatus, ReadResult
from kvstore.backends.s3 import S3Backend, S3Options
from kvstore.backends.s3_socket import S3SocketBackend
from kvstore.errors import KVStoreError, MisconfiguredError

PLANES = {"aiobotocore": S3Backend, "socket": S3SocketBackend}
OBJECT = b"0123456789"
PATIENCE_S = 60.0
# Every kind of character that URLs, signatures and XML treat in ways of their own.
ODD_NAMES = (
    "a b",
    " leading and trailing ",
    "a+b",
    "50%",
    "a%2Fb",
    "~user",
    "é",
    "e\u0301",
    "键/値",
    "😀",
    "&'\"<>",
    "(1)*!;:@=,$",
    "?a=b#c",
    "back\\slash",
    "{}[]|^`",
    "..a/b..",
)
BUFFERS_BYTES = (1, 3, 10, 11, 4096)
OFFSETS = (0, 1, 9, 10, 11, 1 << 40)

# Takes a plane and a folder that nobody else uses.
Call = Callable[[Backend, str], Awaitable[object]]


def open_plane(plane: str, options: S3Options) -> Backend:
    return PLANES[plane](options)


async def outcome(call: Call, backend: Backend, folder: str) -> object:
    """What `call` returns, or the class of what it raises."""
    try:
        return await call(backend, folder)
    except KVStoreError as error:
        return type(error)


async def read(
    backend: Backend, name: str, offset: int, length: int, if_match: str | None = None
) -> tuple[object, bytes]:
    """What a read returns, and what the buffer holds then."""
    out = bytearray(b"." * length)
    result = await backend.read_into(name, offset, memoryview(out), if_match=if_match)
    return result, bytes(out)


def same(left: ObjectInfo | None, right: ObjectInfo | None) -> bool:
    """Whether both describe one object; a listing may tell the time more exactly than HEAD."""
    if left is None or right is None:
        return left is right
    return replace(left, modified_s=0.0) == replace(right, modified_s=0.0) and int(left.modified_s) == int(
        right.modified_s
    )


def run_on_planes(
    options: S3Options, scenario: Callable[[dict[str, Backend]], Coroutine[Any, Any, Any]]
) -> Any:
    """Run `scenario` with every plane open, by name."""

    async def bounded() -> Any:
        planes = {plane: open_plane(plane, options) for plane in PLANES}
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await scenario(planes)
        finally:
            for backend in planes.values():
                await backend.close()

    return asyncio.run(bounded())


def agreed(options: S3Options, call: Call) -> object:
    """What `call` gives on every plane, each with a folder of its own; fails where they differ."""

    async def scenario(planes: dict[str, Backend]) -> object:
        folders = {plane: f"parity-{uuid.uuid4().hex}" for plane in planes}
        outcomes = {plane: await outcome(call, planes[plane], folders[plane]) for plane in planes}
        assert outcomes["socket"] == outcomes["aiobotocore"]
        return outcomes["socket"]

    return run_on_planes(options, scenario)


def across(options: S3Options, exchange: Callable[[Backend, Backend, str], Awaitable[None]]) -> None:
    """Run `exchange(writer, reader, folder)` with each plane as writer and the other as reader."""

    async def scenario(planes: dict[str, Backend]) -> None:
        for writer, reader in (list(planes.values()), reversed(planes.values())):
            await exchange(writer, reader, f"parity-{uuid.uuid4().hex}")

    run_on_planes(options, scenario)


class PlaneParity:
    """Both planes give equal results and equal classes of errors, and read what the other wrote."""

    options: S3Options

    def test_every_range_reads_the_same(self):
        async def call(backend: Backend, folder: str) -> object:
            await backend.put(f"{folder}/x", [OBJECT], if_absent=True)
            return [await read(backend, f"{folder}/x", at, n) for at in OFFSETS for n in BUFFERS_BYTES]

        results = agreed(self.options, call)
        asked = [(at, n) for at in OFFSETS for n in BUFFERS_BYTES]
        for (at, n), (result, held) in zip(asked, results, strict=True):
            expected = OBJECT[at : at + n]
            assert (result.length, result.object_bytes) == (len(expected), len(OBJECT))
            assert held == expected + b"." * (n - len(expected))

    def test_a_version_is_asked_for_the_same(self):
        async def call(backend: Backend, folder: str) -> object:
            put = await backend.put(f"{folder}/x", [OBJECT], if_absent=True)
            right = await read(backend, f"{folder}/x", 2, 4, put.etag)
            wrong = await read(backend, f"{folder}/x", 2, 4, "other")
            behind = await read(backend, f"{folder}/x", 10, 4, put.etag)
            return put, right, wrong, behind

        put, right, wrong, behind = agreed(self.options, call)
        assert right == (ReadResult(4, 10, put.etag), b"2345")
        assert wrong == (ReadResult(0, 10, put.etag), b"....")
        assert behind == (ReadResult(0, 10, put.etag), b"....")

    @pytest.mark.parametrize("object_bytes", [0, 1, 3 << 20])
    def test_objects_of_any_size_go_from_plane_to_plane(self, object_bytes):
        body = bytes(range(251)) * (object_bytes // 251 + 1)
        body = body[:object_bytes]
        third = object_bytes // 3

        async def exchange(writer: Backend, reader: Backend, folder: str) -> None:
            parts = [body[:third], bytearray(), memoryview(body)[third:]]
            put = await writer.put(f"{folder}/x", parts, if_absent=False)
            assert put.status is PutStatus.CREATED
            result, held = await read(reader, f"{folder}/x", 0, object_bytes + 1)
            assert result == ReadResult(object_bytes, object_bytes, put.etag)
            equal = held == body + b"."
            assert equal
            assert (await reader.head(f"{folder}/x")).object_bytes == object_bytes

        across(self.options, exchange)

    def test_what_one_plane_put_the_other_keeps_replaces_lists_and_deletes(self):
        async def exchange(writer: Backend, reader: Backend, folder: str) -> None:
            name = f"{folder}/x"
            first = await writer.put(name, [b"0123", b"456789"], if_absent=True)
            assert first.status is PutStatus.CREATED
            assert (await reader.put(name, [b"other"], if_absent=True)).status is PutStatus.EXISTS
            assert await read(reader, name, 3, 4, first.etag) == (ReadResult(4, 10, first.etag), b"3456")
            second = await reader.put(name, [b"other"], if_absent=False)
            assert (second.status, second.etag != first.etag) == (PutStatus.CREATED, True)
            info = await writer.head(name)
            assert (info, info.etag) == (await reader.head(name), second.etag)
            for plane in (writer, reader):
                (listed,) = [found async for found in plane.list(f"{folder}/")]
                assert same(listed, info)
            await reader.delete([name, f"{folder}/never there"])
            assert await writer.head(name) is None
            assert await writer.read_into(name, 0, memoryview(bytearray(1))) is ABSENT

        across(self.options, exchange)

    def test_odd_names_are_the_same_object_on_both_planes(self):
        async def exchange(writer: Backend, reader: Backend, folder: str) -> None:
            longest = "é/" + "n" * (1024 - len(folder) - 4)
            names = sorted((f"{folder}/{name}" for name in (*ODD_NAMES, longest)), key=str.encode)
            assert max(len(name.encode()) for name in names) == 1024
            etags = {}
            for name in names:
                put = await writer.put(name, [name.encode()], if_absent=True)
                assert put.status is PutStatus.CREATED, name
                etags[name] = put.etag
            for name in names:
                body = name.encode()
                assert await read(reader, name, 0, len(body)) == (
                    ReadResult(len(body), len(body), etags[name]),
                    body,
                )
                assert await reader.head(name) == await writer.head(name)
            assert [found.name async for found in reader.list(f"{folder}/")] == names
            await reader.delete(names)
            assert [found.name async for found in writer.list(f"{folder}/")] == []

        across(self.options, exchange)

    def test_a_missing_object_is_told_the_same(self):
        async def call(backend: Backend, folder: str) -> object:
            name = f"{folder}/none"
            return await read(backend, name, 5, 2), await backend.head(name), await backend.delete([name])

        assert agreed(self.options, call) == ((ABSENT, b".."), None, None)

    def test_calls_that_cannot_be_are_refused_the_same(self):
        calls: list[Call] = [
            *(lambda backend, _, name=name: backend.head(name) for name in ("", "/a", "a//b", "..", "a\nb")),
            lambda backend, _: backend.head("n" * 1025),
            lambda backend, _: read(backend, "name", -1, 1),
            lambda backend, _: read(backend, "name", 0, 0),
            lambda backend, _: backend.put("name", ["text"], if_absent=True),
        ]
        for call in calls:
            assert agreed(self.options, call) is MisconfiguredError

    def test_a_missing_bucket_is_told_the_same(self):
        options = replace(self.options, bucket=f"missing-{uuid.uuid4().hex}")
        assert [agreed(options, call) for call in CALLS.values()] == [
            # HEAD answers have no body that would tell what is missing.
            None if name == "head" else MisconfiguredError
            for name in CALLS
        ]

    def test_a_closed_backend_is_told_the_same(self):
        for name, call in CALLS.items():

            async def closed(backend: Backend, folder: str, call: Call = call) -> object:
                await backend.put(f"{folder}/x", [OBJECT], if_absent=True)
                await backend.close()
                await backend.close()
                return await call(backend, folder)

            assert agreed(self.options, closed) is MisconfiguredError, name


async def _listed(backend: Backend, folder: str) -> list[str]:
    return [info.name async for info in backend.list(f"{folder}/")]


CALLS: dict[str, Call] = {
    "read": lambda backend, folder: read(backend, f"{folder}/x", 0, 4),
    "put": lambda backend, folder: backend.put(f"{folder}/x", [OBJECT], if_absent=True),
    "put over": lambda backend, folder: backend.put(f"{folder}/x", [OBJECT], if_absent=False),
    "head": lambda backend, folder: backend.head(f"{folder}/x"),
    "list": _listed,
    "delete": lambda backend, folder: backend.delete([f"{folder}/x"]),
}
