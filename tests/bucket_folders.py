"""Chunks in a bucket that is a folder, for tests that damage them."""

from __future__ import annotations

from pathlib import Path

from kvstore.chunk import ChunkHeader, decode_header

_SECTIONS_FROM = 8192


def chunk_files(folder: Path) -> dict[Path, ChunkHeader]:
    """Every chunk object below a folder: names of theirs end in a shard."""
    files = (path for path in folder.rglob("*.*-*") if path.is_file() and "v1" in path.parts)
    return {path: decode_header(path.read_bytes()) for path in files}


def flip_sections(path: Path) -> None:
    """Damage every layer of a chunk, and nothing of its header."""
    data = bytearray(path.read_bytes())
    # The byte of a float32 that has its sign and most of its exponent.
    for at in range(_SECTIONS_FROM + 3, len(data), 16):
        data[at] ^= 0x81
    path.chmod(0o600)
    path.write_bytes(data)
