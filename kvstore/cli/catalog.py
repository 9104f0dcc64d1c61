"""What lies in a bucket: namespaces, chunk objects, and objects that are neither.

Everything read here may have been written by anyone. Sizes are bounded before bytes are read,
and whatever does not fit is a value that says so, never a crash.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.backends.contract import Backend, ObjectInfo
from kvstore.errors import KVStoreError
from kvstore.keys import (
    ObjectName,
    format_folder,
    namespace_document_name,
    namespace_folder,
    parse_object_name,
)
from kvstore.listing import NAMESPACE_NAME, namespaces

HASH_DIGITS_MIN = 6
CANDIDATES_MAX = 8
_TARGET = re.compile(r"(?P<namespace>[0-9a-f]{1,15}|[0-9a-f]{16}(?:/(?P<hash>[0-9a-f]{0,64}))?)")
_KEY = re.compile(
    r"(?:(?P<namespace>[0-9a-f]{16})/)?(?:[0-9a-f]{2}/)?(?P<hash>[0-9a-f]{2,64})(?P<shard>\.\d+-\d+)?"
)


class NoSuchObjectError(KVStoreError):
    """Nothing, or more than one thing, goes by the name that a person gave."""


@dataclass
class Usage:
    """What one namespace, or all that is outside of any (empty name), takes up."""

    namespace: str
    chunks: int = 0
    stored_bytes: int = 0
    foreign: int = 0
    documented: bool = False


class Target(NamedTuple):
    """What `ls` is to list: namespaces that begin so, or the chunks of one."""

    namespace: str
    hash: str

    @property
    def is_namespace(self) -> bool:
        """Whether it names one namespace in full."""
        return NAMESPACE_NAME.fullmatch(self.namespace) is not None


def parse_target(prefix: str, text: str) -> Target | None:
    """Read what a person gave to `ls`; None when it makes no sense."""
    match = _TARGET.fullmatch(text.removeprefix(format_folder(prefix)).rstrip("/"))
    if match is None:
        return None if text.removeprefix(format_folder(prefix)) else Target("", "")
    return Target(match["namespace"].partition("/")[0], match["hash"] or "")


async def usages(backend: Backend, prefix: str, digits: str) -> AsyncIterator[Usage]:
    """Every namespace that begins with `digits`, in order; last, what belongs to none."""
    folder = format_folder(prefix)
    current, outside = Usage(""), Usage("")
    async for info in backend.list(folder + digits):
        name, slash, _ = info.name[len(folder) :].partition("/")
        if not (slash and NAMESPACE_NAME.fullmatch(name)):
            outside.foreign += 1
            continue
        if name != current.namespace:
            if current.namespace:
                yield current
            current = Usage(name)
        _count(current, prefix, info)
    if current.namespace:
        yield current
    yield outside


def _count(usage: Usage, prefix: str, info: ObjectInfo) -> None:
    if parse_object_name(prefix, info.name) is not None:
        usage.chunks += 1
        usage.stored_bytes += info.object_bytes
    elif info.name == namespace_document_name(prefix, usage.namespace):
        usage.documented = True
    else:
        usage.foreign += 1


async def chunk_objects(
    backend: Backend, prefix: str, target: Target
) -> AsyncIterator[tuple[ObjectInfo, ObjectName | None]]:
    """Objects of one namespace, and what their names say; None for a foreign one."""
    document = namespace_document_name(prefix, target.namespace)
    async for info in backend.list(_narrowed(prefix, target)):
        if info.name != document:
            yield info, parse_object_name(prefix, info.name)


def _narrowed(prefix: str, target: Target) -> str:
    folder, digits = namespace_folder(prefix, target.namespace), target.hash
    return f"{folder}{digits[:2]}/{digits}" if len(digits) > 1 else folder + digits


class KeyPattern(NamedTuple):
    """What `show` is to show, before anyone has looked. `shard` is empty or begins with a dot."""

    namespace: str
    hash: str
    shard: str


def parse_key(text: str) -> KeyPattern | None:
    """Read NAMESPACE/HASH or HASH; None when it is neither or too short to look for."""
    match = _KEY.fullmatch(text)
    if match is None or (match["namespace"] is None and len(match["hash"]) < HASH_DIGITS_MIN):
        return None
    return KeyPattern(match["namespace"] or "", match["hash"], match["shard"] or "")


async def find_object(backend: Backend, prefix: str, key: KeyPattern) -> str:
    """The name of the one chunk object that `key` fits. Raises NoSuchObjectError."""
    found = []
    async for name in _fitting(backend, prefix, key):
        found.append(name)
        if len(found) > CANDIDATES_MAX:
            break
    if len(found) == 1:
        return found[0]
    place = f"under {format_folder(prefix)} in {backend.location}"
    if not found:
        raise NoSuchObjectError(f"no chunk {key.hash}{key.shard} {place}; `kvstore ls` shows what there is")
    more = ", ..." if len(found) > CANDIDATES_MAX else ""
    raise NoSuchObjectError(
        f"several objects {place} fit; give one of these names:\n" + "\n".join(found[:CANDIDATES_MAX]) + more
    )


async def _fitting(backend: Backend, prefix: str, key: KeyPattern) -> AsyncIterator[str]:
    async for namespace in _namespace_names(backend, prefix, key.namespace):
        async for info, name in chunk_objects(backend, prefix, Target(namespace, key.hash)):
            if name is not None and info.name.endswith(key.shard):
                yield info.name


async def _namespace_names(backend: Backend, prefix: str, known: str) -> AsyncIterator[str]:
    """The one that is known, or all of them."""
    if known:
        yield known
        return
    async for found in namespaces(backend, prefix):
        if isinstance(found, str):
            yield found
