"""The Backend contract: what kvstore needs of an object store, and no more.

A backend is a flat map of names to immutable byte strings. Promises every implementation keeps,
and `kvstore.testing.BackendConformance` checks:

* Absence is a value (`ABSENT`, None), never an exception.
* `RetryableError`: the same call may succeed later. `MisconfiguredError`: a person must act.
  Nothing else escapes on purpose.
* An object is seen whole or not at all, from any process, as soon as `put` has returned.
* When a call has returned, raised or finished being cancelled, nothing touches the caller's
  buffers any more. Cancelling is how a caller enforces its deadline; it must take effect promptly.
  A cancelled put may still take effect, whole.
* One instance belongs to one event loop; calls on it may overlap freely.
* A name that cannot be, a buffer that cannot be filled, and any call after `close` raise
  MisconfiguredError.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, Protocol, runtime_checkable

Buffer = bytes | bytearray | memoryview


class Absent(Enum):
    """Type of `ABSENT`, so that type checkers can narrow on it."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What one ranged read saw.

    length        bytes written to the start of the caller's buffer; fewer than it holds only
                  where the object ends inside the range
    object_bytes  size of the whole object
    etag          opaque version of the object; equal etags mean equal bytes
    """

    length: int
    object_bytes: int
    etag: str


class PutStatus(Enum):
    """How a put ended. Both values mean that an object of that name is now there."""

    CREATED = "created"
    EXISTS = "exists"


@dataclass(frozen=True, slots=True)
class PutResult:
    """`etag` is that of the object now stored; empty where the store does not tell (EXISTS)."""

    status: PutStatus
    etag: str = ""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as HEAD and LIST describe it.

    modified_s  seconds since 1970 by the store's clock; HEAD may tell it to the second, LIST more exactly
    """

    name: str
    object_bytes: int
    etag: str
    modified_s: float


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend claims; `kvstore doctor` probes it live.

    conditional_put   put(if_absent=True) has exactly one winner
    shared            other processes, and machines that reach the same store, see the same objects
    persistent        objects outlive the process
    """

    conditional_put: bool
    shared: bool
    persistent: bool


@dataclass(frozen=True, slots=True)
class UnfinishedUpload:
    """An upload in parts that was begun, and neither completed nor aborted. Its parts take room, unseen.

    upload_id  the store's
    begun_s    seconds since 1970 by the store's clock
    """

    name: str
    upload_id: str
    begun_s: float


class Backend(Protocol):
    """One bucket of an object store.

    Names have at most 1,024 bytes of UTF-8, no control characters, and `/` between parts that are
    neither empty nor `.` nor `..`. An implementation may refuse a name that is also a folder of
    others, and a first part that it keeps for itself; kvstore's own names never are such.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What this backend claims to do."""
        ...

    @property
    def location(self) -> str:
        """Where objects go, for people: a URL without credentials."""
        ...

    async def read_into(
        self, name: str, offset: int, out: memoryview, *, if_match: str | None = None
    ) -> ReadResult | Literal[Absent.ABSENT]:
        """Fill `out` (writable, contiguous, format B, not empty) with the object's bytes from `offset`.

        A range that starts at or past the object's end reads 0 bytes. With `if_match`, an object
        whose etag differs is answered with its own etag and length 0, and `out` is left alone.
        """
        ...

    async def put(self, name: str, parts: Sequence[Buffer], *, if_absent: bool) -> PutResult:
        """Store the concatenation of `parts` under `name`.

        if_absent  an object that is already there stays as it is and the answer is EXISTS;
                   otherwise it is replaced whole. `parts` must not change until the call ends.
        """
        ...

    async def head(self, name: str) -> ObjectInfo | None:
        """Describe one object; None when there is none."""
        ...

    def list(self, prefix: str, *, start_after: str = "") -> AsyncIterator[ObjectInfo]:
        """Every object whose name begins with `prefix`, in order of the names' UTF-8 bytes,

        after `start_after`. Objects put or deleted meanwhile may or may not be seen.
        """
        ...

    async def delete(self, names: Sequence[str]) -> None:
        """Remove the named objects; names that are not there are no error. Retrying is safe."""
        ...

    async def clock_s(self) -> float:
        """The store's own clock, seconds since 1970: the one ages of objects are judged by."""
        ...

    async def close(self) -> None:
        """Release connections and files. Calling it again does nothing."""
        ...


@runtime_checkable
class UploadsInParts(Protocol):
    """What a Backend can do besides where the store takes uploads in parts. kvstore itself makes none;

    other tools, and people who copy chunks with them, may leave some behind.
    """

    def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        """Every unfinished upload of an object whose name begins with `prefix`."""
        ...

    async def abort_upload(self, upload: UnfinishedUpload) -> None:
        """Give up an upload and free its parts; one that has ended meanwhile is no error."""
        ...
