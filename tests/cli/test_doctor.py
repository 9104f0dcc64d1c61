import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from kvstore.backends.contract import ABSENT, PutResult, PutStatus
from kvstore.backends.memory import MemoryBackend
from kvstore.cli import doctor
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call
from kvstore.cli.output import Output
from kvstore.errors import MisconfiguredError, RetryableError

ENGINE_OBJECT = "kvstore/v1/0123456789abcdef/namespace.json"
STORE_CHECKS = {
    *("bucket", "write", "conditional_put", "race", "range_read", "read_your_write"),
    *("list", "delete", "clock", "latency", "namespaces"),
}


def checks(output: str) -> dict[str, dict]:
    lines = [json.loads(line) for line in output.splitlines()]
    return {row["check"]: row for row in lines if row["kind"] == "check"}


def with_status(output: str, status: str) -> set[str]:
    return {name for name, row in checks(output).items() if row["status"] == status}


def test_a_healthy_store_passes_everything_and_is_left_as_it_was(kvstore, contents):
    contents.put({ENGINE_OBJECT: b"{}"})
    ended = kvstore("doctor", "--json")
    assert ended.code == 0
    assert with_status(ended.stdout, "pass") >= {"settings", *STORE_CHECKS}
    assert not with_status(ended.stdout, "fail") | with_status(ended.stdout, "warn")
    assert contents.names() == [ENGINE_OBJECT]


def test_each_kind_of_store_skips_what_it_does_not_have(kvstore, contents):
    skipped = with_status(kvstore("doctor", "--json").stdout, "skip")
    assert skipped in ({"credentials", "uploads", "disk_tier"}, {"disk", "disk_tier"})


def test_people_get_one_line_a_check_and_the_totals(kvstore, folder):
    ended = kvstore("doctor")
    lines = ended.stdout.splitlines()
    assert "checking" not in ended.all
    assert sum(line.startswith("PASS") for line in lines) == 13
    assert lines[-1] == "13 pass, 0 warn, 0 fail, 3 skip"


def test_a_missing_bucket_is_a_configuration_error_with_the_fix(kvstore_process, s3):
    ended = kvstore_process("doctor", "--json", "--bucket", "no-such-bucket")
    assert ended.code == 3
    assert with_status(ended.stdout, "fail") == {"bucket"}
    found = checks(ended.stdout)["bucket"]
    assert "NoSuchBucket" in found["detail"]
    assert "KVSTORE_BUCKET" in found["fix"]
    assert "bucket reachable" in checks(ended.stdout)["race"]["detail"]


def test_a_closed_port_is_unreachable(kvstore_process, s3):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended = kvstore_process("doctor", "--json", "--endpoint-url", f"http://127.0.0.1:{port}")
    assert ended.code == 4
    assert with_status(ended.stdout, "fail") == {"bucket"}
    assert with_status(ended.stdout, "skip") == (STORE_CHECKS - {"bucket"}) | {"uploads", "disk", "disk_tier"}


