"""Chunks without the memory to hold them: objects that differ in their headers and share one body."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from benchmarks.pages import HostPages
from kvstore import Durability, KVLayout, KVStore, Namespace, PrefixChain, load_settings
from kvstore.backends.contract import ABSENT, Absent, ObjectInfo, ReadResult
from kvstore.backends.memory import MemoryBackend, StoredObject
from kvstore.chunk import decode_header, encode_header
from kvstore.keys import object_name
from kvstore.layout import ChunkForm

_ETAG = "1"
_DEADLINE_S = 60.0


class SharedBodyBackend(MemoryBackend):
    """Read-only. Every chunk of the chains that were added is there, whole and valid.

    One chunk is saved by a store, from pages with random bytes; every other object is that one
    with a header of its own key. Reading copies, as it does from any backend.
    """

    def __init__(self, layout: KVLayout, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix
        self._headers: dict[str, bytes] = {}
        self._layout = layout
        form = ChunkForm(layout, layout.whole)
        data = memoryview(_saved_chunk(form))
        self._header = decode_header(data)
        self._body = data[form.header_bytes :]
        self._object_bytes = len(data)

    def add(self, chain: PrefixChain) -> None:
        """Have an object of every key of `chain`."""
        for key in chain.keys:
            header = replace(
                self._header,
                hash=key.hash,
                parent=key.parent,
                depth=key.depth,
                namespace_digest=key.namespace_digest,
            )
            self._headers[object_name(self._prefix, key, self._layout.whole)] = encode_header(header)

    async def read_into(
        self,
        name: str,
        offset: int,
        out: memoryview,
        *,
        if_match: str | None = None,  # noqa: ARG002 an object never changes
    ) -> ReadResult | Literal[Absent.ABSENT]:
        header = self._headers.get(name)
        if header is None:
            return ABSENT
        length = min(len(out), self._object_bytes - offset)
        of_header = max(0, min(length, len(header) - offset))
        out[:of_header] = header[offset : offset + of_header]
        start = offset + of_header - len(header)
        out[of_header:length] = self._body[start : start + length - of_header]
        return ReadResult(length, self._object_bytes, _ETAG)

    async def head(self, name: str) -> ObjectInfo | None:
        return ObjectInfo(name, self._object_bytes, _ETAG, 0.0) if name in self._headers else None


def _saved_chunk(form: ChunkForm) -> bytes:
    objects: dict[str, StoredObject] = {}
    room_bytes = 4 * (form.raw_bytes + 4096)
    settings = load_settings(codec="none", memory_bytes=room_bytes, upload_queue_bytes=room_bytes)
    with KVStore.open(form.layout, settings=settings, backend=MemoryBackend(objects)) as store:
        chain = store.chain(Namespace("body", "r1", form.layout, "none"), range(form.layout.chunk_tokens))
        store.save(chain, range(1), HostPages(form, 1), until=Durability.REMOTE).wait(_DEADLINE_S)
        return objects[object_name(settings.prefix, chain.keys[0], form.shard)].data
