import asyncio
import contextlib
import errno
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kvstore.backends import object_files
from kvstore.backends.contract import ABSENT, PutStatus
from kvstore.backends.filesystem import FilesystemBackend
from kvstore.errors import MisconfiguredError, RetryableError

T = TypeVar("T")

RACERS = 4
ROUNDS = 50
RACER = """
import asyncio, sys
from pathlib import Path
from kvstore.backends.filesystem import FilesystemBackend

async def main(root, number, rounds):
    backend = FilesystemBackend(Path(root))
    print("ready", flush=True)
    sys.stdin.readline()
    for turn in range(rounds):
        result = await backend.put(f"{turn}/object", [bytes([number]) * 50_000], if_absent=True)
        print(turn, result.status.value, flush=True)
    await backend.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""
HALF_WRITER = """
import os, signal, sys
from kvstore.backends import object_files

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

object_files._publish = killed
"""


@pytest.fixture(autouse=True)
def _no_lost_exceptions(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    gc.collect()
    assert caplog.records == []


def run(root: Path, scenario: Callable[[FilesystemBackend], Awaitable[T]]) -> T:
    async def opened() -> T:
        backend = FilesystemBackend(root)
        try:
            async with asyncio.timeout(30):
                return await scenario(backend)
        finally:
            await backend.close()

    return asyncio.run(opened())


async def put(backend: FilesystemBackend, name: str = "name", data: bytes = b"data") -> Any:
    return await backend.put(name, [data], if_absent=True)


async def read(backend: FilesystemBackend, name: str = "name") -> bytes | None:
    out = bytearray(1 << 17)
    result = await backend.read_into(name, 0, memoryview(out))
    return None if result is ABSENT else bytes(out[: result.length])


async def listed(backend: FilesystemBackend) -> list[str]:
    return [info.name async for info in backend.list("")]


@contextlib.contextmanager
def python(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_of_several_processes_that_put_one_name_exactly_one_wins(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(python(RACER, tmp_path, number, ROUNDS)) for number in range(RACERS)]
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        outcomes = [racer.stdout.read().split("\n")[:-1] for racer in racers if racer.stdout]
    for turn in range(ROUNDS):
        winners = [number for number in range(RACERS) if outcomes[number][turn] == f"{turn} created"]
        assert len(winners) == 1
        assert (tmp_path / f"{turn}/object").read_bytes() == bytes(winners) * 50_000
    assert [len(lines) for lines in outcomes] == [ROUNDS] * RACERS


def test_what_a_killed_process_left_is_never_seen_and_removed_when_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with python(HALF_WRITER + RACER, tmp_path, 0, 1) as writer:
        writer.communicate("go\n")
    assert writer.returncode == -9
    (left,) = (tmp_path / ".tmp").iterdir()
    assert left.stat().st_size == 50_000

    async def look(backend: FilesystemBackend) -> None:
        assert await listed(backend) == []
        assert await backend.head("0/object") is None
        await put(backend)
        assert await listed(backend) == ["name"]

    run(tmp_path, look)
    assert left.exists()
    monkeypatch.setattr(object_files, "_STALE_S", 0.0)
    run(tmp_path, lambda backend: put(backend, "other"))
    assert not left.exists()
    assert run(tmp_path, listed) == ["name", "other"]


def test_nothing_unfinished_stays_behind(tmp_path: Path) -> None:
    async def scenario(backend: FilesystemBackend) -> None:
        await put(backend)
        await put(backend)
        await backend.put("name", [b"over"], if_absent=False)
        await backend.clock_s()
        with pytest.raises(MisconfiguredError):
            await put(backend, "name/below")
        writing = asyncio.ensure_future(put(backend, "large", bytes(16 << 20)))
        await asyncio.sleep(0.002)
        writing.cancel()
        await asyncio.wait([writing])

    run(tmp_path, scenario)
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_the_reserved_folder_is_no_place_for_objects(tmp_path: Path) -> None:
    async def scenario(backend: FilesystemBackend) -> None:
        for name in (".tmp", ".tmp/object", ".tmp/a/b"):
            for call in (put(backend, name), read(backend, name), backend.head(name), backend.delete([name])):
                with pytest.raises(MisconfiguredError, match=r"\.tmp"):
                    await call
        await put(backend, "a/.tmp/b")
        assert await listed(backend) == ["a/.tmp/b"]

    run(tmp_path, scenario)


def test_deletes_and_puts_in_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    async def scenario(backend: FilesystemBackend) -> None:
        async def come_and_go(name: str) -> None:
            for _ in range(60):
                assert (await put(backend, name)).status is PutStatus.CREATED
                assert await read(backend, name) == b"data"
                await backend.delete([name])

        await asyncio.gather(*(come_and_go(f"deep/er/{number}") for number in range(6)))

    run(tmp_path, scenario)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp"]


def test_an_object_can_take_the_place_of_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    assert run(tmp_path, put).status is PutStatus.CREATED


def test_a_missing_root_is_an_empty_store(tmp_path: Path) -> None:
    async def scenario(backend: FilesystemBackend) -> None:
        assert await read(backend) is None
        assert await backend.head("name") is None
        assert await listed(backend) == []
        await backend.delete(["name"])

    run(tmp_path / "missing", scenario)
    assert not (tmp_path / "missing").exists()


def test_a_file_in_place_of_the_root_is_for_a_person_to_mend(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_bytes(b"")
    calls: list[Callable[[FilesystemBackend], Awaitable[Any]]] = [
        put, read, listed, lambda backend: backend.head("name"), lambda backend: backend.clock_s()
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(MisconfiguredError) as raised:
            run(root, call)
        assert str(root) in str(raised.value)
        assert "KVSTORE_BUCKET" in str(raised.value)


def test_foreign_files_are_no_objects(tmp_path: Path) -> None:
    run(tmp_path, put)
    (tmp_path / "link").symlink_to(tmp_path / "name")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "line\nbreak").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")

    async def scenario(backend: FilesystemBackend) -> None:
        assert await listed(backend) == ["name"]
        for name in ("link", "loop", "pipe"):
            assert await backend.head(name) is None
            assert await read(backend, name) is None

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EMFILE]
)
@pytest.mark.parametrize("function", ["open", "write", "fsync", "link"])
def test_trouble_of_the_disk_is_retryable_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, function: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, function, fail)
        with pytest.raises(RetryableError) as raised:
            run(tmp_path, put)
    assert os.strerror(number) in str(raised.value)
    assert run(tmp_path, listed) == []
    assert list(tmp_path.glob(".tmp/*")) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV])
def test_what_a_person_must_mend_names_path_and_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(MisconfiguredError) as raised:
        run(tmp_path, put)
    assert str(tmp_path / "name") in str(raised.value)
    assert "KVSTORE_BUCKET" in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_for_a_person_to_mend(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MisconfiguredError, match="read and write"):
        run(tmp_path, put)


def test_a_part_of_a_name_that_is_too_long_is_for_a_person_to_mend(tmp_path: Path) -> None:
    with pytest.raises(MisconfiguredError, match="255"):
        run(tmp_path, lambda backend: put(backend, "x" * 256))


def test_a_file_that_shrinks_while_it_is_read_is_retryable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, put)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(RetryableError):
        run(tmp_path, read)


def test_a_cancelled_read_waits_for_its_thread_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 16 * object_files._STEP_BYTES
    run(tmp_path, lambda backend: put(backend, data=b"\xff" * size))
    reading = threading.Event()
    preadv = os.preadv

    def slow(*arguments: Any) -> int:
        reading.set()
        time.sleep(0.1)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", slow)

    async def scenario(backend: FilesystemBackend) -> None:
        out = bytearray(size)
        task = asyncio.ensure_future(backend.read_into("name", 0, memoryview(out)))
        await asyncio.to_thread(reading.wait)
        started_s = time.monotonic()
        # However often it is told.
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - started_s < 0.5
        out[:] = bytes(size)
        await asyncio.sleep(0.3)
        assert out.count(0) == size

    run(tmp_path, scenario)


def test_a_cancelled_put_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, put)
    syncing, synced = threading.Event(), threading.Event()

    def hang(_: int) -> None:
        syncing.set()
        synced.wait(10)

    monkeypatch.setattr(os, "fsync", hang)

    async def scenario(backend: FilesystemBackend) -> None:
        try:
            task = asyncio.ensure_future(put(backend, "other"))
            await asyncio.to_thread(syncing.wait)
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=2)
            assert done
        finally:
            synced.set()

    run(tmp_path, scenario)


def test_calls_that_were_cancelled_in_the_queue_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(object_files, "status", lambda _: release.wait(10) and None)

    async def scenario(backend: FilesystemBackend) -> None:
        running = [asyncio.ensure_future(backend.head("name")) for _ in range(16)]
        await asyncio.sleep(0.05)
        queued = asyncio.ensure_future(backend.delete(["name"]))
        await asyncio.sleep(0.05)
        queued.cancel()
        await asyncio.wait([queued], timeout=2)
        release.set()
        await asyncio.gather(*running)

    (tmp_path / "name").write_bytes(b"")
    run(tmp_path, scenario)
    assert (tmp_path / "name").exists()


def test_a_closed_backend_says_so(tmp_path: Path) -> None:
    async def scenario(backend: FilesystemBackend) -> None:
        await backend.close()
        with pytest.raises(MisconfiguredError, match="close"):
            await read(backend)

    run(tmp_path, scenario)
