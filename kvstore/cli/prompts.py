"""Files of prompts, as token ids or as text: read, never shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvstore.errors import MisconfiguredError

_TOKEN_MAX = (1 << 32) - 1
_TOKENIZER_FILE = "tokenizer.json"


def token_lists(path: Path) -> Iterator[tuple[int, Sequence[int]]]:
    """Numbers of lines, and the token ids on them. Raises MisconfiguredError that shows none of them."""
    for number, value in _lines(path):
        if not isinstance(value, list) or not all(
            type(each) is int and 0 <= each <= _TOKEN_MAX for each in value
        ):
            raise MisconfiguredError(f"{path}, line {number}: is no list of token ids, such as [1, 529, 28]")
        yield number, value


def tokenized(path: Path, tokenizer: Path) -> Iterator[tuple[int, Sequence[int]]]:
    """Numbers of lines, and the token ids of the prompts on them, special tokens included.

    Raises MisconfiguredError that shows no text.
    """
    encode = _encoder(tokenizer)
    for number, value in _lines(path):
        if not isinstance(value, str):
            raise MisconfiguredError(f"{path}, line {number}: is no text in JSON's quotes")
        yield number, encode(value)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parsed(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no UTF-8"
        raise MisconfiguredError(f"{path} cannot be read: {reason}") from None


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise MisconfiguredError(f"{path}, line {number}: is no JSON; one value a line is expected") from None


def _encoder(path: Path) -> Callable[[str], Sequence[int]]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MisconfiguredError(
            "--prompts needs the library tokenizers: pip install 'kvstore[warm]'; or give --tokens"
        ) from None
    file = path / _TOKENIZER_FILE if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # it raises nothing narrower
        raise MisconfiguredError(
            f"--tokenizer {file}: is no tokenizer of the library tokenizers: {error}"
        ) from None

    def encode(text: str) -> Sequence[int]:
        return list(tokenizer.encode(text).ids)

    return encode
