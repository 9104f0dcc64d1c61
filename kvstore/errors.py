"""Errors, classed by what the caller does next.

Absence is never an error: a contract returns a value for it. What is raised is one of

* `MisconfiguredError`: a person must change a setting, a permission or an argument; retrying is useless.
* `RetryableError`: the same call may succeed later (timeout, 5xx, throttling, lost connection).
* `CircuitOpenError`: the backend is not asked for a while, so asking again at once is of no use.
* `MissError`: an object is there but must not be used; the engine recomputes. It carries a `MissReason`.

Every message names the setting or the object, the value found, and the fix. No message holds
token text, key material or credentials.
"""

from __future__ import annotations

from enum import StrEnum


class KVStoreError(Exception):
    """Base of every error this package raises on purpose."""


class MisconfiguredError(KVStoreError):
    """A setting, permission or argument is wrong; the message says which and how to mend it."""


class LayoutMismatchError(MisconfiguredError):
    """Two parties that must agree on a `KVLayout` do not; the message shows both."""


class UnsupportedModelError(MisconfiguredError):
    """The model's cache cannot be stored and restored exactly; serving it would risk wrong output."""


class StoreClosedError(KVStoreError):
    """The store was closed; engines that shut down may meet it and go on without the store."""


class RetryableError(KVStoreError):
    """The backend could not answer now; the same call may succeed later."""


class ThrottledError(RetryableError):
    """The store asks for fewer requests (SlowDown, 503, 429)."""


class CircuitOpenError(KVStoreError):
    """The backend has failed for a while and is not asked now; the message says when it is tried next."""


class MissReason(StrEnum):
    """Why a chunk could not be served. Values are metric labels: append only, never rename."""

    ABSENT = "absent"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    CANCELLED = "cancelled"
    BEHIND_A_MISS = "behind_a_miss"
    NO_MEMORY = "no_memory"
    TRUNCATED = "truncated"
    TRAILING_BYTES = "trailing_bytes"
    BAD_MAGIC = "bad_magic"
    BAD_VERSION = "bad_version"
    BAD_HEADER = "bad_header"
    BAD_CHECKSUM = "bad_checksum"
    BAD_ENCODING = "bad_encoding"
    UNKNOWN_CODEC = "unknown_codec"
    WRONG_KEY = "wrong_key"
    CHANGED = "changed"
    SINK_FAILED = "sink_failed"
    INTERNAL_ERROR = "internal_error"


class MissError(KVStoreError):
    """An object exists but cannot be trusted; `reason` says why, and the caller counts a miss."""

    def __init__(self, reason: MissReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
