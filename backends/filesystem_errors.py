"""What an OSError of the file system means to a caller."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from kvstore.errors import KVStoreError, MisconfiguredError, RetryableError

_SET_BUCKET = "or set KVSTORE_BUCKET to a folder that fits"
_FIXES = {
    errno.EACCES: f"let this user read and write the folder, {_SET_BUCKET}",
    errno.EPERM: f"let this user write the folder, on a file system with hard links, {_SET_BUCKET}",
    errno.EROFS: f"mount the file system writable, {_SET_BUCKET}",
    errno.ENOTDIR: f"a file is where a folder must be: remove it, {_SET_BUCKET}",
    errno.EISDIR: f"a folder is where an object must be: remove it, {_SET_BUCKET}",
    errno.ENAMETOOLONG: "a part of a name has at most 255 bytes here: shorten KVSTORE_PREFIX",
    errno.EXDEV: f"other file systems must not be mounted below the folder: unmount them, {_SET_BUCKET}",
    errno.EOPNOTSUPP: f"use a file system with hard links, {_SET_BUCKET}",
    errno.ENOSYS: f"use a file system with hard links, {_SET_BUCKET}",
    errno.ELOOP: f"a symbolic link is where a folder must be: remove it, {_SET_BUCKET}",
}


@contextlib.contextmanager
def filesystem_errors(action: str) -> Iterator[None]:
    """Raise OSErrors of the body as the contract's errors. `action` says what was tried, with its path."""
    try:
        yield
    except OSError as error:
        raise _contract_error(action, error) from error


def _contract_error(action: str, error: OSError) -> KVStoreError:
    what = f"cannot {action}: {error.strerror or error}"
    fix = _FIXES.get(error.errno or 0)
    if fix is not None:
        return MisconfiguredError(f"{what}; {fix}")
    # All else (a full disk, EIO, a lost mount, too many open files) can pass without this process.
    return RetryableError(what)
