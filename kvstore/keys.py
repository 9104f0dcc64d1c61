"""Prefix-hash keys: which tokens a chunk stands for, and the name of its object.

The chain is SHA-256 with length-framed input, so no two inputs share a byte string:

    h0 = H(tag, namespace digest, tenant salt)
    hi = H(h(i-1), token ids as little-endian u32, extra keys ...)
"""

from __future__ import annotations

import hashlib
import re
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.errors import MisconfiguredError
from kvstore.layout import Shard
from kvstore.namespace import Namespace

FORMAT_FOLDER = "v1"
_ROOT_TAG = b"kvstore.prefix.v1"
_OBJECT_NAME = re.compile(
    r"(?P<namespace>[0-9a-f]{16})/(?P<fan>[0-9a-f]{2})/(?P<hash>[0-9a-f]{64})"
    r"\.(?P<start>0|[1-9][0-9]{0,9})-(?P<stop>[1-9][0-9]{0,9})\Z"
)


class ChunkKey(NamedTuple):
    """Names one chunk and, through the hash chain, everything before it."""

    namespace_digest: bytes
    hash: bytes
    parent: bytes
    depth: int

    def __str__(self) -> str:
        return f"{self.namespace_digest.hex()[:16]}/{self.hash.hex()[:12]}"


@dataclass(frozen=True)
class PrefixChain:
    """The keys of every full chunk of one token sequence, first chunk first.

    Tokens past the last full chunk have no key. Holds no token ids.
    """

    namespace: Namespace
    keys: tuple[ChunkKey, ...]

    @classmethod
    def of(
        cls,
        namespace: Namespace,
        tokens: Sequence[int],
        *,
        tenant_salt: str = "",
        extra_keys: Sequence[Sequence[bytes]] = (),
    ) -> PrefixChain:
        """Hash `tokens` into a chain.

        tenant_salt  tenants with different salts never share a key
        extra_keys   for chunk i, what its KV depends on besides tokens (ids of multimodal
                     inputs, ...); chunks past the end of the sequence have none

        Raises MisconfiguredError for a token id outside 0 .. 2**32-1, a salt that is no text, or
        extra keys that are no bytes.
        """
        growing = GrowingChain(namespace, tenant_salt)
        growing.extend(tokens, extra_keys)
        return growing.chain()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        """How many leading tokens the chain covers."""
        return len(self.keys) * self.namespace.layout.chunk_tokens


class GrowingChain:
    """The chain of a sequence that grows: what was hashed once is not hashed again.

    keys  of the full chunks so far, first chunk first
    """

    def __init__(self, namespace: Namespace, tenant_salt: str = "") -> None:
        self.namespace = namespace
        self.keys: list[ChunkKey] = []
        self._parent = root_hash(namespace, tenant_salt)

    def extend(self, tokens: Sequence[int], extra_keys: Sequence[Sequence[bytes]] = ()) -> None:
        """Hash on with `tokens`, those after the last full chunk; see PrefixChain.of for `extra_keys`.

        Tokens past the last full chunk get no key, and are to come again with those that follow.
        Raises MisconfiguredError, as PrefixChain.of; the chain then ends before the chunk in question.
        """
        step = self.namespace.layout.chunk_tokens
        count = len(tokens) // step
        data = _little_endian_u32(tokens[: count * step])
        for index in range(count):
            extra = extra_keys[index] if index < len(extra_keys) else ()
            try:
                own = _digest((self._parent, data[4 * step * index : 4 * step * (index + 1)], *extra))
            except TypeError:
                raise MisconfiguredError(f"extra_keys[{index}] is not a sequence of bytes") from None
            self.keys.append(ChunkKey(self.namespace.digest, own, self._parent, len(self.keys)))
            self._parent = own

    def chain(self) -> PrefixChain:
        """The keys so far."""
        return PrefixChain(self.namespace, tuple(self.keys))


def root_hash(namespace: Namespace, tenant_salt: str) -> bytes:
    """What the first chunk of every prefix of a tenant has as its parent."""
    return _digest((_ROOT_TAG, namespace.digest, _salt_bytes(tenant_salt)))


def _digest(fields: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.digest()


def _salt_bytes(tenant_salt: str) -> bytes:
    try:
        return tenant_salt.encode()
    except UnicodeEncodeError:
        # Not chained: the original error shows the salt.
        raise MisconfiguredError("the tenant salt is not valid Unicode text; use another one") from None


def _little_endian_u32(tokens: Sequence[int]) -> bytes:
    try:
        # array() would take a byte string for the machine's own form of an array.
        ids = array("I", list(tokens) if isinstance(tokens, bytes | bytearray) else tokens)
    except (OverflowError, TypeError):
        raise MisconfiguredError("a token id is not a whole number from 0 to 2**32-1") from None
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


class ObjectName(NamedTuple):
    """The parts of an object's name that identify a chunk."""

    namespace_name: str
    hash: bytes
    shard: Shard


def namespace_name_of(key: ChunkKey) -> str:
    """The first 16 hex digits of its namespace's digest: what folders are named by."""
    return key.namespace_digest.hex()[:16]


def object_name(prefix: str, key: ChunkKey, shard: Shard) -> str:
    """`<prefix>/v1/<namespace, 16 hex>/<hash, first 2 hex>/<hash hex>.<shard>`."""
    return chunk_name(prefix, ObjectName(namespace_name_of(key), key.hash, shard))


def chunk_name(prefix: str, parts: ObjectName) -> str:
    """The name that has these parts: what `parse_object_name` takes apart."""
    digits = parts.hash.hex()
    return f"{namespace_folder(prefix, parts.namespace_name)}{digits[:2]}/{digits}.{parts.shard}"


def namespace_document_name(prefix: str, namespace_name: str) -> str:
    """Where the namespace says in plain words what it is."""
    return f"{namespace_folder(prefix, namespace_name)}namespace.json"


def namespace_folder(prefix: str, namespace_name: str) -> str:
    """Prefix of every object of a namespace, ending in a slash."""
    return f"{format_folder(prefix)}{namespace_name}/"


def format_folder(prefix: str) -> str:
    """Prefix of everything kvstore keeps in a bucket, ending in a slash."""
    return f"{prefix}/{FORMAT_FOLDER}/" if prefix else f"{FORMAT_FOLDER}/"


def parse_object_name(prefix: str, name: str) -> ObjectName | None:
    """The parts of a chunk object's name, or None for any other object."""
    folder = format_folder(prefix)
    match = _OBJECT_NAME.match(name[len(folder) :]) if name.startswith(folder) else None
    if match is None or match["fan"] != match["hash"][:2] or int(match["start"]) >= int(match["stop"]):
        return None
    return ObjectName(
        match["namespace"], bytes.fromhex(match["hash"]), Shard(int(match["start"]), int(match["stop"]))
    )
