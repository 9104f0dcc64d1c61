"""The namespaces of a bucket: which there are, and what their documents say.

Anyone may have written what is read here: it is bounded before it is read, and doubted after.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import NamedTuple

from kvstore.backends.contract import ABSENT, Backend, ObjectInfo
from kvstore.keys import format_folder, namespace_document_name
from kvstore.namespace import Namespace

DOCUMENT_BYTES_MAX = 64 * 1024
NAMESPACE_NAME = re.compile(r"[0-9a-f]{16}")


async def namespaces(backend: Backend, prefix: str) -> AsyncIterator[str | ObjectInfo]:
    """Names of all namespaces, and between them, in order, objects that are in none.

    Leaps over the objects of namespaces: about one request each.
    """
    folder = format_folder(prefix)
    after: str | None = ""
    while after is not None:
        start_after, after = after, None
        async for info in backend.list(folder, start_after=start_after):
            name, slash, _ = info.name[len(folder) :].partition("/")
            if slash and NAMESPACE_NAME.fullmatch(name):
                yield name
                # "0" is the character behind "/".
                after = f"{folder}{name}0"
                break
            yield info


class Description(NamedTuple):
    """What namespace.json says; without a namespace, `fault` says why it cannot be believed."""

    namespace: Namespace | None
    fault: str = ""


NO_DOCUMENT = Description(None, "no namespace.json")


async def describe(backend: Backend, prefix: str, namespace: str) -> Description:
    """Read namespace.json and compare it with the digest its folder is named by."""
    data = bytearray(DOCUMENT_BYTES_MAX)
    answer = await backend.read_into(namespace_document_name(prefix, namespace), 0, memoryview(data))
    if answer is ABSENT:
        return NO_DOCUMENT
    if answer.object_bytes > DOCUMENT_BYTES_MAX:
        return Description(None, f"damaged: namespace.json has {answer.object_bytes} bytes")
    document = bytes(data[: answer.length])
    found = Namespace.from_document(document)
    if found is None:
        return Description(None, "damaged: namespace.json is not what kvstore writes")
    if found.name != namespace:
        return Description(None, "damaged: namespace.json describes another namespace")
    return Description(found)
