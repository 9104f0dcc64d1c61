"""Which exact weights an engine serves, as a text for the namespace."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from kvstore.errors import MisconfiguredError

# What decides about KV: weights, and how a model's code reads them.
_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".model", ".py", ".npz"})
# The Hugging Face cache names a file by its content, and a snapshot's folder by its commit.
_CONTENT_NAME = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?\Z")
_REMEDY = "set KVSTORE_WEIGHTS_REVISION to a name that you change whenever the weights change"


def weights_revision(model_config: Any, load_format: str, given: str) -> str:
    """Names the weights that `model_config` has the engine load. Never empty.

    given  KVSTORE_WEIGHTS_REVISION, which is taken as it is

    For a local folder, a digest of its files' names, sizes and times, or content names in a Hugging
    Face cache; for a name on the hub, the commit that was resolved. Raises MisconfiguredError where
    there is neither.
    """
    if given.strip():
        return given.strip()
    if str(load_format) == "dummy":
        raise MisconfiguredError(f"load_format=dummy makes weights up, which nothing names; {_REMEDY}")
    place = str(model_config.model)
    if Path(place).is_dir():
        return folder_digest(Path(place))
    if Path(place).is_file():
        return _digest([_file_line(Path(place), Path(place).name)])
    commit = getattr(model_config.hf_config, "_commit_hash", None)
    if commit:
        return f"commit {commit}"
    raise MisconfiguredError(
        f"model={place!r} is no local folder, and which commit of it was loaded is not known; {_REMEDY}"
    )


def folder_digest(folder: Path) -> str:
    """Names the files below `folder` that make a model, by what the file system says of them."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    if not files:
        raise MisconfiguredError(f"{str(folder)!r} holds no weights that could be named; {_REMEDY}")
    return _digest([_file_line(path, path.relative_to(folder).as_posix()) for path in files])


def _file_line(path: Path, name: str) -> str:
    target = path.resolve().name
    if path.is_symlink() and _CONTENT_NAME.match(target):
        return f"{name} content {target}"
    status = path.stat()
    return f"{name} {status.st_size} bytes of {status.st_mtime_ns}"


def _digest(lines: list[str]) -> str:
    return f"files sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"
