"""The options every command takes, and the frame every command runs in."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

from kvstore.cli.exits import ExitCode, exit_code_of
from kvstore.cli.output import Output, printable
from kvstore.errors import KVStoreError
from kvstore.keys import format_folder
from kvstore.listing import NAMESPACE_NAME
from kvstore.masking import without_user

_Own = ParamSpec("_Own")
_CHUNK = re.compile(r"(?P<namespace>[0-9a-f]{16})/(?:[0-9a-f]{2}/)?(?P<hash>[0-9a-f]{64})(?:\.\d+-\d+)?")
_PANEL = "Settings (over the environment, over the file that KVSTORE_CONFIG names)"


@dataclass(frozen=True)
class Call:
    """One call of a command: settings given as flags, for `resolve_settings`, and where to print."""

    flags: Mapping[str, str]
    output: Output


def check_namespace(text: str) -> str:
    """`text`, if it is a namespace as `kvstore ls` has it, or empty."""
    if text and NAMESPACE_NAME.fullmatch(text) is None:
        raise typer.BadParameter(f"{text!r} is no namespace: 16 hex digits, as `kvstore ls` has them")
    return text


def parse_chunk(prefix: str, text: str) -> tuple[str, bytes]:
    """Namespace and hash of the chunk that `text` names in full."""
    match = _CHUNK.fullmatch(text.removeprefix(format_folder(prefix)))
    if match is None:
        raise typer.BadParameter(f"{text!r} is not NAMESPACE/HASH, in 16 and 64 hex digits")
    return match["namespace"], bytes.fromhex(match["hash"])


def node_command(body: Callable[Concatenate[Call, _Own], ExitCode]) -> Callable[..., None]:
    """Frame `body` as a typer command: it gets a `Call`, its own parameters, and returns how it ended.

    A KVStoreError becomes one clear message on stderr and the exit code of its class.
    """

    def command(**arguments: Any) -> None:
        common = {name: arguments.pop(name) for name in _COMMON}
        output = Output(as_json=common.pop("as_json"))
        # Requests that were interrupted may complain when their connection ends.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        try:
            with _heeding_sigterm():
                code = body(Call(_flags(**common), output), **arguments)  # type: ignore[call-arg] # by name
        except KVStoreError as error:
            code = exit_code_of(error)
            _complain(error)
        raise typer.Exit(code)

    own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
    command.__name__ = body.__name__
    command.__doc__ = body.__doc__
    command.__signature__ = inspect.Signature([*own, *_COMMON.values()])  # type: ignore[attr-defined] # PEP 362
    return command


@contextlib.contextmanager
def _heeding_sigterm() -> Iterator[None]:
    """Have SIGTERM, by which schedulers end what they run, do what ctrl-C does: nothing is left half done."""
    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(_signal: int, frame: FrameType | None) -> None:
    # What runs in the background may have been told to ignore SIGINT.
    handler = signal.getsignal(signal.SIGINT)
    (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)


def _flags(  # noqa: PLR0917 called by name alone
    bucket: Annotated[
        str | None,
        typer.Option(metavar="BUCKET", help="S3 bucket, file:///folder or memory://", rich_help_panel=_PANEL),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder inside the bucket", rich_help_panel=_PANEL)
    ] = None,
    endpoint_url: Annotated[
        str | None, typer.Option(metavar="URL", help="S3-compatible server", rich_help_panel=_PANEL)
    ] = None,
    region: Annotated[
        str | None, typer.Option(metavar="REGION", help="AWS region", rich_help_panel=_PANEL)
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other setting; repeatable. `kvstore config` lists them.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line")] = False,  # noqa: ARG001, FBT002 declares the option
) -> dict[str, str]:
    flags = {}
    for assignment in assignments or ():
        name, equals, value = assignment.partition("=")
        if not equals:
            raise typer.BadParameter(f"{assignment!r} is not of the form NAME=VALUE", param_hint="--set")
        flags[name] = value
    named = {"bucket": bucket, "prefix": prefix, "endpoint_url": endpoint_url, "region": region}
    return flags | {name: value for name, value in named.items() if value is not None}


_COMMON = inspect.signature(_flags, eval_str=True).parameters


def _complain(error: KVStoreError) -> None:
    lines = [printable(line) for line in without_user(str(error)).splitlines()]
    sys.stderr.write("kvstore: " + "\n  ".join(lines) + "\n")
