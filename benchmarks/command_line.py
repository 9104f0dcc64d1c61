"""The command line of a benchmark, and what `make bench NAME=x ARGS=--help` says of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and tells defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, False, argparse.SUPPRESS, []):
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        return f"{action.help} (default: {shown})"


def parser_of(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for the options that people give to make as ARGS."""
    usage = f"{prog} [ARGS='OPTION...']"
    return argparse.ArgumentParser(
        prog=prog, usage=usage, description=description, formatter_class=_Help, allow_abbrev=False
    )


def add_rounds(parser: argparse.ArgumentParser, default: int) -> None:
    """The option that every benchmark of several rounds has."""
    add_number(parser, "--rounds", default, "how often each case is measured; figures are medians")


def add_number(parser: argparse.ArgumentParser, option: str, default: int, text: str, least: int = 1) -> None:
    """An option that takes one whole number."""
    parser.add_argument(option, type=_at_least(least), metavar="N", default=default, help=text)


def add_numbers(
    parser: argparse.ArgumentParser, option: str, default: Sequence[int] | None, text: str
) -> None:
    """An option that takes some whole numbers."""
    parser.add_argument(option, type=_at_least(1), metavar="N", nargs="+", default=default, help=text)


def _at_least(least: int) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return number

    return parsed
