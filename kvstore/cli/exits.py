"""What the exit code of a command means."""

from __future__ import annotations

from enum import IntEnum

from kvstore.errors import KVStoreError, MisconfiguredError, RetryableError


class ExitCode(IntEnum):
    """How a command ended. Scripts depend on the values: append only."""

    OK = 0
    FINDINGS = 1
    USAGE = 2
    CONFIGURATION = 3
    UNREACHABLE = 4
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.OK: "done, nothing found wrong",
    ExitCode.FINDINGS: "done, something was found wrong, damaged or absent",
    ExitCode.USAGE: "the command line is wrong",
    ExitCode.CONFIGURATION: "a setting, credential or permission is wrong",
    ExitCode.UNREACHABLE: "the object store does not answer",
    ExitCode.INTERRUPTED: "interrupted",
}


def exit_code_of(error: KVStoreError) -> ExitCode:
    """The code of a command that `error` ended."""
    if isinstance(error, MisconfiguredError):
        return ExitCode.CONFIGURATION
    if isinstance(error, RetryableError):
        return ExitCode.UNREACHABLE
    return ExitCode.FINDINGS
