"""How `kvstore doctor` runs its checks: each bounded in time, later ones skipped when pointless."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from kvstore.backends.contract import ABSENT, Backend, Buffer, PutResult
from kvstore.cli.exits import ExitCode, exit_code_of
from kvstore.errors import KVStoreError, MisconfiguredError
from kvstore.masking import without_user
from kvstore.settings import Settings

READ_BYTES = 1 << 17
_Found = TypeVar("_Found")


class Status(StrEnum):
    """How a check ended. SKIP: it does not apply, or an earlier failure makes it meaningless."""

    PASS = "pass"  # noqa: S105 no password
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found.

    detail     what was measured, in words
    fix        what a person can do about it; empty when nothing needs doing
    exit_code  what the command ends with when this is the first failure
    values     the measured numbers by name, units last
    """

    status: Status
    detail: str
    fix: str = ""
    exit_code: ExitCode = ExitCode.FINDINGS
    values: Mapping[str, object] = field(default_factory=dict)


def passed(detail: str, **values: object) -> Outcome:
    """All is well."""
    return Outcome(Status.PASS, detail, values=values)


def failed(detail: str, fix: str, **values: object) -> Outcome:
    """The store answers, but wrongly."""
    return Outcome(Status.FAIL, detail, fix, values=values)


def warned(detail: str, fix: str, **values: object) -> Outcome:
    """It works, and may soon not."""
    return Outcome(Status.WARN, detail, fix, values=values)


def refused(error: KVStoreError) -> Outcome:
    """The store or the configuration refuses; messages of errors end with the fix."""
    text = without_user(str(error))
    detail, _, fix = (text, "", "") if "\n" in text else text.partition("; ")
    return Outcome(Status.FAIL, detail, fix, exit_code_of(error))


class Site:
    """What checks share: settings, the backend, and a folder of probe objects of this run alone.

    Every object that `put` may have stored is removed by `clean_up`, whether or not a check failed.
    """

    def __init__(self, settings: Settings, open_backend: Callable[[Settings], Backend]) -> None:
        self.settings = settings
        root = f"{settings.prefix}/doctor" if settings.prefix else "doctor"
        self.folder = f"{root}/{secrets.token_hex(8)}/"
        self._open_backend = open_backend
        self._backend: Backend | None = None
        self._stored: list[str] = []

    @property
    def backend(self) -> Backend:
        """The store, opened at first use. Raises MisconfiguredError."""
        if self._backend is None:
            self._backend = self._open_backend(self.settings)
        return self._backend

    async def put(self, label: str, *parts: Buffer) -> PutResult:
        """Store probe object `label` unless it is there."""
        name = self.folder + label
        self._stored.append(name)
        try:
            return await self.backend.put(name, parts, if_absent=True)
        except MisconfiguredError:
            self._stored.remove(name)
            raise

    async def read(self, label: str, offset: int = 0, length: int = READ_BYTES) -> bytes | None:
        """Up to `length` bytes of probe object `label`; None when it is absent."""
        out = bytearray(length)
        answer = await self.backend.read_into(self.folder + label, offset, memoryview(out))
        return None if answer is ABSENT else bytes(out[: answer.length])

    async def listed(self, labels: str = "", start_after: str = "") -> list[str]:
        """Labels of the probe objects that a listing shows."""
        after = self.folder + start_after if start_after else ""
        found = self.backend.list(self.folder + labels, start_after=after)
        return [info.name.removeprefix(self.folder) async for info in found]

    async def clean_up(self, timeout_s: float) -> Outcome | None:
        """Remove every probe object and close the backend. An outcome only if some may be left."""
        if self._backend is None:
            return None
        try:
            async with asyncio.timeout(timeout_s):
                if self._stored:
                    await self._backend.delete(sorted(set(self._stored)))
        except (KVStoreError, TimeoutError) as error:
            found = str(error) or f"no answer within {timeout_s:g} s"
            return warned(f"probe objects may be left: {found}", f"delete everything under {self.folder}")
        finally:
            await self._backend.close()
        return None


def unreachable(detail: str) -> Outcome:
    """The store gave no answer in time."""
    fix = "check KVSTORE_ENDPOINT_URL, the network and any proxy between"
    return Outcome(Status.FAIL, f"unreachable: {detail}", fix, ExitCode.UNREACHABLE)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report.

    needs       checks without which this one says nothing
    unanswered  what it means that there was no answer in time, told how long that was
    """

    name: str
    title: str
    run: Callable[[Site], Awaitable[Outcome]]
    needs: tuple[str, ...] = ()
    unanswered: Callable[[str], Outcome] = unreachable


class Examination:
    """Runs checks one after the other and remembers which others they make meaningless."""

    def __init__(self, site: Site, timeout_s: float) -> None:
        self._site = site
        self._timeout_s = timeout_s
        self._broken: dict[str, str] = {}

    async def run(self, check: Check) -> Outcome:
        """How `check` ended; never raises but for cancellation."""
        causes = [self._broken[name] for name in check.needs if name in self._broken]
        if causes:
            self._broken[check.name] = causes[0]
            return Outcome(Status.SKIP, f"not tried, because this failed: {causes[0]}")
        outcome = await self._attempt(check)
        if outcome.status is Status.FAIL:
            self._broken[check.name] = check.title
        return outcome

    async def _attempt(self, check: Check) -> Outcome:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await check.run(self._site)
        except KVStoreError as error:
            return refused(error)
        except TimeoutError:
            return check.unanswered(f"no answer within {self._timeout_s:g} s")
        except Exception as error:
            return failed(f"{type(error).__name__}: {error}", "this is a defect of kvstore; please report it")


async def in_daemon_thread(work: Callable[[], _Found]) -> _Found:
    """Await `work()` in a thread that cannot keep the process alive when it hangs."""
    future: Future[_Found] = Future()
    future.set_running_or_notify_cancel()

    def target() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=target, name="kvstore-doctor", daemon=True).start()
    return await asyncio.wrap_future(future)
