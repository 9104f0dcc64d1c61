"""`kvstore doctor`: runs the checks and prints one line for each, with the fix where one is needed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

import typer

from kvstore.backends.opening import open_backend
from kvstore.cli.checks import CHECKS
from kvstore.cli.examination import Check, Examination, Outcome, Site, Status, passed, refused
from kvstore.cli.exits import ExitCode
from kvstore.cli.options import Call
from kvstore.cli.output import Output, printable
from kvstore.cli.sharing import namespaces_check
from kvstore.engine_adapters.vllm.settings import VLLMSettings
from kvstore.errors import MisconfiguredError
from kvstore.listing import NAMESPACE_NAME
from kvstore.masking import without_user
from kvstore.settings import ResolvedSettings, resolve_settings_of

CHECK_TIMEOUT_S = 10.0
_STYLES = {Status.PASS: "green", Status.WARN: "yellow", Status.FAIL: "bold red", Status.SKIP: "dim"}
_TITLE_CHARACTERS = 26


class Report:
    """Prints outcomes as they come and remembers how the command ends."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._counts: Counter[Status] = Counter()
        self.exit_code = ExitCode.OK

    def add(self, check: str, title: str, outcome: Outcome) -> None:
        """Print one line."""
        self._counts[outcome.status] += 1
        if outcome.status is Status.FAIL and self.exit_code is ExitCode.OK:
            self.exit_code = outcome.exit_code
        row = {"check": check, "status": outcome.status, "detail": outcome.detail, "fix": outcome.fix}
        self._output.record("check", row | dict(outcome.values))
        lines = [printable(line) for line in outcome.detail.splitlines()]
        head = f"{outcome.status.upper():<5} {title:<{_TITLE_CHARACTERS}} "
        margin = " " * len(head)
        for index, line in enumerate(lines):
            self._output.line((margin if index else head) + line, _STYLES[outcome.status], len(head))
        if outcome.fix:
            self._output.line(f"{margin}fix: {printable(outcome.fix)}", indent=len(head))

    def close(self) -> ExitCode:
        """Print the totals; how the command ends."""
        totals: dict[str, object] = {status.value: self._counts[status] for status in Status}
        self._output.record("summary", {**totals, "exit_code": int(self.exit_code)})
        self._output.line("\n" + ", ".join(f"{count} {status}" for status, count in totals.items()))
        return self.exit_code


def examine_store(call: Call, namespace: str = "", timeout_s: float = CHECK_TIMEOUT_S) -> ExitCode:
    """Check settings, then the store they name.

    namespace  the name of one to compare with others of its model, by default all are compared
    """
    if namespace and not NAMESPACE_NAME.fullmatch(namespace):
        raise typer.BadParameter(
            f"{namespace!r} is no name of a namespace: 16 hex digits, as engines log and `kvstore ls` shows",
            param_hint="--namespace",
        )
    report = Report(call.output)
    try:
        resolved = resolve_settings_of(VLLMSettings, call.flags)
    except MisconfiguredError as error:
        report.add("settings", "settings", refused(error))
        return report.close()
    report.add("settings", "settings", passed(_summary(resolved)))
    checks = (*CHECKS, namespaces_check(namespace))
    asyncio.run(_examine(checks, Site(resolved.settings, open_backend), report, call.output, timeout_s))
    return report.close()


async def _examine(
    checks: Iterable[Check], site: Site, report: Report, output: Output, timeout_s: float
) -> None:
    examination = Examination(site, timeout_s)
    try:
        for check in checks:
            with output.progress(f"checking: {check.title}"):
                outcome = await examination.run(check)
            report.add(check.name, check.title, outcome)
    finally:
        remainder = await site.clean_up(timeout_s)
        if remainder is not None:
            report.add("clean_up", "clean up", remainder)


def _summary(resolved: ResolvedSettings[VLLMSettings]) -> str:
    origins = Counter(resolved.origins.values())
    counts = ", ".join(f"{count} by {origin}" for origin, count in sorted(origins.items()))
    bucket = without_user(resolved.settings.bucket)
    return f"bucket {bucket}, prefix {resolved.settings.prefix or '(none)'}; {counts}"