def test_an_endpoint_that_never_answers_is_unreachable_within_the_limit(s3, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        flags = {"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        started_s = time.monotonic()
        code = doctor.examine_store(Call(flags, Output(as_json=True)), timeout_s=0.5)
    assert code == ExitCode.UNREACHABLE
    assert time.monotonic() - started_s < 5
    assert "no answer within 0.5 s" in checks(capsys.readouterr().out)["bucket"]["detail"]


def test_missing_credentials_are_a_configuration_error_and_nothing_is_tried_without(kvstore, monkeypatch, s3):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    ended = kvstore("doctor", "--json")
    assert ended.code == 3
    assert with_status(ended.stdout, "fail") == {"credentials"}
    assert with_status(ended.stdout, "skip") >= STORE_CHECKS


def test_a_malformed_setting_is_a_finding_with_the_configuration_code(kvstore):
    ended = kvstore("doctor", "--json", "--set", "codec=brotli")
    assert ended.code == 3
    assert with_status(ended.stdout, "fail") == {"settings"}
    assert "KVSTORE_CODEC='brotli'" in checks(ended.stdout)["settings"]["detail"]


class Overwriting(MemoryBackend):
    async def put(self, name, parts, *, if_absent):
        return await super().put(name, parts, if_absent=False)


class RefusingButOverwriting(MemoryBackend):
    async def put(self, name, parts, *, if_absent):
        known = await self.head(name)
        result = await super().put(name, parts, if_absent=False)
        return PutResult(PutStatus.EXISTS) if known else result


class AcceptingButDropping(MemoryBackend):
    async def put(self, name, parts, *, if_absent):
        await super().put(name, parts, if_absent=True)
        return PutResult(PutStatus.CREATED)


class RacingCheckThenWrite(MemoryBackend):
    async def put(self, name, parts, *, if_absent):
        if await self.head(name) is not None:
            return PutResult(PutStatus.EXISTS)
        await asyncio.sleep(0.01)
        return await super().put(name, parts, if_absent=False)


class OffByOne(MemoryBackend):
    async def read_into(self, name, offset, out, *, if_match=None):
        return await super().read_into(name, offset + (offset > 0), out, if_match=if_match)


class DroppingTheLastByte(MemoryBackend):
    async def read_into(self, name, offset, out, *, if_match=None):
        result = await super().read_into(name, offset, out, if_match=if_match)
        if result is ABSENT or offset == 0 or not result.length:
            return result
        return type(result)(result.length - 1, result.object_bytes, result.etag)


class RememberingAbsence(MemoryBackend):
    def __init__(self):
        super().__init__()
        self._absent = set()

    async def head(self, name):
        found = await super().head(name)
        if found is None:
            self._absent.add(name)
        return None if name in self._absent else found


class ListingEverything(MemoryBackend):
    async def list(self, prefix, *, start_after=""):
        async for info in super().list(prefix[:-2], start_after=""):
            yield info


class ListingBackwards(MemoryBackend):
    async def list(self, prefix, *, start_after=""):
        found = [info async for info in super().list(prefix, start_after=start_after)]
        for info in found if start_after else reversed(found):
            yield info


class NoObjectStore(MemoryBackend):
    async def list(self, prefix, *, start_after=""):
        raise MisconfiguredError("the store answered 404; set KVSTORE_ENDPOINT_URL")
        yield


class KeepingWhatIsDeleted(MemoryBackend):
    async def delete(self, names):
        if len(names) > 2:
            await super().delete(names)


class SlowClock(MemoryBackend):
    async def clock_s(self):
        return time.time() - 600


class Throttling(MemoryBackend):
    async def head(self, name):
        raise RetryableError("the store is busy")


class ForbiddingWrites(MemoryBackend):
    async def put(self, name, parts, *, if_absent):
        raise MisconfiguredError("may not write; allow s3:PutObject")


class Crashing(MemoryBackend):
    async def clock_s(self):
        raise ZeroDivisionError("a bug")


@pytest.fixture
def examined(kvstore, monkeypatch):
    """Examine a backend that lies; gives how it ended, the checks by name, and the objects left."""

    def examine(liar: type[MemoryBackend], *arguments: str):
        backend = liar()
        asyncio.run(MemoryBackend.put(backend, ENGINE_OBJECT, [b"{}"], if_absent=True))
        monkeypatch.setattr(doctor, "open_backend", lambda _: backend)
        ended = kvstore("doctor", "--json", "--bucket", "memory://", *arguments)
        return ended, checks(ended.stdout), set(backend._objects)

    return examine


@pytest.mark.parametrize(
    ("liar", "failing", "code"),
    [
        (Overwriting, {"conditional_put", "race"}, 1),
        (RefusingButOverwriting, {"conditional_put", "race"}, 1),
        (AcceptingButDropping, {"conditional_put", "race"}, 1),
        (RacingCheckThenWrite, {"race"}, 1),
        (OffByOne, {"range_read"}, 1),
        (DroppingTheLastByte, {"range_read"}, 1),
        (RememberingAbsence, {"read_your_write"}, 1),
        (ListingEverything, {"list"}, 1),
        (ListingBackwards, {"list"}, 1),
        (NoObjectStore, {"bucket"}, 3),
        (KeepingWhatIsDeleted, {"delete"}, 1),
        (SlowClock, {"clock"}, 1),
        (Throttling, {"read_your_write", "delete"}, 4),
        (ForbiddingWrites, {"write"}, 3),
        (Crashing, {"clock"}, 1),
    ],
)
def test_a_lying_store_fails_the_right_line_and_keeps_no_probe_object(examined, liar, failing, code):
    ended, found, left = examined(liar)
    assert {name for name, row in found.items() if row["status"] == "fail"} == failing
    assert all(row["detail"] for row in found.values())
    assert all(found[name]["fix"] for name in failing if liar is not Throttling)
    assert ended.code == code
    assert left == {ENGINE_OBJECT}


def test_a_clock_a_little_off_is_a_warning(examined, monkeypatch):
    class Early(MemoryBackend):
        async def clock_s(self):
            return time.time() + 100

    ended, found, _ = examined(Early)
    assert ended.code == 0
    assert found["clock"]["status"] == "warn"
    assert found["clock"]["drift_s"] == pytest.approx(100, abs=5)
    assert "NTP" in found["clock"]["fix"]


def test_a_store_that_cannot_delete_is_told_where_probe_objects_are_left(examined):
    class Undeletable(MemoryBackend):
        async def delete(self, names):
            raise MisconfiguredError("may not delete; allow s3:DeleteObject")

    ended, found, left = examined(Undeletable)
    assert ended.code == 3
    assert found["clean_up"]["status"] == "warn"
    folder = found["clean_up"]["fix"].removeprefix("delete everything under ")
    assert folder.startswith("kvstore/doctor/")
    assert all(name.startswith(folder) for name in left - {ENGINE_OBJECT})


def test_probe_objects_lie_beside_the_format_folder_whatever_the_prefix(examined):
    written = set()

    class Recording(MemoryBackend):
        async def put(self, name, parts, *, if_absent):
            written.add(name)
            return await super().put(name, parts, if_absent=if_absent)

    for prefix, folder in (("team/kv", "team/kv/doctor/"), ("", "doctor/")):
        written.clear()
        examined(Recording, "--prefix", prefix)
        assert written
        assert all(name.startswith(folder) for name in written)


def test_a_permission_that_only_collections_need_is_a_warning(examined):
    class Refusing(MemoryBackend):
        async def unfinished_uploads(self, prefix):
            raise MisconfiguredError("cannot list unfinished uploads: AccessDenied")
            yield

        async def abort_upload(self, upload):
            raise AssertionError

    ended, found, _ = examined(Refusing)
    assert ended.code == 0
    assert found["uploads"]["status"] == "warn"
    assert "AccessDenied" in found["uploads"]["detail"]
    assert "s3:ListBucketMultipartUploads" in found["uploads"]["fix"]


def test_losers_of_a_race_may_be_told_to_try_again(examined):
    class Conflicting(MemoryBackend):
        refused = False

        async def put(self, name, parts, *, if_absent):
            if name.endswith("/race") and name in self._objects and not self.refused:
                self.refused = True
                raise RetryableError("409 ConditionalRequestConflict")
            return await super().put(name, parts, if_absent=if_absent)

    ended, found, _ = examined(Conflicting)
    assert ended.code == 0
    assert found["race"]["status"] == "pass"


def test_probe_objects_are_removed_when_a_person_interrupts(examined):
    class Interrupted(MemoryBackend):
        async def clock_s(self):
            raise KeyboardInterrupt

    ended, _, left = examined(Interrupted)
    assert ended.code == 130
    assert left == {ENGINE_OBJECT}


def test_an_interrupted_process_ends_with_130_and_no_traceback(s3):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "kvstore.cli", "doctor", "--endpoint-url", url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        silent.settimeout(30)
        connection, _ = silent.accept()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        connection.close()
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("free_bytes", "status"), [(1 << 40, "pass"), (500 << 20, "warn"), (1 << 20, "fail")]
)
def test_little_free_disk_is_told(kvstore, monkeypatch, folder, free_bytes, status):
    usage = SimpleNamespace(total=1 << 41, free=free_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = checks(kvstore("doctor", "--json").stdout)["disk"]
    assert found["status"] == status
    assert found["free_bytes"] == free_bytes


def test_text_of_the_store_cannot_steer_the_terminal(kvstore, monkeypatch):
    class Hostile(MemoryBackend):
        location = "memory://[red]\x1b[2J"

    monkeypatch.setattr(doctor, "open_backend", lambda _: Hostile())
    ended = kvstore("doctor", "--bucket", "memory://")
    assert "memory://[red]\\x1b[2J answers" in ended.stdout
    assert "\x1b" not in ended.stdout
