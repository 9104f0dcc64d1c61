"""What a test knows of objects without asking a store: whose bytes they have, and how to damage them."""

from __future__ import annotations

import functools
from pathlib import Path

from node_process import Prompt, content
from samples import FORM, name_of

from kvstore.arena import Arena
from kvstore.chunk_writer import ChunkWriter
from kvstore.codecs.registry import decoder
from kvstore.codecs.section_codecs import SectionCodecs
from kvstore.disk.pending import PendingName, verified_header
from kvstore.errors import MissError
from kvstore.keys import ChunkKey

CHUNKS_MAX = 5
WRITERS = "ABC"
WHOLE_PROMPTS = [Prompt(tenant, branch, CHUNKS_MAX) for tenant in ("", "other") for branch in (0, 1)]
PROMPT_OF = {key: prompt for prompt in WHOLE_PROMPTS for key in prompt.chain.keys}
KEYS = {key.hash: key for key in PROMPT_OF}
NAMES = {name_of(key): key for key in KEYS.values()}


def key_of(path: Path) -> ChunkKey:
    return KEYS[bytes.fromhex(path.name.partition(".")[0])]


def do_damage(damage: str, path: Path, other: Path, at: float) -> None:
    """In place, as a file on disk may have two names; so an object's version changes, too."""
    data = path.read_bytes()
    # Of the header and of the sections alike, of which there are fewer bytes.
    place = int(2 * at * FORM.header_bytes if at < 0.5 else len(data) * (0.5 + at / 2))
    if damage == "delete":
        path.unlink()
    elif damage == "swap":
        theirs = other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(data)
    else:
        damaged = {
            "flip": data[:place] + bytes(byte ^ 0x10 for byte in data[place : place + 1]) + data[place + 1 :],
            "cut": data[:place],
            "extend": data + b"x",
            "empty": b"",
        }
        path.write_bytes(damaged[damage])


@functools.cache
def writer_of(key: ChunkKey, data: bytes) -> str | None:
    """Whose bytes a whole object has; None for a damaged one."""
    view = memoryview(data)
    try:
        header = verified_header(PendingName.of(key, FORM.shard), view)
    except MissError:
        return None
    layers = []
    for section, extent in zip(header.sections, header.extents, strict=True):
        stored = view[extent.start : extent.start + section.stored_bytes]
        host = bytearray(FORM.section_bytes)
        codec = header.codec_name(section)
        if codec is None:
            host[:] = stored
        else:
            decoder(codec).decode(stored, memoryview(host))
        layers.append(bytes(host))
    for writer in WRITERS:
        if layers == [content(key, layer, writer) for layer in range(FORM.layers)]:
            return writer
    return "nobody"


@functools.cache
def sealed(key: ChunkKey, writer: str) -> bytes:
    """The object as another engine of the fleet stores it."""
    slot = Arena(FORM.raw_bytes, 1).try_acquire()
    assert slot is not None
    host = bytearray()
    for layer in range(FORM.layers):
        host += content(key, layer, writer) + bytes(FORM.stride - FORM.section_bytes)
    slot.memory[FORM.header_bytes : FORM.raw_bytes] = host
    chunk_writer = ChunkWriter(FORM, SectionCodecs("none", FORM), 1, lambda: None)
    return b"".join(chunk_writer.seal(key, slot, slot, created_s=1))
